"""Images in all supported formats, and files that are not images."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import sfp
from sfp.data.images import as_image, check_short_side, read_image, resize_short_side, turned


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
        ("https://example.com/a.jpg", "only local files can be read"),
        ("file://server/share/a.jpg", "only local files can be read"),
        ("s3://bucket/a.jpg", "only local files can be read"),
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


# -- files -----------------------------------------------------------------------------------------


def encoded(rgb: np.ndarray, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, kind, **options)
    return stream.getvalue()


def tagged(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def thumbnail(rgb: np.ndarray) -> Image.Exif:
    """Metadata that hold a whole JPEG, as a camera's do."""
    tags = Image.Exif()
    tags[0x927C] = encoded(rgb[:8, :8], "JPEG")
    return tags


JPEGS = dict(
    baseline=dict(),
    progressive=dict(progressive=True),
    full=dict(quality=100, subsampling=0),
    restarts=dict(restart_marker_rows=1),
    thumbnail=None,
)


def jpeg(rgb: np.ndarray, kind: str) -> bytes:
    return encoded(rgb, "JPEG", **(JPEGS[kind] or dict(exif=thumbnail(rgb))))


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_is_whole_up_to_its_own_end(kind, rgb):
    """Any cut is refused, also with random bytes or a thumbnail's end behind it."""
    data = jpeg(rgb, kind)
    noise = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    whole = read_image(data)
    for behind in (noise, data, b"\0" * 5000, b"\xff" * 5000, b"\xff\xda\0"):
        assert np.array_equal(read_image(data + behind), whole)
    for cut in range(4, len(data), 13):
        with pytest.raises(sfp.ImageError, match=r"^half: "):
            read_image(data[:cut], name="half")
    for cut in (len(data) - 100, len(data) - 20):  # in the compressed data
        with pytest.raises(sfp.ImageError, match="truncated JPEG"):
            read_image(data[:cut] + b"\xff\x02" + noise, name="half")


def test_a_png_is_whole_up_to_its_own_end(rgb):
    data = encoded(rgb, "PNG")
    assert np.array_equal(read_image(data + bytes(10**6)), rgb)
    assert np.array_equal(read_image(data + data[:100]), rgb)
    for cut in range(8, len(data), 13):
        with pytest.raises(sfp.ImageError, match=r"^half: "):
            read_image(data[:cut] + b"IEND", name="half")


def test_rows_that_a_whole_png_lacks_are_no_black_rows(rgb):
    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 8, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rgb[:12]))
    data = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )
    with pytest.raises(sfp.ImageError, match="damaged or truncated"):
        read_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", dict(compression="tiff_lzw")),
        ("WEBP", dict(lossless=True)),
    ],
)
def test_orientation_is_pillows(orientation, kind, options, rgb):
    data = encoded(rgb, kind, exif=tagged(orientation), **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(read_image(data), np.asarray(expected.convert("RGB")))
    assert np.array_equal(
        as_image(Image.open(io.BytesIO(data))), np.asarray(expected.convert("RGB"))
    )
    assert np.array_equal(turned(rgb, orientation), np.asarray(expected.convert("RGB")))


def test_orientation_in_xmp_counts_where_exif_has_none(rgb):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain, tall = read_image(encoded(rgb, "JPEG")), read_image(encoded(rgb, "JPEG", xmp=xmp))
    assert np.array_equal(tall, np.rot90(plain, -1))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_the_first_picture_of_several_is_taken(kind, rgb):
    pair = [Image.fromarray(np.full_like(rgb, shade)) for shade in (0, 255)]
    stream = io.BytesIO()
    pair[0].save(stream, kind, save_all=True, append_images=pair[1:])
    assert read_image(stream.getvalue()).max() < 5


def test_sixteen_bits_keep_the_upper_eight(rgb):
    wide = np.random.default_rng(2).integers(0, 65536, (20, 30, 4), np.uint16)
    wide[..., 3] = 65535
    for channels in (1, 3, 4):
        order = [2, 1, 0, 3][:channels] if channels > 1 else [0]
        data = cv2.imencode(".png", wide[..., order])[1].tobytes()
        expected = np.broadcast_to(wide[..., : min(channels, 3)] >> 8, (20, 30, 3))
        assert np.array_equal(read_image(data), expected)


def test_a_transparent_colour_is_white(rgb):
    rgb = rgb.clip(4, 255)
    rgb[0] = (1, 2, 3)
    grey = np.dstack([rgb[..., 0]] * 3)
    for data, expected in (
        (encoded(rgb, "PNG", transparency=(1, 2, 3)), rgb),
        (encoded(rgb[..., 0], "PNG", transparency=1), grey),
        (encoded(rgb[..., 0].astype(np.uint16) * 257, "PNG", transparency=257), grey),
    ):
        image = read_image(data)
        assert image[0].min() == 255
        assert np.array_equal(image[1:], expected[1:])


def test_threads_read_large_and_small_pictures_and_change_no_global(rgb, monkeypatch):
    """Pillow's own limit stays what its user has set."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    files = [encoded(rgb, "PNG"), encoded(rgb, "BMP"), encoded(rgb, "JPEG")] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read_image, files))
    assert all(np.array_equal(image, found[i % 3]) for i, image in enumerate(found))
    assert Image.MAX_IMAGE_PIXELS == 10


# -- sizes -----------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(height=st.integers(2, 400), width=st.integers(2, 400), side=st.integers(8, 500))
def test_resizing_is_mmcvs_to_the_last_bit(height, width, side):
    mmcv = pytest.importorskip("mmcv")
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for long_side in (2048, 600):
        expected = mmcv.imrescale(image, (long_side, side))
        assert np.array_equal(resize_short_side(image, side, long_side), expected)


def test_a_thread_of_pixels_keeps_one():
    """mmcv rounds its side to 0, which OpenCV refuses."""
    assert resize_short_side(np.zeros((1, 9000, 3), np.uint8), 336).shape == (1, 2048, 3)


@pytest.mark.parametrize("side", [336, np.int64(336), np.uint8(200), torch.tensor(336)], ids=repr)
def test_short_sides(side):
    assert type(check_short_side(side)) is int
    assert check_short_side(side) == int(side)


@pytest.mark.parametrize(
    "side", [True, np.True_, 0, -1, 2049, 336.0, np.float32(336), "336", None], ids=repr
)
def test_what_is_no_short_side(side):
    with pytest.raises(ValueError, match="expected 1 to 2048 pixels"):
        check_short_side(side)


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
