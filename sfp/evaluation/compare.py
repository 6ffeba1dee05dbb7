"""Evaluates several methods on one benchmark, sharing the model, the text bank and trunk runs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor

from sfp.data.benchmarks import by_dataset
from sfp.data.datasets import DATASETS
from sfp.data.images import DataError
from sfp.engine import choose_device
from sfp.evaluation.configs import ConfigError
from sfp.evaluation.journal import Journal
from sfp.evaluation.loading import Batches
from sfp.evaluation.metrics import SegmentationMetric, counting_metric
from sfp.evaluation.notices import quiet
from sfp.evaluation.paired import PREVIOUS, bases, cell, differences, heading
from sfp.evaluation.published import beside_run
from sfp.evaluation.scores import (
    cells,
    columns_of,
    confusion,
    coverage,
    note_coverage,
    note_progress,
    note_turned,
    number,
    rounded,
    summarize,
)
from sfp.evaluation.settings import image_names, method_settings, settings
from sfp.files import atomic_write
from sfp.method import Method, build_method, check_needs
from sfp.overlay import Panel
from sfp.registry import suggest
from sfp.segmentor import OpenVocabSegmentor
from sfp.tables import markdown
from sfp.trace import GuideError, RegionsError
from sfp.visualize.sheets import at_size, picture_sheet
from sfp.vocabulary import load_vocabulary


class MethodError(ValueError):
    """A method that cannot run on these weights; the message gives the reason."""


def build_segmentor(config: Config, method: Method | None = None) -> OpenVocabSegmentor:
    """The segmentor of a config, on the GPU if there is one.

    Args:
        config: from `evaluate.load_config`.
        method: replaces that of the config.

    Raises:
        ConfigError: if the config names weights that only mmengine's runner would load.
    """
    if path := config.get("load_from"):
        raise ConfigError(
            f"load_from={path} is supported by `sfp eval` with words only: name the weights in "
            "model.weights instead (--weights)"
        )
    init_default_scope(config.get("default_scope", "mmseg"))
    segmentor = MODELS.build(dict(config.model, method=method) if method else config.model)
    return segmentor.to(choose_device()).eval()


@dataclass
class _Plan:
    """The work of a comparison and its progress.

    Attributes:
        dataset: the test set.
        images: names of its images.
        metric: metric that counts and scores.
        methods: the methods by their names in tables.
        journals, counts: by method; counts are those known so far, by image.
        chosen: indices of the images for the sheet.
        batches: indices of the images that go through the network together, and their methods.
    """

    dataset: Any
    images: list[str]
    metric: SegmentationMetric
    methods: dict[str, Method]
    journals: dict[str, Journal]
    counts: dict[str, dict[str, Tensor]]
    chosen: set[int]
    batches: list[tuple[range, list[str]]] = field(default_factory=list)


@quiet()
def measure(
    config: Config,
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    *,
    segmentor: OpenVocabSegmentor | None = None,
    pictures: int = 0,
    resume: bool = True,
    paired: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates several methods on the test set of a config, image by image.

    Each method has its own journal inside `journal` in the work folder (`journal.py`). A batch runs
    only for those methods that lack one of its images, and is not loaded if there are none.

    Args:
        config: from `evaluate.load_config`; its `model.method` is not used.
        methods: arguments of `build_method`, by the methods' names in tables.
        segmentor: result of `build_segmentor`, to use one for several calls.
        pictures: number of images on the sheet `compare.png` in the work folder, rerun for it if
            already done; 0 for none.
        resume: False discards the journals of these methods.
        paired: name of the method that the others are paired with, or "previous", see `paired`.
        progress: called with the number of finished images and the total.

    Returns:
        "methods": for each name mIoU, mAcc, aAcc, fwIoU, further scores of the config's metric (bIoU)
        and the classes' IoU, in percent. With `paired` also "paired", that name, and "differences", by
        name as in `paired.differences`.

    Raises:
        ValueError: if `paired` is not the name of a method, or the config has a setting that only
            `sfp eval` applies.
        MethodError: if a method cannot run on these weights.
        DataError: if a file cannot be used, with its name, or if all ground truth is ignored.
    """
    if config.get("custom_hooks") or config.get("test_cfg", {}).get("fp16"):
        raise ConfigError(
            "custom_hooks and test_cfg.fp16 are supported by `sfp eval` only, which uses mmengine's "
            "runner: remove them from the config"
        )
    if "clusters" in config:
        raise ValueError(
            "clusters are fitted to the features of one method: evaluate configs without words "
            "separately, with `sfp eval --method`"
        )
    if paired:
        bases(methods, paired)  # raises for a wrong name before anything runs
    init_default_scope(config.get("default_scope", "mmseg"))
    built = {name: build_method(method) for name, method in methods.items()}
    for method in built.values():
        check_needs(method, config.model.get("guides"), config.model.get("regions"))
    segmentor = segmentor or build_segmentor(config, next(iter(built.values())))
    nodes = {name: method_settings(method) for name, method in methods.items()}
    plan = _plan(config, segmentor, built, nodes, pictures, resume)
    columns = _run(config, segmentor, plan, progress)
    classes = plan.dataset.metainfo["classes"]
    if pictures:
        sheet = Path(config.work_dir, "compare.png")
        picture_sheet(columns, classes, plan.dataset.metainfo["palette"], sheet)
    records = {
        name: [counts[image] for image in plan.images] for name, counts in plan.counts.items()
    }
    entries = {name: [plan.metric.pixels(x) for x in each] for name, each in records.items()}
    found = coverage(next(iter(entries.values())), classes)
    note_coverage(found, len(classes), plan.metric.ignore_index)
    further = {name: plan.metric.further(each) for name, each in records.items()}
    record = dict(
        images=len(plan.images),
        weights=str(config.model.weights),
        methods={name: _scores(each, classes, further[name]) for name, each in entries.items()},
    )
    if paired:
        record.update(paired=paired, differences=differences(entries, len(classes), paired))
    return record


