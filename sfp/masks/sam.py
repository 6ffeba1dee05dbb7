"""Masks from SAM and SAM 2 of Hugging Face's `transformers`, prompted with points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.functional.masks import MaskSheet
from sfp.functional.windows import interpolation
from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.numerics import finite
from sfp.registry import MASKS

KINDS = {"sam": False, "sam2": True, "sam2_video": True}  # whether images are stretched to a square


class PromptedSam(FrozenModel):
    """A frozen SAM (Kirillov et al., 2023) or SAM 2 (Ravi et al., 2024) that is given prompts.

    Preprocessing is written in torch and as in the releases: bilinear with antialiasing; SAM keeps the
    shape, the longer side becomes 1024 and zeros fill the square; SAM 2 stretches to the square.

    Args:
        model: a name on the Hugging Face hub or a folder, loaded with `AutoModelForMaskGeneration`; or
            a `SamModel` or `Sam2Model`.
        prompt_batch: most prompts that are decoded at once.
        image_mean, image_std: the normalisation of the images that come in, RGB in 0..255; by default
            that of the segmentor's weights, for most OpenAI's.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
        ValueError: if the model is neither.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        prompt_batch: int = 64,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = pretrained(model, "AutoModelForMaskGeneration", "sam")
        super().__init__(model, Renormalise(image_mean=image_mean, image_std=image_std))
        kind = getattr(getattr(self.model, "config", None), "model_type", type(model).__name__)
        if kind not in KINDS:
            raise ValueError(f"mask proposer 'sam': model of type {kind!r}; valid: sam, sam2")
        self.stretch = KINDS[kind]
        self.prompt_batch = prompt_batch

    @property
    def side(self) -> int:
        """Of the square that the model sees, in pixels."""
        return self.model.config.prompt_encoder_config.image_size

    def inner(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the square that an image of that size takes."""
        if self.stretch:
            return self.side, self.side
        scale = self.side / max(height, width)
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def embed(self, image: Tensor) -> Any:
        """What the decoder sees of an image (3, h, w)."""
        inner = self.inner(image.shape[-2], image.shape[-1])
        pixels = F.interpolate(
            self.renormalise(image)[None],
            inner,
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        pixels = F.pad(pixels, (0, self.side - inner[1], 0, self.side - inner[0]))
        return self.model.get_image_embeddings(pixels.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.model.parameters()).dtype

    def decode(self, embeddings: Any, **prompts: Any) -> tuple[Tensor, Tensor]:
        """Mask logits (P, n, s, s) and predicted IoU (P, n), n masks for each of P prompts.

        Args:
            embeddings: from `embed`.
            **prompts: arguments of the model.

        Raises:
            FloatingPointError: if the model gives NaN or infinite values.
        """
        out = self.model(image_embeddings=embeddings, **prompts)
        masks, iou = out.pred_masks[0].float(), out.iou_scores[0].float()
        if not (finite(masks) and finite(iou)):
            raise FloatingPointError(
                f"the SAM of the settings gives NaN or infinite values in {self.dtype}: "
                "precision='fp32' of the segmentor (or 'bf16') may avoid them"
            )
        return masks, iou

    def sheet(
        self,
        masks: Tensor,
        inner: tuple[int, int],
        size: tuple[int, int],
        scores: Tensor | None = None,
    ) -> MaskSheet:
        """Masks (M, s, s) of the square, to be rendered at the size of an image.

        Args:
            masks: logits.
            inner: rows and columns of the square that the image takes.
            size: rows and columns.
            scores: as in `MaskSheet`.
        """
        matrices = [
            _enlarge(masks.shape[i - 2], self.side, inner[i], size[i], masks, direct=self.stretch)
            for i in range(2)
        ]
        return MaskSheet(masks, matrices[0], matrices[1], scores)


@MASKS.register_module(name="sam")
class SamMasks(PromptedSam):
    """One mask of a SAM or SAM 2 for each prompt.

    Of the three masks that the model offers for an ambiguous prompt, the one that it predicts the
    highest IoU for.

    Args:
        model: as in `PromptedSam`.
        min_iou: masks with a lower predicted IoU are left out (SAM's automatic mode: 0.88).
        **settings: `prompt_batch`, `image_mean` and `image_std` of `PromptedSam`.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        min_iou: float = 0.0,
        prompt_batch: int = 64,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            model=model, prompt_batch=prompt_batch, image_mean=image_mean, image_std=image_std
        )
        self.min_iou = min_iou

    @torch.no_grad()
    def forward(self, image: Tensor, points: Tensor, size: tuple[int, int]) -> MaskSheet:
        """Mask logits of an image (3, h, w) for points (P, n, 2), to be rendered at a size.

        Raises:
            FloatingPointError: if the model gives NaN or infinite values.
        """
        inner = self.inner(image.shape[-2], image.shape[-1])
        # the prompt encoder adds half a pixel
        at = points.float() * points.new_tensor([inner[1], inner[0]]).float() - 0.5
        maps = [at.new_zeros(0, self.side // 4, self.side // 4)]
        scores = [at.new_zeros(0)]
        embeddings = self.embed(image) if len(at) else None
        for part in at.split(self.prompt_batch) if len(at) else ():
            masks, iou = self.decode(embeddings, input_points=part[None])  # (P, 3, s, s), (P, 3)
            best = iou.argmax(1)
            rows = torch.arange(len(best), device=best.device)
            sure = iou[rows, best]
            maps.append(masks[rows, best][sure >= self.min_iou])
            scores.append(sure[sure >= self.min_iou])
        found = torch.cat([t for t in maps if len(t)] or maps[-1:])
        return self.sheet(found, inner, size, torch.cat(scores))


def _enlarge(
    cells: int, side: int, inner: int, target: int, like: Tensor, *, direct: bool
) -> Tensor:
    """One side of the way from the model's masks to an image's pixels, (target, cells), as `like`.

    To the padded square, off with the padding, to the image, as SAM does; SAM 2 goes straight.
    """
    if direct:
        return interpolation(cells, target, like)
    padded = interpolation(cells, side, like.new_empty(0, dtype=torch.float64))[:inner]
    return F.interpolate(padded.T[None], target, mode="linear", align_corners=False)[0].T.to(like)
