"""The mini world serves its purpose: purification helps in it, and outliers look like outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sfp
from sfp.evaluation.paired import class_iou
from sfp.mini import acceptance

METHODS = ("clip", "sfp", "sfp_unpurified", "paper_sae", "paper_som_sae")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def measured():
    """Forty of the scenes that the checkpoint was accepted on."""
    chosen = {name: acceptance.METHODS[name] for name in METHODS}
    with torch.inference_mode():
        return acceptance.measure(sfp.load_clip("mini"), 40, 910_000, chosen)


@pytest.fixture(scope="module")
def level(measured) -> dict[str, float]:
    return {n: float(np.nanmean(class_iou(c.sum(0)))) for n, c in measured["counts"].items()}


def test_purification_matters(level):
    assert level["sfp"] - level["sfp_unpurified"] > 1
    assert level["paper_som_sae"] - level["paper_sae"] > 15


def test_levels(level, measured):
    assert level["sfp"] > 71
    assert level["clip"] < 42
    assert measured["top_k"] > 95


def test_outliers_are_long_and_everybody_attends_to_them(measured):
    blocks = {
        name: dict(zip(acceptance.BLOCKS, values, strict=True))
        for name, values in measured["blocks"].items()
    }
    assert min(blocks["norm"][i] for i in range(6, 11)) > 3
    assert np.mean([blocks["both"][i] for i in range(6, 11)]) > 0.7
