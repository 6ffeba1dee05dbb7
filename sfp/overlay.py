"""Label maps as pictures: palette images, and colours over a photo. Without matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Panel:
    """A picture, (H, W, 3) uint8 RGB, and optionally the labels to lay over it, (H, W)."""

    image: np.ndarray
    labels: np.ndarray | None = None


def overlay(panel: Panel, palette: Sequence[Sequence[int]], opacity: float = 0.7) -> np.ndarray:
    """The labels' colours over the picture, with white borders between them: (H, W, 3) uint8.

    Pixels with a label outside the palette, such as ignored ones, are not coloured.
    """
    if panel.labels is None:
        return panel.image
    colours = np.array([*palette, (0, 0, 0)], np.float32)
    labels = np.minimum(panel.labels, len(palette)).astype(np.uint16)
    # keep the brightness of the picture under the colours
    grey = cv2.cvtColor(panel.image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    mixed = opacity * colours[labels] + (1 - opacity) * grey
    edges = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    mixed[edges] = 255
    shown = (labels < len(palette))[..., None]
    return np.where(shown, mixed, panel.image).astype(np.uint8)


def label_picture(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
    """A label map (H, W) as a picture: uint8 with a palette, or uint16, for which PNG has none."""
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette([value for colour in palette for value in colour])
    return picture
