from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache; all tests of a run share one."""
    monkeypatch.setenv("SFP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
