"""What works where mmcv, mmengine and mmsegmentation are not installed, and what is said of the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from sfp import mini

ROOT = Path(__file__).parents[1]
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmcv", "mmengine", "mmseg"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""
DOOR = """
import sfp
from sfp import visualize
from sfp.mini import scene

image = scene(900_009, 224)[0]
model = sfp.load("mini")
result = model.segment(image, ["grass", "sky"])
assert result.labels.shape == image.shape[:2]
assert len(sfp.list_methods()) > 10
for name in ("sfp", "sclip", "naclip"):
    sfp.build_method(name)
pixels = sfp.load_clip("mini").visual.trace
try:
    sfp.OpenVocabSegmentor
except ModuleNotFoundError as error:
    print(error)
"""
PAGE = """
from sfp.demo import pictures
from sfp.demo.session import Session
import sfp
from sfp.mini import scene

session = Session(sfp.load("mini"), mini=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a picture, and a `sitecustomize` that hides the three packages."""
    here = tmp_path_factory.mktemp("bare")
    (here / "sitecustomize.py").write_text(BLOCK)
    cv2.imwrite(str(here / "photo.png"), mini.scene(900_009, 224)[0][..., ::-1])
    return here


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=dict(os.environ, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}"),
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_the_packages_are_hidden(folder):
    done = python(folder, "-c", "import mmengine")
    assert "No module named 'mmengine'" in done.stderr


def test_the_python_door(folder):
    done = python(folder, "-c", DOOR)
    assert done.returncode == 0, done.stderr
    assert "pip install 'sfp[mmseg]'" in done.stdout


WORDS = ["--weights", "mini", "--classes", "grass, sky"]


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["segment", "photo.png", *WORDS, "--out", "one", "--overlay"], "one/labels/photo.png"),
        (["label", "photo.png", *WORDS, "--out", "two"], "two/labels/photo.png"),
        (["methods", "sclip"], None),
    ],
    ids=["segment", "label", "methods"],
)
def test_commands(folder, words, written):
    done = python(folder, "-m", "sfp", *words)
    assert done.returncode == 0, done.stderr
    assert written is None or (folder / written).is_file()


@pytest.mark.parametrize(
    "command",
    ["eval mini", "compare mini", "ablate mini --study modules", "audit mini mini"],
)
def test_evaluation_says_what_to_install(folder, command, monkeypatch, capsys):
    done = python(folder, "-m", "sfp", *command.split())
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    for part in ("sfp[mmseg]", "mmcv 2.1", "mmengine 0.10", "mmsegmentation 1.2"):
        assert part in line
