"""The image preprocessor for mmsegmentation, and functions that undo padding and flips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.clip.model import CLIP
from sfp.engine import is_large
from sfp.functional.labels import Labels


@MODELS.register_module(force=True)
class ImagePreprocessor(SegDataPreProcessor):
    """Normalises each image of a batch and returns them as a list, so that their sizes may differ.

    Args:
        mean, std: RGB in 0..255; by default those of the segmentor's weights, usually OpenAI's.
        bgr_to_rgb: whether images are in BGR order, as mmseg loads them.
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bgr_to_rgb: bool = True,
    ) -> None:
        super().__init__(
            mean=CLIP_MEAN if mean is None else mean,
            std=CLIP_STD if std is None else std,
            bgr_to_rgb=bgr_to_rgb,
        )
        self.bgr_to_rgb = bgr_to_rgb
        self._given = dict(mean=mean, std=std)

    def follow(self, clip: CLIP) -> None:
        """Uses the normalisation that `clip` was trained with, unless another was given."""
        for name, given in self._given.items():
            if given is None:
                getattr(self, name).copy_(torch.tensor(getattr(clip, name))[:, None, None])

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """`inputs`: images (3, H, W) in 0..255, BGR as mmseg loads them -> a list of float images.

        Very large 8-bit images are not normalised here but later, window by window.
        """
        data = self.cast_data(data)
        images = [x if is_large(x) else self.normalise(x) for x in data["inputs"]]
        return dict(inputs=images, data_samples=data.get("data_samples"))

    def normalise(self, image: Tensor) -> Tensor:
        """Normalises an image or part of one for the network: RGB, float, mean 0."""
        image = image[[2, 1, 0]] if self.bgr_to_rgb else image
        return (image.float() - self.mean) / self.std


def unpadded(image: Tensor, sample: SegDataSample) -> Tensor:
    """The image without the padding (left, right, top, bottom) of a pipeline or preprocessor."""
    meta = sample.metainfo
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    return image[:, top : image.shape[1] - bottom, left : image.shape[2] - right]


def flipped(sample: SegDataSample) -> tuple[int, ...]:
    """The dimensions along which the pipeline has flipped the image (test-time augmentation)."""
    if not sample.metainfo.get("flip"):
        return ()
    direction = sample.metainfo.get("flip_direction", "horizontal")
    return dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))[direction]


def unflipped(result: Labels, sample: SegDataSample) -> Labels:
    """The labels flipped back, if the pipeline has flipped the image."""
    if not (sides := flipped(sample)):
        return result
    scores = None if result.scores is None else result.scores.flip(sides)
    return Labels(result.labels.flip(sides), result.confidence.flip(sides), scores)
