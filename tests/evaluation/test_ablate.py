"""Ablation studies, and comparisons that continue after a kill."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import pytest
import tiny
import trees
from mmengine.config import Config
from mmengine.registry import DefaultScope

import sfp
from sfp import cli
from sfp.evaluation import ablate, compare
from sfp.evaluation import run as evaluate
from sfp.segmentor import OpenVocabSegmentor

ROOT = Path(__file__).parents[2]
SCENES = 4
OPTIONS = {"test_dataloader.dataset.scenes": SCENES, "test_dataloader.num_workers": 0}
NAMES = ("modules", "self_attention", "layers", "detectors", "backbones", "cliptrase")
NAMES += ("cliptrase_release", "gclip")
POSTER = [57.0, 60.1, 62.3, 63.9]


def mini(work: Path, **options):
    """The mini world, four scenes of it."""
    return evaluate.load_config(
        ROOT / "configs/cfg_mini.py", work_dir=str(work), options={**OPTIONS, **options}
    )


@pytest.fixture
def ran(monkeypatch) -> list[tuple[str, int]]:
    """What goes through the network: image and number of methods."""
    calls: list[tuple[str, int]] = []
    predict = OpenVocabSegmentor.predict_each

    def spy(self, methods, inputs, samples):
        calls.extend((Path(sample.img_path).name, len(methods)) for sample in samples)
        return predict(self, methods, inputs, samples)

    monkeypatch.setattr(OpenVocabSegmentor, "predict_each", spy)
    return calls


def stop_after(images: int):
    """Progress that is interrupted."""

    def progress(*state) -> None:
        if state[-2] == images:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("name", NAMES)
def test_every_row_builds(name):
    study = ablate.find_study(name)
    labels = [row.label for row in study.rows]
    assert len({label.lower() for label in labels}) == len(labels) > 2
    built = [sfp.build_method(row.method) for row in study.rows if row.method]
    assert len(set(map(repr, built))) == len(built)  # every row is another method


def test_which_studies():
    assert set(ablate.studies()) == set(NAMES)
    detectors = [row.label for row in ablate.find_study("detectors").rows]
    assert detectors == ["none", *sfp.list_ops("detector")]
    with pytest.raises(ValueError, match="did you mean 'modules'"):
        ablate.find_study("module")


def values(row: ablate.Row) -> dict[str, float | str]:
    return {n.benchmark: n.value for n in row.published}


def test_rows_are_the_papers():
    """CLIPtrase's study is its tables 2, 4 and 5; numbers copied from the paper by hand."""
    rows = {row.label: row for row in ablate.find_study("cliptrase").rows}
    ade = {
        "CLIP": 2.30,
        "SCR": 15.79,
        "SCR + PC": 16.00,
        "SCR + PC + D": 16.35,
        "inner product": 7.49,
        "features clustered": 15.01,
        "layer 9": 0.41,
        "layer 10": 1.74,
        "layer 11": 4.08,
        "without SCR (table 4)": 3.01,
        "<x_i, x_i>": 11.55,
        "<x_i, x_j>": 15.58,
        "COS in ground truth": 16.50,
        "DINOv2 masks": 15.79,
    }
    assert {label: values(row)["ADE20K"] for label, row in rows.items() if row.published} == ade
    assert not rows["heads concatenated"].published
    assert {n.protocol for row in rows.values() for n in row.published} == {"cliptrase_224"}
    idle = [label for label, row in rows.items() if row.method is None]
    assert idle == ["without SCR (table 4)", "COS in ground truth"]  # what it is; an oracle


def test_backbones_have_their_own_numbers():
    row = {row.label: row for row in ablate.find_study("backbones").rows}["sfp_paper"]
    found = {n.backbone: n.value for n in row.published if n.benchmark == "VOC21"}
    assert found == {"ViT-B/16": 63.9, "ViT-B/32": 60.1, "ViT-L/14": 64.7}
    shown = ablate._of_weights(row, "ViT-L/14")
    assert {n.benchmark: n.value for n in shown} == {"VOC21": 64.7, "ADE20K": 22.1}


