"""Other metrics in addition to or instead of the package's own, and notes on the ground truth."""

from __future__ import annotations

import json
import pickle

import cv2
import numpy as np
import pytest

from sfp import cli
from sfp.data.images import DataError
from sfp.evaluation import ablate, compare, scores
from sfp.evaluation import run as evaluate
from sfp.evaluation.configs import ConfigError
from sfp.segmentor import OpenVocabSegmentor

DICE = 'dict(type="IoUMetric", iou_metrics=["mDice", "mFscore"])'
FIRST = "_delete_=True, "


def run(own, evaluator: str = "", **options) -> dict:
    config = own.config(evaluator=f"test_evaluator = {evaluator}" if evaluator else "")
    evaluate.check(config)
    return evaluate.evaluate(config, **{"pictures": 0, **options})


def dice(matrix) -> float:
    """Mean over classes of 2 |A and B| / (|A| + |B|), in percent, from the result's IoU."""
    return np.mean([200 * iou / (100 + iou) for iou in matrix])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluator", "prefix"),
    [
        (DICE.replace("dict(", f"dict({FIRST}", 1), "IoUMetric"),
        (f'[dict(type="SegmentationMetric"), {DICE}]', "IoUMetric"),
        (f'[{DICE}, dict(type="SegmentationMetric")]', "IoUMetric"),
        (
            f'[dict(type="SegmentationMetric"), {DICE.replace("type", "prefix=`their`, type")}]',
            "their",
        ),
        (f'[dict(type="SegmentationMetric", prefix="our"), {DICE}]', "IoUMetric"),
    ],
)
def test_mmsegs_metric(own, evaluator, prefix):
    plain = run(own)
    result = run(own, evaluator.replace("`", '"'))
    for column in scores.COLUMNS:
        assert result[column] == plain[column]
    found = result["metrics"]
    assert set(found) >= {f"{prefix}/mDice", f"{prefix}/mFscore", f"{prefix}/aAcc"}
    expected = dice([row["IoU"] for row in plain["classes"].values()])
    assert found[f"{prefix}/mDice"] == pytest.approx(expected, abs=0.01)
    assert found[f"{prefix}/aAcc"] == pytest.approx(plain["aAcc"], abs=0.01)
    card = json.loads((own.root / "work/card.json").read_text())
    assert len(card["data"]["truth_sha256"]) == 64


@pytest.mark.slow
def test_two_of_one_kind(own):
    f = 'dict(type="IoUMetric", iou_metrics=["mFscore"])'
    d = 'dict(type="IoUMetric", iou_metrics=["mDice"])'
    found = run(own, f'[{d}, {f}, dict(type="SegmentationMetric", prefix="IoUMetric")]')["metrics"]
    assert {"IoUMetric 2/mDice", "IoUMetric 3/mFscore"} <= set(found)
    ours = 'dict(type="SegmentationMetric")'
    found = run(own, f"[{ours}, {ours}]")
    assert found["metrics"]["SegmentationMetric/mIoU"] == pytest.approx(found["mIoU"], abs=0.01)


@pytest.mark.slow
def test_others_see_every_image_each_time(own, capsys):
    """The journal has counts, which are not what another metric needs of an image."""
    evaluator = f'[dict(type="SegmentationMetric"), {DICE}]'
    assert run(own, evaluator) == run(own, evaluator)
    assert "continuing" not in capsys.readouterr().err


@pytest.mark.slow
def test_predictions_are_written_each_time(own):
    out = own.root / "maps"
    evaluator = f'dict(type="SegmentationMetric", output_dir={str(out)!r})'
    for _ in range(2):
        result = run(own, evaluator)
        assert {path.name for path in out.iterdir()} == {"0.png", "1.png", "2.png"}
        maps = {path.name: cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in out.iterdir()}
        right = sum((maps[n] == truth).sum() for n, truth in own.truth.items())
        total = sum(truth.size for truth in own.truth.values())
        assert result["aAcc"] == pytest.approx(100 * right / total, abs=1e-3)
        for path in out.iterdir():
            path.unlink()


def test_formatting_needs_no_labels(own):
    """The test set of a server: predictions, and no scores."""
    out = own.root / "maps"
    node = f'dict({FIRST}type="IoUMetric", format_only=True, output_dir={str(out)!r})'
    for path in (own.root / "labels").iterdir():
        path.unlink()
    config = own.config(evaluator=f"test_evaluator = {node}")
    config.test_dataloader.dataset.data_prefix.pop("seg_map_path")
    config.test_dataloader.dataset.pipeline.pop(1)
    evaluate.check(config)
    result = evaluate.evaluate(config, pictures=2)
    assert len(list(out.iterdir())) == 3
    assert result["images"] == 3
    assert "mIoU" not in result
    assert json.loads((own.root / "work/metrics.json").read_text()) == result
    assert evaluate.per_class_table(result).row_count == 0


