"""What determines a result, what came out, and whether two results can be compared.

`settings` reads a config with all defaults resolved, in groups:

* protocol, vocabulary, data: two numbers compare only if these are equal;
* method, weights: what one compares;
* versions, run: what may change last digits (and, for `code`, anything).

A *reproduction card* is these groups with the scores: `card.json`, and `card.md` to read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch
from mmengine.config import Config
from torch import Tensor

from sfp.cli.method_table import knobs
from sfp.clip.checkpoints.loading import WeightsError, weights_digest
from sfp.clip.text import prompt_templates
from sfp.data.datasets import LABEL_STEPS
from sfp.evaluation.configs import ConfigError, find_config, read_config
from sfp.evaluation.journal import fingerprint
from sfp.files import atomic_write, sha256_file
from sfp.preprocessor import ImagePreprocessor
from sfp.registry import METHODS, OPS, find
from sfp.segmentor import SETTINGS, OpenVocabSegmentor
from sfp.version import __version__
from sfp.vocabulary import load_vocabulary

STRICT = ("protocol", "vocabulary", "data")  # numbers compare only if these are equal
FREE = ("method", "weights")  # what one compares
NOTED = ("versions", "run")
GROUPS = STRICT + FREE + NOTED
PACKAGES = [
    f"{line}{name}" for name in ("mmcv", "mmengine", "mmsegmentation") for line in ("onedl-", "")
]
# arguments of the segmentor that are not protocol, or that stand elsewhere on the card
_ELSEWHERE = {"weights", "classes", "method", "templates", "precision", "window_batch", "compiled"}
_ELSEWHERE |= {"data_preprocessor", "scores", "palette", "init_cfg", "pretrained", "train_cfg"}
_STEPS_OF_LABELS = {*LABEL_STEPS, "PackSegInputs"}  # no image passes through them


def plain(value: Any) -> Any:
    """A config's value as JSON holds it: lists for tuples, text for paths, a hash for a tensor."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return f"{tuple(data.shape)} {hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def settings(
    config: Config,
    *,
    model: OpenVocabSegmentor | None = None,
    dataset: Any = None,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Everything that determines the result of a config, in groups, as JSON holds it.

    What a config alone cannot tell (the precision that "auto" becomes, the list of images) is left
    out unless the parts that know it are given.

    Args:
        config: from `sfp.evaluation.run.load_config`.
        model: the segmentor built from it.
        dataset: the test set built from it.
        device: "cpu" or "cuda", where the model is.
    """
    groups: dict[str, dict[str, Any]] = dict(
        protocol=_protocol(config, model),
        vocabulary=_vocabulary(config, model),
        data=_data(config, dataset),
        method=method_settings(config.model.get("method", "sfp")),
        weights=_weights(config, model),
        versions=_versions(),
        run={name: config.model.get(name) for name in ("window_batch", "compiled")},
    )
    if device is not None:
        groups["run"]["device"] = device
    if "clusters" in config and config.model.get("query_features"):
        groups["run"]["clusters_sha256"] = sha256_file(config.model.query_features)
    if "test_dataloader" in config:
        groups["run"]["batch_size"] = config.test_dataloader.get("batch_size", 1)
    if dataset is not None:
        groups["run"]["file_sizes_sha256"] = fingerprint(dict(sizes=_sizes(dataset)))
    return plain(groups)


def _protocol(config: Config, model: OpenVocabSegmentor | None) -> dict[str, Any]:
    node = config.model
    preprocessor = {k: v for k, v in node.get("data_preprocessor", {}).items() if k != "type"}
    result = {k: node.get(k, v) for k, v in SETTINGS.items() if k not in _ELSEWHERE}
    if "clusters" in config:  # its knobs are the setting; `run` has the file that they led to
        result["clusters"] = config.clusters
        del result["query_features"]
    elif isinstance(path := result["query_features"], (str, Path)):
        result["query_features"] = sha256_file(path)
    result.update(_defaults(ImagePreprocessor), **preprocessor)
    templates = prompt_templates(node.get("templates", "imagenet"))
    result["templates"] = f"{len(templates)} {fingerprint(dict(templates=templates))[:16]}"
    precision = node.get("precision", "auto")
    if model is not None and precision != "int8":  # which the parameters do not tell
        precision = str(model.clip.text_projection.dtype).removeprefix("torch.")
        precision = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[precision]
    if precision != "auto":
        result["precision"] = precision
    if steps := _pipeline(config):
        for step in steps:
            if step["type"] not in _STEPS_OF_LABELS:
                arguments = {k: v for k, v in step.items() if k != "type"}
                result.setdefault(f"pipeline {step['type']}", []).append(arguments)
        result["pipeline"] = " > ".join(step["type"] for step in steps)
    if "test_evaluator" in config:
        nodes = config.test_evaluator
        result["metric"] = [
            {k: v for k, v in node.items() if k != "output_dir"}
            for node in (nodes if isinstance(nodes, Sequence) else [nodes])
        ]
    return result


def _pipeline(config: Config) -> Sequence[Mapping[str, Any]]:
    """The steps from file to network: the test set's, or those for images of one's own."""
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    return dataset.get("pipeline") or config.get("test_pipeline") or ()


def _defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _vocabulary(config: Config, model: OpenVocabSegmentor | None) -> dict[str, Any]:
    words = model.vocabulary if model is not None else load_vocabulary(config.model.classes)
    classes: list[list[str]] = [[] for _ in words.names]
    for query, index in zip(words.queries, words.index, strict=True):
        classes[index].append(query)
    return dict(sha256=fingerprint(dict(classes=classes)), classes=classes)


def image_names(dataset: Any) -> tuple[list[str], list[str]]:
    """Paths of a dataset's images, and the same below its image folder, with forward slashes."""
    paths = [dataset.get_data_info(i)["img_path"] for i in range(len(dataset))]
    root = dataset.data_prefix["img_path"]
    return paths, [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def _data(config: Config, dataset: Any) -> dict[str, Any]:
    node = config.get("test_dataloader", {}).get("dataset")
    if node is None:
        return {}
    arguments = {k: v for k, v in node.items() if k not in ("type", "pipeline", "data_root")}
    result = dict(dataset=node.type, arguments=arguments)
    if dataset is not None:
        _, names = image_names(dataset)
        result["images"] = len(names)
        result["list_sha256"] = fingerprint(dict(images=names))
    return result


def truth_hash(records: Mapping[str, Tensor]) -> str:
    """Hash of the pixels per class in the ground truth of every image.

    Equal for equal labels, however they are stored, and different for another conversion of them.

    Args:
        records: entries of each image, as `sfp.evaluation.journal.count` gives them.
    """
    pixels: dict[str, dict[int, int]] = {}
    for name, entries in records.items():
        row = pixels.setdefault(name, {})
        for truth, _, number in entries.T.tolist():
            row[truth] = row.get(truth, 0) + number
    return fingerprint(pixels)


def _sizes(dataset: Any) -> list[list[int]]:
    """Bytes of every image and label: a cheap sign that a file was replaced."""
    infos = (dataset.get_data_info(i) for i in range(len(dataset)))
    keys = ("img_path", "seg_map_path")
    return [[os.path.getsize(info[k]) for k in keys if k in info] for info in infos]


def method_settings(node: Any) -> dict[str, Any]:
    """The group "method" of `settings`: a method node with all knobs of its preset."""
    if isinstance(node, str):
        node = dict(type=node)
    if not isinstance(node, Mapping):
        return dict(composition=repr(node))
    name = node.get("type", "Method")
    own = {k: v for k, v in node.items() if k != "type"}
    if name == "Method":
        return dict(type=name, **own)
    return dict(type=name, **{**knobs(find(METHODS, name)), **own})


def _weights(config: Config, model: OpenVocabSegmentor | None) -> dict[str, Any]:
    source = config.model.weights
    result = dict(name=str(source) if isinstance(source, (str, Path)) else "a state dict")
    if config.get("load_from"):  # mmengine loads it over the others
        result["load_from"] = config.load_from
    if model is not None:
        return dict(result, sha256=model.clip.digest)
    try:
        digest = weights_digest(source)
    except (WeightsError, FileNotFoundError):
        return result  # of a config one may only want to know what it asks for
    return dict(result, sha256=digest) if digest else result


def _versions() -> dict[str, Any]:
    result = dict(
        sfp=__version__,
        code=_code(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=numpy.__version__,
    )
    found = ((package, _version(package)) for package in PACKAGES)
    return result | {package: number for package, number in found if number}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the host has two lines of packages; one of each is there
        return None


def _code() -> str:
    """Hash of this package's source, and of the files in which other people's parts are."""
    files = set(Path(__file__).parents[1].rglob("*.py"))
    registered = (*OPS.module_dict.values(), *METHODS.module_dict.values())
    # a part defined in a console is its own file, "<stdin>", which is_file() sorts out
    files |= {Path(fn.__code__.co_filename) for fn in registered}
    digest = hashlib.sha256()
    for content in sorted(hashlib.sha256(f.read_bytes()).digest() for f in files if f.is_file()):
        digest.update(content)
    return digest.hexdigest()


def write_card(folder: Path, groups: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Writes card.json and card.md.

    Args:
        folder: where they go.
        groups: from `settings`.
        result: scores: "mIoU", "aAcc", "mAcc", "fwIoU" and "classes" with "IoU" and "Acc" of each.
    """
    card = dict(groups)
    card["scores"] = {k: result[k] for k in ("mIoU", "aAcc", "mAcc", "fwIoU", "classes")}
    card["command"] = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    for name, text in (("card.json", json.dumps(card, indent=1) + "\n"), ("card.md", _page(card))):
        with atomic_write(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _page(card: Mapping[str, Any]) -> str:
    scores = card["scores"]
    lines = ["# Reproduction card", "", f"    {card['command']}", ""]
    lines += ["| mIoU | mAcc | aAcc | fwIoU |", "| ---: | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(_cell(scores[k]) for k in ("mIoU", "mAcc", "aAcc", "fwIoU")) + " |"]
    for group in GROUPS:
        lines += ["", f"## {group.capitalize()}", "", "| setting | value |", "| --- | --- |"]
        for key, value in card[group].items():
            if (group, key) == ("vocabulary", "classes"):
                value = f"{len(value)}, {sum(map(len, value))} queries"
            lines.append(f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |")
    lines += ["", "## Classes", "", "| class | IoU | Acc |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {_cell(row['IoU'])} | {_cell(row['Acc'])} |"
        for name, row in scores["classes"].items()
    ]
    return "\n".join(lines) + "\n"


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def read_side(path: str | Path) -> dict[str, Any]:
    """One side of a comparison: a card (.json), a work folder that has one, or a config.

    Raises:
        ConfigError: if there is no such file.
        ValueError: if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "card.json"
    if path.suffix != ".json":
        path = find_config(path)
    elif not path.is_file():
        raise ConfigError(
            f"there is no card {path}: give a card.json, a work folder of `sfp eval` that has one, or "
            "a config"
        )
    if path.suffix == ".py":
        config = read_config(path, "model.type", "model.classes", "test_dataloader.dataset")
        groups = settings(config)
        return {k: v for k, v in groups.items() if k not in NOTED}  # of a run, and there was none
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a card: {error}") from None
    if not isinstance(card, dict) or not all(isinstance(card.get(k), dict) for k in GROUPS):
        raise ValueError(f"{path} is not a card: expected the groups {', '.join(GROUPS)}")
    return card


@dataclass(frozen=True)
class Difference:
    """A setting that differs: its group, its dotted name, and its two values as text."""

    group: str
    name: str
    a: str
    b: str


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """In which settings two sides differ, of those that both know.

    Weights of one hash are the same under any name; words are compared class by class.
    """
    found: list[Difference] = []
    for group in GROUPS:
        left, right = dict(a.get(group, {})), dict(b.get(group, {}))
        if group == "weights" and left.get("sha256", 0) == right.get("sha256", 1):
            continue
        if group == "vocabulary" and left and right:
            found += _words(left["classes"], right["classes"])
            continue
        if left.get("type") != right.get("type"):  # methods: each has knobs of its own
            left, right = ({"type": side.get("type")} for side in (left, right))
        found += [
            Difference(group, k, *(json.dumps(x, ensure_ascii=False) for x in (v, right[k])))
            for k, v in left.items()
            if k in right and v != right[k]
        ]
    return found


def _words(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> Iterator[Difference]:
    if len(a) != len(b):
        yield Difference("vocabulary", "number of classes", str(len(a)), str(len(b)))
        return
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        if left != right:
            yield Difference("vocabulary", f"class {i}", ", ".join(left), ", ".join(right))


def unknown(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings that decide comparability and that only one side knows."""
    return [
        f"{group} {key}"
        for group in STRICT
        for key in sorted(set(a.get(group, {})) ^ set(b.get(group, {})))
    ]
