"""The one door to mmsegmentation: its import greets users with lines that are not for them."""

from __future__ import annotations

import contextlib
import io
import warnings

with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
    # "Could not import OneDL" (printed) and mmcv-lite's note on compiled ops, which nothing here uses
    warnings.simplefilter("ignore")
    import mmseg.datasets
    import mmseg.models  # noqa: F401
