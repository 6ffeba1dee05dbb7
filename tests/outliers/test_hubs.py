"""Hubs, against loops over the attention, and the table that compares detectors with them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from narrow import images, vit

from sfp import cli
from sfp.outliers import hubs, planted

pytestmark = pytest.mark.usefixtures("no_grad")
LAYERS = (2, 4)


@pytest.fixture(scope="module")
def trace():
    with torch.no_grad():
        return vit().trace(images(2))


def looped(trace, layer: int) -> np.ndarray:
    """Even shares that each patch draws from the others, one pair after the other."""
    maps = trace.attention(layer).mean(1).double().numpy()[:, 1:, 1:]
    n = maps.shape[-1]
    drawn = np.zeros(maps.shape[:2])
    for b, weights in enumerate(maps):
        for i in range(n):
            others = [j for j in range(n) if j != i]
            total = sum(weights[i, j] for j in others)
            for j in others:
                drawn[b, j] += weights[i, j] / total
    return drawn  # n rows that share 1 each, over n patches: 1 is even


def test_what_a_patch_receives(trace):
    ours = hubs.received(trace, 3).numpy()
    np.testing.assert_allclose(ours, looped(trace, 3), rtol=2e-4)
    np.testing.assert_allclose(ours.mean(-1), 1, rtol=1e-4)


def test_detectors_are_counted_against_them(trace):
    times = 1.3  # random weights attend nearly evenly
    chosen = planted.detectors(["l2_norm", "som"])
    found = hubs.study(vit(), images(2).split(1), chosen, LAYERS, times)
    assert (found["images"], found["layers"]) == (2, [*LAYERS])
    for place, layer in enumerate(LAYERS):
        truth = looped(trace, layer + 1) >= times
        assert 0 < truth.sum() < truth.size
        assert found["hubs"][place] == truth.sum() / 2
        for name, detector in chosen.items():
            marked = detector(trace, layer).numpy()
            each = found["detectors"][name]["layers"][place]
            assert each["marked"] == marked.sum() / 2
            assert each["recall"] == pytest.approx((marked & truth).sum() / truth.sum(), abs=1e-4)
            if marked.any():
                share = (marked & truth).sum() / marked.sum()
                assert each["precision"] == pytest.approx(share, abs=1e-4)
            else:
                assert each["precision"] is None
    for layers in ([], [0, 99], [-1], [len(vit().blocks) - 1]):
        with pytest.raises(ValueError, match="expected blocks from 0 to"):
            hubs.study(vit(), [images(1)], chosen, layers)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    words = ["hubs", "--count", "2", "--layers", "9", "--detectors", "som", "l2_norm"]
    assert cli.main([*words, "--out", str(tmp_path / "hubs.json")]) == 0
    said = capsys.readouterr().out
    assert "hubs per image" in said
    found = json.loads((tmp_path / "hubs.json").read_text())
    assert found["images"] == 2
    assert found["detectors"].keys() == {"som", "l2_norm"}
    assert cli.main(["hubs", "--detectors", "sm"]) == 2
    assert "did you mean 'som'" in capsys.readouterr().err
