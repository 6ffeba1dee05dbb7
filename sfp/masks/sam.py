"""Masks from SAM and SAM 2 of Hugging Face's `transformers`, prompted with points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.functional.masks import MaskSheet, fuse_contained, stability, without_doubles
from sfp.functional.windows import from_square, interpolation
from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.numerics import finite
from sfp.registry import MASKS

KINDS = {"sam": False, "sam2": True, "sam2_video": True}  # whether images are stretched to a square


class PromptedSam(FrozenModel):
    """A frozen SAM (Kirillov et al., 2023) or SAM 2 (Ravi et al., 2024) for prompts.

    Preprocessing follows the releases, in torch: images are resized bilinearly with antialiasing. For
    SAM the longer side becomes 1024 and the square is padded with zeros; for SAM 2 the image is
    stretched to the square.

    Args:
        model: a name on the Hugging Face hub or a folder, loaded with `AutoModelForMaskGeneration`; or
            a `SamModel` or `Sam2Model`.
        prompt_batch: largest number of prompts decoded at once.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights, for most OpenAI's.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
        ValueError: if the model is neither of them.
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
        """Side of the model's square input in pixels."""
        return self.model.config.prompt_encoder_config.image_size

    def inner(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that an image of that size takes of the square."""
        if self.stretch:
            return self.side, self.side
        scale = self.side / max(height, width)
        return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)

    def embed(self, image: Tensor) -> Any:
        """The embeddings of an image (3, h, w), for the decoder."""
        inner = self.inner(image.shape[-2], image.shape[-1])
        pixels = self.resized(image[None], inner)
        pixels = F.pad(pixels, (0, self.side - inner[1], 0, self.side - inner[0]))
        return self.model.get_image_embeddings(pixels.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.model.parameters()).dtype

    def decode(self, embeddings: Any, **prompts: Any) -> tuple[Tensor, Tensor]:
        """Mask logits (P, n, s, s) and predicted IoU (P, n), n masks for each of P prompts.

        Args:
            embeddings: result of `embed`.
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
            masks: mask logits.
            inner: rows and columns that the image takes of the square.
            size: rows and columns of the image.
            scores: as in `MaskSheet`.
        """
        rows, columns = (
            interpolation(masks.shape[i - 2], size[i], masks)
            if self.stretch
            else from_square(masks.shape[i - 2], self.side, inner[i], size[i], masks)
            for i in range(2)
        )
        return MaskSheet(masks, rows, columns, scores)


@MASKS.register_module(name="sam")
class SamMasks(PromptedSam):
    """Masks of a SAM or SAM 2 for prompts.

    Of the three masks that the model predicts for an ambiguous prompt, the one of highest predicted IoU
    is used, or all. Other measures are computed on the model's own maps, at a quarter of its
    resolution. TextRegion uses `min_iou=0.6, multimask=True, min_stability=0.6, box_nms=0.9,
    fuse=True`.

    Args:
        model: as in `PromptedSam`.
        min_iou: masks with a lower predicted IoU are left out (SAM's automatic mode: 0.88).
        multimask: whether all three masks of a prompt are used, those of larger area first.
        min_stability: masks of a smaller `stability` are left out (SAM's automatic mode: 0.95).
        box_nms: IoU of boxes above which, of two masks, the one with the lower predicted IoU is left
            out (SAM's automatic mode: 0.7); None keeps both.
        fuse: whether masks that contain most of each other are merged (`fuse_contained`).
        prompt_batch, image_mean, image_std: as in `PromptedSam`.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        min_iou: float = 0.0,
        multimask: bool = False,
        min_stability: float = 0.0,
        box_nms: float | None = None,
        fuse: bool = False,
        prompt_batch: int = 64,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            model=model, prompt_batch=prompt_batch, image_mean=image_mean, image_std=image_std
        )
        self.min_iou = min_iou
        self.multimask = multimask
        self.min_stability = min_stability
        self.box_nms = box_nms
        self.fuse = fuse

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
            masks, iou = self._chosen(masks, iou)
            good = (iou >= self.min_iou) & (
                stability(self._within(masks, inner)) >= self.min_stability
            )
            maps.append(masks[good])
            scores.append(iou[good])
        found, sure = torch.cat([t for t in maps if len(t)] or maps[-1:]), torch.cat(scores)
        if self.box_nms is not None:
            kept = without_doubles(self._within(found, inner), sure, self.box_nms)
            found, sure = found[kept], sure[kept]
        if self.fuse:
            found, first = fuse_contained(found, self._within(found, inner))
            sure = sure[first]
        return self.sheet(found, inner, size, sure)

    def _chosen(self, masks: Tensor, iou: Tensor) -> tuple[Tensor, Tensor]:
        """The masks (M, s, s) that are used of (P, n, s, s), and their predicted IoU."""
        order = iou.argmax(1, keepdim=True)
        if self.multimask:
            area = (masks > 0).flatten(2).sum(2)
            order = area.argsort(dim=1, descending=True, stable=True)  # whole objects before parts
        rows = torch.arange(len(iou), device=iou.device)[:, None]
        return masks[rows, order].flatten(0, 1), iou[rows, order].flatten()

    def _within(self, masks: Tensor, inner: tuple[int, int]) -> Tensor:
        """Masks (M, s, s), cropped to the image."""
        rows, columns = (-(-masks.shape[i - 2] * inner[i] // self.side) for i in range(2))
        return masks[:, :rows, :columns]
