"""Clusters instead of words: k-means, Hungarian matching, and complete evaluations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import segmentors
import tiny
import torch
import trees
from mmengine.config import Config
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp import cli
from sfp.evaluation import clusters as unsupervised
from sfp.evaluation import compare
from sfp.evaluation import run as evaluate
from sfp.evaluation.metrics import HungarianMetric, match
from sfp.functional.kmeans import spherical_kmeans

FOLDER = Path(__file__).parents[2] / "configs"


def blobs(count: int = 4, each: int = 30, noise: float = 0.2, seed: int = 0) -> Tensor:
    """Unit vectors around some directions, `each` after the other."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(count, 1, 8, generator=generator), dim=-1)
    points = centres + noise * torch.randn(count, each, 8, generator=generator)
    return F.normalize(points, dim=-1).flatten(0, 1)


# -- k-means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.05, 0.3, 2.0])
def test_kmeans_is_as_good_as_scikit_learns(noise):
    """Which minimises distances; on unit vectors that is nearly the same, and ours may not be worse."""
    points = blobs(noise=noise)
    centres, score = spherical_kmeans(points, 4, restarts=50)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))
    cosine = points.double() @ centres.double().T
    assert score == pytest.approx(cosine.amax(1).mean().item(), abs=1e-6)
    theirs = KMeans(4, n_init=10, random_state=0).fit(points.numpy()).cluster_centers_
    theirs = F.normalize(torch.from_numpy(theirs).double(), dim=1)
    assert score >= (points.double() @ theirs.T).amax(1).mean() - 1e-7  # of float32 centres
    # a fixed point: each centre is the direction of its points' sum
    nearest = cosine.argmax(1)
    for k in range(4):
        expected = F.normalize(points[nearest == k].sum(0), dim=0)
        torch.testing.assert_close(centres[k], expected, atol=1e-5, rtol=0)


def test_kmeans_finds_groups():
    centres, _ = spherical_kmeans(blobs(noise=0.1), 4)
    labels = (blobs(noise=0.1) @ centres.T).argmax(1).view(4, 30)
    assert (labels == labels[:, :1]).all()
    assert len(labels[:, 0].unique()) == 4


def test_kmeans_settings():
    points = blobs(noise=1.0)
    again, other = (spherical_kmeans(points, 9, seed=s, restarts=1)[0] for s in (0, 1))
    assert torch.equal(again, spherical_kmeans(points, 9, seed=0, restarts=1)[0])
    assert not torch.equal(again, other)
    scores = [spherical_kmeans(points, 9, restarts=n)[1] for n in (1, 20)]
    assert scores[0] < scores[1]
    short, long = (spherical_kmeans(points, 9, restarts=1, iterations=n)[1] for n in (1, 100))
    assert short < long


def test_kmeans_of_few_points():
    points = F.normalize(torch.eye(3)[[0, 0, 0, 1, 2]], dim=1)
    centres, score = spherical_kmeans(points, 3)
    assert score == 1
    assert sorted(centres.argmax(1).tolist()) == [0, 1, 2]
    centres, score = spherical_kmeans(points, 5)  # more than there are different ones
    assert centres.isfinite().all()
    assert score == 1
    with pytest.raises(ValueError, match="6 clusters of 5 points"):
        spherical_kmeans(points, 6)


# -- matching ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (5, 3), (1, 1), (1, 4)], ids=str)
def test_match_against_all_assignments(shape):
    classes, clusters = shape
    matrix = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(0))
    found = match(matrix).tolist()
    given = [c for c in found if c >= 0]
    assert len(given) == len(set(given)) == min(shape)
    ours = sum(int(matrix[k, c]) for k, c in enumerate(found) if c >= 0)
    if classes <= clusters:
        every = itertools.permutations(range(clusters), classes)
        best = max(sum(int(matrix[k, c]) for k, c in enumerate(p)) for p in every)
    else:
        every = itertools.permutations(range(classes), clusters)
        best = max(sum(int(matrix[k, c]) for c, k in enumerate(p)) for p in every)
    assert ours == best


