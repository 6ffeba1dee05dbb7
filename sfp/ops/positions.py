"""Resampling of position embeddings: `(table (h0, w0, D), grid, *, knobs) -> table (h, w, D)`."""

from __future__ import annotations

from sfp.functional.grid import resample_positions
from sfp.registry import op

op("positions")(resample_positions)
