"""Presets: one file per paper, with its ops, mathematics and a function from knobs to a composition.

Every module in this folder is imported, so a new preset only needs a new file.
"""

import importlib
import pkgutil

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]

for name in __all__:
    importlib.import_module(f"{__name__}.{name}")
