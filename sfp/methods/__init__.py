"""Presets: a file per paper, with its ops, its mathematics and a function from knobs to a composition.

Every module of this folder is imported, so that a new file is all that a new preset needs.
"""

import importlib
import pkgutil

__all__ = [module.name for module in pkgutil.iter_modules(__path__)]

for name in __all__:
    importlib.import_module(f"{__name__}.{name}")
