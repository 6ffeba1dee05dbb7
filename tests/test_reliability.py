"""What happens when things go wrong: damaged files, odd images, wrong labels, bad numbers, full disks.

docs/reliability.md lists the promises and which of these tests proves each.
"""

from __future__ import annotations

import functools
import http.server
import io
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
import trees
from fuzz import fuzz_readers
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.structures import SegDataSample
from PIL import Image
from processes import mounted
from safetensors.torch import save_file

import sfp
from sfp.clip import text as text_module
from sfp.clip.checkpoints import loading
from sfp.clip.checkpoints.loading import PUBLISHED, Published, WeightsError, load_clip
from sfp.clip.text import encode_queries, text_bank
from sfp.data.images import ImageError, check_whole, read_image
from sfp.functional import labels as labels_module
from sfp.functional import room
from sfp.functional import windows as windows_module
from sfp.functional.labels import assign
from sfp.functional.room import RoomError
from sfp.functional.windows import WindowGrid, interpolation, merge_matrix
from sfp.mini import prepare
from sfp.ops.attention import self_self
from sfp.ops.comparisons import cosines

CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = ["cat", "dog", "a red ball"]


def segmentor(**knobs) -> sfp.OpenVocabSegmentor:
    clip = knobs.pop("weights", None) or tiny.clip(**knobs.pop("size", {}))
    count = len(knobs.get("classes", WORDS))
    settings = dict(classes=WORDS, method="clip", query_features=tiny.queries(count), slide_crop=64)
    return sfp.OpenVocabSegmentor(
        clip, **{**settings, "slide_stride": 32, "scores": False, **knobs}
    )


def label(model: sfp.OpenVocabSegmentor, image: np.ndarray, **meta) -> torch.Tensor:
    """The label map of a BGR image, by the way that mmengine takes."""
    sample = SegDataSample(metainfo=dict(ori_shape=image.shape[:2], **meta))
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    (result,) = model.test_step(dict(inputs=[pixels], data_samples=[sample]))
    return result.pred_sem_seg.data[0]


# -- weights ---------------------------------------------------------------------------------------


def saved(path: Path, form: str, state: dict[str, torch.Tensor] | None = None) -> Path:
    """Weights in one of the formats that are read."""
    state = state or {k: v.contiguous() for k, v in tiny.clip().state_dict().items()}
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def test_a_folder_or_an_unreadable_path_is_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="no weights in the folder"):
        load_clip(tmp_path)


def test_a_swapped_published_file_is_not_even_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    path = tmp_path / "weights" / PUBLISHED["ViT-B/16"].file
    path.parent.mkdir()
    saved(path, "torch")
    monkeypatch.setattr(loading, "read_state", lambda path: pytest.fail("opened"))
    with pytest.raises(
        WeightsError, match=r"is not ViT-B/16: its SHA-256 is .*the published one is 5806e77c"
    ):
        load_clip("ViT-B/16")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """ViT-B/16 is a small file from a server in this process, in which the test may change it."""
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = saved(tmp_path / "ViT-B-16.pt", "torch")

    class Handler(http.server.SimpleHTTPRequestHandler):  # which knows no ranges
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        published = Published(path.name, loading.sha256_file(path))
        monkeypatch.setitem(PUBLISHED, "ViT-B/16", published)
        monkeypatch.setattr(Published, "url", property(lambda self: f"{address}/{self.file}"))
        yield published
        httpd.shutdown()


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_download_at_once(served, tmp_path):
    assert set(in_processes(lambda: load_clip("ViT-B/16").digest)) == {served.sha256}
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [served.file]


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "name", ["visual.transformer.resblocks.7.mlp.c_fc.weight", "ln_final.bias"]
)
def test_bad_numbers_in_weights_are_named(tmp_path, name, value):
    state = {k: v.clone() for k, v in tiny.clip().state_dict().items()}
    state[name].view(-1)[3] = value
    path = saved(tmp_path / "clip.pt", "safetensors", state)
    with pytest.raises(
        WeightsError, match=rf"{re.escape(name)} has 1 NaN or infinite of \d+ values"
    ):
        load_clip(path)


# -- images ----------------------------------------------------------------------------------------

# blocks of 8 pixels: what JPEG keeps
PICTURE = np.kron(
    np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8), np.ones((16, 16, 1), np.uint8)
)


