"""Which differences between methods are real: a paired bootstrap over images.

Two methods see the same images, so what makes an image hard for both cancels in their difference. The
bootstrap (Efron, 1979) draws as many images as there are, with replacement, and scores both methods on
the same draw, many times over; the middle 95 % of the differences are the interval. mIoU is no mean
over images: each draw sums the pixel counts first, as the score itself does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfp.evaluation.scores import IGNORED

RESAMPLES = 2000
BYTES = 2**26  # of the sums of one chunk of draws
PREVIOUS = "previous"  # as base of a study: the row before each row


def class_pixels(entries: Iterable[Tensor], classes: int) -> np.ndarray:
    """Pixels by class and image, (images, 3, K) int64: right, predicted, true.

    Args:
        entries: of each image, as `journal.count` gives them.
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
    """How much a method's mIoU lies above another's on the same images.

    A class that occurs in neither truth nor prediction of a draw does not count in it, as in the score.

    Args:
        counts, base: of both, (images, 3, K), from `class_pixels`.
        resamples: of the bootstrap.
        seed: of its draws.

    Returns:
        "difference", and "low" and "high", the ends of its 95 % interval, in points of mIoU.

    Raises:
        ValueError: if the two are not of the same images and classes.
    """
    if counts.shape != base.shape:
        raise ValueError(
            f"counts {counts.shape} and {base.shape} (images, 3, classes) cannot be paired: both "
            "methods must have seen the same images"
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
    """MIoU of the first less that of the second: (draws, 2 * 3 * K) -> (draws,)."""
    mean = np.nanmean(class_iou(sums.reshape(len(sums), 2, 3, classes)), -1)
    return mean[:, 0] - mean[:, 1]


def bases(names: Iterable[str], base: str) -> dict[str, str]:
    """What each method is paired with: the base, or with "previous" the method before it.

    Raises:
        ValueError: if there is no method of that name.
    """
    names = list(names)
    if base == PREVIOUS:
        return dict(zip(names[1:], names[:-1], strict=True))
    if base not in names:
        raise ValueError(
            f"--paired {base}: it is not among what is compared, which is {', '.join(names)} (or "
            f'"{PREVIOUS}", the one before each)'
        )
    return {name: base for name in names if name != base}


def differences(
    counts: Mapping[str, Iterable[Tensor]], classes: int, base: str
) -> dict[str, dict[str, Any]]:
    """`paired` of every method with its base.

    Args:
        counts: by method, of each image, as `journal.count` gives them, in the same order.
        classes: K.
        base: of `bases`.

    Returns:
        By method that has a base: "base", its name, and what `paired` gives, rounded.
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
    """A difference and its interval as a table shows them; a dash where there is none."""
    if difference is None:
        return "-"
    value, low, high = (difference[k] for k in ("difference", "low", "high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def heading(base: str) -> str:
    """Of the column of such cells."""
    return f"mIoU less {base if base != PREVIOUS else 'the row before'} [95 %]"
