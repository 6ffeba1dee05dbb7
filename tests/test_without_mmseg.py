"""What works without mmcv, mmengine and mmsegmentation, and the messages for what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import pytest

from sfp import mini

pytestmark = [pytest.mark.process, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
WORDS = "photo.png --weights mini --classes grass,sky --out"
COMMANDS = [f"segment {WORDS} one", f"label {WORDS} two", "methods sclip"]
EVALUATIONS = ["eval mini", "compare mini", "ablate mini --study modules", "audit mini mini"]
SCRIPT = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mmcv", "mmengine", "mmseg"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())

import sfp
import torch
from sfp import visualize
from sfp.cli import main

model = sfp.load("mini")
result = model.segment("photo.png", ["grass", "sky"])
assert result.labels.shape == (224, 224) and len(result.summary()) > 5
with torch.inference_mode():
    visualize.norm_maps(result.image, model.trace("photo.png"), [5, 10])
for name in sfp.list_methods():
    sfp.build_method(name)
try:
    sfp.OpenVocabSegmentor
except ModuleNotFoundError as error:
    print("segmentor:", error)

for command in {COMMANDS + EVALUATIONS}:
    print("command:", main(command.split()), command)

if sys.argv[1:] == ["page"]:
    from sfp.demo.page import Page
    from sfp.demo.session import Session

    page = Page(Session(model, "mini"), "sfp")
    values = {{each: each.value for tab in page.tabs.values() for each in tab.controls}}
    values |= {{page.inputs.photo: "photo.png", page.inputs.words: "grass, dog"}}
    values |= {{page.inputs.background: "", page.inputs.method: "sfp", page.attention.cell: None}}
    for title, tab in page.tabs.items():
        print(f"tab: {{title}}: {{tab.draw(values).warning}}")

assert not {{"mmcv", "mmengine", "mmseg"}} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with a picture."""
    here = tmp_path_factory.mktemp("bare")
    cv2.imwrite(str(here / "photo.png"), mini.scene(900_009, 224)[0][..., ::-1])
    return here


@pytest.fixture(scope="module")
def done(folder) -> subprocess.CompletedProcess[str]:
    """All of it in one interpreter, in which the three packages cannot be found."""
    cache = str(folder / "cache")  # the fixture of conftest.py belongs to single tests
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(["page"] if find_spec("gradio") else [])],
        env=dict(os.environ, PYTHONPATH=str(ROOT), SFP_CACHE=cache),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def said(done: subprocess.CompletedProcess[str], what: str) -> list[str]:
    """Its lines that begin so."""
    return [x.removeprefix(f"{what}: ") for x in done.stdout.splitlines() if x.startswith(what)]


def test_the_python_door(done):
    (line,) = said(done, "segmentor")
    assert "pip install 'sfp[mmseg]'" in line


def test_commands(done, folder):
    lines = said(done, "command")
    assert lines[: len(COMMANDS)] == [f"0 {command}" for command in COMMANDS]
    assert (folder / "one/labels/photo.png").is_file()
    assert (folder / "two/labels/photo.png").is_file()


def test_the_page(done):
    pytest.importorskip("gradio", reason="no gradio: pip install 'sfp[demo]'")
    assert said(done, "tab") == [
        "Segmentation: dog: unknown to the mini CLIP",
        "Outliers: ",
        "Attention: ",
        "Compare: dog: unknown to the mini CLIP",
    ]


def test_evaluation_says_what_to_install(done):
    assert said(done, "command")[len(COMMANDS) :] == [f"2 {command}" for command in EVALUATIONS]
    lines = [x for x in done.stderr.splitlines() if "sfp[mmseg]" in x]
    assert len(lines) == len(EVALUATIONS)
    for line in lines:
        for part in ("mmcv 2.1", "mmengine 0.10", "mmsegmentation 1.2"):
            assert part in line
