"""SAM 3: the guide against `transformers`, the methods against their formulas as loops.

There are no official numbers. The model is a small random one.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import segmentors
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sfp
from sfp.clip.tokenizer import tokenize
from sfp.functional.windows import WindowGrid
from sfp.guides import Sam3Guide, build_guides
from sfp.methods.activesam import active, canonical
from sfp.methods.sam3 import fused_map
from sfp.registry import OPS
from sfp.trace import GuideError, LayerError

pytest.importorskip("transformers", "5")
pytestmark = pytest.mark.usefixtures("no_grad")

SIDE = 56
NAMES = ("cat", "a very large dog", "trafficlight", "tree")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return segmentors.sam3()


@pytest.fixture(scope="module")
def guide(model) -> Sam3Guide:
    return Sam3Guide(model=model, batch=3)


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    pixels = tiny.images(1, height, width, seed)[0] * 50 + 120
    return pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy()


def squeezed(guide: Sam3Guide, image: Tensor, side: int = SIDE) -> Tensor:
    """As the processor of the library does it."""
    return F.interpolate(guide.renormalise(image), (side, side), mode="bilinear", antialias=True)


# -- the guide -------------------------------------------------------------------------------------


def test_detections_are_the_librarys():
    """Queries in batches, padded; the library has them one by one. In float64."""
    model = segmentors.sam3().double()
    guide = Sam3Guide(model=model, batch=3)
    image = tiny.images(1, 40, 70)
    embedded, prompts = guide.embed(image), guide.encode(NAMES)
    assert prompts.tokens.shape[:2] == prompts.mask.shape
    assert prompts.mask.sum(1).tolist() == [len(tokenize([name])[0]) for name in NAMES]
    batches = list(guide.detect(embedded, prompts))
    assert [len(batch.scores) for batch in batches] == [3, 1]
    presence = guide.presence(embedded, prompts)
    for number, name in enumerate(NAMES):
        batch, i = batches[number // 3], number % 3
        ids = tokenize([name])
        out = model(
            pixel_values=squeezed(guide, image).double(),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
        )
        for found, expected in (
            (batch.scores[i], out.pred_logits[0]),
            (batch.masks[i], out.pred_masks[0]),
            (batch.presence[i], out.presence_logits[0, 0]),
            (batch.semantic[i], out.semantic_seg[0, 0]),
            (presence[number], out.presence_logits[0, 0]),
        ):
            torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-5)
    assert presence.std() > 1e-3


def test_another_side_is_that_of_a_model_built_for_it(model, guide):
    other = segmentors.sam3(84)
    other.load_state_dict(model.state_dict())
    image = tiny.images(1, 40, 70)
    expected = other.vision_encoder(squeezed(guide, image, 84)).fpn_hidden_states
    for found, level in zip(guide.embed(image, 84), expected, strict=False):
        torch.testing.assert_close(found, level, atol=1e-5, rtol=1e-4)
    own = guide.embed(image)  # and nothing of it stays
    torch.testing.assert_close(own[0], model.vision_encoder(squeezed(guide, image))[1][0])
    with pytest.raises(ValueError, match="multiple of 14"):
        guide.embed(image, 60)


def test_context(model, guide):
    """Two nearest other queries by their shares, then more general words, then nothing."""
    names = ("cat", "dog", "tree", "cat house")
    prompts = guide.encode_in_context(names, 2, {"dog": ["animal", "living thing", "being"]}, 2)
    table, project = model.text_encoder.get_input_embeddings(), model.text_projection
    means = [table(tokenize([name]))[0].mean(0) for name in names]
    for q, name in enumerate(names):
        text = guide.encode([name]).tokens[0]
        near = sorted(
            (-float(F.cosine_similarity(means[q], means[j], dim=0)), j)
            for j in range(len(names))
            if j != q
        )[:2]
        weights = [math.exp(-x) for x, _ in near]
        extra = [w / sum(weights) * means[j] for w, (_, j) in zip(weights, near, strict=True)]
        if name == "dog":
            extra += [table(tokenize([x]))[0].mean(0) for x in ("animal", "living thing")]
        expected = torch.cat([text, project(torch.stack(extra))])
        own = prompts.tokens[q][prompts.mask[q]]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    (alone,) = guide.encode_in_context(["cat"], 2, {}, 2).tokens
    assert torch.equal(alone, guide.encode(["cat"]).tokens[0])


def test_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    (own,) = build_guides(dict(sam3=dict(type="sam3", model=str(tmp_path)))).values()
    half = own.to(torch.bfloat16)
    (found,) = half.detect(half.embed(tiny.images(1)), half.encode(["cat"]))
    assert found.masks.dtype == torch.float32
    assert found.masks.isfinite().all()
    with pytest.raises(sfp.WeightsError, match=r"gated.*model\.safetensors into a folder"):
        Sam3Guide(model=str(tmp_path / "nowhere"))


# -- the formulas ----------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_loops(found, size, score, fuse):
    """The map of one query, a pixel at a time, in float64."""
    scores, masks, presence, semantic = (x.double() for x in found)
    up = F.interpolate(masks[None], size, mode="bilinear")[0]
    whole = F.interpolate(semantic[None, None], size, mode="bilinear")[0, 0]
    rho = sigmoid(float(presence))
    out = torch.zeros(size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            best = 0.0
            for i, logit in enumerate(scores.tolist()):
                own = sigmoid(logit) * rho
                if own > score:
                    best = max(best, own * sigmoid(float(up[i, y, x])))
            surface = sigmoid(float(whole[y, x]))
            if fuse == "once":
                best = max(best, rho * surface)
            elif fuse == "twice":
                best = max(best, surface) * rho
            out[y, x] = best
    return out


@pytest.mark.parametrize("fuse", ["instances", "once", "twice"])
def test_fused_map(fuse):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6,), (6, 4, 5), (), (4, 5)]
    found = [2 * torch.randn(shape, generator=generator) for shape in shapes]
    maps = fused_map(*found, (7, 9), score=0.2, fuse=fuse)
    expected = by_loops(found, (7, 9), 0.2, fuse)
    torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=1e-5)
    one = fused_map(*found, (7, 9), score=0.0, fuse="instances", most=1)
    best = [x if i else x[x.argmax(0)][None] for i, x in enumerate(found[:1])]
    best += [found[1][found[0].argmax()][None], *found[2:]]
    torch.testing.assert_close(one.double(), by_loops(best, (7, 9), 0.0, "instances"))


def test_a_query_that_is_surely_there_without_instances_is_its_map():
    semantic = torch.randn(4, 5)
    none = torch.full((3,), -50.0), torch.randn(3, 4, 5)
    found = fused_map(*none, torch.tensor(50.0), semantic, (8, 10), score=0.1, fuse="twice")
    expected = F.interpolate(semantic[None, None], (8, 10), mode="bilinear")[0, 0].sigmoid()
    torch.testing.assert_close(found, expected)


def test_active_queries():
    presence = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.3, 0.8])
    assert active(presence, 0.5, 40).tolist() == [1, 3, 5]  # the median is 0.6
    assert active(presence, 0.5, 2).tolist() == [1, 5]
    assert active(presence, 1.0, 40).tolist() == [1]
    assert active(torch.full((4,), 0.2), 0.8, 3).tolist() == [0, 1, 2]


def test_margin():
    scores = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(1))
    scores[1, 0, 0] = scores[2, 0, 0] = 2.0  # a tie
    sheet = WindowGrid.over((5, 6), 0, 1).sheet(scores[None], (5, 6))
    own = OPS.get("margin_scores")(sheet, sheet.rows, (0, 1, 1, 2))(0, 5)
    classes = torch.stack([scores[0], scores[1:3].amax(0), scores[3]])
    first, second = classes.sort(0, descending=True).values[:2]
    assert torch.equal(own.argmax(0), classes.argmax(0))
    for threshold in (0.1, 0.4, 0.7):
        below = first * (first - second).sqrt() < threshold**1.25
        assert torch.equal(own.amax(0) < threshold, below)
        assert below.any()
        assert not below.all()


def test_names():
    assert canonical("trafficsign") == "traffic sign"
    assert canonical("baseballglove") == "baseball glove"
    assert canonical("ceiling-tile") == "tile ceiling"
    for name in ("window-blind", "light", "tie dye", "hotdogs", "building"):
        assert canonical(name) == name


# -- from images to labels -------------------------------------------------------------------------

CLASSES = [["cat", "kitten"], ["a very large dog"], ["tree"]]
QUERIES = [word for names in CLASSES for word in names]


def maps_of(guide: Sam3Guide, pixels: np.ndarray, score: float, fuse: str) -> Tensor:
    """The fused maps of the queries, made of the library's outputs one by one."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    found = []
    for query in QUERIES:
        ids = tokenize([query])
        out = guide.model(
            pixel_values=F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True),
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
        )
        parts = out.pred_logits, out.pred_masks, out.presence_logits[:, 0], out.semantic_seg[:, 0]
        size = pixels.shape[:2]
        found.append(fused_map(*(x[0] for x in parts), size, score=score, fuse=fuse))
    return torch.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "score", "fuse"), [("sam3", 0.02, "instances"), ("segearth_ov3", 0.05, "twice")]
)
def test_segment_without_clip(model, method, score, fuse):
    """Images of any shape, alone and in a list, with synonyms and a threshold."""
    guides = dict(sam3=Sam3Guide(model=model, batch=3))
    own = sfp.load("none", dict(type=method, score=score), guides=guides, device="cpu")
    pictures = [picture(), picture(47, 33, seed=1)]
    results = own.segment(pictures, CLASSES)
    for pixels, result in zip(pictures, results, strict=True):
        maps = maps_of(guides["sam3"], pixels, score, fuse)
        classes = torch.stack([maps[:2].amax(0), maps[2], maps[3]])
        assert result.labels.shape == pixels.shape[:2]
        torch.testing.assert_close(
            torch.as_tensor(result.scores), classes, atol=1e-4, rtol=1e-3, check_dtype=False
        )
        best = classes.sort(0, descending=True).values
        clear = (best[0] - best[1] > 1e-3).numpy()
        assert clear.mean() > 0.3
        assert np.array_equal(result.labels[clear], classes.argmax(0).numpy()[clear])
        middle = float(result.confidence.mean())
        cut = own.segment(pixels, CLASSES, background=middle)
        assert cut.names[0] == "background"
        assert np.array_equal(cut.labels == 0, result.confidence < middle)
    assert np.array_equal(own.segment(pictures[1], CLASSES).labels, results[1].labels)


