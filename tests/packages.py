"""Imports the parts that tests need of packages that define families of models."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import types
from importlib.machinery import ModuleSpec

import pytest


class _AnyName(type):
    """A class that has every attribute, such as the members of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """A module that has every class that somebody may import."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for torchvision, which has to be built for the one PyTorch that is there.

    timm and open_clip import it for images and datasets, which no test uses.
    """

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def _imported(name: str) -> types.ModuleType:
    """A module, imported with the stand-in where torchvision is missing, and only for that long."""
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(name)
    finder = _Torchvision()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


def timm() -> types.ModuleType:
    """timm; skips the test where it is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return _imported("timm")


def open_clip(name: str = "model") -> types.ModuleType:
    """A module of open_clip, without its `__init__`, which imports much that no test needs."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    if "open_clip" not in sys.modules:
        package = types.ModuleType("open_clip")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["open_clip"] = package
    return _imported(f"open_clip.{name}")
