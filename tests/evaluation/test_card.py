"""The reproduction card: its contents, and the changes that affect it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from sfp.clip.checkpoints.loading import PUBLISHED
from sfp.evaluation import run as evaluate
from sfp.evaluation import settings
from sfp.evaluation.journal import count, fingerprint
from sfp.plugins import import_modules
from sfp.registry import METHODS, OPS

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str = "mini", **options) -> Config:
    return evaluate.load_config(CONFIGS / f"cfg_{name}.py", options=options)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The work folder and the result of a small evaluation."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        options = {"test_dataloader.dataset.scenes": 3, "test_dataloader.num_workers": 0}
        config = load(**options)
        config.work_dir = str(work)
        yield work, evaluate.evaluate(config, pictures=0)


def test_a_card_says_everything(evaluated):
    work, result = evaluated
    found = json.loads((work / "card.json").read_text())
    for key, value in dict(
        logit_scale=40.0,
        prob_thd=0.0,
        area_thd=None,
        slide_crop=224,
        slide_stride=112,
        pamr_steps=0,
        pamr_dilations=[8, 16],  # a default that no config names
        precision="fp32",  # what "auto" became
    ).items():
        assert found["protocol"][key] == value
    assert found["protocol"]["pipeline Resize"] == [dict(scale=[2048, 224], keep_ratio=True)]
    assert len(found["vocabulary"]["classes"]) == 18
    assert found["method"] == {
        **settings.plain(load().model.method),
        "layers": [-2],
        "top_k": 10,
    } | {k: found["method"][k] for k in ("beta", "pre_layer", "post_layer", "integrator_end")}
    assert len(found["weights"]["sha256"]) == 64
    assert found["data"]["images"] == 3
    for hashed in ("list_sha256", "truth_sha256"):
        assert len(found["data"][hashed]) == 64
    assert {"sfp", "code", "torch", "numpy", "python"} <= set(found["versions"])
    assert any("mmengine" in package for package in found["versions"])
    assert found["run"]["device"] == "cpu"
    assert found["command"]
    assert found["scores"] == {k: result[k] for k in found["scores"]}
    assert {"mIoU", "aAcc", "mAcc", "fwIoU", "classes"} == set(found["scores"])

    page = (work / "card.md").read_text()
    for text in (f"{result['mIoU']:.2f}", found["weights"]["sha256"], "brick wall", "logit_scale"):
        assert text in page


def flip(**options) -> dict:
    return settings.settings(load(**{k.replace("__", "."): v for k, v in options.items()}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("protocol", dict(model__logit_scale=50.0)),
        ("protocol", dict(model__slide_stride=56)),
        ("protocol", dict(model__pamr_steps=10)),
        ("protocol", dict(model__templates=["a {}."])),
        ("protocol", dict(model__precision="bf16")),
        ("protocol", dict(model__data_preprocessor__mean=[0.0, 0.0, 0.0])),
        ("protocol", dict(test_dataloader__dataset__pipeline__1__scale=(2048, 336))),
        ("vocabulary", dict(model__classes=["sky", "sea"])),
        ("data", dict(test_dataloader__dataset__scenes=7)),
        ("method", dict(model__method__top_k=3)),
        ("method", dict(model__method__depth=None)),
        ("weights", dict(model__weights="ViT-B/16")),
        ("weights", dict(load_from="other.pth")),
        ("run", dict(test_dataloader__batch_size=2)),
    ],
)
def test_each_knob_is_in_its_group(group, options):
    before, after = flip(), flip(**options)
    assert [k for k in before if before[k] != after[k]] == [group]
    assert fingerprint(before) != fingerprint(after)


def test_where_things_lie_does_not_matter(monkeypatch, tmp_path):
    before = flip()
    words = tmp_path / "words.txt"
    words.write_text((CONFIGS / "cls_mini.txt").read_text())
    after = flip(model__classes=str(words), work_dir="elsewhere", model__weights="mini")
    assert before == after
    monkeypatch.setenv("DATA_ROOT", "/one")
    one = settings.settings(load("voc21"))
    monkeypatch.setenv("DATA_ROOT", "/two")
    assert settings.settings(load("voc21")) == one
    assert one["weights"]["sha256"] == PUBLISHED["ViT-B/16"].sha256


def test_code_of_other_people_counts(tmp_path, monkeypatch):
    """A user's own op, in a file of their own, is part of what determines a result."""
    before = settings.settings(load())["versions"]["code"]
    file = tmp_path / "mine.py"
    file.write_text("def quiet(trace, layer):\n    pass\n")
    space: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    monkeypatch.setitem(OPS.module_dict, "quiet_for_a_test", space["quiet"])
    one = settings.settings(load())["versions"]["code"]
    file.write_text("def quiet(trace, layer):\n    return None\n")
    two = settings.settings(load())["versions"]["code"]
    assert len({before, one, two}) == 3


def test_code_that_ones_own_code_imports_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_mine.py").write_text("GAIN = 1\n")
    (tmp_path / "mine_of_two.py").write_text(
        "import beside_mine\nfrom sfp.registry import METHODS\n"
        "@METHODS.register_module()\ndef of_two():\n    return {}\n"
    )
    try:
        import_modules([str(tmp_path / "mine_of_two.py")])
        one = settings.settings(load())["versions"]["code"]
        (tmp_path / "beside_mine.py").write_text("GAIN = 2\n")
        assert settings.settings(load())["versions"]["code"] != one
    finally:
        METHODS.module_dict.pop("of_two", None)
        for name in ("beside_mine", "mine_of_two"):
            sys.modules.pop(name, None)


def test_the_truth_has_a_hash():
    truth = torch.tensor([[0, 1], [1, 255]])
    one = settings.truth_hash({"a": count(torch.zeros(2, 2).long(), truth, 3, 255)})
    two = settings.truth_hash({"a": count(torch.ones(2, 2).long(), truth, 3, 255)})
    assert one == two  # whatever was predicted
    other = settings.truth_hash({"a": count(torch.zeros(2, 2).long(), truth.clamp(max=1), 3, 255)})
    assert one != other
