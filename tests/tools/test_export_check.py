"""tools/export_check.py: files in each precision against the engine."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

import sfp

TOOL = Path(__file__).parents[2] / "tools" / "export_check.py"


@pytest.mark.slow
def test_precisions():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    agreement = runpy.run_path(str(TOOL))["agreement"]
    found = agreement(sfp.load("mini", "clip"), 2, ("fp16", "int8"))
    (_, half, *rounded), (_, small, *coarse) = found
    assert small < half
    assert 0.99 < rounded[0] <= 1
    assert 0.9 < coarse[0] < 1
    assert all(0.2 < right < 1 for _, right in (rounded, coarse))
