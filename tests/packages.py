"""Packages that define families of models, imported as far as tests need them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest


def open_clip(name: str = "model") -> types.ModuleType:
    """A module of open_clip, without its `__init__`, which wants torchvision for image transforms.

    Where torchvision is missing, a stand-in has the one class that `open_clip.utils` asks for, a frozen
    batch norm for ResNets, which is never made.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    if importlib.util.find_spec("torchvision") is None and "torchvision" not in sys.modules:
        for part in ("torchvision", "torchvision.ops", "torchvision.ops.misc"):
            sys.modules[part] = types.ModuleType(part)
            sys.modules[part].__spec__ = ModuleSpec(part, None)
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    if "open_clip" not in sys.modules:
        package = types.ModuleType("open_clip")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["open_clip"] = package
    return importlib.import_module(f"open_clip.{name}")
