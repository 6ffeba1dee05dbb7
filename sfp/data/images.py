"""Reading pictures of every kind into one: 8-bit RGB, (H, W, 3), upright.

What benchmarks consist of, 8-bit grey and RGB files in JPEG and PNG, is decoded by OpenCV, exactly as
mmsegmentation's `LoadImageFromFile` does. Other kinds go through Pillow, which knows more of them:
transparency is put on white, 16 bits keep the upper eight, palettes and CMYK become RGB, the first
frame stands for an animation. EXIF orientation is applied in both.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 2**28  # 268 million, a third more than 20,000 x 10,000; 0.8 GB as RGB
MAX_BYTES = 2**31  # of a file
Image.init()
FORMATS = tuple(
    kind  # the others of Pillow are rare, and some start programs
    for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
    if kind in Image.OPEN
)
LIKE_MMSEG = ("JPEG", "MPO", "PNG")  # MPO: a JPEG that more pictures follow
ENDS = {  # format: (its last part, what begins the part before it)
    "JPEG": (b"\xff\xd9", b"\xff\xda"),
    "PNG": (b"IEND", b"IHDR"),
}
_pillow_limit = threading.Lock()


class DataError(ValueError):
    """An image or label file that cannot be used; the message names it."""


class ImageError(DataError):
    """A file that is no readable picture."""


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    bgr: bool = False,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """A picture as RGB (or BGR), (H, W, 3).

    Args:
        source: path, or the bytes of a file.
        bgr: whether the channels come in the order of OpenCV and mmsegmentation instead.
        name: what errors call it; by default the path.
        max_pixels: larger pictures are refused by what their header says, before memory is taken.

    Raises:
        ImageError: if the file is missing, empty, truncated, too large or no picture.
    """
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    data = source if isinstance(source, bytes) else read_bytes(source)
    image = _open(data, name, max_pixels)
    check_whole(data, name)
    try:
        if (
            image.format in LIKE_MMSEG
            and image.mode in ("L", "RGB")
            and not image.has_transparency_data
        ):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if pixels is not None:
                return _ordered(pixels.astype(np.uint8, copy=False), not bgr)
            # what OpenCV gives up on may still have a reason, which Pillow tells
        return _ordered(pillow_pixels(image, name), bgr)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, cv2.error) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: damaged or truncated image ({error})") from error


def _ordered(pixels: NDArray[np.uint8], swap: bool) -> NDArray[np.uint8]:
    """First and last channel swapped or not, in place: the picture may be large."""
    if swap:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return pixels


def read_labels(path: str | os.PathLike[str]) -> NDArray[np.integer]:
    """The numbers in a label map as they are stored, of 8 or 16 bits: (H, W), palettes ignored.

    A file with several channels gives (H, W, C); nobody's label maps, but that is for the caller to
    say.

    Raises:
        ImageError: as `read_image`.
    """
    name = str(path)
    data = read_bytes(path)
    image = _open(data, name, MAX_PIXELS)
    check_whole(data, name)
    try:
        labels = np.asarray(image)
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError) as error:
        raise ImageError(f"{name}: damaged or truncated label map ({error})") from error
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The contents of a regular file of reasonable size.

    Raises:
        ImageError: if there is none.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ImageError(f"{path}: not a file")  # a folder, or a device without an end
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise ImageError(f"{path}: {size} bytes, more than the {MAX_BYTES} of a sane image")
        return Path(path).read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_whole(data: bytes, name: str) -> None:
    """Refuses empty files and cut-off JPEG and PNG files, which OpenCV would fill up with grey.

    Raises:
        ImageError: if a file is.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    kind = "JPEG" if data[:3] == b"\xff\xd8\xff" else "PNG" if data[:4] == b"\x89PNG" else None
    if kind:
        end, before = ENDS[kind]
        if data.rfind(end) <= data.rfind(before):  # no end after the last scan: nothing else has it
            raise ImageError(f"{name}: truncated {kind} file, its end is missing; fetch it again")


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    """The picture's header, nothing decoded."""
    if not data:
        raise ImageError(f"{name}: the file is empty")
    try:
        with _pillow_limit, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd metadata, which is none of ours
            before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours follows
            try:
                image = Image.open(io.BytesIO(data), formats=FORMATS)
            finally:
                Image.MAX_IMAGE_PIXELS = before
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError) as error:
        raise ImageError(
            f"{name}: not an image, or a damaged one ({', '.join(FORMATS)} are read)"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: claims {width} x {height} pixels, more than {max_pixels} (max_pixels)"
        )
    return image


def pillow_pixels(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """A Pillow image of any mode as RGB, upright, (H, W, 3); its own errors are not translated.

    Raises:
        ImageError: if its pixels have no known range.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion would clip
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ImageError(f"{name}: grey values beyond 16 bits; save it with 8 or 16")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no known range; save it with 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