def scored(truth: np.ndarray, predicted: np.ndarray, classes: int, clusters: int | None):
    metric = HungarianMetric(clusters=clusters)
    metric.dataset_meta = dict(classes=[f"class {k}" for k in range(classes)])
    for t, p in zip(truth, predicted, strict=True):
        metric.process(
            {},
            [
                dict(
                    pred_sem_seg=dict(data=torch.from_numpy(p)[None]),
                    gt_sem_seg=dict(data=torch.from_numpy(t)[None]),
                )
            ],
        )
    return metric, metric.evaluate(len(truth))


@pytest.mark.parametrize("clusters", [None, 3, 4, 7])
def test_metric_against_loops(clusters):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (3, 9, 11))
    count = clusters or 4
    predicted = np.where(rng.random(truth.shape) < 0.6, (truth * 2 + 1) % count, 0)
    predicted = np.where(
        rng.random(truth.shape) < 0.2, rng.integers(0, count, truth.shape), predicted
    )
    truth[rng.random(truth.shape) < 0.1] = 255
    metric, scores = scored(truth, predicted, 4, clusters)

    counted = truth != 255
    best, chosen = -1, None
    options = [*range(count), *[-1] * max(4 - count, 0)]
    for assignment in itertools.permutations(options, 4):
        right = sum(((truth == k) & (predicted == c)).sum() for k, c in enumerate(assignment))
        if right > best:
            best, chosen = right, assignment
    assert scores["aAcc"] == pytest.approx(100 * best / counted.sum(), abs=0.006)
    found = metric.assignment.tolist()
    right = sum(((truth == k) & (predicted == c)).sum() for k, c in enumerate(found))
    assert right == best
    iou = []
    for k, c in enumerate(found):
        both = ((truth == k) & (predicted == c)).sum()
        either = ((truth == k) | ((predicted == c) & counted)).sum()
        iou.append(100 * both / either)
    assert scores["mIoU"] == pytest.approx(np.mean(iou), abs=0.006)
    assert len(metric.summary["IoU"]) == 4
    assert chosen is not None

    relabelled = metric.relabel(torch.from_numpy(predicted))
    for c in range(count):
        expected = found.index(c) if c in found else 255
        assert (relabelled[torch.from_numpy(predicted) == c] == expected).all()


def test_names_of_clusters_do_not_matter():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 5, (2, 4, 8, 8))
    _, scores = scored(truth, predicted, 5, None)
    _, same = scored(truth, rng.permutation(5)[predicted], 5, None)
    assert scores == same
    _, right = scored(truth, rng.permutation(5)[truth], 5, None)
    assert right["mIoU"] == right["aAcc"] == 100


def test_a_cluster_that_does_not_exist():
    with pytest.raises(ValueError, match=r"prediction has labels 0\.\.5"):
        scored(np.zeros((1, 2, 2), int), np.array([[[0, 5], [0, 0]]]), 4, 5)


# -- features ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_batch", [1, 32])
def test_patch_features(window_batch):
    """Those of all windows, as the segmentor cuts them."""
    model = sfp.OpenVocabSegmentor(
        tiny.clip(), ["a"], "sfp", slide_crop=64, slide_stride=32, window_batch=window_batch
    )
    image = tiny.images(1, 80, 100)[0]
    features = model.patch_features(image)
    assert features.shape == (2 * 3 * 64, 32)
    for n, (y, x) in enumerate((y, x) for y in (0, 16) for x in (0, 32, 36)):
        window = image[None, :, y : y + 64, x : x + 64]
        with torch.no_grad():
            tokens, _ = model.method.features(model.clip.visual, window)
        expected = F.normalize(tokens.patches[0], dim=-1)
        torch.testing.assert_close(features[64 * n : 64 * (n + 1)], expected, atol=1e-5, rtol=0)
    assert model.patch_features(image[:, :3, :5]).shape == (1, 32)


def test_features_that_need_words():
    model = sfp.OpenVocabSegmentor(tiny.clip(), ["a"], "resclip", slide_crop=64, slide_stride=32)
    with pytest.raises(LookupError, match="needs the text features"):
        model.patch_features(tiny.images(1)[0])


