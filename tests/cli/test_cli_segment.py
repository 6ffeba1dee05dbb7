"""`sfp segment`, on the mini world."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import segmentors
from PIL import Image

import sfp
from sfp import cli, mini
from sfp.cli.options import parse_classes

MINI = ["--weights", "mini", "--short-side", "224", "--device", "cpu"]


def run(*words: str) -> int:
    args = cli.build_parser().parse_args(["segment", *words])
    return args.run(args)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for i, name in enumerate(["a.png", "deep/b.png"]):
        cv2.imwrite(str(folder / name), mini.scene(900_009 + i, 240)[0][..., ::-1])
    return folder


@pytest.mark.slow
def test_a_folder(photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--classes", "cat|kitten, grass,sky", "--background", "sand, water"]
    assert run(str(photos), *words, *MINI, "--out", str(out), "--overlay", "--coco") == 0
    printed = capsys.readouterr()
    assert f"{photos}/a.png: " in printed.out
    assert f"2 of 2 images segmented; results in {out}" in printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("note: the mini CLIP knows the words of its drawn scenes only")
    model = sfp.load("mini", device="cpu", short_side=224)
    document = json.loads((out / "coco.json").read_text())
    for i, name in enumerate(["a", "deep/b"]):
        expected = model.segment(
            photos / f"{name}.png",
            [["cat", "kitten"], "grass", "sky"],
            background=["sand", "water"],
        )
        labels = np.array(Image.open(out / "labels" / f"{name}.png"))
        assert np.array_equal(labels, expected.labels)
        assert Image.open(out / "overlay" / f"{name}.jpg").size == (240, 240)
        assert f"{name}.png: {expected.summary()}" in printed.out
        assert document["images"][i]["file_name"] == str(photos / f"{name}.png")
    assert [c["name"] for c in document["categories"]] == ["cat", "grass", "sky"]
    assert {a["image_id"] for a in document["annotations"]} == {1, 2}


def test_words_that_the_mini_clip_never_saw(photos, capsys):
    assert run(str(photos / "a.png"), "--classes", "dog, sky|person", *MINI) == 0
    assert "dog, person: unknown to the mini CLIP" in capsys.readouterr().err


def test_a_result_that_cannot_be_written_fails_alone(photos, tmp_path, capsys):
    (tmp_path / "out" / "labels" / "a.png").mkdir(parents=True)
    words = ["--classes", "cat, sky", "--out", str(tmp_path / "out")]
    assert run(str(photos), *words, *MINI) == 1
    assert (tmp_path / "out" / "labels" / "deep" / "b.png").is_file()
    assert "1 of 2 images segmented" in capsys.readouterr().out


@pytest.mark.slow
def test_settings_arrive(photos, tmp_path, capsys):
    words = ["--classes", "mini", "--background", "0.5", "--method", "sclip", "--pamr", "2"]
    assert run(str(photos / "a.png"), *words, *MINI, "--out", str(tmp_path / "out")) == 0
    model = sfp.load("mini", "sclip", device="cpu", short_side=224, pamr_steps=2)
    expected = model.segment(photos / "a.png", "mini", background=0.5)
    labels = np.array(Image.open(tmp_path / "out" / "labels" / "a.png"))
    assert np.array_equal(labels, expected.labels)
    assert "background" in capsys.readouterr().out
    assert not (tmp_path / "out" / "coco.json").exists()
    assert run(str(photos / "a.png"), *words, *MINI) == 0  # prints, writes nothing


def test_one_broken_image_among_others(photos, tmp_path, capsys):
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes()[:500])
    words = ["--classes", "cat, sky", *MINI, "--out", str(tmp_path / "out"), "--coco", "--parts"]
    assert run(str(photos), *words) == 1
    printed = capsys.readouterr()
    assert "c.png: truncated" in printed.err
    assert "2 of 3 images" in printed.out
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 2
    with pytest.raises(sfp.ImageError, match=r"c\.png: truncated"):
        run(str(photos / "c.png"), *words)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--classes", ""], ValueError, "type the words to look for"),
        (["--classes", " , "], ValueError, "type the words to look for"),
        (["--classes", "no.txt"], FileNotFoundError, "no.txt: there is no such file"),
        (["--classes", "lists/words.csv"], FileNotFoundError, "lists/words.csv: there is no such"),
        (["--classes", "cat", "--background", "2"], ValueError, "between 0 and 1"),
        (["--classes", "cat", "--background", "cat"], ValueError, "'cat' is also a name"),
        (["--classes", "cat", "--overlay"], ValueError, "add --out FOLDER"),
        (["--classes", "cat", "--parts"], ValueError, "--coco"),
        (["--classes", "cat", "--method", "scilp"], ValueError, "did you mean 'sclip'"),
        (["--classes", "cat", "--weights", "no.pt"], sfp.WeightsError, "no.pt"),
        (["--classes", "cat", "--device", "gpu"], ValueError, "device='gpu'"),
    ],
    ids=str,
)
def test_command_lines_that_are_wrong(photos, words, error, message):
    with pytest.raises(error, match=message):
        run(str(photos), *MINI, *words)


@pytest.mark.parametrize(("word", "meant"), [("voc2", "voc21"), ("Cityscape", "city_scapes")])
def test_a_word_that_is_nearly_a_benchmark(word, meant):
    with pytest.warns(UserWarning, match=f"{word}: .* taken as a word; did you mean {meant}"):
        assert parse_classes(word) == [[word]]


def test_inputs_that_are_wrong(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(str(tmp_path / "none.jpg"), "--classes", "cat")
    (tmp_path / "some.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="use `sfp label`"):
        run(str(tmp_path / "some.tar"), "--classes", "cat")
    with pytest.raises(SystemExit) as exit_:
        run(str(photos))
    assert exit_.value.code == 2


def test_exit_codes(photos, capsys):
    """Through the one place that turns errors into codes."""
    for words, code in (
        (["--classes", "voc21", "--background", "sky"], 2),
        (["--classes", "cat", "--weights", "no.pt"], 3),
        (["--classes", "cat", *MINI], 0),
        (["--classes", "cat", "--weights", "mini"], 0),
    ):
        assert cli.main(["segment", str(photos / "a.png"), *words]) == code
    (photos / "a.png").write_bytes(b"")
    assert cli.main(["segment", str(photos / "a.png"), "--classes", "cat", *MINI]) == 3
    assert "a.png: the file is empty" in capsys.readouterr().err


# -- output that cannot show everything ----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "word", "shown"),
    [
        ("cp1252", "небо", r"\u043d\u0435"),
        ("ascii", "ciel é", r"ciel \xe9"),
        ("utf-8", "небо", "небо"),
    ],
)
def test_words_that_the_terminal_cannot_show(encoding, word, shown, photos, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    words = ["--classes", f"{word}, grass", *MINI, "--out", str(tmp_path / "out")]
    assert cli.main(["segment", str(photos / "a.png"), *words]) == 0
    terminal.flush()
    assert shown in terminal.buffer.getvalue().decode(encoding)
    assert (tmp_path / "out/labels/a.png").is_file()


def test_file_names_that_are_no_text(photos, tmp_path, monkeypatch):
    odd = os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")
    try:
        shutil.copy(photos / "a.png", odd)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    terminal = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    words = ["--classes", "sky, grass", *MINI, "--out", str(tmp_path / "out"), "--coco"]
    assert cli.main(["segment", str(photos), *words]) == 0
    assert len(list((tmp_path / "out/labels").rglob("*.png"))) == 3


def test_a_reader_that_leaves_does_not_end_the_work(photos, tmp_path, monkeypatch):
    """`sfp segment photos --out out | head -0`: 1, but all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        words = ["--classes", "sky, grass", *MINI, "--out", str(tmp_path / "out")]
        assert cli.main(["segment", str(photos), *words]) == 1
    assert len(list((tmp_path / "out/labels").rglob("*.png"))) == 2


