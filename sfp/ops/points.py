"""Point prompts for mask proposers: `(trace, *, knobs) -> (P, n, 2)` per image, from 0 to 1."""

from __future__ import annotations

import torch
from torch import Tensor

from sfp.functional.precision import upcast
from sfp.registry import op
from sfp.trace import Trace


@op("points")
def grid_points(trace: Trace, *, side: int = 16) -> list[Tensor]:
    """A regular grid of point prompts, the same for every image: (side * side, 1, 2) each.

    SAM's automatic mode uses 32 points per side. x and y are from 0 to 1.

    Args:
        side: points in a row and in a column.
    """
    at = torch.arange(side, device=trace.image.device, dtype=upcast(trace.image).dtype)
    at = (at + 0.5) / side
    points = torch.cartesian_prod(at, at).flip(1)[:, None]  # rows first
    return [points for _ in trace.image]
