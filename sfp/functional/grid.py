"""Position tables on other grids, and straight lines on one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.tokens import upcast


def resample_positions(
    table: Tensor,
    grid: tuple[int, int],
    *,
    offset: float = 0.1,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """A position table on another grid: (h0, w0, D) -> (h, w, D).

    Args:
        table: the trained table.
        grid: rows and columns wanted.
        offset: added to the grid before it is divided by the table's size to give the sampling
            scale. 0.1 is what DINO and the segmentation forks of CLIP do (it guards against the
            floor of a rounding error, and shifts the samples slightly); 0 samples the exact grid
            (GEM, CLIP Surgery).
        mode: "bicubic" or "bilinear" (CLIP Surgery).
        antialias: low-pass when shrinking (GEM); needs `offset` 0.
    """
    source = upcast(table).permute(2, 0, 1)[None]  # (1, D, h0, w0)
    if offset:
        scale = [(n + offset) / n0 for n, n0 in zip(grid, table.shape[:2], strict=True)]
        out = F.interpolate(source, scale_factor=scale, mode=mode, align_corners=False)
    else:
        out = F.interpolate(source, grid, mode=mode, align_corners=False, antialias=antialias)
    return out[0].permute(1, 2, 0).to(table.dtype)


def segment_steps(grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The patches on the straight segment between any two patches of a grid.

    The segment from i to j is sampled once per row or column, whichever it crosses more of, and each
    sample belongs to the nearest patch; that of j and i is the same.

    Returns:
        (steps, N, N) int64 patch numbers, segments shorter than `steps` staying on their end, and the
        (N, N) Chebyshev distances.
    """
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    cols = torch.arange(grid[1]).repeat(grid[0])
    length = torch.maximum(*((x[:, None] - x).abs() for x in (rows, cols)))  # (N, N)
    double = 2 * length.clamp_min(1)
    steps = []
    for step in range(max(grid)):
        walked = torch.minimum(torch.tensor(step), length)
        # in integers, because floats would round the two directions differently
        row, col = (
            (2 * (x[:, None] * (double // 2) + walked * (x - x[:, None])) + double // 2) // double
            for x in (rows, cols)
        )
        steps.append(row * grid[1] + col)
    return torch.stack(steps), length