def encoded(kind: str, mode: str = "RGB", pixels: np.ndarray = PICTURE, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def opencv(suffix: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(suffix, pixels)[1].tobytes()


GREY = np.asarray(Image.fromarray(PICTURE).convert("L"))
HALF = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 128, np.uint8)])
LONG = np.tile(PICTURE[:3], (1, 50, 1))
ALIKE = {  # 8-bit grey and RGB in JPEG and PNG: pixels are mmseg's to the last bit
    "jpeg": encoded("JPEG"),
    "jpeg progressive": encoded("JPEG", progressive=True),
    "jpeg grey": encoded("JPEG", "L"),
    **{f"jpeg exif {i}": encoded("JPEG", exif=exif(i)) for i in range(1, 9)},
    "png": encoded("PNG"),
    "png grey": encoded("PNG", "L"),
    "png exif": encoded("PNG", exif=exif(6)),
}
KINDS = {  # name: (file, what it shows, tolerance per value)
    "png": (encoded("PNG"), PICTURE, 0),
    "png grey": (encoded("PNG", "L"), GREY, 0),
    "png palette": (encoded("PNG", "P", palette=Image.Palette.ADAPTIVE), None, 0),
    "png grey and alpha": (encoded("PNG", "LA"), GREY, 0),
    "png half transparent": (
        opencv(".png", HALF[..., [2, 1, 0, 3]]),
        np.round(PICTURE * (128 / 255) + 127),
        1,
    ),
    "png transparent": (opencv(".png", HALF * [1, 1, 1, 0]), np.full_like(PICTURE, 255), 0),
    "png 16-bit": (opencv(".png", PICTURE[..., ::-1].astype(np.uint16) * 257), PICTURE, 0),
    "png 16-bit grey": (opencv(".png", GREY.astype(np.uint16) * 257), GREY, 0),
    "png 1-bit": (encoded("PNG", "1"), None, 0),
    "gif": (encoded("GIF"), None, 0),
    "bmp": (encoded("BMP"), PICTURE, 0),
    "webp": (encoded("WEBP", lossless=True), PICTURE, 0),
    "ppm": (encoded("PPM"), PICTURE, 0),
    "tiff": (encoded("TIFF"), PICTURE, 0),
    "tiff 16-bit": (opencv(".tiff", PICTURE[..., ::-1].astype(np.uint16) * 257), PICTURE, 0),
    "tiff 16-bit grey": (opencv(".tiff", GREY.astype(np.uint16) * 257), GREY, 0),
    "tiff cmyk": (encoded("TIFF", "CMYK"), PICTURE, 1),
    "jpeg": (encoded("JPEG", quality=100, subsampling=0), PICTURE, 3),
    "jpeg grey": (encoded("JPEG", "L", quality=100), GREY, 3),
    "jpeg cmyk": (encoded("JPEG", "CMYK", quality=100), PICTURE, 6),
    "jpeg on its side": (
        encoded("JPEG", quality=100, subsampling=0, exif=exif(6)),
        np.rot90(PICTURE, -1),
        3,
    ),
    "tiff on its side": (encoded("TIFF", exif=exif(8)), np.rot90(PICTURE), 0),
    "1x1": (encoded("PNG", pixels=PICTURE[:1, :1]), PICTURE[:1, :1], 0),
    "3x4000": (
        encoded("PNG", pixels=np.tile(PICTURE[:3], (1, 50, 1))),
        np.tile(PICTURE[:3], (1, 50, 1)),
        0,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind(tmp_path, kind):
    data, expected, tolerance = KINDS[kind]
    path = tmp_path / "image"
    path.write_bytes(data)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert np.array_equal(read_image(data, bgr=True), image[..., ::-1])
    if expected is not None:
        expected = expected if expected.ndim == 3 else expected[..., None].repeat(3, 2)
        assert image.shape == expected.shape
        assert np.abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("kind", ALIKE)
def test_images_of_benchmarks_are_mmsegs_to_the_last_bit(tmp_path, kind):
    path = tmp_path / "image"
    path.write_bytes(ALIKE[kind])
    init_default_scope("mmseg")
    theirs = sfp._mmseg.mmseg.registry.TRANSFORMS.build(dict(type="LoadImageFromFile"))
    ours = sfp._mmseg.mmseg.registry.TRANSFORMS.build(dict(type="LoadImage"))
    theirs, ours = (step(dict(img_path=str(path))) for step in (theirs, ours))
    assert np.array_equal(ours["img"], theirs["img"])
    assert ours["ori_shape"] == theirs["ori_shape"]
    assert ours["img_shape"] == theirs["img_shape"]


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "1x1"])
def test_truncated_images(kind, share):
    data = KINDS[kind][0]
    with pytest.raises(ImageError, match=r"^holiday\.jpg: "):
        read_image(data[: int(len(data) * share)], name="holiday.jpg")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"\n", "not an image"),
        (b"<html>404</html>", "not an image"),
        (bytes(5000), "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(100) + b"\xff\xd9", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # runs programs
        (opencv(".tiff", GREY.astype(np.float32)), "floating-point"),
        (opencv(".tiff", GREY.astype(np.int32) * 10**6), "beyond 16 bits"),
    ],
)
def test_files_that_are_no_images(tmp_path, content, why):
    path = tmp_path / "image.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=why) as error:
        read_image(path)
    assert str(error.value).startswith(str(path))


