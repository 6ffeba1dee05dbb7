"""Several methods over one benchmark: one model, one text bank, one trunk per group of methods."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from torch import Tensor

from sfp.cli.method_table import markdown
from sfp.data.datasets import DATASETS
from sfp.evaluation.card import image_names, method_settings, plain, settings
from sfp.evaluation.journal import Journal, confusion, count
from sfp.evaluation.metrics import summarize
from sfp.files import atomic_write
from sfp.method import Method, build_method
from sfp.overlay import Panel
from sfp.segmentor import OpenVocabSegmentor
from sfp.visualize.sheets import at_size, picture_sheet

COLUMNS = ("mIoU", "mAcc", "aAcc", "fwIoU")


def build_segmentor(config: Config) -> OpenVocabSegmentor:
    """The segmentor of a config, on the GPU if there is one."""
    init_default_scope(config.get("default_scope", "mmseg"))
    segmentor = MODELS.build(config.model)
    return segmentor.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def measure(
    config: Config,
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    *,
    pictures: int = 0,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates methods on the test set of a config, all of them image by image.

    Every method has a journal of its own below `journal` in the work folder (`journal.py`). A batch is
    run for those methods that lack one of its images, and is not loaded if there is none.

    Args:
        config: from `evaluate.load_config`; its `model.method` is not used.
        methods: what `build_method` takes, by the name that tables show.
        pictures: images on the sheet `compare.png` in the work folder, run again for it if they are
            done; 0 for none.
        resume: False forgets what the journals have of these methods.
        progress: called with the images done and all of them.

    Returns:
        "methods": for each name mIoU, mAcc, aAcc, fwIoU and the classes' IoU, in percent.
    """
    if "clusters" in config:
        raise ValueError(
            "clusters are fitted to one method's features: evaluate configs without words one by one, "
            "with tools/test.py --method"
        )
    init_default_scope(config.get("default_scope", "mmseg"))
    built = {name: build_method(method) for name, method in methods.items()}
    dataset = DATASETS.build(config.test_dataloader.dataset)
    model = config.model.copy()
    model.pop("method", None)  # assigning to it would merge
    model.method = next(iter(built.values()))
    segmentor = build_segmentor(Config(dict(config, model=model)))
    classes, (_, images) = dataset.metainfo["classes"], image_names(dataset)

    device = next(segmentor.parameters()).device.type
    groups = settings(config, model=segmentor, dataset=dataset, device=device)
    journals = {
        name: Journal(
            Path(config.work_dir, "journal", re.sub(r"[^\w.+=-]+", "_", name)),
            dict(groups, method=plain(method_settings(method))),
        )
        for name, method in methods.items()
    }
    if not resume:
        for journal in journals.values():
            journal.clear()
    counts = {name: journal.read() for name, journal in journals.items()}
    if (before := min(map(len, counts.values()))) or any(j.damaged for j in journals.values()):
        damaged = sum(journal.damaged for journal in journals.values())
        print(
            f"continuing: {before} of {len(images)} images are done for all {len(methods)} methods, "
            f"damaged records: {damaged}; --no-resume starts over",
            file=sys.stderr,
        )

    # the batches of an undisturbed run, so that the same images go through the network together
    chosen = {i * len(images) // pictures for i in range(pictures)}
    size = config.test_dataloader.get("batch_size", 1)
    work: list[tuple[range, list[str]]] = []
    for start in range(0, len(images), size):
        batch = range(start, min(start + size, len(images)))
        lacking = [n for n in built if any(images[i] not in counts[n] for i in batch)]
        if lacking or not chosen.isdisjoint(batch):
            work.append((batch, lacking if chosen.isdisjoint(batch) else list(built)))
    sampler = [i for batch, _ in work for i in batch]
    loader = Runner.build_dataloader(dict(config.test_dataloader, dataset=dataset, sampler=sampler))
    done = len(images) - len(sampler)
    columns: dict[str, list[Panel]] = {t: [] for t in ("image", "ground truth", *built)}

    with ExitStack() as stack:
        for journal in journals.values():
            stack.callback(journal.close)
        for data, (batch, names) in zip(loader, work, strict=True):
            raw = data["inputs"]
            data = segmentor.data_preprocessor(data)
            samples = data["data_samples"]
            results = segmentor.predict_each([built[n] for n in names], data["inputs"], samples)
            truths = [sample.gt_sem_seg.data[0] for sample in samples]
            for name, labels in zip(names, results, strict=True):
                for i, truth, result in zip(batch, truths, labels, strict=True):
                    if images[i] not in counts[name]:
                        entries = count(
                            result.labels,
                            truth.to(result.labels),
                            len(classes),
                            dataset.ignore_index,
                        )
                        journals[name].append(images[i], entries)
                        counts[name][images[i]] = entries
            for n, i in enumerate(batch):
                if i in chosen:
                    picture = at_size(raw[n], truths[n].shape)
                    columns["image"].append(Panel(picture))
                    columns["ground truth"].append(Panel(picture, truths[n].cpu().numpy()))
                    for name, labels in zip(names, results, strict=True):
                        columns[name].append(Panel(picture, labels[n].labels.cpu().numpy()))
            done += len(batch)
            progress(done, len(images))

    if pictures:
        sheet = Path(config.work_dir, "compare.png")
        picture_sheet(columns, classes, dataset.metainfo["palette"], sheet)
    return dict(
        images=len(images),
        weights=str(config.model.weights),
        methods={n: _scores([counts[n][image] for image in images], classes) for n in built},
    )


def _scores(entries: Sequence[Tensor], classes: Sequence[str]) -> dict[str, Any]:
    matrix = confusion(entries, len(classes))
    scores = summarize(matrix.diagonal(), matrix.sum(0), matrix.sum(1))
    # a class that does not occur has no IoU: NaN, for which JSON has no word
    iou = [None if math.isnan(x) else round(x, 4) for x in scores["IoU"]]
    return dict({k: round(scores[k], 4) for k in COLUMNS}, IoU=dict(zip(classes, iou, strict=True)))


def compare(
    config: Config,
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    *,
    pictures: int = 4,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """`measure`, written into the work folder: compare.json, compare.md, and pictures."""
    record = measure(config, methods, pictures=pictures, resume=resume, progress=progress)
    folder = Path(config.work_dir)
    with atomic_write(folder / "compare.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    with atomic_write(folder / "compare.md") as path:
        path.write_text(compare_markdown(record))
    return record


def compare_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a comparison, methods in the order given."""
    return [
        [name, *(f"{scores[k]:.1f}" for k in COLUMNS)] for name, scores in record["methods"].items()
    ]


def compare_markdown(record: Mapping[str, Any], header: Sequence[str] = COLUMNS) -> str:
    """A comparison as a Markdown table."""
    return markdown(["method", *header], compare_rows(record))
