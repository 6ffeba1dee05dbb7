"""Registers this package with mmsegmentation, and explains what to install if that is missing.

Configs name the model, datasets and metrics of this package and have
`custom_imports = dict(imports=["sfp"])`. So `import sfp` must register them, but should not load
mmsegmentation when it is not needed. The module `sfp._mmseg`, which does the registration, is therefore
imported as soon as mmsegmentation is, whether before or after `import sfp`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("mmcv", "mmengine", "mmseg")
INSTALL = (
    "this needs mmsegmentation, which is not installed: pip install 'sfp[mmseg]', or OpenMMLab's own "
    "packages (mmcv 2.1, mmengine 0.10 and mmsegmentation 1.2 work), but not both"
)


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error, or one that says what to install if a package of OpenMMLab is missing."""
    missing = (error.name or "").partition(".")[0]
    return ModuleNotFoundError(INSTALL, name=missing) if missing in PACKAGES else error


def register() -> None:
    """Registers this package's parts, now or when mmsegmentation is imported."""
    if sys.modules.get("mmseg"):
        _load()
    else:
        sys.meta_path.insert(0, _Watch())


def _load() -> None:
    try:
        import_module("sfp._mmseg")
    except ImportError as error:  # mmsegmentation may be in use for something else
        warnings.warn(f"sfp is not registered with mmsegmentation: {error}", stacklevel=2)


class _Watch(MetaPathFinder):
    """An import hook that runs the registration after mmsegmentation's own import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that other finders return for `mmseg`, with a loader that also registers."""
        if name != "mmseg":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenLoad(spec.loader)
                return spec
        return None


class _ThenLoad(Loader):
    """Wraps mmsegmentation's loader and calls `_load` afterwards."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Calls the wrapped loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module with its own loader restored, then registers."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
        self.loader.exec_module(module)
        _load()
