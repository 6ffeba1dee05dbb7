"""From a file or a scene number to pixels, and from pixels to what the model reads."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.clip.model import CLIP
from sfp.mini import scene

SHORT_SIDE = 336  # of most benchmarks, docs/protocol.md
SCENE_SIDE = 224  # what the mini CLIP was trained on


def load_image(source: str | Path | int, short_side: int | None = None) -> np.ndarray:
    """An RGB picture, (H, W, 3) uint8.

    Args:
        source: path of an image, or the number of a drawn scene of the mini world.
        short_side: pixels to scale the short side to; by default 336, and 224 for a drawn scene.

    Raises:
        OSError: if the file is missing or no image.
    """
    if isinstance(source, int):
        return scene(source, short_side or SCENE_SIDE)[0]
    if not Path(source).is_file():
        raise FileNotFoundError(f"no image {str(source)!r}: there is no such file")
    # read by Python: OpenCV cannot open paths with letters outside the system's code page
    data = np.fromfile(source, np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if image is None:
        raise OSError(f"cannot read {str(source)!r} as an image: damaged, or of an unknown format")
    scale = (short_side or SHORT_SIDE) / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.cvtColor(cv2.resize(image, size, interpolation=kind), cv2.COLOR_BGR2RGB)


def normalised(image: np.ndarray, clip: CLIP | None = None) -> Tensor:
    """A batch of one for the image tower: (H, W, 3) uint8 RGB -> (1, 3, H, W).

    Args:
        image: the picture.
        clip: whose normalisation is used; OpenAI's by default.
    """
    mean, std = (clip.mean, clip.std) if clip else (CLIP_MEAN, CLIP_STD)
    pixels = (torch.from_numpy(image.copy()).float() - torch.tensor(mean)) / torch.tensor(std)
    return pixels.permute(2, 0, 1)[None]  # (1, 3, H, W)