def test_paths_that_are_no_images(tmp_path):
    for path in (tmp_path / "nowhere.jpg", tmp_path, "/dev/zero"):
        with pytest.raises(ImageError, match=re.escape(str(path))):
            read_image(path)


def test_a_claim_of_gigapixels_costs_nothing():
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    png[29:33] = struct.pack(">I", __import__("zlib").crc32(png[12:29]))
    with pytest.raises(ImageError, match="claims 100000 x 100000 pixels"):
        read_image(bytes(png))
    with pytest.raises(ImageError, match="claims 80 x 48 pixels, more than 100"):
        read_image(encoded("PNG"), max_pixels=100)
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own guard is as it was


plain = functools.cache(segmentor)


@pytest.mark.slow
@pytest.mark.parametrize("method", sfp.list_methods())
@pytest.mark.parametrize("size", [(1, 1), (3, 150), (7, 9)])
def test_images_smaller_than_a_patch(method, size):
    """They are padded with the mean colour; every pixel has a label."""
    built = sfp.build_method(method)
    if built.needs_regions or "guide" in str(built):
        pytest.skip("its guide, or what proposes its regions, has a smallest size of its own")
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    model = plain()
    model.method = built
    labels = label(model, image)
    assert labels.shape == size
    assert labels.min() >= 0
    assert labels.max() < len(WORDS)


@pytest.mark.slow
def test_an_image_of_3_by_4000_pixels():
    assert label(segmentor(method="sfp"), KINDS["3x4000"][1]).shape == (3, 4000)


@pytest.mark.parametrize("crop", [0, 64])
def test_padding_is_for_windows_below_a_patch_only(crop):
    for size, expected in {
        (64, 8): (0, 0),
        (5, 64): (3, 0),
        (1, 1): (7, 7),
        (9, 9): (0, 0),
    }.items():
        assert WindowGrid.over(size, crop, 32, least=8).padding == expected


def test_large_images_stay_in_8_bits_and_give_the_same_labels(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (100, 190, 3), np.uint8)
    model = segmentor(prob_thd=0.3)
    whole = label(model, image)
    kept = []
    monkeypatch.setattr("sfp.engine.LARGE", 1000)
    cut = WindowGrid.cut
    monkeypatch.setattr(
        WindowGrid, "cut", lambda grid, x, *more: kept.append(x.dtype) or cut(grid, x, *more)
    )
    assert torch.equal(label(model, image), whole)
    assert set(kept) == {torch.uint8}
    monkeypatch.setitem(labels_module.BUDGET, "cpu", 5000)
    assert (label(model, image) != whole).float().mean() < 1e-3  # rounding of ties at most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (dict(pamr_steps=2), "PAMR of 100 x 190 pixels and 3 queries takes about .* pamr_steps=0"),
        (dict(scores=True), "probabilities of 100 x 190 pixels and 3 classes .* without scores"),
    ],
)
def test_what_cannot_fit_into_memory_is_refused(knobs, said, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (100, 190, 3), np.uint8)
    pixels, limit = 100 * 190, dict(pamr_steps=56 * 2 + 2 * 3, scores=3)[next(iter(knobs))]
    monkeypatch.setattr(room, "memory", lambda device: 4 * pixels * limit)
    label(segmentor(**knobs), image)  # just fits
    monkeypatch.setattr(room, "memory", lambda device: 4 * pixels * limit - 1)
    with pytest.raises(RoomError, match=said):
        label(segmentor(**knobs), image)
    label(segmentor(), image)


