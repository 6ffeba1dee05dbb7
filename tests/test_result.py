"""Results: files against independent readers, COCO against pycocotools, images by their pixels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageShow
from pycocotools import mask as reference
from pycocotools.coco import COCO

import sfp
from sfp.data.coco import coco_document, rle
from sfp.palette import class_palette

NAMES = ("background", "sky", "cat", "unseen")


def result(labels: np.ndarray | None = None, names: tuple[str, ...] = NAMES) -> sfp.Result:
    """Three of four classes, in blobs."""
    if labels is None:
        labels = np.zeros((40, 60), np.int32)
        labels[:15] = 1
        labels[20:30, 10:30] = labels[35:, 55:] = 2
        labels[30, 30] = 2  # touches the first blob at a corner
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*labels.shape, 3), np.uint8)
    confidence = rng.random(labels.shape, np.float32)
    return sfp.Result(labels.astype(np.int32), confidence, names, image, None)


# -- COCO ----------------------------------------------------------------------------------------


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_run_lengths_are_what_pycocotools_decodes(mask):
    code = rle(mask)
    assert sum(code["counts"]) == mask.size
    assert all(count > 0 for count in code["counts"][1:])
    decoded = reference.decode(reference.frPyObjects(code, *mask.shape))
    assert np.array_equal(decoded, mask)


@pytest.mark.parametrize("parts", [False, True])
def test_a_document_that_pycocotools_reads(tmp_path, parts):
    one, two = result(), result(np.full((10, 20), 2))
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(coco_document({"a.jpg": one, "b.jpg": two}, parts=parts)))
    coco = COCO(path)
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {
        2: "sky",
        3: "cat",
        4: "unseen",
    }
    for number, (file, each) in enumerate({"a.jpg": one, "b.jpg": two}.items(), 1):
        (image,) = coco.loadImgs([number])
        assert image["file_name"] == file
        assert (image["height"], image["width"]) == each.labels.shape
        labels = np.zeros(each.labels.shape, int)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert not labels[mask].any()  # nothing twice
            labels[mask] = annotation["category_id"] - 1
            code = coco.annToRLE(annotation)
            assert annotation["area"] == reference.area(code)
            assert annotation["bbox"] == reference.toBbox(code).tolist()
            assert annotation["score"] == pytest.approx(each.confidence[mask].mean(), abs=1e-4)
        assert np.array_equal(labels, each.labels)  # the background, 0, has no annotation
        assert len(annotations) == ((3 if parts else 2) if each is one else 1)


def test_parts_are_connected_diagonally_too():
    annotations = result().to_coco("a.jpg", parts=True)["annotations"]
    assert sorted(a["area"] for a in annotations if a["category_id"] == 3) == [25, 201]


def test_one_document_has_one_list_of_classes():
    with pytest.raises(ValueError, match=r"b\.jpg has other classes"):
        coco_document({"a.jpg": result(), "b.jpg": result(names=("sky", *NAMES[1:]))})
    assert coco_document({}) == dict(images=[], annotations=[], categories=[])


# -- files ---------------------------------------------------------------------------------------


def test_labels_as_a_palette_picture(tmp_path):
    each = result()
    each.save(tmp_path / "new" / "labels.png")
    read = Image.open(tmp_path / "new" / "labels.png")
    assert read.mode == "P"
    assert np.array_equal(np.array(read), each.labels)
    assert np.array_equal(np.array(read.convert("RGB")), np.array(each.palette)[each.labels])


def test_many_classes_take_16_bits(tmp_path):
    labels = np.arange(300).reshape(10, 30)
    each = result(labels, tuple(f"class {i}" for i in range(300)))
    each.save(str(tmp_path / "labels.png"))
    assert np.array_equal(np.array(Image.open(tmp_path / "labels.png")), labels)
    assert each.overlay().size == (30, 10)
    assert each._repr_png_()


def test_overlays(tmp_path):
    each = result()
    for name in ("seen.jpg", "seen.png", "SEEN.JPEG", "seen.webp"):
        each.save(tmp_path / name, overlay=True)
        assert Image.open(tmp_path / name).size == (60, 40)
    seen = np.array(Image.open(tmp_path / "seen.png"))
    assert np.array_equal(seen, np.array(each.overlay()))
    inside = np.array(each.overlay(opacity=1.0))[5, 5]
    assert inside.tolist() == list(each.palette[1])


@pytest.mark.parametrize(
    ("name", "overlay", "message"),
    [
        ("labels.jpg", False, "labels can only be saved as .png, since .jpg may change them"),
        ("labels", False, "unknown image format ''"),
        ("labels.txt", True, "unknown image format '.txt'"),
    ],
)
def test_endings(tmp_path, name, overlay, message):
    with pytest.raises(ValueError, match=message):
        result().save(tmp_path / name, overlay=overlay)
    assert not list(tmp_path.iterdir())


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    (tmp_path / "labels.png").write_bytes(b"before")

    def full(self, path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space left"):
        result().save(tmp_path / "labels.png")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


# -- what it says --------------------------------------------------------------------------------


def test_words_about_it():
    each = result()
    # 900 of 2400 pixels are sky; 200 + 1 + 25 cat
    assert repr(each) == "Result(60 x 40: background 53.1%, sky 37.5%, cat 9.4%)"
    assert each.shares == dict(background=1274 / 2400, sky=900 / 2400, cat=226 / 2400)
    many = result(np.arange(12)[None], tuple("abcdefghijkl"))
    assert repr(many).endswith("h 8.3% and 4 more)")
    assert each.mask("cat").sum() == each.mask(2).sum() == 226
    for wrong, message in (("cta", "did you mean 'cat'"), (4, "no label 4"), (-1, "no label -1")):
        with pytest.raises(ValueError, match=message):
            each.mask(wrong)


def test_colours():
    colours = class_palette([*(f"class {i}" for i in range(255)), "background"])
    assert colours[-1] == (0, 0, 0)
    assert len(set(colours[:24])) == 24
    assert (0, 0, 0) not in colours[:-1]
    assert len(class_palette(["x"] * 1000)) == 1000


@pytest.mark.parametrize("size", [(40, 60), (1, 1), (3, 400), (900, 30)], ids=str)
def test_what_notebooks_show(size):
    each = result(np.random.default_rng(0).integers(0, 4, size))
    shown = Image.open(io.BytesIO(each._repr_png_()))
    assert shown.format == "PNG"
    assert np.array(shown.convert("RGB")).std() > 5


def test_show(monkeypatch):
    """Outside of notebooks the system's viewer, and a hint where there is none."""
    opened = []
    monkeypatch.setattr(ImageShow, "show", lambda image: opened.append(image.size) or True)
    result().show()
    assert len(opened) == 1
    monkeypatch.setattr(ImageShow, "show", lambda image: False)
    with pytest.raises(RuntimeError, match="overlay=True"):
        result().show()


def test_show_in_a_notebook(monkeypatch):
    import IPython
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", shown.append)
    each = result()
    each.show()
    assert shown == [each]
