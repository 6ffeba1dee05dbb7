"""Reads images: files, bytes, Pillow, NumPy, PyTorch -> 8-bit RGB, (H, W, 3), upright.

8-bit grey and RGB JPEG and PNG files, as in benchmarks, are decoded by OpenCV, so that their pixels
equal those of mmsegmentation's `LoadImageFromFile` to the last bit. Other kinds are decoded by Pillow,
which supports more of them: transparent images are composited on white, 16-bit values keep their upper
eight bits, palettes and CMYK become RGB, and of an animation the first frame is used. The orientation
tag (EXIF, or XMP if there is none) is always applied.

Truncated files are refused, because decoders fill the missing part with grey. Bytes after the end of an
image are allowed: phones append videos there, cameras a second picture.
"""

from __future__ import annotations

import io
import operator
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile, DibImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

MAX_PIXELS = 2**28  # 268 million, a third more than 20,000 x 10,000; 0.8 GB as RGB
MAX_BYTES = 2**31  # largest file
LONG_SIDE = 2048  # as in the benchmarks: longer images are resized by their long side
SLACK = 1e-3  # resampled floats may leave the range 0 to 1 by this much
FORMATS = "JPEG, PNG, BMP, GIF, TIFF, WebP and PPM"
# Formats by their first bytes. `Image.open` is not used, because its size limit is a global variable of
# Pillow (MAX_IMAGE_PIXELS); here it is an argument. Pillow's rarer formats are not supported, since
# some start other programs.
_READERS: tuple[tuple[re.Pattern[bytes], Callable[..., ImageFile]], ...] = (
    (re.compile(rb"\xff\xd8\xff"), JpegImageFile),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile),
    (re.compile(rb"GIF8[79]a"), GifImageFile),
    (re.compile(rb"II\*\0|MM\0\*|II\+\0|MM\0\+"), TiffImageFile),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile),
    (re.compile(rb"P[1-7fF]\s"), PpmImageFile),
    (re.compile(rb"BM"), BmpImageFile),
    (re.compile(rb"[\x0c\x28\x40\x6c\x7c]\0\0\0"), DibImageFile),
)
_DECODING = (  # what Pillow's decoders raise on damaged files
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    zlib.error,
    Image.DecompressionBombError,  # of frames and tiles larger than the picture
)
_ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF


class DataError(ValueError):
    """An image or label file that cannot be used; the message names it."""


class ImageError(DataError):
    """A file that is not a readable image."""


# -- pictures in every form ----------------------------------------------------------------------


