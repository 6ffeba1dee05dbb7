"""Evaluates a config: run, table, metrics file, picture sheet."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.registry import Registry, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from rich.table import Table
from torch.utils.data import DataLoader

from sfp.clip.checkpoints.loading import locate
from sfp.clip.checkpoints.published import NONE
from sfp.clip.text import model_templates
from sfp.data.datasets import DATASETS
from sfp.evaluation.card import write_card
from sfp.evaluation.clusters import cluster_config, ensure_clusters
from sfp.evaluation.configs import ConfigError, require
from sfp.evaluation.configs import load_config as load_config
from sfp.evaluation.distributed import start_processes
from sfp.evaluation.metrics import HungarianMetric, SegmentationMetric, complete, main_metric
from sfp.evaluation.notices import quiet
from sfp.evaluation.resumable_loop import ResumableTestLoop as ResumableTestLoop
from sfp.evaluation.scores import COLUMNS, cell, note_coverage, number, rounded
from sfp.evaluation.settings import truth_hash
from sfp.files import atomic_write
from sfp.method import build_method, check_needs
from sfp.overlay import Panel
from sfp.registry import suggest
from sfp.segmentor import SETTINGS
from sfp.visualize.sheets import at_size, picture_sheet
from sfp.vocabulary import load_vocabulary

LOADER = inspect.signature(DataLoader).parameters  # settings of `test_dataloader`
RESULTS = ("metrics.json", "card.json", "card.md", "sheet.png")  # files of `evaluate`


@quiet()
def check(config: Config) -> None:
    """Checks within seconds that a config's data and weights exist, and builds its method.

    Raises:
        FileNotFoundError: if images or labels are missing; the message says where they belong.
        WeightsError: likewise for weights.
        ValueError: if a setting, the method or the vocabulary is wrong.
    """
    init_default_scope(config.get("default_scope", "mmseg"))
    if "clusters" in config:
        cluster_config(config)
    segmentor = MODELS.get(config.model.type)
    if segmentor is None:
        raise ConfigError(f"model.type={config.model.type!r} is not registered in mmseg's MODELS")
    known = SETTINGS
    for name in config.model:
        if name != "type" and name not in known:
            raise ConfigError(f"the segmentor has no setting {name!r}{suggest(name, known)}")
    require(config, "model.classes", "model.weights", "test_dataloader.dataset.type")
    require(config, "test_evaluator", "test_cfg.type")
    for name in config.test_dataloader:
        if name not in LOADER:
            raise ConfigError(f"test_dataloader has no setting {name!r}{suggest(name, LOADER)}")
    complete(config.test_evaluator)
    model_templates(config.model.get("templates", "auto"))
    method = build_method(config.model.get("method", "sfp"))
    check_needs(method, config.model.get("guides"), config.model.get("regions"))
    dataset = _built(DATASETS, config, "test_dataloader.dataset")
    if config.model.get("data_preprocessor"):
        _built(MODELS, config, "model.data_preprocessor")
    names = load_vocabulary(config.model.classes).names  # some class files belong to the data
    expected = dataset.metainfo.get("classes") or names
    if len(names) != len(expected):
        raise ValueError(
            f"{config.model.classes} has {len(names)} classes, but {type(dataset).__name__} has "
            f"{len(expected)}: expected one line per class, in label order"
        )
    if config.model.weights != NONE:
        locate(config.model.weights)


def _built(registry: Registry, config: Config, place: str) -> Any:
    """Builds a part of a config.

    Raises:
        ConfigError: for an unknown argument or type; the message names the part.
    """
    node = functools.reduce(getattr, place.split("."), config)
    try:
        return registry.build(node)
    except (TypeError, KeyError) as error:
        raise ConfigError(f"{place}: {error.args[0]}") from None


@quiet()
def evaluate(
    config: Config, *, pictures: int = 6, show_dir: str | None = None, resume: bool = True
) -> dict[str, Any]:
    """Runs the test set of a config and writes the results into its work folder.

    Per-image counts are stored in its folder `journal`, so that an interrupted run can resume.

    Args:
        config: from `load_config`.
        pictures: number of images on the sheet `sheet.png`; 0 for none.
        show_dir: folder for one picture per image, drawn by mmseg's visualization hook.
        resume: False starts over.

    Returns:
        "mIoU", "mAcc", "aAcc", "fwIoU" in percent, "classes" with IoU and Acc of each, and a
        description of what was evaluated (without words also "assignment", the cluster of each class;
        with further metrics also "metrics", their results). They are also written to `metrics.json`,
        and with all settings to the reproduction card, `card.json` and `card.md`. Empty on processes
        other than the first.

    Raises:
        DataError: if a file cannot be used, with its name, or if all ground truth is ignored.
    """
    config = copy.deepcopy(config)  # its parts are changed below
    start_processes(config)
    if "clusters" in config:
        config = ensure_clusters(config)
    runner = Runner.from_cfg(_for_runner(config, show_dir, resume))
    work_dir = Path(config.work_dir)
    measured = runner.test()
    if not is_main_process():
        return {}
    metric = main_metric(runner.test_evaluator)
    result = _result(runner, metric, measured)
    text = json.dumps(
        result, indent=2, default=float
    )  # third-party metrics may return NumPy numbers
    result = json.loads(text)  # return exactly what the file contains, e.g. lists for tuples
    for name in RESULTS:  # those of an earlier run would pass for this one's
        (work_dir / name).unlink(missing_ok=True)
    with atomic_write(work_dir / "metrics.json") as path:
        path.write_text(text + "\n")
    if metric is None:  # results were only written, perhaps for images without labels
        return result
    note_coverage(metric.coverage, len(metric.dataset_meta["classes"]), metric.ignore_index)
    if (groups := getattr(runner.test_loop, "settings", None)) is not None:
        groups["data"].update(metric.coverage, truth_sha256=truth_hash(metric.records))
        write_card(work_dir, groups, result)
    if pictures:
        _write_sheet(runner, work_dir / "sheet.png", pictures, metric)
    return result


def _for_runner(config: Config, show_dir: str | None, resume: bool) -> Config:
    """The config for mmengine's runner."""
    config.test_evaluator = complete(config.test_evaluator)
    if config.test_cfg.type == "TestLoop":
        # drawing every image requires running every image
        config.test_cfg.update(type="ResumableTestLoop", resume=resume and show_dir is None)
    if config.get("launcher", "none") != "none":
        config.model_wrapper_cfg = dict(type="FrozenReplica")
    if show_dir is not None:
        # for every image: by default some versions of mmseg draw one in fifty
        config.default_hooks.visualization = dict(
            type="SegVisualizationHook", draw=True, interval=1
        )
        config.visualizer.save_dir = str(Path(show_dir).absolute())
    # mmengine keeps visualizers and logs by name: each evaluation in a process needs its own names
    config.visualizer.pop("name", None)
    config.setdefault("experiment_name", f"{Path(config.work_dir).name}_{time.time_ns()}")
    return config


