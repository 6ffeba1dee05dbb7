"""The page without a browser: the output of each tab, invalid input, and the command that serves it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from sfp import cli
from sfp.cli.demo import default_weights
from sfp.demo.session import Session
from sfp.mini import CLASSES, scene, unknown_words
from sfp.vocabulary import as_vocabulary

WORDS = "house, mushroom, cat|kitten, sand"


@pytest.fixture(scope="module")
def page(model):
    pytest.importorskip("gradio", reason="no gradio: pip install 'sfp[demo]'")
    from sfp.demo.page import Page

    return Page(Session(model, "mini"), "sfp")


def values(page, photo, title: str, words: str = WORDS, background: str = ""):
    """What gradio hands to an event while the tab of this title is open."""
    controls = {each: each.value for tab in page.tabs.values() for each in tab.controls}
    return controls | {
        page.inputs.photo: str(photo) if photo else None,
        page.inputs.words: words,
        page.inputs.background: background,
        page.inputs.method: "sfp",
        page.open: title,
        page.attention.cell: None,
    }


@pytest.mark.slow
def test_every_tab_draws_all_that_it_has(page, photo, model):
    for title, tab in page.tabs.items():
        drawing = tab.draw(values(page, photo, title))
        assert set(drawing.values) == set(tab.outputs)
        assert drawing.status.startswith("sfp: ")
        assert not drawing.warning
    result = model.segment(photo, as_vocabulary(["house", "mushroom", ["cat", "kitten"], "sand"]))
    drawn = page.tabs["Segmentation"].draw(values(page, photo, "Segmentation"))
    assert result.summary() in drawn.values[page.tabs["Segmentation"].picture].alt_text


@pytest.mark.slow
def test_words_that_the_mini_clip_does_not_know_are_named(page, photo, model):
    for title in ("Segmentation", "Compare"):
        asked = values(page, photo, title, "cat, dog|puppy", "rug")
        assert page.tabs[title].draw(asked).warning == "rug, dog, puppy: unknown to the mini CLIP"
        assert "rug, dog, puppy: unknown to" in page._draw(asked)[page.status]
    page.session.weights = "ViT-B/16"
    try:
        assert not page.tabs["Segmentation"].draw(asked).warning
    finally:
        page.session.weights = "mini"


def test_the_page_says_what_the_mini_clip_knows(page, model):
    from sfp.demo.page import Page

    header = page.blocks.config["components"][0]["props"]["value"]
    assert f"drawn scenes only: {', '.join(CLASSES)}" in header
    assert "sfp weights get ViT-B/16" in header
    other = Page(Session(model, "ViT-B/16"), "sfp").blocks.config["components"][0]["props"]["value"]
    assert "drawn scenes" not in other
    assert "<code>ViT-B/16</code>" in other


@pytest.mark.slow
def test_the_button_leads_to_the_segmentation(page, photo):
    """From a tab that shows no words; and asks for what is missing."""
    drawn = page._submit(values(page, photo, "Outliers"))
    assert drawn[page.open] == "Segmentation"
    assert "sfp: text" in drawn[page.status]
    assert page.open not in page._submit(values(page, photo, "Compare"))
    with pytest.raises(ValueError, match="first drop a photo"):
        page._submit(values(page, None, "Segmentation"))
    with pytest.raises(ValueError, match="type the words to look for"):
        page._submit(values(page, photo, "Segmentation", " "))
    assert "Now type words" in page._draw(values(page, photo, "Segmentation", " "))[page.status]


def test_the_scenes_on_the_page_get_the_right_labels(model):
    from sfp.demo.page import SCENES

    for seed, words in SCENES.items():
        pixels, labels = scene(seed)
        vocabulary = as_vocabulary([name.split("|") for name in words.split(", ")])
        assert not unknown_words("mini", vocabulary)
        result = model.segment(pixels, vocabulary)
        seen = np.array([CLASSES.index(name) for name in result.names])[result.labels]
        assert (seen == labels).mean() > 0.88
        drawn = {CLASSES[label] for label in np.unique(labels)}
        assert {name for name, share in result.shares.items() if share > 0.01} == drawn
        assert len(set(result.names) - drawn) == 1  # a word without a place


def test_only_uploads_are_read(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from sfp.demo.page import _uploaded

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    assert _uploaded(dict(path=f"{tmp_path}/a/b.png")) == f"{tmp_path.resolve()}/a/b.png"
    for path in ("/etc/passwd", f"{tmp_path}/../b.png"):
        with pytest.raises(ValueError, match="not an uploaded file"):
            _uploaded(dict(path=path))


# -- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    assert cli.main(["demo", "--method", "scilp"]) == 2
    assert "did you mean 'sclip'" in capsys.readouterr().err
    assert cli.main(["demo", "--weights", "nowhere.pt"]) == 3
    assert "nowhere.pt" in capsys.readouterr().err


def test_the_command_asks_for_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("sfp.demo.page", "sfp.demo.tabs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["demo"]) == 3
    assert "pip install 'sfp[demo]'" in capsys.readouterr().err


def test_weights_that_are_there_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_weights() == "mini"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "ViT-B-16.pt").touch()
    assert default_weights() == "ViT-B/16"