# -- evaluation ----------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """The mini world without words: four scenes, a quick method."""

    def make(name: str = "mini_unsupervised", **options) -> Config:
        return evaluate.load_config(
            FOLDER / f"cfg_{name}.py",
            work_dir=str(tmp_path / "work"),
            options={
                "test_dataloader.dataset.scenes": 4,
                "test_dataloader.num_workers": 0,
                **options,
            },
        )

    return make


@pytest.mark.slow
def test_evaluation_without_words(config, tmp_path, capsys):
    cfg = config(**{"clusters.patches": 40})
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=2)
    assert "clustering the patches of 4 images" in capsys.readouterr().err
    assert result["mIoU"] > 40  # of 18 classes; chance is near 5
    assert sorted(result["assignment"].values()) == list(range(18))
    assert list(result["assignment"])[-2:] == ["night", "brick wall"]
    assert (tmp_path / "work" / "sheet.png").is_file()
    centres = load_file(tmp_path / "work" / unsupervised.FILE)["queries"]
    assert centres.shape == (18, 128)
    card = json.loads((tmp_path / "work" / "card.json").read_text())
    assert card["protocol"]["clusters"] == dict(count=18, patches=40)
    assert "query_features" not in card["protocol"]
    assert len(card["run"]["clusters_sha256"]) == 64

    # started again: neither clusters nor images are computed again
    again = evaluate.evaluate(cfg, pictures=0)
    streams = capsys.readouterr()
    assert "continuing: 4 of 4" in streams.err
    assert "clustering" not in streams.err
    assert again["mIoU"] == result["mIoU"]
    assert again["assignment"] == result["assignment"]

    # with other settings both are; more clusters than classes
    more = evaluate.evaluate(config(**{"clusters.count": 25}), pictures=1)
    assert "clustering" in capsys.readouterr().err
    assert len(set(more["assignment"].values())) == 18
    assert max(more["assignment"].values()) >= 18
    assert len(more["classes"]) == 18


def test_clusters_are_the_labels(config):
    """What the evaluation scored are the centres nearest to the features, by hand for one image."""
    cfg = config(**{"model.slide_crop": 0, "model.method": "clip"})
    ready = unsupervised.ensure_clusters(cfg)
    model = compare.build_segmentor(ready)
    image = tiny.images(1, 64, 96)[0]
    (result,) = model([image], mode="predict")
    low = model.patch_features(image) @ load_file(ready.model.query_features)["queries"].T.to(image)
    maps = F.interpolate(low.T.unflatten(1, (4, 6))[None], (64, 96), mode="bilinear")[0]
    assert (result.pred_sem_seg.data[0] == maps.argmax(0)).float().mean() > 0.999


@pytest.mark.slow
def test_a_damaged_file_is_made_again(config, tmp_path, capsys):
    unsupervised.ensure_clusters(config())
    path = tmp_path / "work" / unsupervised.FILE
    whole = load_file(path)["queries"].clone()  # not a view of the file
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    unsupervised.ensure_clusters(config())
    assert "clustering" in capsys.readouterr().err
    assert torch.equal(load_file(path)["queries"], whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters.cuont": 3}, "clusters has no knob 'cuont'.*'count'"),
        ({"test_evaluator.type": "SegmentationMetric"}, "type='HungarianMetric'"),
    ],
)
def test_settings_that_are_wrong(config, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.check(config(**options))


@pytest.mark.parametrize("count", [9, 25])
def test_any_number_of_clusters_from_the_command_line(count):
    options = [f"clusters.count={count}", "test_dataloader.dataset.scenes=2"]
    assert cli.main(["eval", "mini_unsupervised", "--check", "--cfg-options", *options]) == 0


def test_methods_are_not_compared_by_clusters(config):
    with pytest.raises(ValueError, match="fitted to the features of one method"):
        compare.measure(config(), dict(a="clip"))


def test_query_features_from_a_file(tmp_path):
    from safetensors.torch import save_file

    save_file(dict(queries=tiny.queries(3)), tmp_path / "q.safetensors")
    settings = dict(weights=tiny.clip(), classes=["a", "b", "c"])
    model = sfp.OpenVocabSegmentor(**settings, query_features=str(tmp_path / "q.safetensors"))
    torch.testing.assert_close(model.text_features(), tiny.queries(3))
    with pytest.raises(ValueError, match=r"\(3, 32\): expected \(2, 32\)"):
        sfp.OpenVocabSegmentor(
            **dict(settings, classes=["a", "b"]), query_features=tmp_path / "q.safetensors"
        )
    with pytest.raises(FileNotFoundError, match="no_such"):
        sfp.OpenVocabSegmentor(**settings, query_features=tmp_path / "no_such.safetensors")
    save_file(dict(texts=tiny.queries(3)), tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for name in ("other", "broken"):
        with pytest.raises(ValueError, match=rf"{name}\.safetensors.*a tensor 'queries'"):
            sfp.OpenVocabSegmentor(**settings, query_features=tmp_path / f"{name}.safetensors")


# -- the other applications, from their configs ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [("mini_sam", segmentors.sam), ("mini_sam", segmentors.sam2), ("mini_dino", segmentors.dino)],
)
def test_masks_from_a_config(name, model, config, tmp_path):
    model().save_pretrained(tmp_path / "model")
    cfg = config(name, **{"model.masks.propose.model": str(tmp_path / "model")})
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=0)
    plain = config(name)
    plain.model.pop("masks")
    plain.work_dir = str(tmp_path / "plain")
    assert result["images"] == 4
    assert result["mIoU"] != evaluate.evaluate(plain, pictures=0)["mIoU"]


