"""Scores from pixel counts, the columns of tables, rounding, and notes to the user.

Undefined scores (of a class that does not occur) are NaN in tensors, None in results and JSON, and a
dash in tables.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfp.data.images import DataError
from sfp.tables import cell as cell

COLUMNS = ("mIoU", "mAcc", "aAcc", "fwIoU")
IGNORED = -1  # used for both labels in the entry for an image's ignored pixels
NAMED = 8  # largest number of classes listed in a note


def summarize(intersect: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Scores in percent from pixel counts per class, each (K,).

    Args:
        intersect: pixels labelled and predicted as the class.
        predicted: pixels predicted as the class.
        truth: pixels labelled as the class.

    Returns:
        "mIoU", "mAcc", "aAcc", "fwIoU" (IoU weighted by the class's share of the truth), and "IoU",
        "Acc" per class. The IoU of a class that occurs in neither truth nor prediction is NaN and left
        out of means, as is the accuracy of a class that does not occur in the truth.
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
    """The result of `summarize` in the format of result files.

    Returns:
        The scores of `COLUMNS`, and "classes": IoU and Acc by name; four decimals, None for NaN.
    """
    each = zip(names, summary["IoU"], summary["Acc"], strict=True)
    return {
        **{column: number(summary[column]) for column in COLUMNS},
        "classes": {name: dict(IoU=number(iou), Acc=number(acc)) for name, iou, acc in each},
    }


def number(value: float) -> float | None:
    """Rounds to four decimals; None for NaN, which JSON does not have."""
    return None if math.isnan(value) else round(value, 4)


def cells(
    scores: Mapping[str, float | None], decimals: int = 2, columns: Sequence[str] = COLUMNS
) -> list[str]:
    """Scores as table cells."""
    return [cell(scores[column], decimals) for column in columns]


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """`COLUMNS` and any further scores of some rows, e.g. "bIoU"."""
    further = (k for row in rows for k, v in row.items() if not isinstance(v, Mapping))
    return list(dict.fromkeys([*COLUMNS, *further]))


def coverage(entries: Iterable[Tensor], classes: Sequence[str]) -> dict[str, Any]:
    """Statistics of the ground truth of all images.

    Args:
        entries: for each image, the result of `journal.count`.
        classes: names of the classes.

    Returns:
        "absent_classes", the names of classes without a pixel, and "ignored_percent", the share of
        ignored pixels.

    Raises:
        DataError: if all pixels are ignored, so that no score is defined.
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
            f"all {ignored} pixels of the ground truth are ignored. Labels must be class numbers from "
            f"0 to {len(classes) - 1}; is 255 meant as a class here?"
        )
    absent = [name for name, n in zip(classes, pixels.tolist(), strict=True) if not n]
    return dict(absent_classes=absent, ignored_percent=round(100 * ignored / (total + ignored), 4))


def note_coverage(found: Mapping[str, Any], count: int, ignored: int) -> None:
    """Prints to stderr which classes never occur in the ground truth, if there are any.

    Args:
        found: from `coverage`.
        count: number of classes.
        ignored: label of ignored pixels.
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
    """Prints to stderr where an interrupted run resumes, if there is anything to resume.

    Args:
        done: number of images already evaluated.
        count: number of all images.
        what: description of the methods and the journal, for the message.
        damaged: number of unreadable records, whose images are evaluated again.
    """
    if damaged:
        note(f"incomplete or damaged records: {damaged} (their images are evaluated again)")
    if done or damaged:
        note(f"continuing: {done} of {count} images are done {what}; --no-resume starts over")


def note_turned(data: Mapping[str, Any]) -> None:
    """Prints to stderr how many images are rotated by their EXIF orientation, if there are any.

    Args:
        data: the group "data" of `settings`.
    """
    if number := data.get("turned_by_exif"):
        note(
            f"{number} of {data['images']} images have an EXIF orientation, the first is "
            f"{data['first_turned']}: images are turned upright when loaded, so their label maps must "
            "be upright as well. If labels match the stored pixels, remove the EXIF tag"
        )


def note(text: str) -> None:
    """Prints a line to stderr."""
    print(text, file=sys.stderr)
