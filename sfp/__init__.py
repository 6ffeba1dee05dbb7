"""Training-free open-vocabulary segmentation with frozen CLIP.

Names are imported on first use (PEP 562), so that `import sfp` loads neither PyTorch nor
mmsegmentation. The latter is needed only for evaluation and for these names: `OpenVocabSegmentor`,
`ImagePreprocessor`, `datasets`, `metrics` and `mm`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sfp import _host
from sfp.version import __version__

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with the table below
    from sfp import _mmseg as mm
    from sfp import methods, ops
    from sfp.api import Model, load
    from sfp.clip.checkpoints.loading import WeightsError, load_clip
    from sfp.clip.model import CLIP
    from sfp.data import datasets
    from sfp.data.coco import coco_document
    from sfp.data.images import DataError, ImageError, as_image, read_image
    from sfp.evaluation import metrics
    from sfp.method import Method, Purify, Readout, build_method
    from sfp.registry import METHODS, OPS, list_methods, list_ops, op
    from sfp.result import Result
    from sfp.segmentor import ImagePreprocessor, OpenVocabSegmentor
    from sfp.tokens import Heads, Tokens
    from sfp.trace import Trace
    from sfp.vocabulary import Vocabulary, load_vocabulary

_MODULES = {
    "datasets": "sfp.data.datasets",
    "methods": "sfp.methods",
    "metrics": "sfp.evaluation.metrics",
    "mm": "sfp._mmseg",
    "ops": "sfp.ops",
}
_NAMES = {
    "sfp.api": ("Model", "load"),
    "sfp.clip.checkpoints.loading": ("WeightsError", "load_clip"),
    "sfp.clip.model": ("CLIP",),
    "sfp.data.coco": ("coco_document",),
    "sfp.data.images": ("DataError", "ImageError", "as_image", "read_image"),
    "sfp.method": ("Method", "Purify", "Readout", "build_method"),
    "sfp.registry": ("METHODS", "OPS", "list_methods", "list_ops", "op"),
    "sfp.result": ("Result",),
    "sfp.segmentor": ("ImagePreprocessor", "OpenVocabSegmentor"),
    "sfp.tokens": ("Heads", "Tokens"),
    "sfp.trace": ("Trace",),
    "sfp.vocabulary": ("Vocabulary", "load_vocabulary"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "CLIP",
    "METHODS",
    "OPS",
    "DataError",
    "Heads",
    "ImageError",
    "ImagePreprocessor",
    "Method",
    "Model",
    "OpenVocabSegmentor",
    "Purify",
    "Readout",
    "Result",
    "Tokens",
    "Trace",
    "Vocabulary",
    "WeightsError",
    "__version__",
    "as_image",
    "build_method",
    "coco_document",
    "datasets",
    "list_methods",
    "list_ops",
    "load",
    "load_clip",
    "load_vocabulary",
    "methods",
    "metrics",
    "mm",
    "op",
    "ops",
    "read_image",
]


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of this package, on first access."""
    try:
        if name in _HOMES:
            value = getattr(import_module(_HOMES[name]), name)
        elif name in _MODULES:
            value = import_module(_MODULES[name])
        elif not name.startswith("_") and find_spec(f"sfp.{name}"):
            return import_module(f"sfp.{name}")  # which makes it an attribute
        else:
            raise AttributeError(f"module 'sfp' has no attribute {name!r}")
    except ModuleNotFoundError as error:
        raise _host.explained(error) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_host.register()
