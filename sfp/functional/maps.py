"""Similarity maps as heat maps and as point prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def min_max(maps: Tensor) -> Tensor:
    """Each map (..., h, w) scaled to 0..1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low)


def prompt_points(
    similarity: Tensor, size: tuple[int, int], *, threshold: float = 0.8, shrink: int = 2
) -> tuple[Tensor, Tensor]:
    """Point prompts for an interactive segmentor (CLIP Surgery with SAM).

    Cells of the shrunk map above `threshold` of its range are the object, in rising order; as many of
    the lowest cells are not. At most half of the cells are taken for each.

    Args:
        similarity: of one class, (h, w).
        size: rows and columns of the image that the points are for.
        threshold, shrink: as above.

    Returns:
        (2n, 2) integer x and y of cell centres, and (2n,) labels, 1 for the object.
    """
    grid = [max(n // shrink, 1) for n in similarity.shape]
    cells = F.interpolate(similarity[None, None], grid, mode="bilinear", align_corners=False)
    order = cells.flatten().argsort()
    n = min(int((min_max(cells) >= threshold).sum()), len(order) // 2)
    chosen = torch.cat([order[len(order) - n :], order[:n]])
    at = torch.stack([chosen % grid[1], chosen // grid[1]], dim=-1)  # (2n, 2) as x, y
    scale = torch.tensor([size[1] / grid[1], size[0] / grid[0]], device=at.device)
    points = ((at + 0.5) * scale).long()
    labels = (torch.arange(2 * n, device=at.device) < n).long()
    return points, labels
