"""Everything that determines a result, as JSON: the key for all stored values of an evaluation.

`settings` reads a config with all defaults filled in, in groups:

* protocol, vocabulary, data: two numbers are comparable only if these are equal;
* method, weights: the subjects of a comparison;
* versions, run: what may change the last digits (or, for `code`, anything).

Journals, fitted clusters and reproduction cards follow one rule: a stored value is valid only if these
groups, including the contents of all files read, are unchanged. Weights, images, label maps and class
files are therefore identified by their contents. Something without identifiable contents, such as a
function written in a console, never equals anything from another process.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import platform
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import cv2
import mmengine.registry
import mmseg.registry
import numpy
import PIL
import torch
from mmengine.config import Config
from torch import Tensor, nn

from sfp.clip.checkpoints.loading import WeightsError, digest_of, weights_digest
from sfp.clip.checkpoints.published import own_templates
from sfp.clip.fingerprint import contents_digest
from sfp.clip.model import CLIP
from sfp.clip.text import model_templates
from sfp.data.datasets import LABEL_STEPS
from sfp.evaluation.contents import Content, contents
from sfp.evaluation.journal import fingerprint
from sfp.files import sha256_file
from sfp.plugins import files_digest, registered, source_files
from sfp.preprocessor import ImagePreprocessor
from sfp.registry import method_node
from sfp.segmentor import SETTINGS, OpenVocabSegmentor
from sfp.version import __version__
from sfp.vocabulary import load_vocabulary

STRICT = ("protocol", "vocabulary", "data")  # numbers are comparable only if these are equal
FREE = ("method", "weights")  # these may differ between compared numbers
NOTED = ("versions", "run")
GROUPS = STRICT + FREE + NOTED
OPENMMLAB = ("mmcv", "mmengine", "mmsegmentation")  # and the corresponding forks of OneDL
PACKAGES = [f"{line}{name}" for name in OPENMMLAB for line in ("onedl-", "")]
PACKAGES += ["scipy", "scikit-learn", "transformers"]  # for detectors, matching, guides and masks
REGISTRIES = ("DATASETS", "TRANSFORMS", "MODELS", "METRICS", "HOOKS", "LOOPS")
FILES = ("img_path", "seg_map_path")  # keys of mmseg's records
# arguments of the segmentor that are not part of the protocol, or are elsewhere on the card
_ELSEWHERE = {
    "weights",
    "classes",
    "method",
    "templates",
    "precision",
    "window_batch",
    "compiled",
    "graphs",
}
_ELSEWHERE |= {"data_preprocessor", "scores", "palette", "init_cfg", "pretrained", "train_cfg"}
_STEPS_OF_LABELS = {*LABEL_STEPS, "PackSegInputs"}  # no image passes through them


_tokens: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def plain(value: Any) -> Any:
    """Converts a value to JSON such that equal results mean equal values.

    Tuples become lists and paths text; arrays, tensors and modules become hashes of their contents;
    importable functions become their name with a hash of their file. Anything else whose contents
    cannot be read gets a unique name, so that it never compares equal.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=repr)
    if isinstance(value, numpy.generic):
        return value.item()
    if isinstance(value, (Tensor, numpy.ndarray)):
        data = torch.as_tensor(value)
        return f"{tuple(data.shape)} {digest_of({'': data.detach().cpu()})}"
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {contents_digest(value)}"
    if isinstance(value, functools.partial):
        return [plain(value.func), plain(value.args), plain(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f.name for f in dataclasses.fields(value) if f.compare]
        values = {name: plain(getattr(value, name)) for name in shown}
        return dict(values, type=type(value).__qualname__)
    if isinstance(value, type) or callable(value):
        return _callable(value)
    text = value.as_posix() if isinstance(value, Path) else repr(value)
    return f"{text} {_token(value)}" if " at 0x" in text else text


def _callable(value: Any) -> str:
    name = f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    module = sys.modules.get(str(value.__module__))
    found: Any = module
    for part in name.removeprefix(f"{value.__module__}.").split("."):
        found = getattr(found, part, None)
    file = getattr(module, "__file__", None)
    if found is not value or value.__module__ == "__main__":
        return f"{name} {_token(value)}"
    return f"{name} {sha256_file(file)[:16]}" if file and file.endswith(".py") else name


def _token(value: Any) -> str:
    """A token unique to an object across all processes."""
    try:
        return _tokens.setdefault(value, uuid.uuid4().hex)
    except TypeError:  # it has no hash, or no weak references
        return uuid.uuid4().hex


def settings(
    config: Config,
    *,
    model: OpenVocabSegmentor | None = None,
    dataset: Any = None,
    device: str | None = None,
) -> dict[str, dict[str, Any]]:
    """Everything that determines the result of a config, in groups, as JSON.

    Values that do not follow from the config alone (the precision behind "auto", the list of images)
    are left out unless the objects that know them are given.

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
        run=_run(config, device),
    )
    if dataset is not None:
        images, labels = _files(dataset)
        groups["run"]["files_sha256"] = fingerprint(
            dict(images=[x.sha256 for x in images], labels=[x.sha256 for x in labels])
        )
        _, names = image_names(dataset)
        turned = [name for name, x in zip(names, images, strict=True) if x.orientation != 1]
        groups["data"]["turned_by_exif"] = len(turned)
        if turned:
            groups["data"]["first_turned"] = turned[0]
    return plain(groups)


def _run(config: Config, device: str | None) -> dict[str, Any]:
    """The config's settings for how it is run."""
    result: dict[str, Any] = {
        name: config.model.get(name) for name in ("window_batch", "compiled", "graphs")
    }
    if device is not None:
        result["device"] = device
        result["tf32"] = device == "cuda" and torch.backends.cuda.matmul.allow_tf32
    if "clusters" in config and config.model.get("query_features"):
        result["clusters_sha256"] = sha256_file(config.model.query_features)
    if "test_dataloader" in config:
        result["batch_size"] = config.test_dataloader.get("batch_size", 1)
    if config.get("test_cfg", {}).get("fp16"):
        result["fp16"] = True  # of mmengine's loop: autocast
    if hooks := config.get("custom_hooks"):
        result["custom_hooks"] = hooks
    return result


def _protocol(config: Config, model: OpenVocabSegmentor | None) -> dict[str, Any]:
    node = config.model
    preprocessor = dict(node.get("data_preprocessor", {}))
    if preprocessor.get("type") == "ImagePreprocessor":
        del preprocessor["type"]
    result = {k: node.get(k, v) for k, v in SETTINGS.items() if k not in _ELSEWHERE}
    if "clusters" in config:  # its knobs are the setting; `run` has the file that they led to
        result["clusters"] = config.clusters
        del result["query_features"]
    elif isinstance(path := result["query_features"], (str, Path)):
        result["query_features"] = sha256_file(path)
    result.update(_defaults(ImagePreprocessor), **preprocessor)
    if node.get("type", "OpenVocabSegmentor") != "OpenVocabSegmentor":
        result["model"] = node.type
    own = own_templates(node.weights) if model is None else model.clip.text.templates
    templates = model_templates(node.get("templates", "auto"), own)
    result["templates"] = f"{len(templates)} {fingerprint(dict(templates=templates))[:16]}"
    precision = node.get("precision", "auto") if model is None else model.engine.computes_in
    if precision not in ("auto", "half"):  # what these come to depends on the machine
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
    """The pipeline steps from file to network, of the test set or of the config."""
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
    """Paths of a dataset's images, and the same relative to its image folder, with forward slashes.

    Raises:
        ValueError: if an image appears twice with different label maps.
    """
    records = _records(dataset)
    labels: dict[str, Any] = {}
    for record in records:
        label = record.get("seg_map_path")
        if labels.setdefault(record["img_path"], label) != label:
            raise ValueError(
                f"{record['img_path']} is in the test set with two label maps, "
                f"{labels[record['img_path']]} and {label}: evaluate them separately"
            )
    paths = [record["img_path"] for record in records]
    root = getattr(dataset, "data_prefix", {}).get("img_path")
    if root is None:  # several datasets in one
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return paths, [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def _records(dataset: Any) -> list[Mapping[str, Any]]:
    return [dataset.get_data_info(i) for i in range(len(dataset))]


def _files(dataset: Any) -> list[list[Content]]:
    """The contents of a dataset's images and label maps."""
    records = _records(dataset)
    return [contents([record[key] for record in records if key in record]) for key in FILES]


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

    It depends on the labels but not on how they are stored; a different conversion changes it.

    Args:
        records: for each image, the result of `sfp.evaluation.journal.count`.
    """
    pixels: dict[str, dict[int, int]] = {}
    for name, entries in records.items():
        row = pixels.setdefault(name, {})
        for truth, _, number in entries.T.tolist():
            row[truth] = row.get(truth, 0) + number
    return fingerprint(pixels)


def method_settings(node: Any) -> dict[str, Any]:
    """The group "method" of `settings`: a method node with all knobs of its preset."""
    return method_node(node) if isinstance(node, (str, Mapping)) else plain(node)


def _weights(config: Config, model: OpenVocabSegmentor | None) -> dict[str, Any]:
    source = config.model.weights
    result = dict(name=str(source) if isinstance(source, (str, Path)) else "a state dict")
    if path := config.get("load_from"):  # mmengine loads it over the others
        result["load_from"] = path
        if Path(path).is_file():
            result["load_from_sha256"] = sha256_file(path)
    if digest := _digest(source, model):
        result["sha256"] = digest
    if model is not None and (digest := _others(model)):
        result["others_sha256"] = digest
    return result


def _others(model: OpenVocabSegmentor) -> str | None:
    """The hash of weights other than CLIP's, of guides and mask proposers, if there are any."""
    clip = next(name for name, part in model.named_modules() if isinstance(part, CLIP))
    state = {k: v.cpu() for k, v in model.state_dict().items() if not k.startswith(f"{clip}.")}
    return digest_of(state) if state else None


def _digest(source: Any, model: OpenVocabSegmentor | None) -> str | None:
    """The hash of CLIP's weights, if they are available."""
    clip = source if model is None else model.clip
    if isinstance(clip, CLIP):
        return clip.digest
    if isinstance(source, Mapping):
        return digest_of(source)
    try:
        return weights_digest(source)
    except (WeightsError, FileNotFoundError):
        return None  # a config can be compared without its weights


def _versions() -> dict[str, Any]:
    result = dict(
        sfp=__version__,
        code=_code(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=numpy.__version__,
        opencv=cv2.__version__,
        pillow=PIL.__version__,
    )
    found = ((package, _version(package)) for package in PACKAGES)
    return result | {package: number for package, number in found if number}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the host has two lines of packages; one of each is there
        return None


def _code() -> str:
    """Hash of this package's source, and of all code that parts from elsewhere may use."""
    own = set(Path(__file__).parents[1].rglob("*.py"))
    return files_digest(own | source_files(list(_registered())))


def _registered() -> Iterable[Callable[..., Any]]:
    """All parts that configs can name: this package's, OpenMMLab's and other people's."""
    yield from registered()
    modules: tuple[ModuleType, ...] = (mmengine.registry, mmseg.registry)
    for module in modules:
        for name in REGISTRIES:
            yield from getattr(module, name).module_dict.values()
