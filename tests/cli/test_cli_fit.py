"""`sfp fit`, from a folder of scenes to a method with the file that it writes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import segmentors
from PIL import Image
from safetensors.torch import load_file

import sfp
from sfp import cli, mini

MINI = ["--weights", "mini", "--device", "cpu", "--short-side", "112"]


def run(*words: str) -> int:
    args = cli.build_parser().parse_args([*words])
    return args.run(args)


@pytest.fixture
def photos(tmp_path):
    """Two scenes, their regions (four quarters, one of them none), and a file that is no image."""
    folder, maps = tmp_path / "photos", tmp_path / "maps"
    (folder / "deep").mkdir(parents=True)
    (maps / "deep").mkdir(parents=True)
    ids = np.kron([[0, 1], [2, 3]], np.ones((56, 56))).astype(np.uint8)
    for i, name in enumerate(["a.png", "deep/b.png"]):
        cv2.imwrite(str(folder / name), mini.scene(900_009 + i, 112)[0][..., ::-1])
        Image.fromarray(ids).save(maps / name)
    (folder / "c.png").write_bytes(b"nothing")
    return folder, maps


def test_templates(photos, tmp_path, capsys):
    out = tmp_path / "experts.json"
    classes = tmp_path / "classes.txt"
    classes.write_text("sky\ngrass\ncat, kitten\n")
    words = ["--classes", str(classes), "--out", str(out), "--templates", "vild"]
    assert run("fit", "templates", str(photos[0]), *words, *MINI, "--count", "2") == 0
    printed = capsys.readouterr()
    assert f"{out}: 2 of " in printed.out
    assert "left out: " in printed.err
    assert "c.png" in printed.err
    found = json.loads(out.read_text())
    assert set(found["experts"]) == {"sky", "grass", "cat"}


def test_templates_of_no_image(photos, tmp_path, capsys):
    """A file of an earlier run is kept."""
    folder, out = photos[0], tmp_path / "experts.json"
    out.write_text("earlier")
    for image in ("a.png", "deep/b.png"):
        (folder / image).write_bytes(b"nothing")
    words = ["--classes", "voc20", "--out", str(out), "--templates", "vild"]
    assert cli.main(["fit", "templates", str(folder), *words, *MINI]) == 3
    assert "none of the 3 images could be used" in capsys.readouterr().err
    assert out.read_text() == "earlier"


def test_memory(photos, tmp_path, capsys, monkeypatch):
    folder, maps = photos
    segmentors.dino(patch=16).save_pretrained(tmp_path / "dino")
    monkeypatch.chdir(tmp_path)
    given = ["--guide", "dino=transformers:model=dino", "--regions", f"files:folder={maps}"]
    out = tmp_path / "memory.safetensors"
    method = ["--method", "sclip", "--slide-crop", "112", "--out", str(out)]
    assert run("fit", "memory", str(folder), *method, *MINI, *given) == 0
    assert f"{out}: 6 regions" in capsys.readouterr().out
    found = load_file(out)
    assert found["keys"].shape == (6, 32)
    assert len(found["values"]) == 6
    knobs = f"region_memory:base=sclip,memory={out},count=1"
    words = ["--classes", "cat,sky,grass", "--method", knobs, "--out", str(tmp_path / "labels")]
    assert run("segment", str(folder / "a.png"), *words, *MINI, *given) == 0
    model = sfp.load(
        "mini",
        dict(type="region_memory", base="sclip", memory=str(out), count=1),
        guides=dict(dino=dict(type="transformers", model="dino")),
        regions=dict(type="files", folder=str(maps)),
        short_side=112,
        device="cpu",
    )
    labels = model.segment(folder / "a.png", ["cat", "sky", "grass"]).labels
    assert np.array_equal(np.array(Image.open(tmp_path / "labels/labels/a.png")), labels)
    plain = model.segment(folder / "a.png", ["cat", "sky", "grass"], method="sclip").labels
    assert (labels != plain).any()
    with pytest.raises(LookupError, match="regions of the image"):
        run("fit", "memory", str(folder), *method, *MINI, *given[:2])


def test_label_takes_guides_and_regions(photos, tmp_path, monkeypatch):
    folder, maps = photos
    (folder / "c.png").unlink()
    segmentors.dino(patch=16).save_pretrained(tmp_path / "dino")
    monkeypatch.chdir(tmp_path)
    words = ["--classes", "cat,sky", "--method", "corrclip:eps=None", "--out", "out"]
    given = ["--guide", "dino=transformers:model=dino", "--regions", f"files:folder={maps}"]
    assert run("label", str(folder), *words, *MINI, *given) == 0
    job = json.loads((tmp_path / "out/settings.json").read_text())
    assert job["method"]["eps"] is None
    assert job["protocol"]["guides"] == dict(dino=dict(type="transformers", model="dino"))
    assert job["protocol"]["regions"] == dict(type="files", folder=str(maps))
    assert len(list((tmp_path / "out/labels").rglob("*.png"))) == 2
