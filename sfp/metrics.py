"""The benchmark's metric: per-class IoU and accuracy, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor

from sfp.journal import Journal, confusion, count


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
    """Pixel counts, summed exactly over all images and processes, with fwIoU and per-class numbers.

    Attributes:
        summary: what `summarize` gave, after an evaluation; empty before, and on other processes
            than the first.
        confusion: the matrix it was computed from, (K, K) int64, rows are truth; likewise.
        records: entries of each image, by name, if there is a journal; likewise.
    """

    default_prefix = ""  # plain names, without mmengine's warning about them

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(iou_metrics=["mIoU"], **kwargs)
        self.summary: dict[str, Any] = {}
        self.confusion: Tensor | None = None
        self.records: dict[str, Tensor] = {}
        self._journal: Journal | None = None
        self._names: Sequence[str] = ()
        self._by_path: dict[str, str] = {}

    def keep(self, journal: Journal, paths: Sequence[str], names: Sequence[str]) -> None:
        """Writes counts into a journal as they come, and computes the scores from it in the end.

        Args:
            journal: in a folder that all processes share.
            paths, names: of all images of the dataset, whichever process evaluates them.
        """
        self._journal, self._names = journal, names
        self._by_path = dict(zip(paths, names, strict=True))

    @staticmethod
    def intersect_and_union(
        pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> Tensor:
        """Exact integers where mmseg's float histogram stops counting at 2**24 pixels."""
        return count(pred_label, label, num_classes, ignore_index)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Counts a batch.

        Raises:
            ValueError: if a label map does not fit; the message names the file.
        """
        for sample in data_samples:
            before = len(self.results)
            try:
                super().process(data_batch, [sample])
            except ValueError as error:
                raise ValueError(f"{sample.get('seg_map_path', 'a label map')}: {error}") from None
            if self._journal is not None:
                for counts in self.results[before:]:
                    self._journal.append(self._by_path[sample["img_path"]], counts)

    def evaluate(self, size: int) -> dict[str, float]:
        """Scores of all images: from the journal if there is one, else from all processes' results.

        Raises:
            RuntimeError: if the journal lacks images after all processes are done.
        """
        if self._journal is None or self.format_only:
            return super().evaluate(size)
        self._journal.close()
        self.results.clear()
        barrier()  # every process has written what it had to write
        scores: list[Any] = [None]
        if is_main_process():
            self.records = self._journal.read()
            lost = [name for name in self._names if name not in self.records]
            if lost:
                raise RuntimeError(
                    f"{len(lost)} of {len(self._names)} images, first {lost[0]}, are not in "
                    f"{self._journal.folder}: the work folder must be one that all processes share"
                )
            scores = [self.compute_metrics([self.records[name] for name in self._names])]
        broadcast_object_list(scores)
        return scores[0]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Prints the per-class table and returns mIoU, aAcc, mAcc and fwIoU, two decimals each."""
        if self.format_only:
            return super().compute_metrics(results)
        names = self.dataset_meta["classes"]
        self.confusion = matrix = confusion(results, len(names))
        self.summary = summarize(matrix.diagonal(), matrix.sum(0), matrix.sum(1))
        table = PrettyTable(["Class", "IoU", "Acc"], align="r")
        table.align["Class"] = "l"
        for name, iou, acc in zip(names, self.summary["IoU"], self.summary["Acc"], strict=True):
            table.add_row([name, f"{iou:.2f}", f"{acc:.2f}"])
        if is_main_process():
            print_log(f"per class results:\n{table}", MMLogger.get_current_instance())
        return {k: round(self.summary[k], 2) for k in ("mIoU", "aAcc", "mAcc", "fwIoU")}
