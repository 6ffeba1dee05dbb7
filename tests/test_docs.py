"""The docs agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from mmengine import Config
from PIL import Image

import sfp
from sfp import mini
from sfp.cli.method_table import methods_markdown
from sfp.registry import METHODS, OPS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_methods_page_holds_the_generated_table():
    """`sfp methods --markdown` writes what stands between the marks."""
    text = (DOCS / "methods.md").read_text()
    shown = text.split("<!-- methods: begin -->\n")[1].split("<!-- methods: end -->")[0]
    assert shown == methods_markdown()


def test_methods_page_names_the_paper_of_every_method():
    text = (DOCS / "methods.md").read_text().split("## Papers")[1]
    for name in sfp.list_methods():
        assert f"\n| `{name}` |" in text, name


def test_adding_a_method_as_the_page_does():
    """Executes the page's code blocks, in order, in one namespace."""
    blocks = code_blocks("adding_a_method.md")
    assert len(blocks) == 3
    namespace = {}
    try:
        for block in blocks:
            exec(compile(block, "adding_a_method.md", "exec"), namespace)
        vit = namespace["clip"].visual
        image = torch.randn(1, 3, 112, 112)
        assert {"lookback"} <= set(sfp.list_methods())
        # with no share of the earlier layer it is the keys' own attention
        own = dict(type="self_self", pairs=("kk",))
        plain = sfp.build_method(dict(readouts=[dict(attention=own, residual=None, ffn=False)]))
        with torch.no_grad():
            same, _ = sfp.build_method("lookback", share=0.0).features(vit, image)
            other, _ = sfp.build_method("lookback").features(vit, image)
            expected, _ = plain.features(vit, image)
        torch.testing.assert_close(same.data, expected.data)
        assert (other.data - expected.data).abs().max() > 1e-3
    finally:
        METHODS.module_dict.pop("lookback", None)
        OPS.module_dict.pop("lookback_keys", None)


def test_the_home_page_runs():
    """Its one block of Python asserts what it says."""
    (block,) = code_blocks("index.md")
    assert "assert" in block
    exec(compile(block, "index.md", "exec"), {})


def test_citation_file_agrees_with_the_readme_and_the_version():
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cff["preferred-citation"]
    bibtex = (ROOT / "README.md").read_text().split("```bibtex\n")[1].split("\n}")[0]
    shown = dict(re.findall(r"(\w+) += \{(.*)\}", bibtex))
    authors = (f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert cff["version"] == sfp.__version__
    assert " and ".join(authors) == shown["author"]
    assert (paper["title"], paper["collection-title"]) == (shown["title"], shown["booktitle"])
    assert str(paper["year"]) == shown["year"]


@pytest.mark.slow
def test_the_quickstart(tmp_path, monkeypatch):
    """Executes the page's blocks, in order, with the mini world in place of what is not here."""
    for i, name in enumerate(["street.jpg", "photo.jpg"]):
        Image.fromarray(mini.scene(900_009 + i, 120)[0]).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    config = str(DOCS.parent / "configs" / "base_config.py")
    base = Config.fromfile(config)
    base.model.weights = "mini"
    monkeypatch.setattr(Config, "fromfile", lambda path: base if path == config else None)
    namespace: dict[str, object] = {}
    for block in code_blocks("quickstart.md"):
        block = block.replace('"ViT-B/16"', '"mini"').replace("configs/base_config.py", config)
        exec(compile(block, "quickstart.md", "exec"), namespace)
    for name in ("labels.png", "seen.jpg"):
        assert Image.open(tmp_path / name).size == (120, 120)
    assert namespace["features"].as_map().shape == (1, 128, 28, 28)  # 448 / 16
    assert namespace["labels"].shape == (120, 120)
    assert namespace["figure"].axes
