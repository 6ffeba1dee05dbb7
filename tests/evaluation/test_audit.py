"""The command that says whether two results can be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfp import cli
from sfp.evaluation import card, settings
from sfp.evaluation import run as evaluate

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def audit(monkeypatch, capsys):
    """Runs `sfp audit` in this process: the exit code and what it printed."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*sides) -> tuple[int, str]:
        code = cli.main(["audit", *map(str, sides)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def write(folder: Path, config: str = "mini", miou: float = 50.0, **options) -> Path:
    """A card as an evaluation writes it."""
    loaded = evaluate.load_config(
        CONFIGS / f"cfg_{config}.py", options={k.replace("__", "."): v for k, v in options.items()}
    )
    groups = settings.settings(loaded)
    groups["data"].update(images=3, list_sha256="1", truth_sha256="2")
    groups["protocol"]["precision"] = "fp32"
    scores = dict(mIoU=miou, aAcc=80.0, mAcc=60.0, fwIoU=70.0, classes={})
    folder.mkdir()
    card.write_card(folder, groups, scores)
    return folder


def test_two_methods_compare(tmp_path, audit):
    a = write(tmp_path / "a")
    b = write(tmp_path / "b", miou=52.5, model__method__top_k=3)
    code, said = audit(a, b / "card.json")
    assert code == 0
    assert "differ only in method" in said
    assert "top_k" in said
    assert "+2.50" in said
    assert audit(a, a) == (0, audit(a, a)[1])
    assert "the same method and weights" in audit(a, a)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "name", "options"),
    [
        ("protocol", "logit_scale", dict(model__logit_scale=20.0)),
        ("protocol", "slide_crop", dict(model__slide_crop=0)),
        ("protocol", "pipeline Resize", dict(test_dataloader__dataset__pipeline__1__scale=(9, 9))),
        ("vocabulary", "class 1", dict(model__classes=["ball", ["house", "home"], "tree"])),
        ("data", "arguments", dict(test_dataloader__dataset__scenes=7)),
    ],
)
def test_refused(tmp_path, audit, group, name, options):
    words = ["ball", "house", "tree"]
    a = write(tmp_path / "a", model__classes=words)
    b = write(tmp_path / "b", **{"model__classes": words, **options})
    code, said = audit(a, b)
    assert code == 1
    assert f"NOT COMPARABLE: they differ in {group}, so" in said
    assert name in said
    assert "+0.00" not in said  # no difference of numbers that do not compare


def test_other_labels_are_other_data(tmp_path, audit):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    changed = json.loads((b / "card.json").read_text())
    changed["data"]["truth_sha256"] = "3"
    (b / "card.json").write_text(json.dumps(changed))
    code, said = audit(a, b)
    assert code == 1
    assert "differ in data" in said


def test_configs(tmp_path, audit):
    code, said = audit(CONFIGS / "cfg_voc20.py", CONFIGS / "cfg_voc21.py")
    assert code == 1
    assert "differ in protocol, vocabulary and data" in said
    for line in ("logit_scale", "number of classes", "PascalVOC20Dataset"):
        assert line in said
    assert audit("voc20", CONFIGS / "cfg_voc20.py")[0] == 0

    code, said = audit(write(tmp_path / "a"), CONFIGS / "cfg_mini.py")
    assert code == 0
    assert "Comparable, as far as is known" in said
    assert "Known on one side only: protocol precision, data images" in said


def test_published_numbers(audit):
    _, said = audit("voc21", "voc21_sam3")
    assert "A: published 61.4 (log in SFP's release), same protocol, as far as known.\n" in said
    assert "B: published 79.8 (another method's paper), settings not stated; here dataset" in said


def test_settings_are_compared_key_by_key():
    a = dict(data=dict(arguments=dict(scenes=4, more=dict(x=1, y=None))))
    b = dict(data=dict(arguments=dict(scenes=5, more=dict(x=1))))
    found = [(row.name, row.a, row.b) for row in card.differences(a, b)]
    assert found == [("arguments.scenes", "4", "5"), ("arguments.more.y", "null", "-")]


def test_weights_are_their_hash(tmp_path, audit):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    changed = json.loads((b / "card.json").read_text())
    changed["weights"]["name"] = "/elsewhere/mini.safetensors"
    (b / "card.json").write_text(json.dumps(changed))
    assert "the same method and weights" in audit(a, b)[1]
    changed["weights"]["sha256"] = "other"
    (b / "card.json").write_text(json.dumps(changed))
    code, said = audit(a, b)
    assert code == 0
    assert "differ only in weights" in said


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"protocol": 1}'])
def test_not_a_card(tmp_path, audit, text):
    file = tmp_path / "card.json"
    file.write_text(text)
    code, said = audit(file, file)
    assert code == 2
    assert f"{file} is not a card" in said


@pytest.mark.parametrize("name", ["nowhere", "nowhere.json", "."])
def test_nothing_there(tmp_path, audit, name):
    code, said = audit(tmp_path / name, "mini")
    assert code == 2
    assert "error: there is no c" in said  # config or card
    assert str(tmp_path / name) in said
