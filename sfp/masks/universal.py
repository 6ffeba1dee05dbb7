"""Masks of networks that segment images without prompts: Mask2Former, MaskFormer and EoMT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.functional.masks import MaskSheet
from sfp.functional.windows import from_square, interpolation
from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.numerics import finite
from sfp.registry import MASKS

KINDS = {"mask2former": False, "maskformer": False, "eomt": True, "eomt_dinov3": True}
"""Models by `model_type`, and whether their input is a square of fixed size."""
MULTIPLE = 32  # the sides of Mask2Former's input are multiples of this


@MASKS.register_module(name="universal")
class UniversalMasks(FrozenModel):
    """Masks of a frozen Mask2Former (Cheng et al., CVPR 2022), MaskFormer or EoMT (CVPR 2025).

    For each query the network predicts a mask and probabilities of its training classes. Masks are used
    if their best class is one of those, with a probability above `min_score`. The class names are not
    used, but the network was trained on masks with class names; say so beside results.

    Images for Mask2Former are resized to multiples of 32, those for EoMT are padded to squares with
    black.

    Args:
        model: a name on the Hugging Face hub, loaded with `AutoModelForUniversalSegmentation`, e.g.
            "facebook/mask2former-swin-large-coco-panoptic" or "tue-mps/coco_panoptic_eomt_large_640",
            or a folder; or such a model.
        min_score: masks are used if their probability is larger; CorrCLIP uses 0.5.
        short_side, long_side: images are resized to this short side in pixels, or to this long side if
            it would be longer; models with square input use their own size instead.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
        ValueError: if the model is of another type.
    """

    needs_points = False

    def __init__(
        self,
        *,
        model: str | nn.Module,
        min_score: float = 0.5,
        short_side: int = 800,
        long_side: int = 1333,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = pretrained(model, "AutoModelForUniversalSegmentation", "sam")
        super().__init__(model, Renormalise(image_mean=image_mean, image_std=image_std))
        kind = getattr(getattr(self.model, "config", None), "model_type", type(model).__name__)
        if kind not in KINDS:
            raise ValueError(
                f"mask proposer 'universal': model of type {kind!r}; valid: {', '.join(KINDS)}"
            )
        self.side: int | None = None
        if KINDS[kind]:
            size: int | Sequence[int] = self.model.config.image_size
            self.side = size if isinstance(size, int) else max(size)
        self.min_score = min_score
        self.short_side = short_side
        self.long_side = long_side

    def inner(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns to which an image of that size is resized."""
        short, long = (self.side or self.short_side), (self.side or self.long_side)
        scale = min(short / min(height, width), long / max(height, width))
        sides = [max(int(length * scale + 0.5), 1) for length in (height, width)]
        if self.side is None:
            sides = [-(-length // MULTIPLE) * MULTIPLE for length in sides]
        return sides[0], sides[1]

    @torch.no_grad()
    def forward(self, image: Tensor, points: Tensor, size: tuple[int, int]) -> MaskSheet:
        """Mask logits of an image (3, h, w), to be rendered at a size, with their probabilities.

        Args:
            image: normalised for CLIP.
            points: not used.
            size: rows and columns.

        Raises:
            FloatingPointError: if the model gives NaN or infinite values.
        """
        inner = self.inner(image.shape[-2], image.shape[-1])
        pixels = self.resized(image[None], inner)
        if self.side is not None:
            black = self.renormalise.black.to(pixels)[:, None, None]
            filled = (0, self.side - inner[1], 0, self.side - inner[0])
            pixels = F.pad(pixels - black, filled) + black
        dtype = next(self.model.parameters()).dtype
        out = self.model(pixel_values=pixels.to(dtype))
        maps = out.masks_queries_logits[0].float()  # (Q, s, t)
        scores = out.class_queries_logits[0].float().softmax(-1)  # (Q, L + 1), the last for none
        if not (finite(maps) and finite(scores)):
            raise FloatingPointError(
                f"the model that proposes masks gives NaN or infinite values in {dtype}: "
                "precision='fp32' of the segmentor (or 'bf16') may avoid them"
            )
        best, label = scores.max(-1)
        kept = (label < scores.shape[1] - 1) & (best > self.min_score)
        maps, best = maps[kept], best[kept]
        rows, columns = (
            interpolation(maps.shape[i - 2], size[i], maps)
            if self.side is None
            else from_square(maps.shape[i - 2], self.side, inner[i], size[i], maps)
            for i in range(2)
        )
        return MaskSheet(maps, rows, columns, best)