def test_only_files_of_this_run_are_named(own, capsys):
    """An earlier card beside new metrics would be audited as theirs."""
    work = own.root / "work"
    assert cli.main(["eval", str(own.file()), "--pictures", "1"]) == 0
    assert "metrics.json, card.json, card.md, sheet.png\n" in capsys.readouterr().out
    node = (
        f'dict(type="SegmentationMetric", format_only=True, output_dir={str(own.root / "maps")!r})'
    )
    config = own.file(evaluator=f"test_evaluator = {node}")
    assert cli.main(["eval", str(config), "--pictures", "1"]) == 0
    assert capsys.readouterr().out.endswith(": metrics.json\n")
    assert not [name for name in evaluate.RESULTS[1:] if (work / name).exists()]


@pytest.mark.slow
def test_dumped_predictions(own):
    """mmengine's `DumpResults`, which scores nothing and needs whole samples."""
    out = own.root / "all.pkl"
    plain = run(own)
    result = run(own, f'[dict(type="DumpResults", out_file_path={str(out)!r})]')
    assert {k: result[k] for k in scores.COLUMNS} == {k: plain[k] for k in scores.COLUMNS}
    assert len(pickle.loads(out.read_bytes())) == 3


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ('dict(type="IoUMetrc")', "unknown metric 'IoUMetrc'; did you mean 'IoUMetric'"),
        ('dict(type="SegmentationMetric", ignored=3)', "test_evaluator: .*'ignored'"),
    ],
)
def test_wrong_metrics_are_found_before_anything_runs(own, evaluator, message, monkeypatch):
    monkeypatch.setattr(OpenVocabSegmentor, "predict_each", lambda *args: pytest.fail("ran"))
    with pytest.raises(ConfigError, match=message):
        run(own, evaluator)


# -- the ground truth ----------------------------------------------------------------------------


def both_doors(own, **more):
    """By `sfp eval` and by `sfp compare`."""
    yield lambda: evaluate.evaluate(own.config("one", **more), pictures=0)
    yield lambda: compare.measure(own.config("two", **more), {"clip": "clip"})


@pytest.mark.slow
def test_masks_of_0_and_255(own, capsys):
    for name, truth in own.truth.items():
        own.label(name, truth * 255)
    for door in both_doors(own):
        door()
        said = capsys.readouterr().err
        assert "1 of 2 classes never occur in the ground truth (sky)" in said
        assert "41.7 % of its pixels are ignored (label 255)" in said
    data = json.loads((own.root / "one/card.json").read_text())["data"]
    assert data["absent_classes"] == ["sky"]
    assert data["ignored_percent"] == pytest.approx(100 * 60 / 144, abs=1e-3)
    assert "ignored_percent" in (own.root / "one/card.md").read_text()


@pytest.mark.slow
def test_nothing_is_said_where_every_class_occurs(own, capsys):
    own.label("0.png", np.where(own.truth["0.png"], 255, 0).astype(np.uint8))
    for door in both_doors(own):
        door()
        assert "ground truth" not in capsys.readouterr().err


def test_all_pixels_ignored(own):
    for name, truth in own.truth.items():
        own.label(name, np.full_like(truth, 255))
    for door in both_doors(own):
        with pytest.raises(DataError, match="all 9216 pixels of the ground truth are ignored"):
            door()
    assert not (own.root / "one/metrics.json").exists()


def test_labels_of_another_class_list_are_named(own):
    path = own.label("1.png", np.full((48, 64), 7, np.uint8))
    for door in both_doors(own):
        with pytest.raises(DataError, match=rf"{path}: ground truth has labels 7\.\.7"):
            door()


@pytest.mark.slow
def test_another_label_is_ignored(own, capsys):
    """`ignore_index` of the metric counts for comparisons, too."""
    for name, truth in own.truth.items():
        own.label(name, truth * 9)
    more = dict(evaluator='test_evaluator = dict(type="SegmentationMetric", ignore_index=9)')
    accuracies = []
    for door in both_doors(own, **more):
        result = door()
        accuracies.append(result.get("aAcc", result.get("methods", {}).get("clip", {}).get("aAcc")))
        assert "(label 9)" in capsys.readouterr().err
    assert accuracies[0] == accuracies[1]


def test_columns_are_one_order():
    assert tuple(scores.COLUMNS) == ("mIoU", "mAcc", "aAcc", "fwIoU")
    assert scores.COLUMNS[:3] == ablate.COLUMNS
