"""What works without mmcv, mmengine and mmsegmentation, and what is said of the rest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from sfp import mini

pytestmark = pytest.mark.process
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
import sys
import sfp
import torch
from sfp import visualize

model = sfp.load("mini")
result = model.segment("photo.png", ["grass", "sky"])
assert result.labels.shape == (224, 224) and len(result.summary()) > 5
with torch.inference_mode():
    visualize.norm_maps(result.image, model.trace("photo.png"), [5, 10])
for name in sfp.list_methods():
    sfp.build_method(name)
assert not {"mmcv", "mmengine", "mmseg"} & set(sys.modules)
try:
    sfp.OpenVocabSegmentor
except ModuleNotFoundError as error:
    print(error)
"""
PAGE = """
import sys
import sfp
from sfp.demo.page import Page
from sfp.demo.session import Session

page = Page(Session(sfp.load("mini"), "mini"), "sfp")
values = {each: each.value for tab in page.tabs.values() for each in tab.controls}
values |= {page.inputs.photo: "photo.png", page.inputs.words: "grass, dog"}
values |= {page.inputs.background: "", page.inputs.method: "sfp", page.attention.cell: None}
for title, tab in page.tabs.items():
    print(title, tab.draw(values).warning, sep=": ")
assert not {"mmcv", "mmengine", "mmseg"} & set(sys.modules)
"""
COMMANDS = """
import sys
from sfp.cli import main

for command in sys.argv[1:]:
    print(command, main(command.split()))
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


def test_the_python_door(folder):
    done = python(folder, "-c", DOOR)
    assert done.returncode == 0, done.stderr
    assert "pip install 'sfp[mmseg]'" in done.stdout


def test_commands(folder):
    words = "photo.png --weights mini --classes grass,sky --out"
    done = python(
        folder, "-c", COMMANDS, f"segment {words} one", f"label {words} two", "methods sclip"
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+) .* (\d)$", done.stdout, re.MULTILINE) == [
        ("segment", "0"),
        ("label", "0"),
        ("methods", "0"),
    ]
    assert (folder / "one/labels/photo.png").is_file()
    assert (folder / "two/labels/photo.png").is_file()


def test_the_page(folder):
    pytest.importorskip("gradio", reason="no gradio: pip install 'sfp[demo]'")
    done = python(folder, "-c", PAGE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Segmentation: dog: never seen by the mini CLIP",
        "Outliers: ",
        "Attention: ",
        "Compare: dog: never seen by the mini CLIP",
    ]


def test_evaluation_says_what_to_install(folder):
    commands = ["eval mini", "compare mini", "ablate mini --study modules", "audit mini mini"]
    done = python(folder, "-c", COMMANDS, *commands)
    assert done.stdout.splitlines() == [f"{command} 2" for command in commands]
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    for line in lines:
        for part in ("sfp[mmseg]", "mmcv 2.1", "mmengine 0.10", "mmsegmentation 1.2"):
            assert part in line