def test_memory_of_this_machine():
    found = room.memory(torch.device("cpu"))
    assert found is None or 2**28 < found < 2**48


@pytest.mark.skipif(not os.environ.get("SFP_SLOW"), reason="minutes; SFP_SLOW=1 runs it")
def test_a_panorama_of_200_megapixels():
    script = Path(__file__).with_name("panorama.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    used = json.loads(done.stdout.splitlines()[-1])
    # 3 bytes a pixel for the image, twice while it is packed, 12 for labels and confidence, and the
    # logits at patch resolution; no 200 million floats times 3, times 21 classes or times two
    assert used["peak_mb"] - used["before_mb"] < 5500
    assert used["labels"] > 10


# -- labels ----------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """The files of a miniature VOC: its dataset, its first image and the label map of that."""
    trees.build("voc21", tmp_path)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    init_default_scope("mmseg")
    config = Config.fromfile(CONFIGS / "cfg_voc21.py")
    dataset = sfp.data.datasets.DATASETS.build(config.test_dataloader.dataset)
    record = dataset.get_data_info(0)
    return dataset, Path(record["img_path"]), Path(record["seg_map_path"])


def write_labels(path: Path, labels: np.ndarray) -> None:
    cv2.imwrite(str(path), labels)


def test_the_miniature_voc_is_right(voc):
    dataset, image, labels = voc
    assert 255 in dataset[0]["data_samples"].gt_sem_seg.data
    write_labels(labels, np.full(cv2.imread(str(image)).shape[:2], 255, np.uint8))
    assert dataset[0] is not None  # nothing but ignored pixels


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:-40]), "truncated PNG"),
        (lambda p: p.write_bytes(b"no labels"), "."),
        (
            lambda p: write_labels(p, np.zeros((5, 7), np.uint8)),
            r"shape \(1, 5, 7\), .* 60x90",
        ),
        (
            lambda p: write_labels(p, np.zeros((60, 90, 3), np.uint8)),
            r"shape \(60, 90, 3\), expected",
        ),
        (
            lambda p: write_labels(p, np.full((60, 90), 21, np.uint8)),
            "label 21 in 5400 pixels",
        ),
        (lambda p: write_labels(p, np.full((60, 90), 300, np.uint16)), "16-bit label map"),
    ],
)
def test_label_maps_that_are_wrong(voc, change, why):
    dataset, _, labels = voc
    change(labels)
    with pytest.raises(sfp.DataError, match=why) as error:
        dataset[0]
    assert str(labels) in str(error.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(p.read_bytes()[:-500]), "truncated JPEG"),
        (lambda p: p.write_bytes(b"no image"), "."),
    ],
)
def test_benchmark_images_that_are_wrong(voc, change, why):
    dataset, image, _ = voc
    change(image)
    with pytest.raises(sfp.DataError, match=why) as error:
        dataset[0]
    assert str(image) in str(error.value)


def test_opencv_alone_would_have_read_half_an_image(voc):
    """Why `check_whole` exists: mmseg evaluates a truncated JPEG as a picture that ends in grey."""
    _, image, _ = voc
    image.write_bytes(image.read_bytes()[:-500])
    assert cv2.imread(str(image)) is not None
    with pytest.raises(ImageError):
        check_whole(image.read_bytes(), str(image))


# -- vocabulary (files and lists are in test_vocabulary.py) ----------------------------------------


def test_a_name_of_more_than_77_tokens_is_named():
    name = "supercalifragilistic " * 30
    with pytest.raises(
        ValueError, match=r"tokens, but CLIP reads at most 77: 'a photo of a supercali"
    ):
        encode_queries(tiny.clip(**tiny.WORDS), ["cat", name], ["a photo of a {}."])


def test_one_class_only():
    labels = label(segmentor(classes=["cat"], area_thd=0.1), PICTURE)
    assert labels.unique().tolist() == [0]


