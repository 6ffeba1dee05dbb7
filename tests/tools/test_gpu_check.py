"""tools/gpu_check.sh on a CPU: the checks run, and tables can be made from the record."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.process
@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "gpu.json"
    words = ["--small", "--device", "cpu", "--precisions", "bf16", "--out", str(out)]
    done = subprocess.run(
        ["sh", str(TOOLS / "gpu_check.sh"), *words],
        env=dict(os.environ, PYTHON=sys.executable),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["process_group"] == dict(backend="gloo", ok=True)
    for name in ("clip", "sfp"):
        assert record["methods"][name]["bf16"]["same_labels"] > 0.95
        assert record["methods"][name]["bf16"]["finite"]
    (case,) = record["bench"]
    (row,) = case["rows"]
    assert row["equal_labels"] > 0.99
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--markdown", str(out)])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOLS / "gpu_check.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert done.stdout.endswith(printed)
    assert "| ViT-B/32, tiny, 3 classes, batch of 1 | fp32 |" in printed


@pytest.mark.process
def test_golden_tests_are_counted(monkeypatch, tmp_path):
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


def test_the_tables_of_the_documentation(monkeypatch, capsys):
    docs = TOOLS.parent / "docs"
    record = str(docs / "measured" / "gpu_h200.json")
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--markdown", record])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOLS / "gpu_check.py"), run_name="__main__")
    assert (docs / "gpu.md").read_text().endswith(capsys.readouterr().out)
