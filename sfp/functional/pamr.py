"""Pixel-adaptive mask refinement (Araslanov & Roth, CVPR 2020, arXiv:2005.08104)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.room import check_room
from sfp.functional.windows import LogitSheet

CHUNK = 2**18  # number of mask pixels refined at once
Unit: TypeAlias = Literal["deviation", "mean"]


@dataclass(frozen=True)
class Refinement:
    """Applies `pamr` to an image's merged logits, at full size.

    Attributes:
        image: normalised, (3, H, W), of any size.
        steps, dilations, unit: as in `pamr`.
    """

    image: Tensor
    steps: int
    dilations: tuple[int, ...]
    unit: Unit = "deviation"

    def __call__(self, sheet: LogitSheet) -> Callable[[int, int], Tensor]:
        """Returns rows (Q, stop - start, W) of the refined logits, which are all computed first.

        Raises:
            RoomError: if they do not fit into memory.
        """
        (height, width), queries = sheet.size, sheet.tiles.shape[-1]
        # per neighbour two times three differences and a weight; logits before and after
        numbers = height * width * (56 * len(self.dilations) + 2 * queries)
        what = f"PAMR of {height} x {width} pixels and {queries} queries"
        check_room(numbers, sheet.tiles.device, what, "use a smaller image, or pamr_steps=0")
        guide = F.interpolate(self.image[None], sheet.size, mode="bilinear", align_corners=False)
        logits = sheet.rows(0, sheet.size[0])[None]
        refined = pamr(guide, logits, steps=self.steps, dilations=self.dilations, unit=self.unit)[0]
        return lambda start, stop: refined[:, start:stop]


def pamr(
    image: Tensor,
    masks: Tensor,
    *,
    steps: int = 10,
    dilations: Sequence[int] = (8, 16),
    unit: Unit = "deviation",
) -> Tensor:
    """Diffuses masks between pixels with similar colours.

    Each pixel repeatedly becomes the mean of its eight neighbours at several distances, weighted by the
    softmax over neighbours of the channel mean of -|x - x_n| / (0.1 std), std over the neighbourhood.

    Args:
        image: (B, 3, H, W), normalised.
        masks: (B, K, h, w); resized to the image first (corners aligned).
        steps: number of iterations.
        dilations: distances of the neighbours in pixels.
        unit: unit of colour differences: a tenth of their "deviation" (PAMR), or the "mean" of their
            absolute values over the neighbours (S2C2Seg).

    Returns:
        (B, K, H, W).
    """
    size = image.shape[-2:]
    masks = F.interpolate(masks, size, mode="bilinear", align_corners=True)
    weights = (
        _closeness(image, dilations, unit).softmax(1)[:, :, None].unbind(1)
    )  # (B, 1, H, W) each
    refined = []
    # a few at a time, so that they and their neighbours stay in the cache
    for part in masks.split(max(CHUNK // image[:, 0].numel(), 1), dim=1):
        for _ in range(steps):
            total = torch.zeros_like(part)
            for neighbour, weight in zip(_neighbours(part, dilations), weights, strict=True):
                total.addcmul_(neighbour, weight)
            part = total
        refined.append(part)
    return torch.cat(refined, dim=1)


def _closeness(image: Tensor, dilations: Sequence[int], unit: Unit) -> Tensor:
    """Similarity in colour to the neighbours, (B, 8 * dilations, H, W), at most 0.

    The deviation is over the neighbours and, once for each distance, the pixel itself.
    """
    apart = torch.stack([near - image for near in _neighbours(image, dilations)], 1)
    if unit == "mean":
        size = apart.abs_()
        return (size / (-1e-8 - size.mean(1, keepdim=True))).mean(2)
    itself = len(dilations)  # as often is the difference 0
    count = apart.shape[1] + itself
    mean = apart.sum(1, keepdim=True) / count  # (B, 1, 3, H, W)
    squares = (apart - mean).square_().sum(1, keepdim=True) + itself * mean.square()
    std = (squares / (count - 1)).sqrt()  # torch.std is ten times slower along this axis
    return (apart.abs_() / (-1e-8 - 0.1 * std)).mean(2)


def _neighbours(x: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """The eight neighbours of every pixel at each distance, as views with the shape of `x`."""
    height, width = x.shape[-2:]
    reach = max(dilations)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    for d in dilations:
        offsets = itertools.product((-d, 0, d), repeat=2)
        for y, z in offsets:
            if (y, z) != (0, 0):
                top, left = reach + y, reach + z
                yield padded[..., top : top + height, left : left + width]
