"""Hashes of images and label maps, so that results for different files are never mixed."""

from __future__ import annotations

import hashlib
import os
import time

import numpy as np
import pytest
from PIL import Image

from sfp.evaluation import contents, settings
from sfp.evaluation import run as evaluate
from sfp.evaluation.contents import Content
from sfp.files import cache_dir


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The files that are read, not remembered."""
    paths: list[str] = []
    original = contents._read

    def spy(path: str) -> Content:
        paths.append(path)
        return original(path)

    monkeypatch.setattr(contents, "_read", spy)
    return paths


@pytest.fixture
def old(tmp_path, monkeypatch):
    """Files whose last change is long ago, as those of a dataset."""
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(contents, "SETTLED", -1e6)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(path.name)
    return list(map(str, paths))


def expected(paths: list[str]) -> list[Content]:
    return [Content(hashlib.sha256(open(p, "rb").read()).hexdigest()) for p in paths]


def test_hashes_are_remembered(old, read):
    assert contents.contents(old) == expected(old)
    assert sorted(read) == old
    read.clear()
    assert contents.contents(old[::-1]) == expected(old)[::-1]
    assert not read
    assert contents.contents([]) == []


def test_a_file_that_looks_the_same_is_read_again(old, read):
    """Size and modification time are restored; its change time cannot be."""
    contents.contents(old)
    before = os.stat(old[1])
    time.sleep(0.02)  # longer than a tick of the file system's clock
    with open(old[1], "w") as file:
        file.write("X")
    os.utime(old[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(old[1])
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    read.clear()
    assert contents.contents(old) == expected(old)
    assert read == [old[1]]


def test_a_file_put_in_the_place_of_another(old, read):
    contents.contents(old)
    before = os.stat(old[0])
    other = old[0] + ".new"
    with open(other, "w") as file:
        file.write("Y")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, old[0])
    assert contents.contents(old) == expected(old)


def test_what_changed_just_now_is_not_remembered(tmp_path, read, monkeypatch):
    """A second change within the clock's tick would leave no trace."""
    monkeypatch.setattr(contents, "SETTLED", 1e6)  # however long this test takes
    path = tmp_path / "a"
    path.write_text("a")
    for _ in range(2):
        contents.contents([str(path)])
    assert read == [str(path)] * 2


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', "{"])
def test_a_damaged_memory_is_made_again(old, read, text):
    contents.contents(old)
    (memory,) = cache_dir("contents").glob("*.json")
    memory.write_text(text.replace('"a"', f'"{old[0]}"'))
    assert contents.contents(old) == expected(old)
    read.clear()
    assert contents.contents(old) == expected(old)
    assert not read


def test_without_a_cache_folder(old, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "file"))
    assert contents.contents(old) == expected(old)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        contents.contents([str(tmp_path / "nowhere.png")])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(tmp_path, kind):
    tags = Image.Exif()
    for name, orientation in (("up", 1), ("down", 3)):
        tags[0x0112] = orientation
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind, exif=tags)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain", kind)
    found = contents.contents([str(tmp_path / name) for name in ("up", "down", "plain")])
    assert [x.orientation for x in found] == [1, 3, 1]


# -- what is kept of an evaluation ---------------------------------------------------------------


def accuracy(own, work: str = "work") -> float:
    return evaluate.evaluate(own.config(work), pictures=0)["aAcc"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["labels", "images"])
def test_a_correction_of_equal_size_is_seen(own, which, capsys):
    """Bitmaps have the same number of bytes whatever they show."""
    folder = own.root / which
    for path in folder.iterdir():
        Image.open(path).save(path, "BMP")  # under its name: the reader goes by what is inside
    first = accuracy(own)
    path = folder / "0.png"
    size = path.stat().st_size
    pixels = np.asarray(Image.open(path))
    Image.fromarray(1 - pixels if which == "labels" else 255 - pixels).save(path, "BMP")
    assert path.stat().st_size == size
    capsys.readouterr()
    again = accuracy(own)
    assert "starting over" in capsys.readouterr().err
    assert again == accuracy(own, "fresh")
    assert (again != first) or which == "images"


def test_the_same_files_elsewhere_are_the_same(own, tmp_path):
    """What they are counts, not where they lie or when they were written."""
    import shutil

    groups = [settings.settings(own.config(), dataset=_dataset(own.config()))]
    moved = own.root.rename(tmp_path / "moved")
    shutil.copytree(moved, own.root)
    groups.append(settings.settings(own.config(), dataset=_dataset(own.config())))
    assert groups[0] == groups[1]


def _dataset(config):
    dataset = evaluate.DATASETS.build(config.test_dataloader.dataset)
    dataset.full_init()
    return dataset


def test_photos_with_an_orientation_are_pointed_out(own, capsys):
    tags = Image.Exif()
    tags[0x0112] = 3
    own.image("1.png", np.zeros((48, 64, 3), np.uint8), exif=tags)
    assert "turned" not in capsys.readouterr().err
    accuracy(own)
    said = capsys.readouterr().err
    assert "1 of 3 images have an EXIF orientation, the first is 1.png: images are turned" in said