def _plan(
    config: Config,
    segmentor: OpenVocabSegmentor,
    methods: dict[str, Method],
    nodes: Mapping[str, Mapping[str, Any]],
    pictures: int,
    resume: bool,
) -> _Plan:
    """The remaining work, in the same batches as in an uninterrupted run.

    Thus the same images go through the network together, however far an earlier run got.
    """
    dataset = DATASETS.build(config.test_dataloader.dataset)
    _, images = image_names(dataset)
    device = next(segmentor.parameters()).device.type
    groups = settings(config, model=segmentor, dataset=dataset, device=device)
    note_turned(groups["data"])
    folder = Path(config.work_dir, "journal")
    journals = {
        name: Journal(folder / re.sub(r"[^\w.+=-]+", "_", name), dict(groups, method=node))
        for name, node in nodes.items()
    }
    if not resume:
        for journal in journals.values():
            journal.clear()
    counts = {name: journal.read() for name, journal in journals.items()}
    note_progress(
        min(map(len, counts.values())),
        len(images),
        f"for all {len(methods)} methods",
        sum(journal.damaged for journal in journals.values()),
    )
    chosen = {i * len(images) // pictures for i in range(pictures)}
    metric = counting_metric(config.test_evaluator, dataset.metainfo)
    plan = _Plan(dataset, images, metric, methods, journals, counts, chosen)
    size = config.test_dataloader.get("batch_size", 1)
    for start in range(0, len(images), size):
        batch = range(start, min(start + size, len(images)))
        lacking = [n for n in methods if any(images[i] not in counts[n] for i in batch)]
        if not chosen.isdisjoint(batch):
            lacking = list(methods)
        if lacking:
            plan.batches.append((batch, lacking))
    return plan


def _run(
    config: Config,
    segmentor: OpenVocabSegmentor,
    plan: _Plan,
    progress: Callable[[int, int], None],
) -> dict[str, list[Panel]]:
    """Runs the batches of a plan, fills in its counts, and returns the columns of the sheet."""
    order = [i for batch, _ in plan.batches for i in batch]
    loader = Batches(config.test_dataloader, plan.dataset, order)
    done = len(plan.images) - len(order)
    columns: dict[str, list[Panel]] = {t: [] for t in ("image", "ground truth", *plan.methods)}
    with ExitStack() as stack:
        for journal in plan.journals.values():
            stack.callback(journal.close)
        for data, (batch, names) in zip(loader, plan.batches, strict=True):
            raw = data["inputs"]
            data = segmentor.data_preprocessor(data)
            samples = data["data_samples"]
            methods = [plan.methods[name] for name in names]
            try:
                results = segmentor.predict_each(methods, data["inputs"], samples)
            except (DataError, GuideError, RegionsError):  # whatever the weights
                raise
            except ValueError as error:
                raise MethodError(str(error)) from error
            truths = [sample.gt_sem_seg.data[0] for sample in samples]
            labels = {
                name: [each.labels for each in result]
                for name, result in zip(names, results, strict=True)
            }
            _record(plan, batch, samples, labels)
            for n, i in enumerate(batch):
                if i in plan.chosen:
                    picture = at_size(raw[n], truths[n].shape)
                    columns["image"].append(Panel(picture))
                    columns["ground truth"].append(Panel(picture, truths[n].cpu().numpy()))
                    for name, each in labels.items():
                        columns[name].append(Panel(picture, each[n].cpu().numpy()))
            done += len(batch)
            progress(done, len(plan.images))
    return columns


def _record(
    plan: _Plan, batch: range, samples: Sequence[Any], labels: Mapping[str, Sequence[Tensor]]
) -> None:
    """Counts a batch for the methods that lack it, and stores the counts in journals and plan.

    Raises:
        DataError: if a label map does not fit its image; the message names the file.
    """
    classes, ignored = len(plan.dataset.metainfo["classes"]), plan.metric.ignore_index
    for name, each in labels.items():
        for i, sample, predicted in zip(batch, samples, each, strict=True):
            image = plan.images[i]
            if image in plan.counts[name]:
                continue
            truth = sample.gt_sem_seg.data[0].to(predicted)
            try:
                entries = plan.metric.intersect_and_union(predicted, truth, classes, ignored)
            except ValueError as error:
                raise DataError(f"{sample.get('seg_map_path', image)}: {error}") from None
            plan.journals[name].append(image, entries)
            plan.counts[name][image] = entries


def _scores(
    entries: Sequence[Tensor], classes: Sequence[str], further: Mapping[str, float]
) -> dict[str, Any]:
    matrix = confusion(entries, len(classes))
    scores = rounded(summarize(matrix.diagonal(), matrix.sum(0), matrix.sum(1)), classes)
    each = scores.pop("classes")
    scores |= {name: number(value) for name, value in further.items()}
    return dict(scores, IoU={name: row["IoU"] for name, row in each.items()})


def compare(
    config: Config,
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    *,
    words: Sequence[str] = (),
    pictures: int = 4,
    resume: bool = True,
    paired: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Runs `measure` and writes compare.json, compare.md and pictures into the work folder.

    Args:
        config, methods, resume, progress: as in `measure`.
        words: vocabularies (see `with_words`) with which each method is run, one after the other; by
            default only the config's. With several, methods' names end with that of the vocabulary.
        pictures: number of images on the sheet, for the first vocabulary.
        paired: as in `measure`, within each vocabulary.

    Returns:
        The result of `measure`, and "published": published numbers of each method on this benchmark
        with these weights, and whether they are comparable, in words.

    Raises:
        ValueError: if a vocabulary does not have one entry per class of the benchmark, or `paired` is
            not the name of a method.
    """
    if paired:
        bases(methods, paired)
    configs = [with_words(config, each) for each in words] or [config]  # raises before any run
    record: dict[str, Any] = dict(methods={}, differences={}, published={})
    for n, (own, each) in enumerate(zip(configs, words or [""], strict=True)):
        tag = f" [{each}]" if words else ""
        named = {name + tag: method for name, method in methods.items()}
        part = measure(
            own,
            named,
            pictures=0 if n else pictures,
            resume=resume,
            paired=paired if paired in (None, PREVIOUS) else paired + tag,
            progress=partial(part_of, progress, n, len(configs)),
        )
        record["published"].update(beside_published(own, named))
        for key in ("methods", "differences"):
            record[key].update(part.pop(key, {}))
        record.update(part, paired=paired)
    folder = Path(config.work_dir)
    with atomic_write(folder / "compare.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    with atomic_write(folder / "compare.md") as path:
        path.write_text(compare_markdown(record))
    return record


def part_of(
    progress: Callable[[int, int], None], n: int, parts: int, done: int, total: int
) -> None:
    """Converts the progress of the n-th of several equal parts to that of the whole."""
    progress(n * total + done, parts * total)


def with_words(config: Config, words: str) -> Config:
    """A config with another vocabulary for the same classes.

    Args:
        config: from `evaluate.load_config`.
        words: "shipped": the class file of the benchmark; "names": the dataset's own class names, one
            query each; or the path of a class file.

    Raises:
        FileNotFoundError: if there is no such file, or no class file is shipped.
        ValueError: if it does not have one entry per class.
    """
    init_default_scope(config.get("default_scope", "mmseg"))
    own = copy.deepcopy(config)  # `copy()` shares the model's settings
    dataset = DATASETS.build(config.test_dataloader.dataset)
    names = list(dataset.metainfo["classes"])
    if words == "names":
        own.model.classes = names
    elif words == "shipped":
        found = by_dataset(config.test_dataloader.dataset.type)
        own.model.classes = str(found.words) if found and found.class_file else config.model.classes
    elif Path(words).is_file():
        own.model.classes = words
    else:
        raise FileNotFoundError(
            f'no class file {words!r}: expected "shipped", "names" or the path of a class file'
            f"{suggest(words, ('shipped', 'names'))}"
        )
    if (number := load_vocabulary(own.model.classes).num_classes) != len(names):
        raise ValueError(
            f"{words} has {number} classes, but {type(dataset).__name__} has {len(names)}: expected "
            "one line per class, in label order"
        )
    return own


def beside_published(
    config: Config, methods: Mapping[str, str | Mapping[str, Any] | Method]
) -> dict[str, list[str]]:
    """Published numbers of those presets that have any (`published.beside_run`), by name."""
    groups = settings(config)
    nodes = {name: method_settings(method) for name, method in methods.items()}
    found = {name: beside_run(dict(groups, method=node)) for name, node in nodes.items()}
    return {name: lines for name, lines in found.items() if lines}


def published_lines(record: Mapping[str, Any]) -> list[str]:
    """The published numbers of a comparison, one line each."""
    return [f"{name}: {line}" for name, own in record["published"].items() for line in own]


def compare_sheet(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison, methods in the order given."""
    columns = columns_of(record["methods"].values())
    header = ["method", *columns]
    rows = [[name, *cells(scores, 1, columns)] for name, scores in record["methods"].items()]
    if record["paired"]:
        header.append(heading(record["paired"]))
        for row in rows:
            row.append(cell(record["differences"].get(row[0])))
    return header, rows


def compare_markdown(record: Mapping[str, Any]) -> str:
    """A comparison as a Markdown table, followed by published numbers."""
    lines = [f"* {line}\n" for line in published_lines(record)]
    return markdown(*compare_sheet(record)) + "\n" * bool(lines) + "".join(lines)