@pytest.mark.slow
def test_beside_a_clip(model):
    """Its images keep their size, unless a size is asked for; CLIP's do not."""
    settings = dict(guides=dict(sam3=Sam3Guide(model=model)), device="cpu")
    pixels = picture(100, 150)
    alone = sfp.load("none", "sam3", **settings).segment(pixels, CLASSES)
    clip = tiny.clip(**tiny.WORDS)
    beside = sfp.load(clip, "naclip", templates=["{}"], **settings)
    found = beside.segment(pixels, CLASSES, method="sam3")
    np.testing.assert_allclose(found.scores, alone.scores, atol=1e-3)
    given = sfp.load(clip, "sam3", short_side=50, templates=["{}"], **settings)
    assert np.abs(given.segment(pixels, CLASSES).scores - alone.scores).max() > 1e-2
    plain = sfp.load(clip, "naclip", templates=["{}"], device="cpu").segment(pixels, CLASSES)
    assert np.array_equal(beside.segment(pixels, CLASSES).labels, plain.labels)


def test_other_words_cost_no_second_look(model, monkeypatch):
    looks: list[int] = []
    tower = Sam3Guide._tower
    monkeypatch.setattr(
        Sam3Guide, "_tower", lambda self, side: looks.append(side) or tower(self, side)
    )
    own = sfp.load("none", "sam3", guides=dict(sam3=Sam3Guide(model=model)), device="cpu")
    own.segment(picture(), ["cat", "dog"])
    again = own.segment(picture(), ["tree", "dog", "road"])
    assert looks == [SIDE]
    fresh = sfp.load("none", "sam3", guides=dict(sam3=Sam3Guide(model=model)), device="cpu")
    assert np.array_equal(fresh.segment(picture(), ["tree", "dog", "road"]).scores, again.scores)


