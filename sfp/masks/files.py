"""Regions from files: id maps, or masks that may overlap, named like the images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath

import numpy as np
import torch
from torch import Tensor, nn

from sfp.clip.vit import VisionTransformer
from sfp.data.images import DataError, read_labels
from sfp.tokens import Tokens
from sfp.trace import RegionsError

ENDINGS = (".png", ".npy")


class RegionFiles(nn.Module):
    """Regions of images from a folder, for methods that need them.

    For an image a/b/c.jpg, the first existing file of FOLDER/a/b/c.png, FOLDER/b/c.png and FOLDER/c.png
    is read, or the same with .npy. A PNG holds the id of each pixel, 0 for none: 8 or 16 bits, or
    colours as in COCO's panoptic maps (red + 256 green + 65536 blue). An array (NPY) is such a map of
    integers, (h, w), or masks (R, h, w), booleans or floats that are positive inside. Any size with the
    image's aspect ratio works.

    Args:
        folder: folder with the files.

    Raises:
        FileNotFoundError: if there is no such folder.
    """

    def __init__(self, *, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"regions: there is no folder {folder!r}; put a file for each image there, named as "
                "the image: a PNG or NPY with the region of each pixel, 0 for none"
            )

    def read(self, name: str | os.PathLike[str]) -> Tensor:
        """The regions of an image, (h, w) int64, or masks (R, h, w) float32.

        Args:
            name: the image's path without its extension.

        Raises:
            DataError: if there is no file, or it has another format; the message names it.
        """
        candidates = list(self._candidates(PurePath(name)))
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            wanted = " or ".join(str(candidates[-len(ENDINGS) + i]) for i in range(len(ENDINGS)))
            raise DataError(f"no regions for the image {str(name)!r}: expected {wanted}")
        values = _array(path)
        if values.ndim == 2 and values.dtype.kind in "iu" and int(values.min(initial=0)) >= 0:
            return torch.from_numpy(values.astype(np.int64))
        if values.ndim == 3 and values.dtype.kind in "bf":
            return torch.from_numpy(values.astype(np.float32))
        raise DataError(
            f"{path}: shape {values.shape}, type {values.dtype}: expected an id map (h, w) of whole "
            "numbers from 0, or masks (R, h, w), booleans or floats"
        )

    def _candidates(self, name: PurePath) -> Iterator[Path]:
        parts = name.parts[1:] if name.anchor else name.parts
        for first in range(len(parts)):
            for ending in ENDINGS:
                yield self.folder.joinpath(*parts[first:-1], parts[-1] + ending)

    def forward(
        self,
        vit: VisionTransformer,
        image: Tensor,
        size: tuple[int, int],
        *,
        guides: Mapping[str, Callable[..., Tokens]] | None = None,
    ) -> Tensor:
        """Raises `RegionsError`: an image given only by its pixels has no file."""
        raise RegionsError(
            "regions come from files named as the images, and this image has no name: pass its path "
            "instead of its pixels, or regions= of the image"
        )


def _array(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        values = read_labels(path)
        if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
            return values.astype(np.int64) @ np.array([1, 256, 65536])
        return values
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged, or no array of NumPy ({error})") from error