def test_rows_are_the_posters():
    modules = ablate.find_study("modules").rows
    assert [values(row)["VOC21"] for row in modules] == POSTER
    full = sfp.build_method("sfp_paper")
    assert repr(sfp.build_method(modules[-1].method)) == repr(full)
    layers = ablate.find_study("layers").rows
    assert repr(sfp.build_method(layers[0].method)) == repr(full)
    assert [row.method["integrator_start"] for row in layers] == [0, 4, 7, 9, 10]
    same = {row.label: row for row in ablate.find_study("self_attention").rows}
    for module, label in ((1, "qk"), (2, "qq+kk")):
        assert values(same[label]) == values(modules[module])
        methods = (sfp.build_method(row.method) for row in (same[label], modules[module]))
        assert len(set(map(repr, methods))) == 1


def test_trunks_are_shared():
    """SOM alone decides about the trunk of the poster's variants."""
    rows = [
        row
        for name in ("modules", "self_attention", "layers")
        for row in ablate.find_study(name).rows
    ]
    assert len({repr(sfp.build_method(row.method).trunk) for row in rows}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modules", "detectors"])
def test_command(name, capsys, tmp_path):
    arguments = ["ablate", "mini", "--study", name, "--work-dir", str(tmp_path)]
    arguments += ["--cfg-options", *(f"{k}={v}" for k, v in OPTIONS.items())]
    assert cli.main(arguments) == 0
    assert "mIoU" in capsys.readouterr().out
    record = json.loads((tmp_path / f"ablate_{name}.json").read_text(), parse_constant=pytest.fail)
    rows = ablate.find_study(name).rows
    assert [row["label"] for row in record["rows"]] == [row.label for row in rows]
    assert all(0 < row[k] <= 100 for row in record["rows"] for k in ablate.COLUMNS)
    assert record["images"] == SCENES
    page = (tmp_path / f"ablate_{name}.md").read_text()
    assert all(f"| {row.label} | " in page for row in rows)
    # of another benchmark: named so, and told apart from ours
    named = "VOC21, published (ViT-B/16) | ADE20K, published (ViT-B/16)"
    assert (named in page) == (name == "modules")
    assert ("for other benchmarks" in page) == (name == "modules")
    assert cv2.imread(str(tmp_path / f"ablate_{name}.png")).std() > 10


@pytest.mark.slow
def test_an_interrupted_study_continues(tmp_path, ran, capsys):
    whole = ablate.ablate(mini(tmp_path / "whole"), "modules")
    assert [methods for _, methods in ran] == [4] * SCENES
    ran.clear()
    with pytest.raises(KeyboardInterrupt):
        ablate.ablate(mini(tmp_path / "cut"), "modules", progress=stop_after(3))
    first = [image for image, _ in ran]
    assert len(first) == 3
    assert not (tmp_path / "cut/ablate_modules.json").exists()
    # one method loses its last record, to a kill within the write
    (torn,) = (tmp_path / "cut/journal/modules_+_SAE").glob("*.jsonl")
    torn.write_bytes(torn.read_bytes()[:-5])
    ran.clear()
    capsys.readouterr()
    again = ablate.ablate(mini(tmp_path / "cut"), "modules")
    said = capsys.readouterr().err
    assert "incomplete or damaged records: 1 " in said
    assert "continuing: 2 of 4 images are done for all 4 methods" in said
    assert again == whole
    assert [methods for _, methods in ran] == [1, 4]
    assert ran[0][0] == first[2]
    assert ran[1][0] not in first
    ran.clear()
    assert ablate.ablate(mini(tmp_path / "cut"), "modules") == whole
    assert not ran
    assert ablate.ablate(mini(tmp_path / "cut"), "modules", resume=False) == whole
    assert len(ran) == SCENES


@pytest.mark.slow
def test_a_comparison_takes_up_more_methods_and_other_settings(tmp_path, ran):
    config = mini(tmp_path, **{"test_dataloader.batch_size": 3})
    alone = compare.compare(config, {"clip": "clip"}, pictures=0)["methods"]["clip"]
    ran.clear()
    both = compare.compare(config, {"clip": "clip", "sclip": "sclip"}, pictures=0)
    assert both["methods"]["clip"] == alone
    assert [methods for _, methods in ran] == [1] * SCENES
    assert json.loads((tmp_path / "compare.json").read_text()) == both
    ran.clear()
    # a sheet needs labels, which are not in the journal: its images run again, and count once
    assert compare.compare(config, {"clip": "clip", "sclip": "sclip"}, pictures=1) == both
    assert [methods for _, methods in ran] == [2] * 3
    assert (tmp_path / "compare.png").is_file()
    ran.clear()
    config.model.logit_scale = 20.0
    compare.compare(config, {"clip": "clip"}, pictures=0)
    assert len(ran) == SCENES


@pytest.mark.slow
def test_a_name_is_not_a_method(tmp_path):
    """A label that stood for another method before brings nothing of that one's."""
    first = compare.measure(mini(tmp_path), {"mine": "clip"})
    second = compare.measure(mini(tmp_path), {"mine": "sfp"})
    assert second != first
    assert second == compare.measure(mini(tmp_path / "fresh"), {"mine": "sfp"})


@pytest.mark.slow
def test_backbones(tmp_path, ran):
    """One model after the other, each with rows and records of its own."""
    paths = [tmp_path / f"seed{seed}.safetensors" for seed in range(2)]
    weights = [str(tiny.save(path, seed, **tiny.WORDS)) for seed, path in enumerate(paths)]
    result = ablate.ablate(mini(tmp_path / "work"), "backbones", weights=weights)
    methods = ("clip", "sclip", "naclip", "sfp", "sfp_paper", "proxyclip", "lavg")
    assert [row["label"] for row in result["rows"]] == [
        f"seed{seed}: {method}" for seed in range(2) for method in methods
    ]
    assert [n for _, n in ran] == [5] * 2 * SCENES  # without a guide and without regions
    assert [row["mIoU"] is None for row in result["rows"]] == [False] * 5 + [True] * 2 + [
        False
    ] * 5 + [True] * 2
    assert "Not run: seed0: proxyclip, seed0: lavg, seed1" in ablate.caption(result)
    assert "| seed1: lavg | - | - | - |" in ablate.report(result)
    header, rows = ablate.sheet(result)
    assert header[4:6] == ["VOC21, published", "Context60, published"]  # a column each
    assert [row[4] for row in rows[:5]] == ["18.6 a", "59.7 a", "58.9 a", "-", "63.9 b"]
    assert "a: ViT-B/16; settings not stated. b: ViT-B/16." in ablate.caption(result)
    assert (tmp_path / "work/ablate_backbones.png").is_file()
    with pytest.raises(ValueError, match="study 'backbones'"):
        ablate.ablate(mini(tmp_path), "modules", weights=weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*'bed' is also in")
def test_published_numbers_of_the_same_benchmark(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    trees.build("voc21", tmp_path / "data")
    words = dict(tiny.WORDS, patch=32, image_size=224)
    config = evaluate.load_config(
        ROOT / "configs/cfg_voc21.py",
        weights=str(tiny.save(tmp_path / "tiny.safetensors", **words)),
        work_dir=str(tmp_path),
        options={"test_dataloader.num_workers": 0},
    )
    result = ablate.ablate(config, "modules")
    header, rows = ablate.sheet(result)
    assert header == ["variant", "mIoU", "mAcc", "aAcc", "VOC21, published (ViT-B/16)"]
    assert [row[-1] for row in rows] == [str(number) for number in POSTER]
    assert "other benchmarks" not in ablate.report(result)
    assert all(math.isfinite(row["mIoU"]) for row in result["rows"])
    # other settings than those of the numbers are named beside them
    config.model.prob_thd = 0.3
    config.work_dir = str(tmp_path / "other")
    other = ablate.sheet(ablate.ablate(config, "layers"))
    assert other[0][-1] == (
        "VOC21, published (ViT-B/16; protocol (SFP's configs) differs in prob_thd (0.15, here 0.3))"
    )
    # a digit that the source leaves open stays open
    assert other[1][-1][-1] == "62.x"
    record = compare.compare(config, {"sfp": "sfp", "mine": dict(type="sfp", pm="lof")}, pictures=0)
    assert record["published"] == {}  # nobody published anything of these weights
    record["published"] = compare.beside_published(
        Config(dict(config, model=dict(config.model, weights="ViT-B/16"))),
        {"sfp_paper": "sfp_paper", "mine": dict(type="sclip", csa=False)},
    )
    assert record["published"]["sfp_paper"] == [
        "published 63.9 (SFP's poster), protocol (SFP's configs) differs in prob_thd (0.15, here 0.3)"
    ]
    assert record["published"]["mine"][0] == (
        "published 59.7 (SFP's poster; run by SFP's authors), settings not stated; here csa false, by "
        "default true"
    )
    assert "\n* sfp_paper: published 63.9" in compare.compare_markdown(record)


def test_words_need_no_earlier_run(tmp_path):
    """In a new process mmengine looks for transforms in its own registry only."""
    with DefaultScope.overwrite_default_scope("mmengine"):
        config = compare.with_words(mini(tmp_path), "names")
    assert len(config.model.classes) == 18


@pytest.mark.slow
def test_boundaries_are_a_column(tmp_path):
    """With the metric's own value, as `sfp eval` has it, and the other scores as without it."""
    options = {"test_evaluator.type": "BoundaryMetric", "test_dataloader.dataset.scenes": 2}
    config = mini(tmp_path / "all", **options)
    record = compare.compare(config, {"clip": "clip"}, pictures=0)
    header, ((_, *row),) = compare.compare_sheet(record)
    assert header[1:] == ["mIoU", "mAcc", "aAcc", "fwIoU", "bIoU"]
    alone = mini(tmp_path / "eval", **options, **{"model.method": dict(_delete_=True, type="clip")})
    scores = evaluate.evaluate(alone, pictures=0)
    assert row == [f"{scores[k]:.1f}" for k in header[1:5]] + [f"{scores['metrics']['bIoU']:.1f}"]
    config.work_dir = str(tmp_path / "study")
    result = ablate.ablate(config, "gclip", paired="none")
    assert ablate.sheet(result)[0][:6] == ["variant", *header[1:4], "bIoU", "mIoU less none [95 %]"]
    assert all(0 < row["bIoU"] < row["mIoU"] for row in result["rows"])


@pytest.mark.slow
def test_vocabularies_are_an_axis_of_a_comparison(tmp_path, ran):
    mine = tmp_path / "mine.txt"
    names = (ROOT / "configs/cls_mini.txt").read_text().splitlines()
    mine.write_text("\n".join([*names[1:], names[0]]))
    config = mini(tmp_path / "work", **{"model.logit_scale": 20.0})
    alone = compare.compare(config, {"clip": "clip"}, pictures=0)["methods"]["clip"]
    config.work_dir = str(tmp_path / "words")
    ran.clear()
    words = ("shipped", str(mine), "names")
    record = compare.compare(config, {"clip": "clip", "sfp": "sfp"}, words=words, pictures=1)
    assert [methods for _, methods in ran] == [2] * SCENES * 3
    assert list(record["methods"]) == [f"{m} [{w}]" for w in words for m in ("clip", "sfp")]
    found = record["methods"]
    # the mini world's file has the names alone
    assert found["clip [shipped]"] == found["clip [names]"] == alone
    assert found[f"clip [{mine}]"] != alone
    ran.clear()
    again = compare.compare(config, {"clip": "clip", "sfp": "sfp"}, words=words, pictures=0)
    assert (again, ran) == (record, [])
    mine.write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="has 2 classes, but MiniSceneDataset has 18"):
        compare.compare(config, {"clip": "clip"}, words=words)
    with pytest.raises(FileNotFoundError, match=r"shiped.*did you mean 'shipped'"):
        compare.compare(config, {"clip": "clip"}, words=["shiped"])
    assert not ran


@pytest.mark.slow
def test_numbers_of_another_protocol_say_so(tmp_path):
    result = ablate.ablate(mini(tmp_path), "gclip")
    header, rows = ablate.sheet(result)
    assert header[4:] == [
        f"{name}, published (ViT-B/16; settings not stated)"
        for name in ("COCO-Stuff", "ADE20K", "Cityscapes")
    ]
    assert rows[-1][4:] == ["24.8", "18.5", "33.7"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["configs/cfg_mini.py", "--study", "layer"], 2, "did you mean 'layers'"),
        (["configs/cfg_min.py", "--study", "layers"], 2, "there is no config"),
        (["configs/cfg_mini.py", "--study", "layers", "--weights", "no.pt"], 3, "no.pt"),
        (["configs/cfg_mini.py", "--study", "gclip", "--weights", "mini", "mini"], 2, "backbones"),
    ],
)
def test_exit_codes(arguments, code, message, capsys):
    few = ["--cfg-options", f"test_dataloader.dataset.scenes={SCENES}"]
    assert cli.main(["ablate", *arguments, *few]) == code
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_help_names_every_study(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["ablate", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ablate.studies())
