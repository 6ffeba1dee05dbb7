"""Several methods over one benchmark: one model, one text bank, one trunk per group of methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS

from sfp.cache import atomic_write
from sfp.datasets import DATASETS
from sfp.describe import markdown
from sfp.method import Method, build_method
from sfp.metrics import SegmentationMetric, summarize
from sfp.segmentor import OpenVocabSegmentor
from sfp.sheet import Panel, at_size, picture_sheet

COLUMNS = ("mIoU", "mAcc", "aAcc", "fwIoU")


def build_segmentor(config: Config) -> OpenVocabSegmentor:
    """The segmentor of a config, on the GPU if there is one."""
    init_default_scope(config.get("default_scope", "mmseg"))
    segmentor = MODELS.build(config.model)
    return segmentor.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def compare(
    config: Config,
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    *,
    pictures: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates methods on the test set of a config, all of them image by image.

    Args:
        config: from `evaluate.load_config`; its `model.method` is not used.
        methods: what `build_method` takes, by the name that tables show.
        pictures: images on the sheet; 0 for none.
        progress: called with the images done and all of them.

    Returns:
        "methods": for each name mIoU, mAcc, aAcc, fwIoU and the classes' IoU, in percent; written with
        a Markdown table and a picture sheet into the work folder.
    """
    init_default_scope(config.get("default_scope", "mmseg"))
    built = {name: build_method(method) for name, method in methods.items()}
    dataset = DATASETS.build(config.test_dataloader.dataset)
    model = config.model.copy()
    model.method = next(iter(built.values()))
    segmentor = build_segmentor(Config(dict(config, model=model)))
    loader = Runner.build_dataloader(dict(config.test_dataloader, dataset=dataset))
    chosen = {i * len(dataset) // pictures for i in range(pictures)} if pictures else set()
    columns: dict[str, list[Panel]] = {t: [] for t in ("image", "ground truth", *built)}
    names = dataset.metainfo["classes"]
    counts = {name: torch.zeros(3, len(names), dtype=torch.float64) for name in built}

    done = 0
    for batch in loader:
        raw = batch["inputs"]
        data = segmentor.data_preprocessor(batch)
        samples = data["data_samples"]
        results = segmentor.predict_each(list(built.values()), data["inputs"], samples)
        for name, labels in zip(built, results, strict=True):
            for sample, result in zip(samples, labels, strict=True):
                truth = sample.gt_sem_seg.data[0].to(result.labels)
                areas = SegmentationMetric.intersect_and_union(
                    result.labels, truth, len(names), ignore_index=255
                )
                counts[name] += torch.stack([areas[0], areas[2], areas[3]]).double()
        for n, sample in enumerate(samples):
            if done + n in chosen:
                truth = sample.gt_sem_seg.data[0].cpu().numpy()
                picture = at_size(raw[n], truth.shape)
                columns["image"].append(Panel(picture))
                columns["ground truth"].append(Panel(picture, truth))
                for name, labels in zip(built, results, strict=True):
                    columns[name].append(Panel(picture, labels[n].labels.cpu().numpy()))
        done += len(samples)
        progress(done, len(dataset))

    table = {}
    for name, (intersect, predicted, truth) in counts.items():
        scores = summarize(intersect, predicted, truth)
        table[name] = {k: round(scores[k], 4) for k in COLUMNS}
        table[name]["IoU"] = dict(zip(names, (round(x, 4) for x in scores["IoU"]), strict=True))
    record = dict(images=done, weights=str(config.model.weights), methods=table)
    folder = Path(config.work_dir)
    with atomic_write(folder / "compare.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    with atomic_write(folder / "compare.md") as path:
        path.write_text(compare_markdown(record))
    if pictures:
        palette = dataset.metainfo["palette"]
        picture_sheet(columns, names, palette, folder / "compare.png")
    return record


def compare_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The cells of a comparison, methods in the order given."""
    return [
        [name, *(f"{scores[k]:.1f}" for k in COLUMNS)] for name, scores in record["methods"].items()
    ]


def compare_markdown(record: Mapping[str, Any], header: Sequence[str] = COLUMNS) -> str:
    """A comparison as a Markdown table."""
    return markdown(["method", *header], compare_rows(record))
