"""Evaluation of a config from start to end: run, table, metrics file, picture sheet."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, MODEL_WRAPPERS, init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from sfp.clip.checkpoints.loading import locate
from sfp.clip.text import prompt_templates
from sfp.data.datasets import DATASETS
from sfp.evaluation.card import truth_hash, write_card
from sfp.evaluation.clusters import cluster_config, ensure_clusters
from sfp.evaluation.configs import ConfigError, find_config, read_config, require
from sfp.evaluation.metrics import HungarianMetric, SegmentationMetric
from sfp.evaluation.resumable_loop import ResumableTestLoop
from sfp.files import atomic_write
from sfp.method import build_method
from sfp.overlay import Panel
from sfp.registry import suggest
from sfp.segmentor import SETTINGS, OpenVocabSegmentor
from sfp.visualize.sheets import at_size, picture_sheet
from sfp.vocabulary import load_vocabulary

METRICS = ("mIoU", "aAcc", "mAcc", "fwIoU")


@HOOKS.register_module()
class ProgressHook(Hook):
    """A progress bar over the test images; every process counts its own, the first one shows it."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def before_test(self, runner: Runner) -> None:
        """Starts the bar."""
        if not is_main_process():
            return
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            TextColumn("{task.description}"), *columns, console=Console(stderr=True)
        )
        total = len(runner.test_dataloader.dataset)
        done = total - getattr(runner.test_loop, "remaining", total)
        self._task = self._bar.add_task("evaluating", total=total, completed=done)
        self._bar.start()

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Counts a batch of all processes."""
        if self._bar is not None:
            self._bar.advance(self._task, len(outputs) * runner.world_size)

    def after_test(self, runner: Runner) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bar.tasks[0].total)
            self._bar.stop()
            self._bar = None


@MODEL_WRAPPERS.register_module()
class FrozenReplica(nn.Module):
    """Stands where DistributedDataParallel would: nothing is trained, so nothing is synchronised."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def test_step(self, data: Any) -> Any:
        """The wrapped model's."""
        return self.module.test_step(data)  # type: ignore[operator]