def test_the_voc_config_sees_whole_images():
    cfg = Config.fromfile(str(FOLDER / "cfg_voc21_sam.py"))
    steps = [step.type for step in cfg.test_pipeline]
    assert steps.index("KeepImage") < steps.index("Resize")
    assert cfg.test_pipeline == cfg.test_dataloader.dataset.pipeline
    base = Config.fromfile(str(FOLDER / "cfg_voc21.py"))
    assert cfg.test_pipeline[2] == base.test_pipeline[1]
    assert cfg.test_dataloader.dataset.ann_file == base.test_dataloader.dataset.ann_file
    assert cfg.model.area_thd == base.model.area_thd


@pytest.mark.slow
def test_a_config_without_clip(tmp_path, monkeypatch):
    """From files in the benchmark's layout to scores: SAM 3 sees images at their own size."""
    segmentors.sam3().save_pretrained(tmp_path / "model")
    files = trees.build("voc21", tmp_path / "data")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    cfg = evaluate.load_config(
        FOLDER / "cfg_voc21_sam3.py",
        work_dir=str(tmp_path / "work"),
        options={
            "test_dataloader.num_workers": 0,
            "model.guides.sam3.model": str(tmp_path / "model"),
            "model.prob_thd": 0.99,  # nothing is as sure: all is background
        },
    )
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=1)
    truth = np.concatenate([labels.flatten() for labels in files.values()])
    background = (truth == 0).sum() / (truth != 255).sum()
    assert result["aAcc"] == pytest.approx(100 * background, abs=1e-4)
    assert list((tmp_path / "work").rglob("sheet.png"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco27", "city_scapes27"])
def test_benchmarks_without_words(name, tmp_path, monkeypatch):
    """From files in the benchmark's layout to scores, with a random CLIP."""
    weights = tiny.save(
        tmp_path / "tiny.safetensors", **dict(tiny.WORDS, patch=32, image_size=224, layers=6)
    )
    trees.build(name, tmp_path / "data")
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))
    options = {"test_dataloader.num_workers": 0, "clusters.patches": 50}
    options["model.slide_crop"] = 0  # dozens of windows would only take time
    cfg = evaluate.load_config(
        FOLDER / f"cfg_{name}_unsupervised.py",
        weights=f"{weights}@quick_gelu",
        work_dir=str(tmp_path / "work"),
        options=options,
    )
    base = Config.fromfile(str(FOLDER / f"cfg_{name}.py"))
    assert cfg.test_dataloader.dataset == base.test_dataloader.dataset
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=1)
    assert sorted(result["assignment"].values()) == list(range(27))
    assert result["aAcc"] > 100 / 27  # the best of all matchings is better than chance
