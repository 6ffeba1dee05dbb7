"""Resampling of position embeddings."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast


def resample_positions(
    table: Tensor,
    grid: tuple[int, int],
    *,
    offset: float = 0.1,
    mode: str = "bicubic",
    antialias: bool = False,
) -> Tensor:
    """Resamples a position embedding for another grid: (h0, w0, D) -> (h, w, D).

    Args:
        table: the trained position embedding.
        grid: rows and columns of the result.
        offset: added to the grid before dividing by the table's size, which gives the sampling scale.
            DINO and the segmentation forks of CLIP use 0.1 (which avoids rounding down by accident, and
            shifts the samples slightly); 0 samples the exact grid (GEM, CLIP Surgery).
        mode: "bicubic" or "bilinear" (CLIP Surgery).
        antialias: low-pass filter when downsampling (GEM); needs `offset` 0.
    """
    source = upcast(table).permute(2, 0, 1)[None]  # (1, D, h0, w0)
    if offset:
        scale = [(n + offset) / n0 for n, n0 in zip(grid, table.shape[:2], strict=True)]
        out = F.interpolate(source, scale_factor=scale, mode=mode, align_corners=False)
    else:
        out = F.interpolate(source, grid, mode=mode, align_corners=False, antialias=antialias)
    return out[0].permute(1, 2, 0).to(table.dtype)


def cropped_positions(
    table: Tensor, grid: tuple[int, int], *, align_corners: bool = False
) -> Tensor:
    """Resamples a position embedding to another grid, as in C-RADIO: (h0, w0, D) -> (h, w, D).

    The table is resized bilinearly to a square with the longer side of the grid, and cropped from the
    top left, so that the spacing of patches is the same in both directions.

    Args:
        table: the trained table.
        grid: rows and columns wanted.
        align_corners: whether the corners of both tables lie on each other, and not their outer edges.
    """
    side = max(grid)
    source = upcast(table).permute(2, 0, 1)[None]  # (1, D, h0, w0)
    out = F.interpolate(source, (side, side), mode="bilinear", align_corners=align_corners)
    return out[0, :, : grid[0], : grid[1]].permute(1, 2, 0).to(table.dtype)
