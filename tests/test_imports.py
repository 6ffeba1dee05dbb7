"""What `import sfp` loads and exports, and how configs find the parts of this package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sfp

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "cv2", "PIL", "matplotlib", "mmcv", "mmengine", "mmseg")


def python(code: str, *words: str, cwd: Path = ROOT) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.process
def test_importing_loads_nothing_heavy():
    code = f"import sys, sfp; print(sfp.__version__, *set({HEAVY}) & set(sys.modules))"
    assert python(code) == f"{sfp.__version__}\n"


@pytest.mark.process
def test_lists_and_help_load_nothing_heavy():
    commands = ["--help", "segment --help", "eval --help", "methods", "weights list", "data list"]
    code = (
        "import contextlib, io, sys\nfrom sfp.cli import main\n"
        f"for command in {commands}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(command.split())\n"
        f"    print(command, *set({HEAVY}) & set(sys.modules))"
    )
    assert [line.strip() for line in python(code).splitlines()] == commands


def test_every_name_is_listed_for_all_readers():
    """The table that is used, what type checkers read, and `__all__`."""
    tree = ast.parse((ROOT / "sfp/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            typed[alias.asname or alias.name] = (node.module, alias.name)
    for name, (module, inner) in typed.items():
        home = sfp._HOMES.get(name)
        assert module == home if home else f"{module}.{inner}" == sfp._MODULES[name]
    assert set(typed) == {*sfp._HOMES, *sfp._MODULES}
    assert set(sfp.__all__) == {*typed, "__version__"}


def test_every_name_is_there():
    for name in sfp.__all__:
        assert getattr(sfp, name) is not None
        assert name in dir(sfp)
    assert sfp.files.__name__ == "sfp.files"
    for name in ("lod", "__wrapped__", "_nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(sfp, name)
    assert not hasattr(sfp, "nothing")


CONFIG = """
custom_imports = dict(imports=["sfp"], allow_failed_imports=False)
default_scope = "mmseg"
model = dict(type="OpenVocabSegmentor", weights="mini", classes=["cat", "sky"])
"""
BUILD = """
from mmengine.config import Config
from mmengine.registry import init_default_scope
config = Config.fromfile("config.py")
init_default_scope(config.default_scope)
from mmengine.registry import DATASETS, METRICS, MODELS
print(type(MODELS.build(config.model)).__name__)
for registry, name in ((DATASETS, "mmseg.MiniSceneDataset"), (METRICS, "mmseg.HungarianMetric")):
    assert registry.get(name) is not None
"""


FIRSTS = [
    "",
    "import mmseg.models",
    "import importlib.util, sfp; importlib.util.find_spec('mmseg')",
    "import sfp.segmentor",
    "import sys, sfp.data.datasets as d; del sys.modules[d.__name__]; import sfp.data.datasets",
    "import sfp.evaluation.metrics",
]
FORKS = """
import os, sys
# most of the time of a start; they know nothing of what is tested
import mmcv.transforms, mmengine.runner, scipy.optimize
for first in sys.argv[1:]:
    print(f"{first}:", end=" ", flush=True)
    if not (child := os.fork()):
        exec(first)
        exec(compile(BUILD, "build", "exec"))
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.slow
@pytest.mark.process
def test_configs_find_the_parts(tmp_path):
    """Whatever was imported before a config with `custom_imports`, each in a fresh interpreter."""
    (tmp_path / "config.py").write_text(CONFIG)
    said = python(f"BUILD = {BUILD!r}{FORKS}", *FIRSTS, cwd=tmp_path)
    assert said.splitlines() == [f"{first}: OpenVocabSegmentor" for first in FIRSTS]