def test_windows(model):
    """Each window is an image of its own; where they do not overlap nothing is mixed."""
    knobs = dict(type="segearth_ov3", dataset="remote_sensing")
    settings = dict(guides=dict(sam3=Sam3Guide(model=model)), device="cpu", slide_crop=40)
    own = sfp.load("none", knobs, slide_stride=40, **settings)
    pixels = picture(40, 80)
    both = own.segment(pixels, ["cat", "dog"])
    for part in (slice(0, 40), slice(40, 80)):
        alone = own.segment(np.ascontiguousarray(pixels[:, part]), ["cat", "dog"])
        found = both.scores[:, :, part][:, 1:-1, 1:-1]
        np.testing.assert_allclose(found, alone.scores[:, 1:-1, 1:-1], atol=1e-5)
    whole = own.segment(pixels, ["cat", "dog"], method=dict(knobs, windows=False))
    assert np.abs(whole.scores - both.scores).max() > 1e-3


def test_activesam(model, tmp_path):
    """Pruned queries are nowhere; names and general words reach the model."""
    guides = dict(sam3=Sam3Guide(model=model, batch=3))
    own = sfp.load("none", dict(type="activesam", prune_side=28), guides=guides, device="cpu")
    words = ["cat", "dog", "trafficlight", "tree", "road"]
    everything = own.segment(picture(), words)
    assert (everything.scores > 0).all()
    knobs = dict(type="activesam", prune_side=28, prune_above=4, prune_most=2, prune_quantile=0.0)
    few = own.segment(picture(), words, method=knobs)
    asked = np.flatnonzero(few.scores.max((1, 2)) > 0)
    assert len(asked) == 2
    image = torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 127.5 - 1
    sam = guides["sam3"]
    prompts = sam.encode_in_context([canonical(word) for word in words], 2, {}, 2)
    presence = sam.presence(sam.embed(image, 28), prompts)
    assert set(asked) == set(presence.topk(2).indices.tolist())
    spelt = own.segment(picture(), words, method=dict(type="activesam", names=False))
    assert np.abs(spelt.scores - everything.scores).max() > 1e-5
    file = tmp_path / "general.json"
    file.write_text(json.dumps({"traffic light": ["signal"]}))
    more = own.segment(picture(), words, method=dict(type="activesam", hypernyms=str(file)))
    assert np.abs(more.scores - everything.scores).max() > 1e-5
    file.write_text(json.dumps({"cat": "animal"}))
    with pytest.raises(ValueError, match=r"hypernyms=.*expected a JSON file"):
        own.segment(picture(), words, method=dict(type="activesam", hypernyms=str(file)))


def test_what_is_missing_is_said():
    own = sfp.load("none", "sam3", device="cpu")
    with pytest.raises(GuideError, match="facebook/sam3"):
        own.segment(picture(), ["cat"])
    for method in ("sfp", "sfp_paper", "clip", "textregion"):
        regions = np.ones((60, 90), int) if method == "textregion" else None
        with pytest.raises(LayerError, match="weights='none', but this method uses CLIP"):
            own.segment(picture(), ["cat", "dog"], method=method, regions=regions)
    features = sfp.OpenVocabSegmentor(
        "none",
        ["cat", "dog"],
        "sam3",
        guides=dict(sam3=Sam3Guide(model=segmentors.sam3())),
        query_features=torch.zeros(2, 1),
    )
    with pytest.raises(LookupError, match="needs the words, not only"):
        features(list(tiny.images(1)))
