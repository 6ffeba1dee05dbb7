"""Each benchmark from its config to its metrics file, on miniature trees in the layout on disk.

The model is random: the numbers mean nothing, but they must be those of its predictions.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
import trees
from mmseg.apis import inference_model, init_model

import sfp
from sfp import cli
from sfp.evaluation import run as evaluate
from sfp.evaluation.metrics import SegmentationMetric
from sfp.evaluation.scores import summarize
from sfp.visualize import sheets as sheet
from sfp.vocabulary import load_vocabulary

FOLDER = Path(__file__).parents[2] / "configs"

pytestmark = pytest.mark.filterwarnings("ignore:.*is also in")  # see test_vocabulary.py


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A random CLIP that reads words: patch 32, 224 pixels, like a small and shallow ViT-B/32."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    return str(tiny.save(path, **dict(tiny.WORDS, patch=32, image_size=224, layers=6)))


@pytest.fixture
def config(weights, tmp_path, monkeypatch):
    """Makes the data of a benchmark, and its config; the files come with it."""

    def make(name: str, **options):
        monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
        files = trees.build(name, tmp_path / "data")
        config = evaluate.load_config(
            FOLDER / f"cfg_{name}.py",
            weights=weights,
            work_dir=str(tmp_path / "work"),
            options={"test_dataloader.num_workers": 0, **options},
        )
        config.experiment_name = f"{name} {tmp_path.name}"
        return config, {tmp_path / "data" / path: labels for path, labels in files.items()}

    return make


def confusion(
    truth: list[np.ndarray], ours: list[np.ndarray], classes: int, ignored: int = 255
) -> np.ndarray:
    """Pixels by truth and prediction, the ignored ones left out: (K, K)."""
    matrix = np.zeros((classes, classes))
    for t, p in zip(truth, ours, strict=True):
        for row, column in zip(t[t != ignored], p[t != ignored], strict=True):
            matrix[row, column] += 1
    return matrix


def scores_by_hand(matrix: np.ndarray) -> dict:
    """In percent, class by class; None for what is not defined."""
    iou, acc = [], []
    for k in range(len(matrix)):
        union = matrix[k].sum() + matrix[:, k].sum() - matrix[k, k]
        iou.append(100 * matrix[k, k] / union if union else None)
        acc.append(100 * matrix[k, k] / matrix[k].sum() if matrix[k].sum() else None)
    share = matrix.sum(1) / matrix.sum()
    return dict(
        IoU=iou,
        Acc=acc,
        mIoU=np.mean([x for x in iou if x is not None]),
        mAcc=np.mean([x for x in acc if x is not None]),
        aAcc=100 * np.trace(matrix) / matrix.sum(),
        fwIoU=sum(s * x for s, x in zip(share, iou, strict=True) if s),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", trees.LAYOUTS)
def test_from_config_to_metrics(name, config, tmp_path):
    layout = trees.LAYOUTS[name]
    # eighty prompts for each of hundreds of names, and windows, would only take time
    quick = {"model.templates": ["{}"], "model.slide_crop": 0}
    cfg, files = config(name, **{} if name == "voc20" else quick)
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=1)

    written = json.loads(
        (tmp_path / "work" / "metrics.json").read_text(), parse_constant=pytest.fail
    )
    assert written == result
    assert result["images"] == len(files) == 3
    assert result["weights"] == cfg.model.weights
    assert result["method"] == dict(cfg.model.method)
    dataset = evaluate.DATASETS.build(cfg.test_dataloader.dataset)
    assert tuple(result["classes"]) == tuple(dataset.metainfo["classes"])
    assert len(result["classes"]) == load_vocabulary(cfg.model.classes).num_classes
    picture = cv2.imread(str(tmp_path / "work" / "sheet.png"))
    assert picture.shape[1] > 500
    assert picture.std() > 10

    model = init_model(cfg.copy(), device="cpu")  # its own way through the pipeline
    truth, ours = [], []
    for path, labels in files.items():
        truth.append(trees.evaluated(name, labels))
        ours.append(inference_model(model, str(path)).pred_sem_seg.data[0].numpy())
    expected = scores_by_hand(confusion(truth, ours, len(result["classes"]), layout.ignored))
    for key in ("mIoU", "mAcc", "aAcc", "fwIoU"):
        assert result[key] == pytest.approx(expected[key], abs=1e-3)
    for key in ("IoU", "Acc"):
        for scores, value in zip(result["classes"].values(), expected[key], strict=True):
            assert (scores[key] is None) == (value is None)
            if value is not None:
                assert scores[key] == pytest.approx(value, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_metric_counts_pixels(seed):
    """Absent classes, ignored pixels, several images of several sizes."""
    rng = np.random.default_rng(seed)
    metric = SegmentationMetric()
    metric.dataset_meta = dict(classes=[f"class {k}" for k in range(7)])
    truth, ours = [], []
    for size in ((5, 9), (30, 20), (1, 1)):
        truth.append(rng.choice([0, 1, 2, 3, 5, 255], size))
        ours.append(rng.choice([0, 1, 2, 4], size))
        sample = dict(
            gt_sem_seg=dict(data=torch.tensor(truth[-1])[None]),
            pred_sem_seg=dict(data=torch.tensor(ours[-1])[None]),
        )
        metric.process({}, [sample])
    scores = metric.compute_metrics(metric.results)
    expected = scores_by_hand(confusion(truth, ours, 7))
    for key in ("mIoU", "mAcc", "aAcc", "fwIoU"):
        assert metric.summary[key] == pytest.approx(expected[key])
        assert scores[key] == round(expected[key], 2)
    for key in ("IoU", "Acc"):
        defined = [np.nan if x is None else x for x in expected[key]]
        np.testing.assert_allclose(metric.summary[key], defined)
    assert np.isnan(metric.summary["IoU"][6])  # neither there nor predicted
    assert metric.summary["IoU"][4] == 0  # predicted only
    assert np.isnan(metric.summary["Acc"][4])
    assert metric.summary["IoU"][5] == metric.summary["Acc"][5] == 0  # there only


def test_summarize_of_nothing():
    """All pixels ignored: no number is made up."""
    scores = summarize(*torch.zeros(3, 4))
    assert all(np.isnan(scores[key]) for key in ("mIoU", "mAcc", "aAcc", "fwIoU"))


def test_large_counts_stay_exact():
    """More pixels than a float32 can count."""
    scores = summarize(*torch.tensor([[2**25 + 1, 1]] * 3))
    assert scores["mIoU"] == 100
    assert scores["aAcc"] == 100


# -- options -------------------------------------------------------------------------------------


def test_command_line_settings(weights, tmp_path):
    path = FOLDER / "cfg_voc21.py"
    config = evaluate.load_config(path, method="sclip", weights=weights)
    assert config.model.method == dict(type="sclip")  # nothing of SFP's flags is left
    assert config.model.weights == weights
    assert Path(config.work_dir) == Path("work/cfg_voc21")
    config = evaluate.load_config(
        path, method="sfp", options={"model.method.pm": "lof", "work_dir": str(tmp_path)}
    )
    assert config.model.method == dict(type="sfp", pm="lof")
    assert config.work_dir == str(tmp_path)
    config = evaluate.load_config(path, options={"model.method.purify": False})
    assert not config.model.method.purify
    assert config.model.method.enhancer == "qq+kk"
    with pytest.raises(evaluate.ConfigError, match=r"no config .*cfg_voc22.py: .* mean 'voc2"):
        evaluate.load_config(FOLDER / "cfg_voc22.py")


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        ("model.weights", "ViT-B/61", sfp.WeightsError, "did you mean 'ViT-B/16'"),
        ("model.method.pm", "dbscn", ValueError, "did you mean 'dbscan'"),
        ("model.method.purfy", False, ValueError, "did you mean 'purify'"),
        ("model.classes", "nowhere.txt", FileNotFoundError, "no class file 'nowhere.txt'"),
        ("model.prob_th", 0.1, ValueError, "prob_th"),
        ("model.precision", "fp8", ValueError, "unknown precision 'fp8'"),
        ("model.templates", "imagnet", ValueError, "'imagnet'"),
        ("model.slide_stride", 500, ValueError, "slide_stride=500"),
        ("model.classes", "{}/cls_voc20.txt", ValueError, "20 classes.*21"),
    ],
    ids=str,
)
def test_wrong_options_are_found_before_anything_runs(config, option, value, error, message):
    if isinstance(value, str):
        value = value.replace("{}", str(FOLDER))
    cfg, _ = config("voc21", **{option: value})

    def run() -> None:  # as tools/test.py does
        evaluate.check(cfg)
        evaluate.evaluate(cfg, pictures=0)

    with pytest.raises(error, match=message):
        run()


def test_a_truncated_image_is_named_in_one_line(config, weights, tmp_path, capsys):
    """Through the data loader's processes, as an evaluation meets it."""
    config("voc21")
    image = next((tmp_path / "data").rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-500])
    command = ["eval", "voc21", "--weights", weights, "--pictures", "0"]
    assert cli.main([*command, "--work-dir", str(tmp_path / "work")]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert str(image) in last
    assert "truncated JPEG" in last


@pytest.mark.slow
def test_evaluations_in_one_process_do_not_mix(config, tmp_path):
    """Each has its own folder for pictures, its own log, its own numbers."""
    cfg, files = config("voc21")
    cfg.pop("experiment_name")
    for run in ("first", "second"):
        cfg.work_dir = str(tmp_path / run)
        evaluate.evaluate(cfg, pictures=0, show_dir=str(tmp_path / run / "show"))
    for run in ("first", "second"):
        shown = list((tmp_path / run / "show").rglob("*.png"))
        assert len(shown) == len(files)
        assert len(list((tmp_path / run).glob("*/*.log"))) == 1
    assert not (tmp_path / "first" / "sheet.png").exists()


# -- picture sheets ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [2, 6])
def test_the_sheet_shows_different_images(config, monkeypatch, pictures):
    """Fewer images than asked for: each of them once."""
    drawn = []

    def spy(columns, names, palette, path):
        drawn.append(columns)
        sheet.picture_sheet(columns, names, palette, path)

    monkeypatch.setattr(evaluate, "picture_sheet", spy)
    cfg, files = config("voc21")
    evaluate.evaluate(cfg, pictures=pictures)
    (columns,) = drawn
    assert list(columns) == ["image", "ground truth", "plain CLIP", "SFP"]
    count = min(pictures, 3)
    assert {len(panels) for panels in columns.values()} == {count}
    labels = list(files.values())
    shown = [
        next(i for i, x in enumerate(labels) if np.array_equal(x, panel.labels))
        for panel in columns["ground truth"]
    ]
    assert len(set(shown)) == count
    for panel, i in zip(columns["image"], shown, strict=True):
        assert panel.image.shape[:2] == labels[i].shape
        assert panel.labels is None


def test_overlay():
    image = np.full((20, 30, 3), (200, 100, 0), np.uint8)
    labels = np.zeros((20, 30), np.int64)
    labels[:, 15:] = 1
    labels[:5, :5] = 255
    palette = [(10, 20, 30), (255, 0, 255)]
    plain = sheet.overlay(sheet.Panel(image), palette)
    assert np.array_equal(plain, image)
    mixed = sheet.overlay(sheet.Panel(image, labels), palette, opacity=1.0)
    assert (mixed[10, 5] == (10, 20, 30)).all()
    assert (mixed[10, 25] == (255, 0, 255)).all()
    assert (mixed[1, 1] == (200, 100, 0)).all()  # ignored: as it is
    assert (mixed[10, 15] == 255).all()  # the border


def test_overlay_of_many_classes(tmp_path):
    """Label 255 is a class like others where there are more; what is none is not drawn."""
    image = np.full((20, 30, 3), (200, 100, 0), np.uint8)
    labels = np.full((20, 30), 255, np.int64)
    labels[:, 15:] = 511
    labels[:5, :5] = 65535
    palette = [(k % 256, k // 256, 7) for k in range(600)]
    mixed = sheet.overlay(sheet.Panel(image, labels), palette, opacity=1.0)
    assert (mixed[10, 5] == (255, 0, 7)).all()
    assert (mixed[10, 25] == (255, 1, 7)).all()
    assert (mixed[1, 1] == (200, 100, 0)).all()
    assert (mixed[10, 15] == 255).all()  # the border
    names = [f"class {k}" for k in range(600)]
    panels = {"truth": [sheet.Panel(image, labels)]}
    sheet.picture_sheet(panels, names, palette, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").is_file()


@pytest.mark.slow
def test_a_sheet_of_one_picture_and_many_classes(tmp_path):
    """171 classes at once: the legend has room for all, and the file is a picture."""
    labels = np.arange(18 * 19).reshape(18, 19) % 171
    labels = np.kron(labels, np.ones((8, 8), int))
    image = np.random.default_rng(0).integers(0, 256, (*labels.shape, 3), np.uint8)
    palette = np.random.default_rng(1).integers(0, 256, (171, 3)).tolist()
    names = ["on" * (2 + 5 * k % 11) for k in range(171)]  # of many lengths
    columns = {"image": [sheet.Panel(image)], "labels": [sheet.Panel(image, labels)]}
    sheet.picture_sheet(columns, names, palette, tmp_path / "sheet.png")
    picture = cv2.imread(str(tmp_path / "sheet.png"))
    for edge in (picture[:, 0], picture[:, -1], picture[-1], picture[0]):
        assert (edge == 255).all()  # no name runs out of the picture
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
