"""Imports user modules that register methods, ops, guides or datasets."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def import_modules(names: Sequence[str]) -> None:
    """Imports modules by name, also from the current folder, and files by path.

    Raises:
        ValueError: if one cannot be imported; the message says why.
    """
    for name in names:
        try:
            _import(name)
        except Exception as error:  # noqa: PERF203 - a few names
            raise ValueError(f"--import {name}: {type(error).__name__}: {error}") from error


def _import(name: str) -> None:
    if name.endswith(".py"):
        _import_file(Path(name))
        return
    sys.path.insert(0, "")  # the current folder, as in `python -m`
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove("")


def _import_file(path: Path) -> None:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.setdefault(path.stem, module)  # so that its classes and functions can be pickled
