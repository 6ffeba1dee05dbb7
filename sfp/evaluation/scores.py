"""What is reported: scores from pixel counts, the columns of tables, rounding, and notes to the user.

Class scores that are not defined (a class that does not occur) are NaN in tensors, None in results and
JSON, and a dash in tables.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfp.data.images import DataError

COLUMNS = ("mIoU", "mAcc", "aAcc", "fwIoU")
IGNORED = -1  # stands for both labels in the entry that counts an image's ignored pixels
NAMED = 8  # most classes that a note lists


def summarize(intersect: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Scores in percent from pixel counts per class, each (K,).

    Args:
        intersect: pixels labelled and predicted as the class.
        predicted: pixels predicted as it.
        truth: pixels labelled as it.

    Returns:
        "mIoU", "mAcc", "aAcc", "fwIoU" (IoU weighted by the class's share of the truth), and "IoU",
        "Acc" per class. A class that occurs in neither truth nor prediction has NaN and does not
        count; nor does the accuracy of a class that does not occur in the truth.
    """
    intersect, predicted, truth = (x.double() for x in (intersect, predicted, truth))
    iou = 100 * intersect / (predicted + truth - intersect)
    acc = 100 * intersect / truth
    return dict(
        mIoU=iou.nanmean().item(),
        mAcc=acc.nanmean().item(),
        aAcc=(100 * intersect.sum() / truth.sum()).item(),
        fwIoU=((iou * truth).nansum() / truth.sum()).item(),
        IoU=iou.tolist(),
        Acc=acc.tolist(),
    )


def confusion(entries: Iterable[Tensor], classes: int) -> Tensor:
    """The sum of `journal.count`s as a matrix, (K, K) int64: rows are truth, columns predictions."""
    total = torch.zeros(classes * classes, dtype=torch.int64)
    for each in entries:
        truth, predicted, pixels = each[:, each[0] != IGNORED]
        total.index_add_(0, truth * classes + predicted, pixels)
    return total.view(classes, classes)


def rounded(summary: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What `summarize` gives as results hold it.

    Returns:
        The scores of `COLUMNS`, and "classes": IoU and Acc by name; four decimals, None for NaN.
    """
    each = zip(names, summary["IoU"], summary["Acc"], strict=True)
    return {
        **{column: number(summary[column]) for column in COLUMNS},
        "classes": {name: dict(IoU=number(iou), Acc=number(acc)) for name, iou, acc in each},
    }


def number(value: float) -> float | None:
    """Four decimals; None for NaN, for which JSON has no word."""
    return None if math.isnan(value) else round(value, 4)


def cell(value: float | None, decimals: int = 2) -> str:
    """A score in a table; a dash where there is none."""
    return "-" if value is None else f"{value:.{decimals}f}"


def cells(scores: Mapping[str, float | None], decimals: int = 2) -> list[str]:
    """The scores of `COLUMNS` in a table."""
    return [cell(scores[column], decimals) for column in COLUMNS]


def coverage(entries: Iterable[Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """What the ground truth of all images consists of.

    Args:
        entries: of each image, as `journal.count` gives them.
        classes: names.

    Returns:
        "absent_classes", the names of those without a pixel, and "ignored_percent", the share of
        pixels that do not count.

    Raises:
        DataError: if no pixel counts: no score is defined.
    """
    pixels = torch.zeros(len(classes), dtype=torch.int64)
    ignored = 0
    for truth, _, counts in entries:
        counted = truth != IGNORED
        pixels.index_add_(0, truth[counted], counts[counted])
        ignored += int(counts[~counted].sum())
    total = int(pixels.sum())
    if not total:
        raise DataError(
            f"no pixel of the ground truth counts: all {ignored} are ignored. Labels are class numbers "
            f"from 0 to {len(classes) - 1}; is 255 meant as a class here?"
        )
    absent = [name for name, n in zip(classes, pixels.tolist(), strict=True) if not n]
    return dict(absent_classes=absent, ignored_percent=round(100 * ignored / (total + ignored), 4))


def note_coverage(found: Mapping[str, Any], count: int, ignored: int) -> None:
    """Says on stderr which classes the ground truth lacks, if it lacks any.

    Args:
        found: from `coverage`.
        count: number of classes.
        ignored: label of pixels that do not count.
    """
    absent = found["absent_classes"]
    if not absent:
        return
    names = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
    note(
        f"{len(absent)} of {count} classes never occur in the ground truth ({names}); "
        f"{found['ignored_percent']:.1f} % of its pixels are ignored (label {ignored})"
    )


def note_progress(done: int, count: int, what: str, damaged: int = 0) -> None:
    """Says on stderr where an interrupted run continues, if there is something to continue.

    Args:
        done: images that were evaluated before.
        count: all images.
        what: who has evaluated them, and where that is recorded.
        damaged: records that could not be read; their images are evaluated again.
    """
    if damaged:
        note(f"torn or damaged records: {damaged} (their images are evaluated again)")
    if done or damaged:
        note(f"continuing: {done} of {count} images are done {what}; --no-resume starts over")


def note_turned(data: Mapping[str, Any]) -> None:
    """Says on stderr that images are turned by their EXIF orientation, if there are such.

    Args:
        data: the group "data" of `settings`.
    """
    if number := data.get("turned_by_exif"):
        note(
            f"{number} of {data['images']} images have an EXIF orientation, first "
            f"{data['first_turned']}: they are turned upright when loaded, so their label maps must "
            "show the picture upright, too. If labels follow the stored pixels, remove the tag"
        )


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr)
