"""Point prompts for mask proposers: `(trace, *, knobs) -> (P, n, 2) of each image`, in 0..1."""

from __future__ import annotations

import torch
from torch import Tensor

from sfp.functional.precision import upcast
from sfp.registry import op
from sfp.trace import Trace


@op("points")
def grid_points(trace: Trace, *, side: int = 16) -> list[Tensor]:
    """The same point prompts for every image, a regular grid: (side * side, 1, 2) each.

    SAM's way to segment everything, with 32 points a side; x and y in 0..1.

    Args:
        side: points in a row and in a column.
    """
    at = torch.arange(side, device=trace.image.device, dtype=upcast(trace.image).dtype)
    at = (at + 0.5) / side
    points = torch.cartesian_prod(at, at).flip(1)[:, None]  # rows first
    return [points for _ in trace.image]
