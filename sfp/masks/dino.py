"""Masks from the patches of a DINO, or of any vision transformer of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.model import CLIP
from sfp.functional.masks import MaskSheet, same_area
from sfp.functional.windows import interpolation
from sfp.guides.transformers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    TransformersGuide,
)
from sfp.registry import MASKS, suggest


class ReadsPatches(nn.Module):
    """A mask proposer that uses the patches of a frozen encoder.

    Args:
        model, mean, std, image_mean, image_std: as in `TransformersGuide`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        image_mean: Sequence[float] | None,
        image_std: Sequence[float] | None,
    ) -> None:
        super().__init__()
        self.guide = TransformersGuide(
            model=model, mean=mean, std=std, image_mean=image_mean, image_std=image_std
        )

    def follow(self, clip: CLIP) -> None:
        """Expects images normalised for `clip`, unless their normalisation was given."""
        self.guide.follow(clip)


@MASKS.register_module(name="dino")
class DinoMasks(ReadsPatches):
    """One mask for each prompt: the patches related to those under its points.

    Args:
        model: as in `TransformersGuide`.
        by: "similarity": patches whose cosine with the prompt's is more than `centre` times the mean
            cosine of all pairs (ProxyCLIP's criterion for attention);
            "attention": the smallest set of patches that holds a share `mass` of the prompt's attention
            in the last block (as in DINO's paper, there for the class token).
        centre: as above; 1.2 in ProxyCLIP.
        mass: as above; 0.6 in DINO.
        side: the image is resized to the area of a square with this side in pixels.
        mean, std: the model's normalisation, RGB in 0..1.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights, for most OpenAI's.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        by: Literal["similarity", "attention"] = "similarity",
        centre: float = 1.2,
        mass: float = 0.6,
        side: int = 336,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if by not in ("similarity", "attention"):
            raise ValueError(f"dino: unknown by={by!r}{suggest(by, ('similarity', 'attention'))}")
        super().__init__(model, mean, std, image_mean, image_std)
        self.by = by
        self.centre = centre
        self.mass = mass
        self.side = side

    @torch.no_grad()
    def forward(self, image: Tensor, points: Tensor, size: tuple[int, int]) -> MaskSheet:
        """Mask logits of an image (3, h, w) for points (P, n, 2), to be rendered at a size.

        For a prompt with several points, their maps are averaged.
        """
        pixels = same_area(image.float(), self.side, self.guide.patch[0])[None]
        if self.by == "similarity":
            tokens = self.guide(pixels)
            unit = F.normalize(tokens.data[0].float(), dim=1)  # (N, D)
            relations, grid = unit @ unit.T, tokens.grid
            maps = _at(relations, points, grid) - self.centre * relations.mean()
        else:
            weights, grid = self.guide.attention(pixels)
            maps = above_mass(_at(weights[0], points, grid), self.mass)
        rows, columns = (interpolation(c, s, maps) for c, s in zip(grid, size, strict=True))
        return MaskSheet(maps.unflatten(1, grid), rows, columns)


def _at(relations: Tensor, points: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows of (N, N) at the patches under points (P, n, 2), the mean of each prompt's: (P, N)."""
    height, width = grid
    x = (points[..., 0] * width).long().clamp(0, width - 1)
    y = (points[..., 1] * height).long().clamp(0, height - 1)
    return relations[y * width + x].mean(1)


def above_mass(weights: Tensor, mass: float) -> Tensor:
    """Weights (P, N) less a threshold: positive for the fewest that hold a share `mass` of the sum.

    The threshold is half way between the last weight that is needed and the next.
    """
    ordered = weights.sort(1, descending=True).values
    held = ordered.cumsum(1) / ordered.sum(1, keepdim=True)
    needed = (held < mass).sum(1, keepdim=True).clamp_max(weights.shape[1] - 1)
    last = ordered.gather(1, needed)
    following = F.pad(ordered, (0, 1)).gather(1, needed + 1)
    return weights - (last + following) / 2