def test_without_standard_output(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    words = ["--classes", "sky, grass", *MINI, "--out", str(tmp_path / "out")]
    assert cli.main(["segment", str(photos / "a.png"), *words]) == 0
    assert (tmp_path / "out/labels/a.png").is_file()


@pytest.mark.slow
def test_a_method_with_a_guide_and_without_clip(photos, tmp_path, capsys, monkeypatch):
    segmentors.sam3().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    photo, out = str(photos / "a.png"), str(tmp_path / "out")
    words = ["--classes", "cat", "--method", "sam3", "--weights", "none", "--device", "cpu"]
    given = ["--guide", "sam3=sam3:model=model,batch=2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one class is no softmax of one
        assert run(photo, *words, *given, "--background", "0.3", "--out", out) == 0
    assert "1 of 1 images segmented" in capsys.readouterr().out
    own = sfp.load("none", "sam3", guides=dict(sam3=dict(type="sam3", model="model")), device="cpu")
    expected = own.segment(photo, ["cat"], background=0.3).labels
    assert np.array_equal(np.array(Image.open(tmp_path / "out/labels/a.png")), expected)
    with pytest.raises(ValueError, match="expected NAME=TYPE"):
        run(photo, *words, "--guide", "sam3:model=model")
    with pytest.raises(LookupError, match="needs the guide 'sam3'; given: none"):
        run(photo, *words)
