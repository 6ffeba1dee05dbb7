"""tools/gpu_check.sh on a CPU: the checks run, and tables can be made from the record."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.multiprocessing
from processes import forked

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    """gpu_check.py in this process, for its exit code."""
    monkeypatch.syspath_prepend(TOOLS)

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(TOOLS / "gpu_check.py"), run_name="__main__")
        return exit_.value.code

    return run


def small(run: Callable[..., int], *words: str) -> int:
    """With a model that takes milliseconds, and no imports for measuring memory."""
    import bench

    bench.ARCHS["ViT-B/32"] = dict(patch=32, width=128, layers=12, embed_dim=64)
    torch.multiprocessing.get_context = lambda _: multiprocessing.get_context("fork")
    return run(*words)


@pytest.mark.process
@pytest.mark.slow
def test_a_small_run(tool, tmp_path, capfd):
    out = tmp_path / "gpu.json"
    words = ["--small", "--device", "cpu", "--precisions", "bf16", "--out", str(out)]
    assert forked(small, tool, *words) == 0  # it starts a process group
    printed = capfd.readouterr().out
    record = json.loads(out.read_text())
    assert record["process_group"] == dict(backend="gloo", ok=True)
    for name in ("clip", "sfp"):
        assert record["methods"][name]["bf16"]["same_labels"] > 0.95
        assert record["methods"][name]["bf16"]["finite"]
    (case,) = record["bench"]
    (row,) = case["rows"]
    assert row["equal_labels"] > 0.99
    assert tool("--markdown", str(out)) == 0
    tables = capfd.readouterr().out
    assert printed.endswith(tables)
    assert "| ViT-B/32, tiny, 3 classes, batch of 1 | fp32 |" in tables


@pytest.mark.process
def test_the_script_passes_everything_on(tmp_path):
    """The checkout comes first on the path, then what is unpacked from the wheels."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PYTHONPATH $*"\n')
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir()

    def says(*words: str) -> list[str]:
        return subprocess.run(
            ["sh", str(TOOLS / "gpu_check.sh"), *words],
            env=dict(os.environ, PYTHON=str(python), PYTHONPATH="mine"),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()

    root = TOOLS.parent
    assert says("--small") == [f"{root}:mine {TOOLS}/gpu_check.py --small"]
    pip, check = says("wheels", "--out", "x.json")
    scratch = re.fullmatch(
        r"mine -m pip install -q --no-index --no-deps --target (\S+) wheels/\*\.whl", pip
    )[1]
    assert check == f"{root}:{scratch}:mine {TOOLS}/gpu_check.py --out x.json"
    assert not Path(scratch).exists()


@pytest.mark.process
def test_what_passes_is_counted(monkeypatch, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_golden_a(): pass\n"
        "def test_golden_b(): pytest.skip('no OpenMMLab')\n"
        "def test_other(): assert False\n"
    )
    (tmp_path / "test_more.py").write_text("def test_golden_c(): assert False\n")
    monkeypatch.syspath_prepend(TOOLS)
    tool = runpy.run_path(str(TOOLS / "gpu_check.py"))
    goldens, settings = tool["goldens"], tool["goldens"].__globals__
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None
    )  # xdist takes seconds to start

    def counts(*files):
        monkeypatch.setitem(settings, "TESTS", [str(tmp_path / file) for file in files])
        found = goldens("cpu")
        return found["ok"], found["passed"], found["skipped"], found["failed"]

    assert counts("test_some.py") == (True, 1, 1, 0)
    assert counts("test_some.py", "test_more.py") == (False, 1, 1, 1)


def test_the_tables_of_the_documentation(tool, capsys):
    docs = TOOLS.parent / "docs"
    assert tool("--markdown", str(docs / "measured" / "gpu_h200.json")) == 0
    assert (docs / "gpu.md").read_text().endswith(capsys.readouterr().out)
