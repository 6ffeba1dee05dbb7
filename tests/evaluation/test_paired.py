"""Differences with intervals: against label maps drawn and scored one by one, and SciPy's bootstrap."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

from sfp import cli
from sfp.cli.options import parse_method
from sfp.evaluation import paired
from sfp.evaluation.journal import count

CLASSES, IGNORED, IMAGES = 6, 255, 40
FEW = ["--cfg-options", "test_dataloader.dataset.scenes=4", "test_dataloader.num_workers=0"]


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, list[np.ndarray]]:
    """Truth (images, 60) and two methods' labels; class 5 occurs in few images, class 4 in none."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 4, (IMAGES, 60))
    truth[:3, :9] = 5
    truth[rng.random(truth.shape) < 0.1] = IGNORED
    guesses = []
    for share in (0.3, 0.35):
        wrong = rng.random(truth.shape) < share * rng.uniform(0.2, 1.8, (IMAGES, 1))
        other = np.where(rng.random(truth.shape) < 0.02, 5, rng.integers(0, 4, truth.shape))
        guesses.append(np.where(wrong | (truth == IGNORED), other, truth))
    return truth, guesses


@pytest.fixture(scope="module")
def pixels(maps) -> list[np.ndarray]:
    truth, guesses = maps
    entries = [
        [count(torch.from_numpy(g), torch.from_numpy(t), CLASSES, IGNORED) for g, t in each]
        for each in (zip(guess, truth, strict=True) for guess in guesses)
    ]
    return [paired.class_pixels(each, CLASSES) for each in entries]


def mean_iou(guess: np.ndarray, truth: np.ndarray) -> float:
    """From the label maps, one class after the other."""
    guess, truth = guess[truth != IGNORED], truth[truth != IGNORED]
    scores = []
    for k in range(CLASSES):
        either = ((guess == k) | (truth == k)).sum()
        if either:
            scores.append(100 * ((guess == k) & (truth == k)).sum() / either)
    return float(np.mean(scores))


def test_it_is_the_bootstrap_over_images(maps, pixels, monkeypatch):
    """Every draw in full: its images one behind the other, some twice, some not at all."""
    truth, guesses = maps
    rng = np.random.default_rng(11)
    differences = []
    for _ in range(300):
        times = rng.multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES))
        drawn = np.repeat(np.arange(IMAGES), times)
        first, second = (mean_iou(guess[drawn], truth[drawn]) for guess in guesses)
        differences.append(first - second)
    low, high = np.percentile(differences, [2.5, 97.5])
    whole = mean_iou(guesses[0], truth) - mean_iou(guesses[1], truth)
    for most in (paired.BYTES, 2**14):  # in one piece, and in chunks
        monkeypatch.setattr(paired, "BYTES", most)
        ours = paired.paired(*pixels, resamples=300, seed=11)
        assert ours == pytest.approx(dict(difference=whole, low=low, high=high), abs=1e-9)


def test_it_is_scipys_percentile_interval(maps, pixels):
    stats = pytest.importorskip("scipy.stats")
    truth, (first, second) = maps

    def difference(images: np.ndarray) -> float:
        images = images.astype(int)
        return mean_iou(first[images], truth[images]) - mean_iou(second[images], truth[images])

    theirs = stats.bootstrap(
        (np.arange(IMAGES),),
        difference,
        n_resamples=1000,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(5),
    ).confidence_interval
    ours = paired.paired(*pixels)
    width = ours["high"] - ours["low"]
    assert ours["low"] == pytest.approx(theirs.low, abs=0.12 * width)
    assert ours["high"] == pytest.approx(theirs.high, abs=0.12 * width)


def test_pairing_is_what_makes_it_narrow(pixels):
    """The same images in another order: the difference stays, its interval does not."""
    first, second = pixels
    ours, theirs = paired.paired(first, second), paired.paired(first, second[::-1])
    assert ours["difference"] == theirs["difference"]
    assert ours["high"] - ours["low"] < theirs["high"] - theirs["low"]
    assert paired.paired(first, first) == dict(difference=0.0, low=0.0, high=0.0)
    with pytest.raises(ValueError, match="same images"):
        paired.paired(first, second[1:])


def test_who_is_paired_with_whom():
    assert paired.bases("abc", "b") == {"a": "b", "c": "b"}
    assert paired.bases("abc", "previous") == {"b": "a", "c": "b"}
    with pytest.raises(ValueError, match=r"--paired d: expected one of a, b, c"):
        paired.bases("abc", "d")


def test_methods_with_knobs():
    assert parse_method("sfp") == dict(type="sfp")
    assert parse_method("sfp:purify=False,layers=[-3,-2],pm=lof") == dict(
        type="sfp", purify=False, layers=[-3, -2], pm="lof"
    )
    with pytest.raises(ValueError, match="expected KNOB=VALUE, got 'purify'"):
        parse_method("sfp:purify")


@pytest.mark.slow
def test_commands(tmp_path, capsys):
    off = "sfp:purify=False"
    words = ["compare", "mini", "--methods", "clip", off, "sfp", "--paired", off, "--pictures", "0"]
    assert cli.main([*words, "--work-dir", str(tmp_path), *FEW]) == 0
    assert f"mIoU less {off}" in capsys.readouterr().out.replace("\n", " ")
    record = json.loads((tmp_path / "compare.json").read_text())
    level = {name: scores["mIoU"] for name, scores in record["methods"].items()}
    assert record["differences"].keys() == {"clip", "sfp"}
    for name, each in record["differences"].items():
        assert each["difference"] == pytest.approx(level[name] - level[off], abs=2e-4)
        assert each["low"] <= each["difference"] <= each["high"]
    assert "| - |\n" in (tmp_path / "compare.md").read_text()

    words = ["ablate", "mini", "--study", "modules", "--work-dir", str(tmp_path)]
    assert cli.main([*words, "--paired", "previous", *FEW]) == 0
    rows = json.loads((tmp_path / "ablate_modules.json").read_text())["rows"]
    assert rows[0]["difference"] is None
    for before, row in itertools.pairwise(rows):
        gain = row["mIoU"] - before["mIoU"]
        assert row["difference"]["difference"] == pytest.approx(gain, abs=2e-4)
    assert "less the row before" in (tmp_path / "ablate_modules.md").read_text()


@pytest.mark.parametrize(
    "words", ["compare mini --paired scilp", "ablate mini --study modules --paired x"]
)
def test_a_base_that_is_not_there(words, capsys):
    assert cli.main([*words.split(), *FEW]) == 2
    assert "expected one of" in capsys.readouterr().err
