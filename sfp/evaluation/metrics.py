"""Metrics: per-class IoU and accuracy, and their means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import mmengine.registry
import torch
from mmengine.dist import barrier, broadcast_object_list, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger, print_log
from mmseg.evaluation.metrics import IoUMetric
from mmseg.registry import METRICS
from prettytable import PrettyTable
from torch import Tensor

from sfp.data.images import DataError
from sfp.evaluation.boundaries import count_boundaries
from sfp.evaluation.configs import ConfigError
from sfp.evaluation.journal import Journal, count
from sfp.evaluation.scores import COLUMNS, cell, confusion, coverage, number, summarize
from sfp.registry import suggest


@METRICS.register_module(force=True)  # modules may be imported again
class SegmentationMetric(IoUMetric):
    """Pixel counts, summed exactly over all images and processes, with fwIoU and per-class numbers.

    Args:
        ignore_index: label of ignored pixels.
        output_dir: folder for predicted labels as PNGs.
        format_only: only write these, without scores; needs no ground truth.
        collect_device, prefix: as in mmengine's `BaseMetric`.

    Attributes:
        summary: the result of `summarize`. This and the following are set after an evaluation, on the
            first process only.
        confusion: the confusion matrix, (K, K) int64, rows are truth.
        coverage: statistics of the ground truth (`scores.coverage`).
        records: entries of each image, by name, if there is a journal.
    """

    default_prefix = ""  # plain names, without mmengine's warning about them

    def __init__(
        self,
        *,
        ignore_index: int = 255,
        output_dir: str | None = None,
        format_only: bool = False,
        collect_device: str = "cpu",
        prefix: str | None = None,
    ) -> None:
        # mmseg's own metric silently accepts any other argument
        super().__init__(
            ignore_index=ignore_index,
            iou_metrics=["mIoU"],
            collect_device=collect_device,
            output_dir=output_dir,
            format_only=format_only,
            prefix=prefix,
        )
        self.summary: dict[str, Any] = {}
        self.confusion: Tensor | None = None
        self.coverage: dict[str, Any] = {}
        self.records: dict[str, Tensor] = {}
        self._journal: Journal | None = None
        self._names: Sequence[str] = ()
        self._by_path: dict[str, str] = {}

    def keep(self, journal: Journal, paths: Sequence[str], names: Sequence[str]) -> None:
        """Writes counts into a journal during the evaluation, and computes scores from it at the end.

        Args:
            journal: a journal in a folder that all processes share.
            paths, names: of all images of the dataset, whichever process evaluates them.
        """
        self._journal, self._names = journal, names
        self._by_path = dict(zip(paths, names, strict=True))

    @staticmethod
    def intersect_and_union(
        pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> Tensor:
        """Exact integer counts; mmseg's float histogram stops counting at 2**24 pixels."""
        return count(pred_label, label, num_classes, ignore_index)

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Counts a batch.

        Raises:
            DataError: if a label map does not fit its image; the message names the file.
        """
        for sample in data_samples:
            before = len(self.results)
            try:
                super().process(data_batch, [sample])
            except ValueError as error:
                raise DataError(f"{sample.get('seg_map_path', 'a label map')}: {error}") from None
            if self._journal is not None:
                for counts in self.results[before:]:
                    self._journal.append(self._by_path[sample["img_path"]], counts)

    def evaluate(self, size: int) -> dict[str, float]:
        """Scores of all images, from the journal if there is one, else from all processes' results.

        Raises:
            RuntimeError: if the journal lacks images when all processes are done.
        """
        if self._journal is None or self.format_only:
            return super().evaluate(size)
        self._journal.close()
        self.results.clear()
        barrier()  # wait until every process has written its records
        scores: list[Any] = [None]
        if is_main_process():
            self.records = self._journal.read()
            lost = [name for name in self._names if name not in self.records]
            if lost:
                raise RuntimeError(
                    f"{len(lost)} of {len(self._names)} images, the first {lost[0]}, are missing in "
                    f"{self._journal.folder}: all processes must share the work folder, and no other "
                    "run may start over in it (--no-resume) at the same time"
                )
            scores = [self.compute_metrics([self.records[name] for name in self._names])]
        broadcast_object_list(scores)
        return scores[0]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Prints the per-class table and returns the scores of `COLUMNS`, two decimals each.

        Raises:
            DataError: if all pixels are ignored.
        """
        if self.format_only:
            return super().compute_metrics(results)
        names = self.dataset_meta["classes"]
        self.coverage = coverage(results, names)
        self.confusion = matrix = self._confusion(results)
        counts = (matrix.diagonal(), matrix.sum(0), matrix.sum(1))
        self.summary = summarize(*(x[: len(names)] for x in counts))
        table = PrettyTable(["Class", "IoU", "Acc"], align="r")
        table.align["Class"] = "l"
        for name, iou, acc in zip(names, self.summary["IoU"], self.summary["Acc"], strict=True):
            table.add_row([name, cell(number(iou)), cell(number(acc))])
        if is_main_process():
            print_log(f"per class results:\n{table}", MMLogger.get_current_instance())
        return {k: round(self.summary[k], 2) for k in COLUMNS}

    def _confusion(self, results: Sequence[Tensor]) -> Tensor:
        return confusion(results, len(self.dataset_meta["classes"]))

    def pixels(self, entries: Tensor) -> Tensor:
        """An image's pixel counts, in the format of `journal.count`, from its record."""
        return entries

    def further(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Scores besides those of `COLUMNS`, by name, from the records of all images."""
        return {}

    def relabel(self, labels: Tensor) -> Tensor:
        """Predictions as class numbers, for pictures. Identity; `HungarianMetric` maps clusters."""
        return labels


@METRICS.register_module(force=True)
class BoundaryMetric(SegmentationMetric):
    """The scores of `SegmentationMetric` and Boundary IoU (`boundaries`): "bIoU", a mean over classes.

    Args:
        ratio: distance from contours, as a share of the image diagonal.
        **kwargs: as for `SegmentationMetric`.

    Attributes:
        boundary_iou: Boundary IoU of each class in percent after an evaluation; NaN if undefined.
    """

    def __init__(self, *, ratio: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < ratio <= 1:
            raise ConfigError(f"BoundaryMetric: ratio={ratio}: expected a share of the diagonal")
        self.ratio = ratio
        self.boundary_iou: list[float] = []

    def intersect_and_union(  # type: ignore[override]
        self, pred_label: Tensor, label: Tensor, num_classes: int, ignore_index: int
    ) -> Tensor:
        """Entries of both confusion matrices; labels of the second follow those of the first."""
        pixels = count(pred_label, label, num_classes, ignore_index)
        edges = count_boundaries(pred_label, label, num_classes, ignore_index, self.ratio)
        edges[:2] += num_classes
        return torch.cat([pixels, edges], dim=1)

    def evaluate(self, size: int) -> dict[str, float]:
        """As in `SegmentationMetric`; `records` are the pixel counts."""
        scores = super().evaluate(size)
        self.records = {name: self.pixels(each) for name, each in self.records.items()}
        return scores

    def compute_metrics(self, results: list) -> dict[str, float]:
        """As in `SegmentationMetric`, with "bIoU"."""
        if self.format_only:
            return super().compute_metrics(results)
        scores = super().compute_metrics([self.pixels(each) for each in results])
        return dict(scores, bIoU=round(self.further(results)["bIoU"], 2))

    def pixels(self, entries: Tensor) -> Tensor:
        """As in `SegmentationMetric`: without the counts of boundaries."""
        return entries[:, entries[0] < len(self.dataset_meta["classes"])]

    def further(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Boundary IoU, the mean over classes, as "bIoU"."""
        classes = len(self.dataset_meta["classes"])
        shift = torch.tensor([[classes], [classes], [0]])
        edges = [each[:, each[0] >= classes] - shift for each in results]
        matrix = confusion(edges, classes + 1)
        counts = (matrix.diagonal(), matrix.sum(0), matrix.sum(1))
        summary = summarize(*(x[:classes] for x in counts))
        self.boundary_iou = summary["IoU"]
        return dict(bIoU=summary["mIoU"])


def complete(nodes: Any) -> list[dict[str, Any]]:
    """The metrics of a config, including one for tables and cards.

    A `SegmentationMetric` is added in front if there is none of its kind, unless all metrics have
    `format_only` and need no labels.

    Raises:
        ConfigError: for an unknown metric.
    """
    nodes = [dict(node) for node in ([nodes] if isinstance(nodes, Mapping) else nodes)]
    types = [_metric_type(node["type"]) for node in nodes]
    formats = all(node.get("format_only") for node in nodes)
    if not formats and not any(hasattr(cls, "keep") for cls in types):
        ignored = next((n["ignore_index"] for n in nodes if "ignore_index" in n), 255)
        nodes.insert(0, dict(type="SegmentationMetric", ignore_index=ignored))
    return nodes


def counting_metric(nodes: Any, dataset_meta: Mapping[str, Any]) -> SegmentationMetric:
    """The metric of a config that provides the scores of tables and cards.

    Args:
        nodes: the config's `test_evaluator`.
        dataset_meta: the dataset's `metainfo`, with its classes.
    """
    metric = _main(map(METRICS.build, complete(nodes))) or SegmentationMetric()
    metric.dataset_meta = dict(dataset_meta)
    return metric


def _metric_type(name: str | type) -> type:
    found = METRICS.get(name) if isinstance(name, str) else name
    if found is None:
        known = {*METRICS.module_dict, *mmengine.registry.METRICS.module_dict}
        raise ConfigError(f"test_evaluator: unknown metric {name!r}{suggest(name, known)}")
    return found


def main_metric(evaluator: Evaluator) -> SegmentationMetric | None:
    """The metric that provides the scores of tables and cards, if any does."""
    return _main(evaluator.metrics)


def _main(metrics: Iterable[Any]) -> SegmentationMetric | None:
    return next((m for m in metrics if hasattr(m, "keep") and not m.format_only), None)


def needs_every_image(evaluator: Evaluator) -> bool:
    """Whether some metric needs every image to be run, even if the journal has its counts."""
    return len(evaluator.metrics) > 1 or evaluator.metrics[0].output_dir is not None


def name_apart(evaluator: Evaluator) -> None:
    """Prefixes the other metrics' results with their type, so that names do not clash."""
    main = main_metric(evaluator)
    taken = set() if main is None else {main.prefix}
    for metric in evaluator.metrics:
        if metric is main:
            continue
        name = wanted = metric.prefix or type(metric).__name__
        number = 2
        while name in taken:
            name, number = f"{wanted} {number}", number + 1
        taken.add(name)
        metric.prefix = name


def match(matrix: Tensor) -> Tensor:
    """The one-to-one assignment of clusters to classes with the most pixels (Hungarian matching).

    Args:
        matrix: pixels by class and cluster, (K, C), K and C of any size.

    Returns:
        The cluster of each class, (K,) int64, using min(K, C) clusters; -1 for classes without one.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    classes, clusters = linear_sum_assignment(matrix.numpy(), maximize=True)
    result = torch.full((len(matrix),), -1)
    result[torch.from_numpy(classes)] = torch.from_numpy(clusters)
    return result


@METRICS.register_module(force=True)  # modules may be imported again
class HungarianMetric(SegmentationMetric):
    """Scores of unnamed clusters, each matched to a class.

    The protocol of unsupervised segmentation (IIC, PiCIE, STEGO): one matching for the whole dataset,
    the one-to-one assignment of clusters to classes with the most correct pixels; then mIoU, and pixel
    accuracy (`aAcc`). Pixels of unmatched clusters are wrong, and classes without a cluster score 0.
    The journal holds counts per cluster, so that an interrupted run can resume.

    Args:
        clusters: number of clusters; None for as many as there are classes.
        **kwargs: as for `SegmentationMetric`.

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
        """The number of labels, for classes or clusters."""
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
        # if a class has no cluster, all clusters are matched and there are no further columns
        order = [c if c >= 0 else others.pop() for c in chosen]
        return matrix[:, order + others]

    def relabel(self, labels: Tensor) -> Tensor:
        """Maps clusters to their classes; 255 for unmatched ones."""
        assert self.assignment is not None
        table = torch.full((self._labels,), 255)
        given = self.assignment >= 0
        table[self.assignment[given]] = given.nonzero()[:, 0]
        return table[labels.cpu()]
