"""CLIPSeg as a scorer, compared with `transformers` on the same words and pixels."""

from __future__ import annotations

import pytest
import segmentors
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from sfp.clip.tokenizer import tokenize
from sfp.guides import ClipSegGuide, build_guides

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    tower = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    config = transformers.CLIPSegConfig(
        text_config=dict(tower, vocab_size=49408, eos_token_id=49407, bos_token_id=49406),
        vision_config=dict(tower, image_size=32, patch_size=8),
        projection_dim=16,
        extract_layers=[0, 2],
        reduce_dim=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        conditional_layer=0,
    )
    return segmentors.scramble(transformers.CLIPSegForImageSegmentation(config))


QUERIES = ("cat", "a very large dog", "tree")


def test_scores_are_the_librarys(model):
    guide = ClipSegGuide(model=model, side=48, batch=2)
    images = tiny.images(2, 40, 56)
    found = guide.scores(images, QUERIES, (20, 28))
    pixels = guide.renormalise(images)
    pixels = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    for image, own in zip(pixels, found, strict=True):
        for query, maps in zip(QUERIES, own, strict=True):
            out = model(pixel_values=image[None], input_ids=tokenize([query]))
            expected = out.logits.reshape(1, 1, 48, 48).sigmoid()
            expected = F.interpolate(expected, (20, 28), mode="bilinear")[0, 0]
            torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-4)
    assert found.std(dim=1).max() > 0.01
    assert torch.equal(guide.scores(images, QUERIES, (20, 28)), found)
    (alone,) = guide.scores(images[1:], QUERIES[1:2], (20, 28))
    torch.testing.assert_close(alone[0], found[1, 1], atol=1e-5, rtol=1e-4)
    assert guide(images).grid == (6, 6)


def test_templates_are_averaged_as_they_are(model):
    templates = ("a {}.", "the {}!")
    guide = ClipSegGuide(model=model, side=32, templates=templates)
    images = tiny.images(1)
    out = model.clip.get_text_features(tokenize(["a cat.", "the cat!"]))
    text = getattr(out, "pooler_output", out).mean(0, keepdim=True)
    pixels = F.interpolate(guide.renormalise(images), (32, 32), mode="bilinear", antialias=True)
    expected = model(pixel_values=pixels, conditional_embeddings=text).logits.sigmoid()
    found = guide.scores(images, ["cat"], (32, 32))
    torch.testing.assert_close(found.flatten(), expected.flatten(), atol=1e-5, rtol=1e-4)
    bare = ClipSegGuide(model=model, side=32).scores(images, ["cat"], (32, 32))
    assert (bare - found).abs().max() > 1e-3


def test_new_weights_are_seen(model):
    guide = ClipSegGuide(model=segmentors.scramble(model, seed=1), side=32)
    before = guide.scores(tiny.images(1), QUERIES, (8, 8))
    segmentors.scramble(model, seed=2)
    after = guide.scores(tiny.images(1), QUERIES, (8, 8))
    fresh = ClipSegGuide(model=model, side=32).scores(tiny.images(1), QUERIES, (8, 8))
    assert torch.equal(after, fresh)
    assert (before - after).abs().max() > 1e-3


def test_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    guides = build_guides(dict(clipseg=dict(type="clipseg", model=str(tmp_path), side=32)))
    found = guides["clipseg"].to(torch.bfloat16).scores(tiny.images(1), QUERIES, (8, 8))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    with pytest.raises(ValueError, match="no knob 'sid'"):
        build_guides(dict(clipseg=dict(type="clipseg", model=model, sid=3)))
