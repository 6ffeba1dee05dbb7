"""Any vision transformer of Hugging Face's `transformers` as a guide: DINO, DINOv2 and others."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.weights import CLIP_MEAN, CLIP_STD
from sfp.registry import GUIDES
from sfp.tokens import Tokens

if TYPE_CHECKING:
    from sfp.clip.model import CLIP

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in 0..1; of DINO, DINOv2 and most others
IMAGENET_STD = (0.229, 0.224, 0.225)


@GUIDES.register_module(name="transformers")
class TransformersGuide(nn.Module):
    """A frozen vision transformer: CLIP-normalised images -> its last layer's patch tokens.

    Args:
        model: a name on the Hugging Face hub or a folder, loaded with `AutoModel`; or a model, e.g.
            one made from a config.
        mean, std: the model's normalisation, RGB in 0..1.
        image_mean, image_std: the normalisation of the images that come in, RGB in 0..255; by default
            that of the segmentor's weights, for most OpenAI's.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
    """

    factor: Tensor
    shift: Tensor

    def __init__(
        self,
        *,
        model: str | nn.Module,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = _load(model) if isinstance(model, str) else model
        self.model.requires_grad_(False)
        size: int | Sequence[int] = self.model.config.patch_size  # type: ignore[union-attr, assignment]
        self.patch: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        forward = inspect.signature(self.model.forward).parameters
        # ViT (DINO) resamples its position table only when told to, DINOv2 always does
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in forward else {}
        )
        self._own = [torch.tensor(list(x)) * 255 for x in (mean, std)]
        self._given = (image_mean, image_std)
        self.register_buffer("factor", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(3, 1, 1), persistent=False)
        self._expect(CLIP_MEAN, CLIP_STD)
        self.eval()

    def follow(self, clip: CLIP) -> None:
        """Expects images normalised for `clip`, unless their normalisation was given."""
        self._expect(clip.mean, clip.std)

    def _expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Images * factor + shift: out of one normalisation and into the other."""
        mean, std = (
            given if given is not None else own
            for given, own in zip(self._given, (mean, std), strict=True)
        )
        factor = torch.tensor(list(std)) / self._own[1]
        shift = (torch.tensor(list(mean)) - self._own[0]) / self._own[1]
        self.factor.copy_(factor[:, None, None])
        self.shift.copy_(shift[:, None, None])

    def train(self, mode: bool = True) -> TransformersGuide:
        """Stays in evaluation mode: nothing of it is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tokens:
        """Patch tokens of images (B, 3, H, W), (B, h * w, D) without a prefix.

        Images are resized (bilinear) so that each side is the nearest multiple of the patch.
        """
        dtype = next(self.model.parameters()).dtype
        pixels = image.float() * self.factor.float() + self.shift.float()
        grid = tuple(
            max(round(length / side), 1)
            for length, side in zip(image.shape[-2:], self.patch, strict=True)
        )
        size = (grid[0] * self.patch[0], grid[1] * self.patch[1])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        out = self.model(pixel_values=pixels.to(dtype), **self._options)
        tokens = (
            out.last_hidden_state
        )  # (B, prefix + h * w, D); the prefix is the class and registers
        return Tokens(
            tokens[:, tokens.shape[1] - grid[0] * grid[1] :], (grid[0], grid[1]), prefix=0
        )


def _load(name: str) -> nn.Module:
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(
            f"the guide {name!r} needs the package transformers: pip install 'sfp[guides]'"
        ) from error
    return AutoModel.from_pretrained(name)