def as_image(source: Any, *, name: str = "") -> NDArray[np.uint8]:
    """An image as RGB, (H, W, 3), copied to new memory.

    Args:
        source: one of

            * a path, a `file://` URL, or the bytes of an image file (`sfp.read_image`);
            * a Pillow image, of any mode;
            * a NumPy array (H, W, 3) in **RGB** order, (H, W) or (H, W, 1) grey, or (H, W, 4) with
              alpha: uint8 from 0 to 255, or floats from 0 to 1. OpenCV reads BGR: pass
              `image[..., ::-1]`;
            * a tensor in PyTorch's layout, (3, H, W), (1, H, W) or (4, H, W), on any device, of the
              same types and ranges; not normalised.

            Transparent images are composited on white; floats are rounded to 8 bits.
        name: the image's name in errors; by default its path or type.

    Raises:
        ImageError: if a file is not a readable image, or an array has a wrong shape, type or range.
        TypeError: if it is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_image(_local(source) if isinstance(source, str) else source, name=name or None)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return read_image(bytes(source), name=name or None)
    if isinstance(source, Image.Image):
        return _from_pillow(source, name or f"the {source.mode} image")
    if isinstance(source, np.ndarray):
        name = name or "the array"
        if source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (1, 3, 4)):
            raise ImageError(
                f"{name} has the shape {source.shape}, expected (H, W, 3)"
                + _advice(source.shape, "array")
            )
        return _from_array(source, name)
    torch = sys.modules.get("torch")  # a tensor implies that it has been imported
    if torch is not None and isinstance(source, torch.Tensor):
        name = name or "the tensor"
        if source.ndim != 3 or source.shape[0] not in (1, 3, 4):
            raise ImageError(
                f"{name} has the shape {tuple(source.shape)}, expected (3, H, W)"
                + _advice(tuple(source.shape), "tensor")
            )
        array = source.detach().cpu()
        array = array.float() if array.dtype in (torch.float16, torch.bfloat16) else array
        return _from_array(array.permute(1, 2, 0).numpy(), name)
    raise TypeError(
        f"{name or 'the picture'} is a {type(source).__name__}, expected a path, a file:// URL, "
        "bytes, a Pillow image, a NumPy array (H, W, 3) or a tensor (3, H, W); a list for several"
    )


def _local(address: str) -> str:
    """The path of a `file://` URL; paths are returned unchanged.

    Raises:
        ImageError: for other kinds of URLs.
    """
    if "://" not in address:
        return address
    parts = urlsplit(address)
    if len(parts.scheme) < 2:  # one letter is a Windows drive
        return address
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ImageError(f"{address}: only local files can be read; download it and pass the path")
    return url2pathname(parts.path)


def _advice(shape: tuple[int, ...], kind: str) -> str:
    """Advice for an array with a wrong shape."""
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
        return turned(_pillow_pixels(image, name), orientation(image))
    except ImageError:
        raise
    except _DECODING as error:  # Pillow decodes files lazily
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error


def _from_array(array: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """An array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of known range as RGB."""
    if not array.size:
        raise ImageError(f"{name} is empty: its shape is {array.shape}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= -SLACK and high <= 1 + SLACK):  # also true for NaN
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
        return np.array(array, order="C")  # a copy, since results keep it
    return _from_pillow(Image.fromarray(np.ascontiguousarray(array)), name)


# -- files ---------------------------------------------------------------------------------------


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    bgr: bool = False,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """An image file as RGB (or BGR), (H, W, 3), upright.

    Args:
        source: path, or the bytes of a file.
        bgr: return channels in the order of OpenCV and mmsegmentation instead.
        name: its name in errors; by default the path.
        max_pixels: larger images are refused from their header, before memory is allocated.

    Raises:
        ImageError: if the file is missing, empty, truncated, too large or no picture.
    """
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_bytes(source)
    image = _open(data, name, max_pixels)
    check_whole(data, name)
    try:
        plain = _is_plain(image)
        pixels = _opencv_pixels(data) if plain else _pillow_pixels(image, name)
        if pixels is None:
            image.load()  # raises what is wrong, unless Pillow fills up what is missing
            raise ImageError(f"{name}: damaged or truncated image, which OpenCV cannot decode")
        if plain != bgr:  # OpenCV's order is BGR; in place, since the picture may be large
            cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
        return turned(pixels, orientation(image))
    except ImageError:
        raise
    except _DECODING as error:
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error


def read_labels(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """The numbers in a label map as they are stored, of 8 or 16 bits: (H, W), palettes ignored.

    A file with several channels gives (H, W, C); nobody's label maps, but that is for the caller to
    say. An orientation tag is not applied: `orientation` has it.

    Raises:
        ImageError: as `read_image`.
    """
    name = str(path)
    data = read_bytes(path)
    image = _open(data, name, MAX_PIXELS)
    check_whole(data, name)
    try:
        labels = np.asarray(image)
    except _DECODING as error:
        raise ImageError(f"{name}: damaged or truncated label map ({error})") from error
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The contents of a regular file of at most `MAX_BYTES`.

    Raises:
        ImageError: if there is none.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ImageError(f"{path}: not a file")  # a folder, or a device without an end
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise ImageError(f"{path}: {size} bytes, more than the {MAX_BYTES} allowed")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a path with a null byte
        raise ImageError(f"{path!r}: cannot be read ({error})") from error


def orientation(source: str | os.PathLike[str] | Image.Image) -> int:
    """The orientation tag of a picture, 1 (upright) to 8: how EXIF says that it was held.

    Raises:
        ImageError: if a path holds no picture.
    """
    if not isinstance(source, Image.Image):
        source = _open(read_bytes(source), str(source), MAX_PIXELS)
    try:
        tag = source.getexif().get(_ORIENTATION, 1)
    except _DECODING:  # damaged metadata are ignored
        return 1
    return tag if tag in range(1, 9) else 1


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turns stored pixels (H, W) or (H, W, C) upright, by the orientation tag (1 to 8)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def check_whole(data: bytes, name: str) -> None:
    """Checks that a file is not empty, nor a truncated JPEG or PNG.

    It walks from segment to segment, so that markers inside thumbnails or after the image are ignored.

    Raises:
        ImageError: if it is.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    for kind, start, whole in (
        ("JPEG", b"\xff\xd8\xff", _whole_jpeg),
        ("PNG", b"\x89PNG", _whole_png),
    ):
        if data.startswith(start) and not whole(data):
            raise ImageError(
                f"{name}: truncated {kind} file, its end is missing; download it again"
            )


