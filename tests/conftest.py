from __future__ import annotations

import gc
import os
import random
from importlib.util import find_spec

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# tests talk to servers on this machine, which a proxy would look for on its own
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, however busy the machine is; --hypothesis-profile explore: others.
settings.register_profile(
    "same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", settings.get_profile("same"), derandomize=False)
settings.load_profile("same")


def pytest_collection_finish():
    """Full collections, which mmengine asks for at each dataset, need not walk over all modules."""
    gc.freeze()


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws does not depend on which tests its process ran before."""
    seed(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    """Nor on which fixtures were made for it; other numbers than those draw."""
    seed(0)


@pytest.fixture(autouse=True, scope="module")
def settled():
    """As above, for what modules before this one have imported and cached."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def plain_configs():
    """mmengine writes a config four times an evaluation, and yapf takes longer than the rest of it."""
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("yapf"):  # else there is no mmengine either
            patch.setattr("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, True))
        yield


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache; all tests of a run share one."""
    monkeypatch.setenv("SFP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
