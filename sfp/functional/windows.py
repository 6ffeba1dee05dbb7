"""Sliding windows, and their logits merged and upsampled by two small matrix products.

Every step from a window's patch logits to the final image is linear, and acts on rows and columns
separately: upsample to the window, place it, divide by how many windows cover a pixel (a product of a
row count and a column count, because the windows form a grid), resize to the original image. So the
whole chain is `rows @ tiles @ columns.T` with two matrices that depend on sizes only. No
full-resolution window, no accumulator, and any slab of the result can be had alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last is shifted inside, as mmseg does.

    Raises:
        ValueError: if the stride would leave pixels uncovered.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"stride {stride} must be between 1 and the crop, {crop} pixels")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def interpolation(source: int, target: int) -> Tensor:
    """Bilinear resampling along one side (`align_corners=False`) as a matrix, (target, source)."""
    eye = torch.eye(source, dtype=torch.float64)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].T


def merge_matrix(starts: list[int], window: int, cells: int, length: int, target: int) -> Tensor:
    """One side of the chain from patch logits to the final image, (target, len(starts) * cells).

    Args:
        starts: first pixel of each window.
        window: pixels of a window.
        cells: patches of a window.
        length: pixels of the network's input.
        target: pixels of the final image.
    """
    up = interpolation(cells, window)
    placed = torch.zeros(length, len(starts), cells, dtype=torch.float64)
    covered = torch.zeros(length, 1, dtype=torch.float64)
    for i, start in enumerate(starts):
        placed[start : start + window, i] = up
        covered[start : start + window] += 1
    merged = placed.flatten(1) / covered  # (length, windows * cells)
    return interpolation(length, target) @ merged