def _result(
    runner: Runner, metric: SegmentationMetric | None, measured: Mapping[str, Any]
) -> dict[str, Any]:
    """The results of an evaluation, with a description of what was evaluated."""
    result: dict[str, Any] = {}
    if metric is not None:
        names = metric.dataset_meta["classes"]
        result = rounded(metric.summary, names)
        if (assignment := getattr(metric, "assignment", None)) is not None:
            result["assignment"] = dict(zip(names, assignment.tolist(), strict=True))
        prefix = f"{metric.prefix}/" if metric.prefix else ""
        measured = {k: v for k, v in measured.items() if k not in {prefix + c for c in COLUMNS}}
    if measured:
        result["metrics"] = {k: _finite(v) for k, v in measured.items()}
    result["images"] = len(runner.test_dataloader.dataset)
    model = runner.cfg.model
    result["method"] = model.get("method", "sfp")
    result["weights"] = str(model.weights)
    if (groups := getattr(runner.test_loop, "settings", None)) is not None:
        result["precision"] = groups["protocol"]["precision"]
    return result


def _finite(value: Any) -> Any:
    """None for NaN, which JSON does not have."""
    return number(value) if isinstance(value, float) else value


def per_class_table(result: Mapping[str, Any]) -> Table:
    """The classes of a result, and the means below them."""
    title = f"{_method_name(result['method'])}, {result['images']} images"
    table = Table(title=", ".join([title, *filter(None, [result.get("precision")])]))
    table.add_column("class")
    for column in ("IoU", "Acc"):
        table.add_column(column, justify="right")
    for name, scores in result.get("classes", {}).items():
        table.add_row(name, *(cell(scores[k]) for k in ("IoU", "Acc")))
    table.add_section()
    if "mIoU" in result:
        table.add_row("mIoU / mAcc", cell(result["mIoU"]), cell(result["mAcc"]), style="bold")
        table.add_row("aAcc", "", cell(result["aAcc"]))
        table.add_row("fwIoU", cell(result["fwIoU"]), "")
    table.add_section()
    for name, value in result.get("metrics", {}).items():
        table.add_row(name, cell(value) if isinstance(value, (int, float)) else str(value))
    return table


def _method_name(node: Any) -> str:
    return node if isinstance(node, str) else node.get("type", "Method")


def _write_sheet(runner: Runner, path: Path, count: int, metric: SegmentationMetric) -> None:
    """Some test images with their truth, plain CLIP's labels and the method's."""
    dataset = runner.test_dataloader.dataset
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    count = min(count, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    ours = model.method
    name = _method_name(runner.cfg.model.get("method", "sfp"))
    named = {"SFP" if name == "sfp" else name: ours}
    if not isinstance(metric, HungarianMetric) and model.clip.visual.blocks:
        # clusters are only valid for their own method's features; without CLIP there is no plain CLIP
        named = {"plain CLIP": build_method("clip"), **named}
    columns: dict[str, list[Panel]] = {"image": [], "ground truth": []}
    for i in chosen:
        record = dataset[i]
        truth = record["data_samples"].gt_sem_seg.data[0]
        picture = at_size(record["inputs"], truth.shape)
        columns["image"].append(Panel(picture))
        columns["ground truth"].append(Panel(picture, truth.numpy()))
        for title, each in named.items():
            model.method = each
            batch = dict(inputs=[record["inputs"]], data_samples=[record["data_samples"]])
            (sample,) = model.test_step(batch)
            labels = metric.relabel(sample.pred_sem_seg.data[0]).cpu().numpy()
            columns.setdefault(title, []).append(Panel(picture, labels))
    model.method = ours
    meta = dataset.metainfo
    picture_sheet(columns, meta["classes"], meta["palette"], path)
