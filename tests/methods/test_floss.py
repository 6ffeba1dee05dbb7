"""FLOSS from unlabelled images to labels, against loops; its fusion is compared with the release."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

import sfp
from sfp.methods import floss
from sfp.trace import Words

pytestmark = pytest.mark.usefixtures("no_grad")

TEMPLATES = ["a {}.", "the {}.", "photo of {}.", "many {}.", "one {}."]
QUERIES = ("road", "car", "bus")
INDEX = (0, 1, 1)


def banks(templates) -> torch.Tensor:
    """Features of a word and template, unit: (M, Q, C)."""
    rows = [tiny.queries(len(QUERIES), seed=TEMPLATES.index(t) + 1) for t in templates]
    return torch.stack(rows)


@pytest.fixture
def experts(tmp_path) -> str:
    features = tiny.queries(50, seed=9)
    found = floss.fit([features[:20], features[20:]], banks(TEMPLATES), INDEX, logit_scale=5.0)
    once = floss.fit([features], banks(TEMPLATES), INDEX, logit_scale=5.0)
    torch.testing.assert_close(found, once)
    path = tmp_path / "experts.json"
    floss.write_experts(path, found, ["road", "car"], TEMPLATES, count=2)
    return str(path)


def test_fit_is_the_mean_entropy_of_the_pixels_of_a_class():
    features = tiny.queries(30, seed=3)
    found = floss.fit([features], banks(TEMPLATES), INDEX, logit_scale=5.0)
    for t, bank in enumerate(banks(TEMPLATES)):
        probs = (5.0 * features @ bank.T).softmax(1)
        entropy = -(probs * probs.log()).sum(1)
        label = torch.tensor(INDEX)[probs.argmax(1)]
        for k in range(2):
            expected = entropy[label == k].mean() if (label == k).any() else torch.tensor(torch.inf)
            torch.testing.assert_close(found[t, k].float(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cells", [1, None])
def test_against_a_loop_over_pixels(experts, cells):
    clip = tiny.clip()
    images, text = tiny.images(2, 32, 48), tiny.queries(3, seed=0)
    method = sfp.build_method("floss", base="sclip", experts=experts, cells=cells, logit_scale=5.0)
    context = dict(index=INDEX, words=Words(QUERIES, banks))
    logits, _ = method.logits(clip.visual, images, text, **context)
    size = (32, 48) if cells is None else (4, 6)
    assert logits.shape == (2, 3, *size)
    plain = sfp.build_method("sclip")
    mine = floss._experts(experts)["experts"]
    each = [F.normalize(banks(TEMPLATES)[mine[name]].mean(0), dim=-1) for name in ("road", "car")]
    maps = []
    for bank in (*each, text):
        low, _ = plain.logits(clip.visual, images, bank)
        up = F.interpolate(low, size, mode="bilinear", align_corners=False)
        maps.append((5.0 * up).softmax(1))
    for b in range(2):
        for y in range(0, size[0], 3):
            for x in range(0, size[1], 5):
                claims = [
                    (float(p.max()), -k)
                    for k, p in enumerate(m[b, :, y, x] for m in maps[:2])
                    if INDEX[int(p.argmax())] == k
                ]
                chosen = maps[-max(claims)[1]] if claims else maps[2]
                torch.testing.assert_close(logits[b, :, y, x], chosen[b, :, y, x])


def test_equal_templates_are_the_default_bank(tmp_path):
    """Every expert is the same bank, so that it does not matter who speaks."""
    same = floss.write_experts(
        tmp_path / "all.json", torch.zeros(5, 2), ["road", "car"], TEMPLATES, count=5
    )
    assert same == dict(road=[0, 1, 2, 3, 4], car=[0, 1, 2, 3, 4])
    text = F.normalize(banks(TEMPLATES).mean(0), dim=-1)
    clip, images = tiny.clip(), tiny.images(1)
    path = str(tmp_path / "all.json")
    method = sfp.build_method("floss", base="sclip", experts=path, cells=1)
    context = dict(index=INDEX, words=Words(QUERIES, banks))
    logits, _ = method.logits(clip.visual, images, text, **context)
    plain, _ = sfp.build_method("sclip").logits(clip.visual, images, text)
    torch.testing.assert_close(logits, (100 * plain).softmax(1))


def test_what_is_missing_is_named(experts, tmp_path):
    clip, images, text = tiny.clip(), tiny.images(1), tiny.queries(3)
    method = sfp.build_method("floss", experts=experts)
    with pytest.raises(LookupError, match="needs the words, not only"):
        method.logits(clip.visual, images, text, index=INDEX)
    words = Words(("road", "tree", "bus"), banks)
    with pytest.raises(ValueError, match="no templates for 'tree'"):
        method.logits(clip.visual, images, text, index=INDEX, words=words)
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    method = sfp.build_method("floss", experts=str(broken))
    words = Words(QUERIES, banks)
    with pytest.raises(ValueError, match="expected a file that `sfp fit templates` wrote"):
        method.logits(clip.visual, images, text, index=INDEX, words=words)
