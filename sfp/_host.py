"""mmsegmentation: registering with it, and what to do where it is missing.

Configs name the model, the datasets and the metrics of this package and say
`custom_imports = dict(imports=["sfp"])`. So `import sfp` must lead to their registration, and yet not
load mmsegmentation where nobody evaluates: `sfp._mmseg`, which registers them, is imported when
somebody imports mmsegmentation, be it before `import sfp` or after it.
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
    """The error itself, or if a package of OpenMMLab is missing, one that says what to install."""
    missing = (error.name or "").partition(".")[0]
    return ModuleNotFoundError(INSTALL, name=missing) if missing in PACKAGES else error


def register() -> None:
    """Has the parts that configs name registered, now or when mmsegmentation is imported."""
    if sys.modules.get("mmseg"):
        _load()
    else:
        sys.meta_path.insert(0, _Watch())


def _load() -> None:
    try:
        import_module("sfp._mmseg")
    except ImportError as error:  # who imported mmsegmentation may want something else of it
        warnings.warn(f"sfp is not registered with mmsegmentation: {error}", stacklevel=2)


class _Watch(MetaPathFinder):
    """Leaves the finding to the others, and adds to mmsegmentation's import what comes after."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the others find for `mmseg`, with a loader that registers in the end."""
        if name != "mmseg":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenLoad(spec.loader)
                return spec
        return None


class _ThenLoad(Loader):
    """A loader of mmsegmentation, and `_load` when it is done."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module, which keeps no trace of this class, and registers."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Watch)]
        self.loader.exec_module(module)
        _load()
