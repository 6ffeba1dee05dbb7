"""A first segmentation turned into an affinity of patches (ResCLIP's semantic feedback)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.grid import segment_steps


def patch_modes(labels: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The most frequent label of each patch, the smallest of equals: (B, H, W) -> (B, N) int64."""
    cells = labels[:, : grid[0] * patch, : grid[1] * patch]
    cells = cells.unflatten(2, (grid[1], patch)).unflatten(1, (grid[0], patch))
    cells = cells.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, pixels)
    classes = int(labels.max()) + 1
    counts = torch.zeros(*cells.shape[:2], classes, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(2, cells, torch.ones_like(cells))
    return counts.argmax(-1)


def feedback_mask(labels: Tensor, grid: tuple[int, int], std: float) -> Tensor:
    """How strongly patches of the same label belong together, (B, N) -> (B, N, N) in 0..1.

    1 for patches of one label, times exp(-Chebyshev distance / the grid's largest) where the straight
    segment between them leaves the label; each row blurred by a Gaussian over the patch numbers (no
    padding), divided by its sum, and all by the image's largest entry.

    Args:
        labels: of the patches.
        grid: rows and columns of patches.
        std: of the Gaussian, in patches.
    """
    steps, length = (x.to(labels.device) for x in segment_steps(grid))
    same = labels[:, :, None] == labels[:, None]  # (B, N, N)
    straight = same
    for step in steps:
        straight = straight & (labels[:, step] == labels[:, :, None])
    decay = torch.exp(-length.float() / max(max(grid) - 1, 1))
    mask = torch.where(straight, 1.0, decay) * same  # (B, N, N)
    number = torch.arange(len(length), device=labels.device)
    blur = torch.exp(-(number[:, None] - number).square() / (2 * std**2))
    mask = F.normalize(mask @ blur, p=1, dim=-1)
    return mask / mask.amax((-2, -1), keepdim=True)
