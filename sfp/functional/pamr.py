"""Pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020, arXiv:2005.08104)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pamr(
    image: Tensor, masks: Tensor, *, steps: int = 10, dilations: Sequence[int] = (8, 16)
) -> Tensor:
    """Lets masks flow along similar colours.

    Each pixel repeatedly becomes the mean of its eight neighbours at several distances, weighted by
    softmax over neighbours of the channel mean of -|x - x_n| / (0.1 std), std over the neighbourhood.

    Args:
        image: (B, 3, H, W), normalised.
        masks: (B, K, h, w); resized to the image first (corners aligned).
        steps: repetitions.
        dilations: distances of the neighbours, in pixels.

    Returns:
        (B, K, H, W).
    """
    size = image.shape[-2:]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=True)
    around = _neighbours(image, dilations)  # (B, 3, 8 * dilations, H, W)
    with_self = torch.cat([around, image[:, :, None].expand_as(around[:, :, : len(dilations)])], 2)
    std = with_self.std(2, keepdim=True)
    closeness = -((around - image[:, :, None]).abs() / (1e-8 + 0.1 * std)).mean(1, keepdim=True)
    weights = closeness.softmax(2)  # (B, 1, 8 * dilations, H, W)
    refined = []
    for mask in masks.split(1, dim=1):  # one at a time: the neighbourhoods of all would not fit
        for _ in range(steps):
            mask = (_neighbours(mask, dilations) * weights).sum(2)
        refined.append(mask)
    return torch.cat(refined, dim=1)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Tensor:
    """The eight neighbours of every pixel at each distance, (B, C, 8 * dilations, H, W)."""
    height, width = x.shape[-2:]
    parts = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode="replicate")
        corners = itertools.product((0, d, 2 * d), repeat=2)
        parts += [
            padded[..., y : y + height, z : z + width] for y, z in corners if (y, z) != (d, d)
        ]
    return torch.stack(parts, dim=2)
