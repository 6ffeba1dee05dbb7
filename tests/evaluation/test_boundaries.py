"""Boundary IoU against its definition, written out mask by mask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sfp.evaluation.boundaries import count_boundaries, near_contour
from sfp.evaluation.metrics import METRICS, SegmentationMetric
from sfp.evaluation.scores import confusion

K = 4


def labels(height: int, width: int, seed: int, ignored: bool = False) -> Tensor:
    """Blobs of the classes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, K, height // 5 + 2, width // 5 + 2, generator=generator)
    result = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").argmax(1)[0]
    if ignored:
        result[height // 3 : height // 2, : width // 3] = 255
    return result


def band(mask: Tensor, distance: int) -> set[tuple[int, int]]:
    """A mask's pixels with a pixel outside the mask within a distance, by looking at all of them."""
    inside = {(y, x) for y, x in mask.nonzero().tolist()}
    reach = range(-distance, distance + 1)
    return {
        (y, x) for y, x in inside if any((y + v, x + u) not in inside for v in reach for u in reach)
    }


def by_definition(pairs: list[tuple[Tensor, Tensor]], ratio: float) -> list[float]:
    """Boundary IoU of each class over images, in percent."""
    scores = []
    for k in range(K):
        intersection = union = 0
        for predicted, truth in pairs:
            distance = max(1, round(ratio * math.hypot(*truth.shape)))
            counted = {(y, x) for y, x in (truth != 255).nonzero().tolist()}
            one = band(predicted == k, distance) & counted
            two = band(truth == k, distance) & counted
            intersection += len(one & two)
            union += len(one | two)
        scores.append(100 * intersection / union if union else math.nan)
    return scores


PAIRS = [
    (labels(31, 44, 0), labels(31, 44, 1, ignored=True)),
    (labels(12, 50, 2), labels(12, 50, 2)),
    (labels(23, 9, 3), labels(23, 9, 4)),
    (torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long)),
]


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.07, 0.3])
def test_the_metric_is_the_definition(ratio):
    metric = METRICS.build(dict(type="BoundaryMetric", ratio=ratio))
    plain = SegmentationMetric()
    for each in (metric, plain):
        each.dataset_meta = dict(classes=list("abcd"))
        for predicted, truth in PAIRS:
            sample = dict(
                pred_sem_seg=dict(data=predicted[None]), gt_sem_seg=dict(data=truth[None])
            )
            each.process({}, [sample])
    scores = metric.evaluate(len(PAIRS))
    expected = by_definition(PAIRS, ratio)
    assert metric.boundary_iou == pytest.approx(expected)
    assert scores.pop("bIoU") == round(sum(expected) / K, 2)
    assert scores == plain.evaluate(len(PAIRS))  # the others are what they are without it
    assert torch.equal(metric.confusion, plain.confusion)
    assert metric.coverage == plain.coverage


def test_a_perfect_prediction():
    truth = labels(40, 40, 5, ignored=True)
    matrix = confusion([count_boundaries(truth, truth, K, 255, 0.02)], K + 1)
    assert torch.equal(matrix, matrix.diagonal().diag())
    assert int(matrix.sum()) == int((truth != 255).sum())
    assert 0 < matrix[K, K] < matrix.sum()


def test_boundaries_feel_what_iou_hardly_does():
    """A square of 60 pixels, predicted one pixel too large: IoU 94 %, boundary IoU 50 %."""
    truth = torch.zeros(100, 100, dtype=torch.long)
    truth[20:80, 20:80] = 1
    predicted = torch.zeros(100, 100, dtype=torch.long)
    predicted[19:81, 19:81] = 1
    matrix = confusion([count_boundaries(predicted, truth, 2, 255, 0.02)], 3)
    # distance 3: frames 60² - 54² and 62² - 56², which share 60² - 56²
    union = (60**2 - 54**2) + (62**2 - 56**2) - (60**2 - 56**2)
    iou = matrix[1, 1] / (matrix[1].sum() + matrix[:, 1].sum() - matrix[1, 1])
    assert float(iou) == pytest.approx((60**2 - 56**2) / union)


def test_labels_of_16_bits():
    stripes = torch.tensor([[846, 846, 846, 3, 3, 3, 65535]])
    assert near_contour(stripes, 1).all()  # a single row touches the outside
    tall = stripes.repeat(7, 1)
    assert near_contour(tall, 1)[3].tolist() == [True, False, True, True, False, True, True]
