"""The benchmark's metric: per-class IoU and accuracy, and their means."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor


def summarize(intersect: Tensor, predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Scores in percent from pixel counts per class, each (K,).

    Args:
        intersect: pixels labelled and predicted as the class.
        predicted: pixels predicted as it.
        truth: pixels labelled as it.

    Returns:
        "mIoU", "aAcc", "mAcc", "fwIoU" (IoU weighted by the class's share of the truth), and "IoU",
        "Acc" per class. A class that occurs in neither truth nor prediction has NaN and does not
        count; nor does the accuracy of a class that does not occur in the truth.
    """
    intersect, predicted, truth = (x.double() for x in (intersect, predicted, truth))
    iou = 100 * intersect / (predicted + truth - intersect)
    acc = 100 * intersect / truth
    return dict(
        mIoU=iou.nanmean().item(),
        aAcc=(100 * intersect.sum() / truth.sum()).item(),
        mAcc=acc.nanmean().item(),
        fwIoU=((iou * truth).nansum() / truth.sum()).item(),
        IoU=iou.tolist(),
        Acc=acc.tolist(),
    )


@METRICS.register_module()
class SegmentationMetric(IoUMetric):
    """mmseg's pixel counts, summed over all images and processes, with fwIoU and per-class numbers.

    Attributes:
        summary: what `summarize` gave, after an evaluation; empty before, and on other processes
            than the first.
    """

    default_prefix = ""  # plain names, without mmengine's warning about them

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(iou_metrics=["mIoU"], **kwargs)
        self.summary: dict[str, Any] = {}

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Prints the per-class table and returns mIoU, aAcc, mAcc and fwIoU, two decimals each."""
        if self.format_only:
            return super().compute_metrics(results)
        intersect, _, predicted, truth = (
            torch.stack(counts).double().sum(0) for counts in zip(*results, strict=True)
        )
        self.summary = summarize(intersect, predicted, truth)
        table = PrettyTable(["Class", "IoU", "Acc"], align="r")
        table.align["Class"] = "l"
        names = self.dataset_meta["classes"]
        for name, iou, acc in zip(names, self.summary["IoU"], self.summary["Acc"], strict=True):
            table.add_row([name, f"{iou:.2f}", f"{acc:.2f}"])
        if is_main_process():
            print_log(f"per class results:\n{table}", MMLogger.get_current_instance())
        return {k: round(self.summary[k], 2) for k in ("mIoU", "aAcc", "mAcc", "fwIoU")}