# a marker, except those within compressed data: stuffed zeros, fill bytes and restarts (D0 to D7)
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_SEGMENTS = {*range(0xC0, 0xD0), *range(0xDA, 0xF0), 0xFE} - {0xC8}  # ITU-T T.81, table B.1


def _whole_jpeg(data: bytes) -> bool:
    """Whether a scan and the end-of-image marker follow in a valid order of segments."""
    position, scanned = 2, False
    while found := _MARKER.search(data, position):
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:  # the end of the image
            return scanned
        if marker == 0x01:  # stands alone
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if marker not in _SEGMENTS or length < 2:
            return False  # not a segment: the file was truncated
        scanned |= marker == 0xDA
        position += length
    return False


def _whole_png(data: bytes) -> bool:
    """Whether the chunks continue up to the last one, IEND."""
    position = 8
    while position + 12 <= len(data):
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    return False


def _open(data: bytes, name: str, max_pixels: int) -> ImageFile:
    """Reads the header without decoding the image."""
    if not data:
        raise ImageError(f"{name}: the file is empty")
    reader = next((reader for start, reader in _READERS if start.match(data)), None)
    if reader is None:
        raise ImageError(f"{name}: not an image in a supported format ({FORMATS})")
    try:
        image = reader(io.BytesIO(data))
    except _DECODING as error:
        raise ImageError(f"{name}: not an image, or a damaged one ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: claims {width} x {height} pixels, more than {max_pixels} (max_pixels)"
        )
    return image


def _is_plain(image: ImageFile) -> bool:
    """Whether it is of a kind used by benchmarks."""
    return (
        image.format in ("JPEG", "PNG")
        and image.mode in ("L", "RGB")
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
    )


def _opencv_pixels(data: bytes) -> NDArray[np.uint8] | None:
    """BGR as stored, (H, W, 3); None if OpenCV cannot decode it."""
    try:
        pixels = cv2.imdecode(
            np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
        )
    except cv2.error:
        return None
    return None if pixels is None else pixels.astype(np.uint8, copy=False)


def _pillow_pixels(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """RGB as stored, (H, W, 3), of a Pillow image in any mode; Pillow's errors are passed on.

    Raises:
        ImageError: if its pixels have no known range.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: grey values beyond 16 bits; save it with 8 or 16")
        grey = (values >> 8).astype(np.uint8)
        grey[values == image.info.get("transparency", -1)] = 255
        return np.dstack([grey, grey, grey])
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


# -- sizes ---------------------------------------------------------------------------------------


def check_short_side(pixels: object) -> int:
    """Checks the size to which the short side of images is resized, and returns it as an int.

    Raises:
        ValueError: unless it is a whole number from 1 to `LONG_SIDE`.
    """
    try:
        side = 0 if isinstance(pixels, bool) else operator.index(pixels)  # type: ignore[arg-type]
    except TypeError:
        side = 0
    if not 0 < side <= LONG_SIDE:
        raise ValueError(f"short_side={pixels!r}: expected 1 to {LONG_SIDE} pixels")
    return side


def resize_short_side(
    image: NDArray[np.uint8], short_side: int, long_side: int = LONG_SIDE
) -> NDArray[np.uint8]:
    """Resizes an image (H, W, C) bilinearly, as in the benchmarks.

    The short side becomes `short_side`, unless the long one would then exceed `long_side`, which is the
    limit. Equals mmcv's `Resize(scale=(long_side, short_side), keep_ratio=True)` to the last bit,
    except that sides which would be rounded to 0 pixels become 1.
    """
    height, width = image.shape[:2]
    scale = min(
        max(short_side, long_side) / max(height, width),
        min(short_side, long_side) / min(height, width),
    )
    size = [max(int(length * scale + 0.5), 1) for length in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)
