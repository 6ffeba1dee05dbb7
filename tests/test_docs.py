"""What the docs show is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml

import sfp
from sfp.describe import methods_markdown
from sfp.registry import METHODS, OPS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_methods_page_holds_the_generated_table():
    """`python tools/list.py --markdown` writes what stands between the marks."""
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
