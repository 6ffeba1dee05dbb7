"""Ops that several methods share, by kind; those of one paper are in its file in `sfp.methods`.

Every module in this folder is imported, which registers its ops.
"""

import importlib
import pkgutil

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]

for name in __all__:
    importlib.import_module(f"{__name__}.{name}")