def load_config(
    path: str | Path,
    *,
    method: str | None = None,
    weights: str | None = None,
    work_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """A config with what the command line says put on top of it.

    Args:
        path: of the config file, or the name of a shipped one (`sfp.evaluation.configs.find_config`).
        method: preset that replaces the whole `model.method` (a merge would leave the other
            method's flags behind).
        weights: replaces `model.weights`.
        work_dir: where results go; by default work/<name of the config>.
        options: dotted keys and values, e.g. {"model.method.pm": "lof"}; applied last.

    Raises:
        ConfigError: if there is no such file, or it is no config.
    """
    path = find_config(path)
    config = read_config(path, "model.type")
    if method is not None:
        config.model.pop("method", None)  # assigning a dict would merge it
        config.model.method = dict(type=method)
    if weights is not None:
        config.model.weights = weights
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work", Path(path).stem))
    if options:
        config.merge_from_dict(dict(options))
    return config


def check(config: Config) -> None:
    """Looks for the data and the weights of a config, and builds its method, in seconds.

    Raises:
        FileNotFoundError: if images or labels are missing; the message says what to put where.
        WeightsError: likewise for weights.
        ValueError: if a setting, the method or the vocabulary is not right.
    """
    init_default_scope(config.get("default_scope", "mmseg"))
    if "clusters" in config:
        cluster_config(config)
    if MODELS.get(config.model.type) is None:
        raise ConfigError(f"model.type={config.model.type!r} is not registered in mmseg's MODELS")
    known = SETTINGS
    for name in config.model:
        if name != "type" and name not in known:
            raise ConfigError(f"the segmentor has no setting {name!r}{suggest(name, known)}")
    require(config, "model.classes", "model.weights", "test_dataloader.dataset")
    require(config, "test_evaluator", "test_cfg.type")
    prompt_templates(config.model.get("templates", "imagenet"))
    build_method(config.model.get("method", "sfp"))
    try:
        dataset = DATASETS.build(config.test_dataloader.dataset)
    except TypeError as error:
        raise ConfigError(f"test_dataloader.dataset: {error}") from None
    names = load_vocabulary(config.model.classes).names  # some come with the data
    expected = dataset.metainfo.get("classes") or names
    if len(names) != len(expected):
        raise ValueError(
            f"{config.model.classes} names {len(names)} classes, {type(dataset).__name__} has "
            f"{len(expected)}: the labels would not be theirs"
        )
    locate(config.model.weights)


def _slurm_group() -> dict[str, str]:
    """What `torch.distributed` reads from the environment, out of what `srun` sets there.

    Raises:
        ValueError: if nothing of that is set, or the first node cannot be told.
    """
    try:
        rank, size, nodes = (
            os.environ[f"SLURM_{name}"] for name in ("PROCID", "NTASKS", "NODELIST")
        )
    except KeyError as error:
        raise ValueError(
            f"--launcher slurm goes by the variables of srun, and {error} is not set: start it with "
            "srun (docs/scaling.md), or use torchrun and --launcher pytorch"
        ) from None
    address = os.environ.get("MASTER_ADDR")
    if address is None and not set(nodes) & set("[,"):
        address = nodes
    elif address is None:
        command = ["scontrol", "show", "hostnames", nodes]  # of "n[1-4]", one a line
        try:
            listed = subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(
                f"--launcher slurm: scontrol cannot tell the first of the nodes {nodes} ({error}): set "
                "MASTER_ADDR to its address"
            ) from None
        address = listed.stdout.split()[0]
    port = os.environ.get("MASTER_PORT", "29500")
    return dict(RANK=rank, WORLD_SIZE=size, MASTER_ADDR=address, MASTER_PORT=port)


def evaluate(
    config: Config, *, pictures: int = 6, show_dir: str | None = None, resume: bool = True
) -> dict[str, Any]:
    """Runs the test set of a config and writes what came out into its work folder.

    Counts of every image are kept in the folder `journal` there; a run that was killed continues.

    Args:
        config: from `load_config`.
        pictures: images on the sheet `sheet.png`; 0 for none.
        show_dir: folder for one picture per image, by mmseg's visualization hook; images that were
            done by an earlier start are not drawn again.
        resume: False starts over.

    Returns:
        "mIoU", "aAcc", "mAcc", "fwIoU" in percent, "classes" with IoU and Acc of each, and what was
        evaluated (without words also "assignment", the cluster of each class); written to
        `metrics.json` as well, and with every setting to the reproduction card, `card.json` and
        `card.md`. Empty on processes other than the first.
    """
    config = config.copy()
    if config.get("launcher", "none") != "none":
        config.model_wrapper_cfg = dict(type="FrozenReplica")
        if not torch.cuda.is_available() and not torch.distributed.is_initialized():
            # mmengine's own start asks for CUDA, and leaves a group that is there alone
            if config.launcher == "slurm":
                os.environ.update(_slurm_group())
            torch.distributed.init_process_group("gloo")
    if "clusters" in config:
        if config.get("launcher", "none") != "none" and not torch.distributed.is_initialized():
            init_dist(config.launcher, **config.env_cfg.dist_cfg)  # else the runner does, later
        config = ensure_clusters(config)
    if config.test_cfg.type == "TestLoop":
        # a picture of each image needs each image to be run
        config.test_cfg.update(type="ResumableTestLoop", resume=resume and show_dir is None)
    config.custom_hooks = [*config.get("custom_hooks", []), dict(type="ProgressHook", priority=90)]
    if show_dir is not None:
        config.default_hooks.visualization = dict(type="SegVisualizationHook", draw=True)
        config.visualizer.save_dir = str(Path(show_dir).absolute())
    # mmengine keeps visualizers and logs by name: each evaluation of a process needs names of its own
    config.visualizer.pop("name", None)
    config.setdefault("experiment_name", f"{Path(config.work_dir).name}_{time.time_ns()}")
    runner = Runner.from_cfg(config)
    runner.test()
    if not is_main_process():
        return {}
    (metric,) = (m for m in runner.test_evaluator.metrics if isinstance(m, SegmentationMetric))
    names = metric.dataset_meta["classes"]
    result = {k: round(metric.summary[k], 4) for k in METRICS}
    result["classes"] = {
        name: dict(IoU=_number(iou), Acc=_number(acc))
        for name, iou, acc in zip(names, metric.summary["IoU"], metric.summary["Acc"], strict=True)
    }
    if isinstance(metric, HungarianMetric) and metric.assignment is not None:
        result["assignment"] = dict(zip(names, metric.assignment.tolist(), strict=True))
    model = config.model
    result["images"] = len(runner.test_dataloader.dataset)
    result["method"] = model.get("method", "sfp")
    result["weights"] = str(model.weights)
    work_dir = Path(config.work_dir)
    text = json.dumps(result, indent=2)
    result = json.loads(text)  # what is returned is what the file holds: lists, no tuples
    with atomic_write(work_dir / "metrics.json") as path:
        path.write_text(text + "\n")
    if isinstance(runner.test_loop, ResumableTestLoop):
        groups = runner.test_loop.settings
        if metric.records:
            groups["data"]["truth_sha256"] = truth_hash(metric.records)
        write_card(work_dir, groups, result)
    if pictures:
        _write_sheet(runner, work_dir / "sheet.png", pictures, metric)
    return result


def _number(value: float) -> float | None:
    """Rounded; None, JSON's word for nothing, for the NaN of a class that does not occur."""
    return None if math.isnan(value) else round(value, 4)


def per_class_table(result: Mapping[str, Any]) -> Table:
    """The classes of a result, and the means below them."""
    table = Table(title=f"{_method_name(result)}, {result['images']} images")
    table.add_column("class")
    for column in ("IoU", "Acc"):
        table.add_column(column, justify="right")
    for name, scores in result["classes"].items():
        table.add_row(name, *(_cell(scores[k]) for k in ("IoU", "Acc")))
    table.add_section()
    table.add_row("mIoU / mAcc", _cell(result["mIoU"]), _cell(result["mAcc"]), style="bold")
    table.add_row("aAcc", "", _cell(result["aAcc"]))
    table.add_row("fwIoU", _cell(result["fwIoU"]), "")
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _method_name(result: Mapping[str, Any]) -> str:
    method = result["method"]
    return method if isinstance(method, str) else method.get("type", "Method")


def _write_sheet(runner: Runner, path: Path, count: int, metric: SegmentationMetric) -> None:
    """Some test images with their truth, plain CLIP's labels and the method's."""
    dataset = runner.test_dataloader.dataset
    model = runner.model.module if isinstance(runner.model, FrozenReplica) else runner.model
    assert isinstance(model, OpenVocabSegmentor)
    count = min(count, len(dataset))
    chosen = [i * len(dataset) // count for i in range(count)]
    ours = model.method
    columns = {"image": [], "ground truth": []}  # type: dict[str, list[Panel]]
    named = {"plain CLIP": build_method("clip"), "SFP": ours}
    method = runner.cfg.model.get("method", "sfp")
    name = method if isinstance(method, str) else method.get("type", "Method")
    if name != "sfp":
        named = {"plain CLIP": named["plain CLIP"], name: ours}
    if isinstance(metric, HungarianMetric):
        named.pop("plain CLIP")  # clusters of one method's features mean nothing in another's
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


def quiet() -> None:
    """Keeps mmengine's advice to developers off the terminal of people who evaluate."""
    import warnings

    warnings.filterwarnings("ignore", module=r"mm(engine|seg|cv)\b")
    MMLogger.get_current_instance().setLevel(logging.ERROR)  # until a run brings its own logger
