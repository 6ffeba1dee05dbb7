"""The page's results are those of the model."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import sfp
from sfp.demo.session import FALLBACK, OWN, Session, typed_vocabulary
from sfp.method import self_contained_methods
from sfp.vocabulary import as_vocabulary


class Sam3(tiny.Sam3, nn.Module):
    """As a part of an engine."""


def test_huge_photos_are_refused(session, tmp_path):
    """By what the header says."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "huge.png").write_bytes(data)
    with pytest.raises(sfp.ImageError, match=r"huge\.png: claims 60000 x 60000 pixels"):
        session.photo(str(tmp_path / "huge.png"))


def test_words_as_people_type_them(tmp_path):
    typed = typed_vocabulary(" cat |kitten,,\n brick  wall, ", " wall, floor\n")
    assert typed == as_vocabulary([["cat", "kitten"], ["brick  wall"]], ["wall", "floor"])
    for nothing in ("", None, " , | ,\n"):
        with pytest.raises(ValueError, match="type the words to look for"):
            typed_vocabulary(nothing)
    with pytest.raises(ValueError, match="'cat' appears twice"):
        typed_vocabulary("cat, dog|cat")
    with pytest.raises(ValueError, match="257 words: expected 256 at most"):
        typed_vocabulary(",".join(map(str, range(257))))
    (tmp_path / "secret.txt").write_text("password")
    file = str(tmp_path / "secret.txt")
    assert typed_vocabulary(file).queries == (file,)


def test_segmentation_is_the_models(session, model, photo):
    vocabulary = as_vocabulary(["house", ["cat", "kitten"], "sand"], ["sky"])
    timed = session.segment(str(photo), vocabulary, "naclip")
    expected = model.segment(photo, vocabulary, method="naclip")
    np.testing.assert_array_equal(timed.result.labels, expected.labels)
    assert timed.result.names[0] == "background"
    assert re.fullmatch(r"text [\d.]+ s, image [\d.]+ s, total [\d.]+ s", str(timed))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
def test_outliers_are_those_that_the_method_replaces(method, session, model, photo):
    trace = model.trace(photo, method=method)
    for layer, mask in trace.masks.items():
        found = session.outliers(str(photo), method, OWN, layer)
        np.testing.assert_array_equal(found.mask.ravel(), mask[0])
        assert found.replaced
    plain = model.trace(photo, method="clip")
    found = session.outliers(str(photo), method, "lof", 3)
    assert not found.replaced
    lof = sfp.OPS.get("lof")(plain, 3)[0]
    np.testing.assert_array_equal(found.mask.ravel(), lof)
    expected = plain.outputs[3].patches[0].norm(dim=-1)
    np.testing.assert_array_equal(found.norms.ravel(), expected)


def test_methods_that_look_for_no_outliers(session, model, photo):
    found = session.outliers(str(photo), "sclip", OWN, 5)
    assert found.detector == FALLBACK
    expected = sfp.OPS.get(FALLBACK)(model.trace(photo, method="clip"), 5)[0]
    np.testing.assert_array_equal(found.mask.ravel(), expected)


@pytest.mark.parametrize("layer", [0, 11])
def test_attention_is_the_row_of_the_matrix(layer, session, model, photo):
    share, to_class = session.attention(str(photo), "sfp", layer, (3, 5))
    trace = model.trace(photo)
    row = trace.attention(layer)[0].mean(0)[1 + 3 * trace.embedded.grid[1] + 5]
    torch.testing.assert_close(torch.from_numpy(share).ravel(), row[1:])
    assert to_class == pytest.approx(float(row[0]), rel=1e-5)


def test_methods_on_offer_run_without_guides():
    others = set(sfp.list_methods()) - set(self_contained_methods())
    assert {"corrclip", "fsa", "gla_clip", "lposs", "ov_stitcher", "proxyclip"} <= others
    assert {"clip", "sfp", "cliptrase", "radseg", "rfclip"} <= set(self_contained_methods())


@pytest.mark.slow
def test_methods_on_offer_with_a_guide(photo):
    model = sfp.load("mini", guides=dict(sam3=Sam3()), device="cpu")
    session = Session(model, "mini")
    more = {"sam3", "segearth_ov3", "activesam"}
    assert set(session.methods) == more | set(self_contained_methods())
    vocabulary = as_vocabulary(["house", "sand"])
    timed = session.segment(str(photo), vocabulary, "sam3")
    assert np.array_equal(
        timed.result.labels, model.segment(photo, vocabulary, method="sam3").labels
    )
    assert session.outliers(str(photo), "sam3", OWN, 5).detector == FALLBACK
