"""User modules that register methods, ops, guides or datasets: their import, and their code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sfp.registry import GUIDES, MASKS, METHODS, OPS, STAGES, is_ours

OTHERS = {"sfp", "mmcv", "mmengine", "mmseg", "torch"}  # their code has a hash or a version


def import_modules(names: Sequence[str]) -> None:
    """Imports modules by name, also from the current folder, and files by path.

    The folder of a file is added to the end of `sys.path`, so that it can import what lies beside it
    and other processes can unpickle what it defines.

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
    name, file = path.stem, str(path.absolute())
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    before = sys.modules.get(name)
    if before is not None and getattr(before, "__file__", None) != file:
        raise ValueError(f"another module is called {name!r}: rename the file")
    if (folder := str(Path(file).parent)) not in sys.path:
        sys.path.append(folder)
    # registered before it runs, because dataclasses and pickle look it up
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def registered() -> Iterator[Callable[..., Any]]:
    """All parts in this package's registries."""
    for registry in (OPS, METHODS, GUIDES, MASKS, STAGES):
        yield from registry.module_dict.values()


def source_files(parts: Iterable[Callable[..., Any]]) -> set[Path]:
    """The files of all code outside this package that some parts may use.

    These are the packages that define a part and, if there is one and because it may import any of
    them, all imported modules that are not installed packages.
    """
    parts = list(parts)
    packages = {str(part.__module__).partition(".")[0] for part in parts} - OTHERS
    # a part of a script, or one defined in a console, whose file "<stdin>" does not exist
    files = {Path(part.__code__.co_filename) for part in parts if hasattr(part, "__code__")}
    for name, module in list(sys.modules.items()) if packages else ():
        file, package = getattr(module, "__file__", None), name.partition(".")[0]
        if not file or package in OTHERS or name == "__main__":
            continue
        if package in packages or not _installed(Path(file)):
            files.add(Path(file))
    return {file for file in files if file.is_file()}


def own_code() -> str | None:
    """Hash of the code that registered parts from outside this package may use; None without any."""
    others = [part for part in registered() if not is_ours(part)]
    return files_digest(source_files(others)) if others else None


def _installed(file: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    packages = {"site-packages", "dist-packages"}.intersection(file.parts)
    return bool(packages) or file.is_relative_to(sysconfig.get_path("stdlib"))


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, whatever their names and order."""
    digest = hashlib.sha256()
    for content in sorted(hashlib.sha256(file.read_bytes()).digest() for file in files):
        digest.update(content)
    return digest.hexdigest()
