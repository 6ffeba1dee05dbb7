"""Pictures as people have them: files, bytes, Pillow, NumPy, PyTorch -> 8-bit RGB, (H, W, 3)."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfp.data.images import MAX_PIXELS, ImageError, pillow_pixels, read_image

SLACK = 1e-3  # by which resampling may leave the range 0 to 1
LONG_SIDE = 2048  # of the benchmarks: longer images are resized by their long side


def check_short_side(pixels: object) -> None:
    """Raises a ValueError unless images can be resized to this short side."""
    if not isinstance(pixels, int) or not 0 < pixels <= LONG_SIDE:
        raise ValueError(f"short_side={pixels!r}: expected 1 to {LONG_SIDE} pixels")


def as_image(source: Any, *, name: str = "") -> NDArray[np.uint8]:
    """A picture as RGB, (H, W, 3).

    Args:
        source: one of

            * a path, a `file://` URL, or the bytes of an image file (`sfp.read_image`);
            * a Pillow image, of any mode;
            * a NumPy array (H, W, 3) in **RGB** order, (H, W) or (H, W, 1) grey, or (H, W, 4) with
              alpha: uint8 from 0 to 255, or floats from 0 to 1. OpenCV reads BGR: pass
              `image[..., ::-1]`;
            * a tensor in PyTorch's layout, (3, H, W), (1, H, W) or (4, H, W), on any device, of the
              same types and ranges; not normalised.

            What is transparent is put on white; floats are rounded to 8 bits.
        name: what errors call the picture; by default its path or its type.

    Raises:
        ImageError: if a file is no readable picture, or an array of another shape, type or range.
        TypeError: if it is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_image(_local(source) if isinstance(source, str) else source, name=name or None)
    if isinstance(source, (bytes, bytearray)):
        return read_image(bytes(source), name=name or None)
    if isinstance(source, Image.Image):
        return _from_pillow(source, name or f"the {source.mode} image")
    if isinstance(source, torch.Tensor):
        name = name or "the tensor"
        if source.ndim != 3 or source.shape[0] not in (1, 3, 4):
            raise ImageError(
                f"{name} has the shape {tuple(source.shape)}, expected (3, H, W)"
                + _advice(tuple(source.shape), "tensor")
            )
        array = source.detach().cpu()
        array = array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
        return _from_array(array.permute(1, 2, 0).numpy(), name)
    if isinstance(source, np.ndarray):
        name = name or "the array"
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
            raise ImageError(
                f"{name} has the shape {source.shape}, expected (H, W, 3)"
                + _advice(source.shape, "array")
            )
        return _from_array(source, name)
    raise TypeError(
        f"{name or 'the picture'} is a {type(source).__name__}, expected a path, a file:// URL, "
        "bytes, a Pillow image, a NumPy array (H, W, 3) or a tensor (3, H, W); a list for several"
    )


def _local(address: str) -> str:
    """The path behind a `file://` URL; paths pass.

    Raises:
        ImageError: for other kinds of URLs.
    """
    parts = urlsplit(address)
    if "://" not in address or len(parts.scheme) < 2:  # one letter is a Windows drive
        return address
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ImageError(f"{address}: only local files are read; download it, and pass the path")
    return url2pathname(parts.path)


def _advice(shape: tuple[int, ...], kind: str) -> str:
    """What is probably meant by a wrong shape."""
    if len(shape) == 4:
        return f"; for a batch pass a list: list({kind})"
    if len(shape) == 3 and kind == "array" and shape[0] in (1, 3):
        return "; move the channels to the end: array.transpose(1, 2, 0)"
    if len(shape) == 3 and kind == "tensor" and shape[2] in (1, 3, 4):
        return "; move the channels to the front: tensor.permute(2, 0, 1)"
    return ""


def _from_pillow(image: Image.Image, name: str) -> NDArray[np.uint8]:
    width, height = image.size
    if not width * height:
        raise ImageError(f"{name} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} x {height} pixels, more than {MAX_PIXELS}")
    try:
        return pillow_pixels(image, name)
    except (OSError, SyntaxError, EOFError) as error:  # Pillow decodes a file only now
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of known range as RGB."""
    if not array.size:
        raise ImageError(f"{name} is empty: its shape is {array.shape}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -SLACK and high <= 1 + SLACK):  # NaN is not, either
            raise ImageError(
                f"{name} has floats from {low:.4g} to {high:.4g}, expected 0 to 1, or uint8 from 0 "
                "to 255; pass pixels that are not normalised"
            )
        array = (array.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} is of type {array.dtype}, expected uint8 from 0 to 255 or floats from 0 to 1"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim == 3 and array.shape[2] == 3:
        return np.array(array)  # its own copy: results keep it
    return _from_pillow(Image.fromarray(np.ascontiguousarray(array)), name)
