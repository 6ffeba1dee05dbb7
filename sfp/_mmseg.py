"""Imports mmsegmentation with its notices silenced, and registers this package with it."""

from __future__ import annotations

import contextlib
import io
import warnings
from importlib import import_module

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    # "Could not import OneDL" (printed) and mmcv-lite's note on compiled ops, which nothing here uses
    warnings.simplefilter("ignore")
    import mmseg.datasets
    import mmseg.models  # noqa: F401

# Everything that configs may name, no matter which of it a user imports. These modules also import this
# one, so they must not import names from each other.
for _part in ("sfp.data.datasets", "sfp.evaluation.metrics", "sfp.segmentor"):
    import_module(_part)