@pytest.mark.slow
def test_five_thousand_classes(monkeypatch):
    """Encoded in chunks, labelled in slabs of rows; nothing is 5,000 times the image."""
    names = [f"thing {i}" for i in range(5000)]
    clip = tiny.clip(**{**tiny.WORDS, "layers": 3})
    at_once = []
    encode = text_module._encode
    monkeypatch.setattr(
        text_module, "_encode", lambda c, q, t: at_once.append(len(q)) or encode(c, q, t)
    )
    features = encode_queries(clip, names, ["{}"])
    assert sum(at_once) == 5000
    assert max(at_once) <= text_module.CHUNK
    model = segmentor(weights=clip, classes=names, query_features=features)
    slabs = []
    rows = windows_module.LogitSheet.rows

    def watched(sheet, start, stop):
        slabs.append(5000 * (stop - start) * sheet.size[1])
        return rows(sheet, start, stop)

    monkeypatch.setattr(windows_module.LogitSheet, "rows", watched)
    labels = label(model, np.random.default_rng(0).integers(0, 256, (70, 100, 3), np.uint8))
    assert len(labels.unique()) > 1
    assert sum(slabs) == 5000 * 70 * 100
    assert max(slabs) <= labels_module.BUDGET["cpu"]


def test_queries_in_chunks_are_the_same_queries(monkeypatch):
    clip = tiny.clip(**tiny.WORDS)
    names = ["cat", "a much longer name", "dog", "cat"]
    whole = encode_queries(clip, names, ["{}", "a photo of {}"])
    monkeypatch.setattr(text_module, "CHUNK", 2)
    torch.testing.assert_close(encode_queries(clip, names, ["{}", "a photo of {}"]), whole)
    assert torch.equal(whole[0], whole[3])


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "where"),
    [
        ("conv1.weight", r"the weights visual\.conv1\.weight"),
        (
            "transformer.resblocks.5.ln_1.bias",
            r"the weights visual\.transformer\.resblocks\.5\.ln_1",
        ),
        ("proj", r"the weights visual\.proj"),
    ],
)
def test_nan_that_appears_in_weights_after_loading(parameter, where):
    model = segmentor()
    dict(model.clip.visual.named_parameters())[parameter].view(-1)[0] = math.nan
    with pytest.raises(FloatingPointError, match=where):
        label(model, PICTURE)


@pytest.mark.parametrize("layer", [0, 6, 10])
def test_infinite_features_name_their_layer_and_image(layer):
    """Finite weights whose products are not: 3e38 times anything above 1."""
    model = segmentor()
    model.clip.visual.transformer.resblocks[layer].mlp.c_proj.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match=rf"photo\.jpg: .*block {layer} \(visual\.trans"):
        label(model, PICTURE, img_path="photo.jpg")


def test_nan_in_an_image_or_in_a_readout_is_named():
    model = segmentor()
    with pytest.raises(FloatingPointError, match="first in the image"):
        model.predict([torch.full((3, 64, 64), math.nan)])
    model.clip.visual.transformer.resblocks[-1].mlp.c_proj.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"first in readout 0 \(through block -1\)"):
        label(model, PICTURE)


@pytest.mark.parametrize(
    ("part", "where"),
    [
        (
            dict(comparison=lambda features, trace: cosines(features, trace) / 0),
            "comparison <lambda>",
        ),
        (dict(refiners=[lambda logits, trace: logits.log().log()]), "refiner <lambda>, also"),
        (
            dict(readouts=[dict(attention=lambda heads, trace: self_self(heads, trace) / 0)]),
            r"readout 0 \(through block -1\), of <lambda>, own_tokens, also",
        ),
    ],
)
def test_nan_of_an_op_names_it(part, where):
    fields = {"readouts": [dict(attention=dict(type="self_self"))], **part}
    with pytest.raises(FloatingPointError, match=f"{where}.*or this part computes them"):
        label(segmentor(method=dict(type="Method", **fields)), PICTURE)


