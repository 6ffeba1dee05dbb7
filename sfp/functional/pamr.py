"""Pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020, arXiv:2005.08104)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

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
    around = torch.stack(list(_neighbours(image, dilations)), 2)  # (B, 3, 8 * dilations, H, W)
    with_self = torch.cat([around, image[:, :, None].expand_as(around[:, :, : len(dilations)])], 2)
    std = with_self.std(2, keepdim=True)
    closeness = -((around - image[:, :, None]).abs() / (1e-8 + 0.1 * std)).mean(1)
    weights = closeness.softmax(1).unbind(1)  # (B, H, W) for each neighbour
    refined = []
    for mask in masks.unbind(1):  # one at a time: it stays in the cache, and so do its neighbours
        for _ in range(steps):
            total = torch.zeros_like(mask)
            for neighbour, weight in zip(_neighbours(mask, dilations), weights, strict=True):
                total.addcmul_(neighbour, weight)
            mask = total
        refined.append(mask)
    return torch.stack(refined, dim=1)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The eight neighbours of every pixel at each distance, views of the shape of `x`."""
    height, width = x.shape[-2:]
    reach = max(dilations)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    for d in dilations:
        offsets = itertools.product((-d, 0, d), repeat=2)
        for y, z in offsets:
            if (y, z) != (0, 0):
                top, left = reach + y, reach + z
                yield padded[..., top : top + height, left : left + width]
