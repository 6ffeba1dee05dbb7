"""The benchmark's metric: per-class IoU and accuracy, and their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor

from sfp.evaluation.journal import Journal, confusion, count


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
        self.confusion = matrix = self._confusion(results)
        counts = (matrix.diagonal(), matrix.sum(0), matrix.sum(1))
        self.summary = summarize(*(x[: len(names)] for x in counts))
        table = PrettyTable(["Class", "IoU", "Acc"], align="r")
        table.align["Class"] = "l"
        for name, iou, acc in zip(names, self.summary["IoU"], self.summary["Acc"], strict=True):
            table.add_row([name, f"{iou:.2f}", f"{acc:.2f}"])
        if is_main_process():
            print_log(f"per class results:\n{table}", MMLogger.get_current_instance())
        return {k: round(self.summary[k], 2) for k in ("mIoU", "aAcc", "mAcc", "fwIoU")}

    def _confusion(self, results: Sequence[Tensor]) -> Tensor:
        return confusion(results, len(self.dataset_meta["classes"]))

    def relabel(self, labels: Tensor) -> Tensor:
        """Predictions as class numbers, for pictures; here they are."""
        return labels


def match(matrix: Tensor) -> Tensor:
    """The cluster of each class that together agree on most pixels (Hungarian matching).

    Args:
        matrix: pixels by class and cluster, (K, C), K and C of any size.

    Returns:
        (K,) int64: every cluster at most once, and min(K, C) of them; -1 for classes without one.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    classes, clusters = linear_sum_assignment(matrix.numpy(), maximize=True)
    result = torch.full((len(matrix),), -1)
    result[torch.from_numpy(classes)] = torch.from_numpy(clusters)
    return result


@METRICS.register_module()
class HungarianMetric(SegmentationMetric):
    """Scores of clusters without names: each class is given the cluster that fits it best.

    The protocol of unsupervised segmentation (IIC, PiCIE, STEGO): one matching for the whole dataset,
    the one-to-one assignment of clusters to classes with the most pixels right; then mIoU, and pixel
    accuracy (`aAcc`). Pixels of clusters that no class was given are wrong, and classes without a
    cluster score 0. The journal holds counts per cluster, so that a killed run continues.

    Args:
        clusters: number of clusters; None for as many as there are classes.
        **kwargs: of `SegmentationMetric`.

    Attributes:
        assignment: cluster of each class, as in `match`, after an evaluation.
        confusion: its columns are the matched clusters, in the order of the classes, then the others.
    """

    def __init__(self, clusters: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clusters = clusters
        self.assignment: Tensor | None = None

    @property
    def _labels(self) -> int:
        """How many numbers there are for classes and clusters."""
        classes = len(self.dataset_meta["classes"])
        return max(classes, self.clusters or 0)

    def intersect_and_union(  # type: ignore[override]
        self, pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> Tensor:
        """Pixel counts by class and cluster."""
        return count(pred_label, label, self._labels, ignore_index)

    def _confusion(self, results: Sequence[Tensor]) -> Tensor:
        classes = len(self.dataset_meta["classes"])
        matrix = confusion(results, self._labels)
        self.assignment = match(matrix[:classes, : self.clusters or classes])
        chosen = self.assignment.tolist()
        others = [c for c in range(self._labels) if c not in chosen]
        # a class without a cluster: all clusters are given away, so the others' columns are empty
        order = [c if c >= 0 else others.pop() for c in chosen]
        return matrix[:, order + others]

    def relabel(self, labels: Tensor) -> Tensor:
        """Clusters as the classes that they were given; 255 for none."""
        assert self.assignment is not None
        table = torch.full((self._labels,), 255)
        given = self.assignment >= 0
        table[self.assignment[given]] = given.nonzero()[:, 0]
        return table[labels.cpu()]
