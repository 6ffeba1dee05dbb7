"""Confidence intervals for differences between methods, by a paired bootstrap over images.

Both methods see the same images, so the difficulty of an image cancels in their difference. The
bootstrap (Efron, 1979) repeatedly draws as many images as there are, with replacement, and scores both
methods on the same draw; the interval covers the middle 95 % of the differences. mIoU is not a mean
over images, so each draw sums the pixel counts first, as the score itself does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfp.evaluation.scores import IGNORED

RESAMPLES = 2000
BYTES = 2**26  # memory for the sums of one chunk of draws
PREVIOUS = "previous"  # base of each row: the row before it


def class_pixels(entries: Iterable[Tensor], classes: int) -> np.ndarray:
    """Pixels by class and image, (images, 3, K) int64: right, predicted, true.

    Args:
        entries: for each image, the result of `journal.count`.
        classes: K.
    """
    images = []
    for each in entries:
        truth, predicted, pixels = each[:, each[0] != IGNORED]
        right = torch.where(truth == predicted, pixels, 0)
        counts = torch.zeros(3, classes, dtype=torch.int64)
        for row, labels, numbers in zip(
            counts, (truth, predicted, truth), (right, pixels, pixels), strict=True
        ):
            row.index_add_(0, labels, numbers)
        images.append(counts.numpy())
    return np.stack(images)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """IoU in percent, (..., 3, K) -> (..., K); NaN for classes that do not occur."""
    right, predicted, true = np.moveaxis(counts, -2, 0)
    union = predicted + true - right
    return 100 * right / np.where(union > 0, union, np.nan)


def paired(
    counts: np.ndarray, base: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, float]:
    """The difference between the mIoU of two methods on the same images, with its interval.

    As in the score, a class that occurs in neither truth nor prediction of a draw is left out.

    Args:
        counts, base: the counts of both methods, (images, 3, K), from `class_pixels`.
        resamples: number of draws.
        seed: seed of the draws.

    Returns:
        "difference", and the ends "low" and "high" of its 95 % interval, in points of mIoU.

    Raises:
        ValueError: if the counts differ in images or classes.
    """
    if counts.shape != base.shape:
        raise ValueError(
            f"counts {counts.shape} and {base.shape} (images, 3, classes) cannot be paired: both "
            "methods must be evaluated on the same images"
        )
    images, _, classes = counts.shape
    both = np.stack([counts, base], 1).reshape(images, -1).astype(float)  # (images, 2 * 3 * K)
    rng = np.random.default_rng(seed)
    chunk = max(1, BYTES // (both.itemsize * max(both.shape)))
    differences = [_difference(both.sum(0, keepdims=True), classes)]
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        times = rng.multinomial(images, np.full(images, 1 / images), count)  # (count, images)
        differences.append(_difference(times.astype(float) @ both, classes))
    value, *others = np.concatenate(differences)
    low, high = np.percentile(others, [2.5, 97.5])
    return dict(difference=float(value), low=float(low), high=float(high))


def _difference(sums: np.ndarray, classes: int) -> np.ndarray:
    """The mIoU of the first minus that of the second: (draws, 2 * 3 * K) -> (draws,)."""
    mean = np.nanmean(class_iou(sums.reshape(len(sums), 2, 3, classes)), -1)
    return mean[:, 0] - mean[:, 1]


def bases(names: Iterable[str], base: str) -> dict[str, str]:
    """The method with which each is paired: the base, or with "previous" the one before it.

    Raises:
        ValueError: if there is no method of that name.
    """
    names = list(names)
    if base == PREVIOUS:
        return dict(zip(names[1:], names[:-1], strict=True))
    if base not in names:
        raise ValueError(
            f"--paired {base}: expected one of {', '.join(names)}, or "
            f'"{PREVIOUS}" for the one before each'
        )
    return {name: base for name in names if name != base}


def differences(
    counts: Mapping[str, Iterable[Tensor]], classes: int, base: str
) -> dict[str, dict[str, Any]]:
    """`paired` of every method with its base.

    Args:
        counts: by method, the result of `journal.count` for each image, in the same order.
        classes: K.
        base: as for `bases`.

    Returns:
        For each method with a base: "base", its name, and the result of `paired`, rounded.
    """
    pixels = {name: class_pixels(each, classes) for name, each in counts.items()}
    return {
        name: {
            "base": other,
            **{k: round(v, 4) for k, v in paired(pixels[name], pixels[other]).items()},
        }
        for name, other in bases(counts, base).items()
    }


def cell(difference: Mapping[str, Any] | None) -> str:
    """A difference and its interval as a table cell; a dash if there is none."""
    if difference is None:
        return "-"
    value, low, high = (difference[k] for k in ("difference", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def heading(base: str) -> str:
    """The heading of the column of such cells."""
    return f"mIoU less {base if base != PREVIOUS else 'the row before'} [95 %]"
