"""The notebooks run without changes, and their stored outputs are small."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_both_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["outliers", "quickstart"]


def outputs(path: Path) -> list:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def assert_fine(path: Path) -> None:
    """Pictures and text, no error or warning, less than a megabyte."""
    kinds = {(out.output_type, out.get("name")) for out in outputs(path)}
    assert kinds <= {("execute_result", None), ("stream", "stdout")}
    assert any("image/png" in out.get("data", {}) for out in outputs(path))
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path):
    assert_fine(path)
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # the cell that readers change comes first and holds all that there is to choose
    assert all(f"{name} = " in cells[0].source for name in ("IMAGE", "WEIGHTS", "CLASSES"))


@pytest.mark.process
@pytest.mark.slow
def test_they_run(tmp_path):
    command = [sys.executable, str(ROOT / "tools/run_notebooks.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in NOTEBOOKS:
        assert_fine(tmp_path / path.name)
        fresh, stored = (
            [(o.output_type, sorted(o.get("data", {}))) for o in outputs(p)]
            for p in (tmp_path / path.name, path)
        )
        assert fresh == stored
