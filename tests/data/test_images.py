"""Pictures in every form that people have them, and what is none."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import sfp
from sfp.data.images import as_image


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture
def file(tmp_path, rgb) -> Path:
    path = tmp_path / "a photo, 100 %.png"
    Image.fromarray(rgb).save(path)
    return path


def png(rgb: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "png")
    return stream.getvalue()


FORMS = dict(
    path=lambda rgb, file: file,
    string=lambda rgb, file: str(file),
    url=lambda rgb, file: file.as_uri(),
    url_with_host=lambda rgb, file: file.as_uri().replace("file://", "file://localhost"),
    bytes=lambda rgb, file: png(rgb),
    bytearray=lambda rgb, file: bytearray(png(rgb)),
    pillow=lambda rgb, file: Image.fromarray(rgb),
    pillow_file=lambda rgb, file: Image.open(file),
    opencv=lambda rgb, file: cv2.imread(str(file))[..., ::-1],
    array=lambda rgb, file: rgb,
    array_in_columns=lambda rgb, file: np.asfortranarray(rgb),
    array_of_floats=lambda rgb, file: rgb / 255,
    array_of_halves=lambda rgb, file: (rgb / 255).astype(np.float16),
    opaque_array=lambda rgb, file: np.dstack([rgb, np.full((20, 30), 255, np.uint8)]),
    tensor=lambda rgb, file: torch.from_numpy(rgb).permute(2, 0, 1),
    tensor_of_floats=lambda rgb, file: torch.from_numpy(rgb).permute(2, 0, 1) / 255,
    tensor_of_halves=lambda rgb, file: (torch.from_numpy(rgb).permute(2, 0, 1) / 255).half(),
    tensor_with_gradient=lambda rgb, file: (
        torch.from_numpy(rgb).permute(2, 0, 1) / 255
    ).requires_grad_(),
    overshooting=lambda rgb, file: torch.from_numpy(rgb).permute(2, 0, 1) / 254.9,
)


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_in_all_forms(form, rgb, file):
    found = as_image(FORMS[form](rgb, file))
    assert found.dtype == np.uint8
    assert np.array_equal(found, rgb)
    assert not np.shares_memory(found, rgb)


@pytest.mark.parametrize("axes", [(20, 30), (20, 30, 1), (1, 20, 30)], ids=str)
@pytest.mark.parametrize("scale", [1, 255])
def test_grey(axes, scale, rgb):
    grey = rgb[..., 0]
    values = (grey if scale == 1 else grey / scale).reshape(axes)
    source = torch.from_numpy(values) if axes[0] == 1 else values
    assert np.array_equal(as_image(source), np.dstack([grey] * 3))


def test_transparency_is_put_on_white():
    """By hand: alpha * colour + (1 - alpha) * white."""
    rgba = np.random.default_rng(1).integers(0, 256, (20, 30, 4), np.uint8)
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    for source in (
        rgba,
        rgba / 255,
        torch.from_numpy(rgba).permute(2, 0, 1),
        Image.fromarray(rgba),
    ):
        assert abs(as_image(source) - expected).max() <= 1


def test_pillow_images_are_turned_upright(rgb):
    image = Image.fromarray(rgb)
    image.getexif()[0x0112] = 6  # the top is on the right
    assert np.array_equal(as_image(image), np.rot90(rgb, -1))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            np.zeros((3, 20, 30), np.uint8),
            r"\(3, 20, 30\), expected \(H, W, 3\); move the channels",
        ),
        (np.zeros((2, 20, 30, 3), np.uint8), r"for a batch pass a list: list\(array\)"),
        (np.zeros(7, np.uint8), r"the array has the shape \(7,\)"),
        (np.zeros((20, 30, 2), np.uint8), r"\(20, 30, 2\)"),
        (np.zeros((0, 30, 3), np.uint8), "is empty"),
        (np.zeros((0, 30, 3)), "is empty"),
        (np.zeros((20, 30, 3), np.int64), "of type int64, expected uint8 from 0 to 255"),
        (np.zeros((20, 30, 3), np.uint16), "of type uint16"),
        (np.zeros((20, 30, 3), bool), "of type bool"),
        (np.full((20, 30, 3), 255.0), "floats from 255 to 255, expected 0 to 1"),
        (np.full((20, 30, 3), -0.5), "not normalised"),
        (np.full((20, 30, 3), np.nan), "floats from nan"),
        (np.full((20, 30, 3), "a"), "of type <U1"),
        (torch.zeros(20, 30, 3), r"\(20, 30, 3\), expected \(3, H, W\); .*permute"),
        (torch.zeros(2, 3, 20, 30), r"list\(tensor\)"),
        (torch.zeros(20, 30), r"the tensor has the shape \(20, 30\)"),
        (torch.zeros(3, 20, 0), "is empty"),
        (torch.zeros(3, 20, 30, dtype=torch.int64), "of type int64"),
        (torch.full((3, 20, 30), 2.0), "floats from 2 to 2"),
        (Image.new("F", (20, 30)), "floating-point pixels have no known range"),
        (Image.new("RGB", (0, 30)), "is empty"),
        (b"", "the file is empty"),
        (b"no picture", "not an image"),
        ("nowhere/photo.jpg", r"nowhere/photo\.jpg: cannot be read"),
        (Path("nowhere.jpg"), r"nowhere\.jpg: cannot be read"),
        ("file:///nowhere/my%20photo.jpg", "/nowhere/my photo.jpg: cannot be read"),
        ("https://example.com/a.jpg", "only local files are read"),
        ("file://server/share/a.jpg", "only local files are read"),
        ("s3://bucket/a.jpg", "only local files are read"),
        ("", "not a file|cannot be read"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_what_is_no_picture(source, message):
    with pytest.raises(sfp.ImageError, match=message):
        as_image(source)


@pytest.mark.parametrize("source", [None, 3, {"image": 1}, [np.zeros((2, 2, 3))]], ids=repr)
def test_what_is_nothing_of_the_kind(source):
    with pytest.raises(TypeError, match="expected a path, a file:// URL"):
        as_image(source)


def test_errors_name_the_picture(tmp_path, rgb):
    with pytest.raises(sfp.ImageError, match="image 4 of the list has the shape"):
        as_image(np.zeros((2, 2, 2), np.uint8), name="image 4 of the list")
    half = tmp_path / "half.png"
    half.write_bytes(png(rgb)[:-300])
    for source in (half, str(half), half.as_uri()):
        with pytest.raises(sfp.ImageError, match=r"half\.png: truncated"):
            as_image(source)
    with pytest.raises(sfp.ImageError, match="damaged or truncated"):
        as_image(Image.open(half))
