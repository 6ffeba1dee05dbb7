"""timm and open_clip, whose forward passes tests compare with, without torchvision.

Both import torchvision when they are imported, for pictures and data sets, which no test touches. A
stand-in takes its place for as long as that takes, because torchvision has to be built for the one
PyTorch that is installed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

import pytest


class _AnyName(type):
    def __getattr__(cls, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _StandIn(types.ModuleType):
    """A module with every name that somebody may import: a class with every attribute."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass


def package(name: str):
    """timm or open_clip; skips the test where it is not installed."""
    if name in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return pytest.importorskip(name)
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        return pytest.importorskip(name)
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