def test_nan_in_text_features_names_the_query(tmp_path):
    clip = tiny.clip(**tiny.WORDS)
    clip.ln_final.weight.fill_(3e38)
    clip.text_projection.fill_(3e38)
    with pytest.raises(FloatingPointError, match="text features, first of 'cat'"):
        text_bank(clip, ["cat"], ["{}"], folder=tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing bad is cached


def massive(scale: float) -> sfp.CLIP:
    """Weights that put out tokens a thousand times as long, as large ViTs do in some channels."""
    clip = tiny.clip()
    for block in clip.visual.transformer.resblocks:
        block.attn.in_proj_weight.mul_(3)
        block.mlp.c_proj.bias[:4] += scale
    return clip


@functools.cache
def in_precision(precision: str, scale: float) -> sfp.OpenVocabSegmentor:
    return segmentor(weights=massive(scale), precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("method", sfp.list_methods())
def test_half_precision_is_finite_where_fp32_is(method, scale):
    built = sfp.build_method(method)
    if built.needs_regions or "guide" in str(built):
        pytest.skip("needs a guide or regions; see tests/methods/test_methods.py")
    for precision in ("fp32", "bf16", "fp16"):
        model = in_precision(precision, scale)
        model.method = built
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # without the detour through fp32
            (logits,) = model(list(tiny.images(1, 64, 80)))
        assert logits.isfinite().all(), precision
        assert logits.dtype == torch.float32


def test_activations_beyond_fp16_run_again_in_fp32():
    expected = label(segmentor(weights=massive(3e4)), PICTURE)  # 3 blocks add up to more than 65504
    model = segmentor(weights=massive(3e4), precision="fp16")
    with pytest.warns(UserWarning, match=r"torch\.float16, first in block 2 .* again in float32"):
        labels = label(model, PICTURE)
    assert (labels == expected).float().mean() > 0.9
    assert model.clip.visual.proj.dtype == torch.float16


# -- caches: two processes, full disks, read-only folders ------------------------------------------


def in_processes(work, count: int = 3) -> list:
    """What `work` returns in forked processes that start together."""
    context = multiprocessing.get_context("fork")
    results, gate = context.Queue(), context.Barrier(count)

    def run() -> None:
        torch.set_num_threads(1)
        gate.wait()
        try:
            results.put(work())
        except BaseException as error:
            results.put(error)

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return found


@pytest.fixture(params=["full disk", "read-only", "a file in the way"])
def bad_folder(request, tmp_path):
    """A folder in which nothing can be written, and why."""
    if request.param == "a file in the way":
        (tmp_path / "cache").write_text("not a folder")
        yield tmp_path / "cache"
        return
    options = "size=8k" if request.param == "full disk" else "ro"
    with mounted(tmp_path / "cache", options) as folder:
        yield folder


def test_text_features_without_a_cache(bad_folder):
    """The run goes on, with a warning; nothing half-written stays."""
    clip = tiny.clip(**{**tiny.WORDS, "embed_dim": 512})
    names = [f"thing {i}" for i in range(20)]  # 40 kB of features
    with pytest.warns(UserWarning, match="text features are not cached: .*cache"):
        features = text_bank(clip, names, ["{}"], folder=bad_folder / "text")
    assert torch.equal(features, encode_queries(clip, names, ["{}"]))
    assert [p for p in bad_folder.rglob("*") if p.is_file()] == []


def test_mini_scenes_without_a_cache(bad_folder, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(bad_folder))
    with pytest.raises(OSError, match=r"cannot write the 2 scenes .* Set SFP_CACHE"):
        sfp.data.datasets.MiniSceneDataset(scenes=2)
    assert [p for p in bad_folder.rglob("*") if p.is_file()] == []


def test_weights_without_a_cache(bad_folder, served, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(bad_folder))
    with pytest.raises(WeightsError, match=r"could not download ViT-B/16.*give the path"):
        load_clip("ViT-B/16")
    assert [p for p in bad_folder.rglob("*") if p.is_file()] == []


def test_a_read_only_cache_that_holds_everything_is_enough(tmp_path, monkeypatch):
    clip = tiny.clip(**tiny.WORDS)
    with mounted(tmp_path / "cache", "size=4m") as folder:
        features = text_bank(clip, WORDS, ["{}"], folder=folder)
        prepare(folder / "mini-2", scenes=2)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        monkeypatch.setattr(
            text_module, "encode_queries", lambda *args: pytest.fail("encoded again")
        )
        assert torch.equal(text_bank(clip, WORDS, ["{}"], folder=folder), features)
        assert prepare(folder / "mini-2", scenes=2) == folder / "mini-2"


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_share_a_text_bank(tmp_path):
    clip = tiny.clip(**tiny.WORDS)
    names = [f"thing {i}" for i in range(50)]
    banks = in_processes(lambda: text_bank(clip, names, ["{}"], folder=tmp_path).numpy())
    assert all(np.array_equal(bank, banks[0]) for bank in banks)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_draw_the_mini_scenes(tmp_path):
    root = tmp_path / "mini-2"
    assert in_processes(lambda: prepare(root, scenes=2)) == [root] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["mini-2"]
    assert len(list(root.glob("*/*.png"))) == 4


@pytest.mark.parametrize("damage", [b"", b"x", None])
def test_a_damaged_text_bank_is_built_again(tmp_path, damage):
    clip = tiny.clip(**tiny.WORDS)
    features = text_bank(clip, WORDS, ["{}"], folder=tmp_path)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # one bit of a number, which only the checksum can tell
    path.write_bytes(data if damage is None else damage)
    assert torch.equal(text_bank(clip, WORDS, ["{}"], folder=tmp_path), features)
    assert path.read_bytes() != data


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 20),
)
def test_any_size_and_stride_gives_every_pixel_weights_that_sum_to_one(
    height, width, crop, stride, least
):
    stride = min(stride, crop) or 1
    grid = WindowGrid.over((height, width), crop, stride, least=least)
    windows = [grid.cut(torch.ones(1, height, width), place) for place in grid.places]
    assert len({window.shape for window in windows}) == 1
    assert min(windows[0].shape[1:]) >= min(least, *windows[0].shape[1:])
    assert all(side >= least for side in windows[0].shape[1:])
    cells = [max(side // least, 1) for side in windows[0].shape[1:]]
    sheet = grid.sheet(torch.ones(len(windows), 2, *cells), (height, width))
    torch.testing.assert_close(sheet.rows(0, height), torch.ones(2, height, width))


@settings(max_examples=60)
@given(
    st.integers(1, 60),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(1, 9),
    st.integers(1, 90),
)
def test_merging_never_builds_length_times_target(length, crop, stride, cells, target):
    """Resampling the columns equals the product with the full resampling matrix."""
    crop = min(crop, length)
    starts = windows_module.window_starts(length, crop, min(stride, crop))
    merged = merge_matrix(starts, crop, cells, length, length)
    whole = merge_matrix(starts, crop, cells, length, target)
    torch.testing.assert_close(whole, interpolation(length, target, merged) @ merged)


@settings(max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_labels_do_not_depend_on_the_slabs(classes, height, width, budget, seed):
    logits = torch.randn(classes, height, width, generator=torch.Generator().manual_seed(seed))
    knobs = dict(like=logits, prob_thd=0.4, area_thd=0.2, keep_scores=True)

    def run():
        return assign(lambda a, b: 3 * logits[:, a:b], (height, width), range(classes), **knobs)

    whole = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labels_module.BUDGET, "cpu", budget)
        parts = run()
    assert torch.equal(whole.labels, parts.labels)
    # vectorised exponentials round their last elements differently
    torch.testing.assert_close(parts.confidence, whole.confidence)
    torch.testing.assert_close(parts.scores, whole.scores)


@settings(max_examples=150)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_class_file_or_an_error_that_names_it(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "cls.txt"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            vocabulary = sfp.load_vocabulary(path)
        except ValueError as error:
            assert "cls.txt" in str(error)  # noqa: PT017
        else:
            assert sorted(set(vocabulary.index)) == list(range(vocabulary.num_classes))


def test_fuzz_seeds():
    """Some hundred of the inputs that tests/fuzz/fuzz_readers.py makes by the hundred thousand."""
    counts, _ = fuzz_readers.loop(600, seed=1, out=None)
    assert set(counts) == {"weights", "safetensors", "program", "vocabulary", "image", "bank"}
    assert min(counts.values()) > 80


def test_the_intact_fuzz_seeds_are_read():
    """Else the fuzzer would only ever see the first check fail."""
    unread = [
        seed[:1] + seed[1:9] for seed in fuzz_readers.seeds() if not fuzz_readers.one_input(seed)
    ]
    assert unread == []
