"""The Python API: against mmseg's entry points, its own consistency, and invalid input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmseg.apis import inference_model, init_model
from torch import Tensor, nn
from torch.nn import functional as F

import sfp
from sfp import mini, visualize
from sfp import result as result_module
from sfp.clip import text
from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.clip.vit import VisionTransformer
from sfp.feature_cache import FeatureCache
from sfp.vocabulary import as_vocabulary, load_vocabulary

ROOT = Path(__file__).parents[1]
SMALL = dict(
    device="cpu",
    short_side=80,
    slide_crop=64,
    slide_stride=32,
    window_batch=32,
    templates=["a {}.", "{}"],
)
WORDS = [["sky", "clouds"], "grass", "a person on a bike"]
OTHER = ["road", "grass", ["car", "bus"], "tree"]


class Colours(nn.Module):
    """A guide on a finer grid than the model's: colours in cells of 4 pixels."""

    def forward(self, image: Tensor, output: str | None = None) -> sfp.Tokens:
        maps = F.avg_pool2d(image, 4)
        return sfp.Tokens(maps.flatten(2).mT, (maps.shape[2], maps.shape[3]), prefix=0)

    def across(self, entering: sfp.Tokens, join: Callable) -> sfp.Tokens:
        """A last block that changes nothing."""
        return join(entering)


class Sam(tiny.Sam, nn.Module):
    """As a part of an engine."""


class Scorer(tiny.Scorer, nn.Module):
    """As a part of an engine."""


class Sam3(tiny.Sam3, nn.Module):
    """As a part of an engine."""


@pytest.fixture(scope="module")
def clip() -> sfp.CLIP:
    return tiny.clip(**tiny.WORDS)


def door(clip: sfp.CLIP, method: object = "sfp", **settings) -> sfp.Model:
    guides = dict(dino=Colours(), sam=Sam(), clipseg=Scorer(), sam3=Sam3())
    return sfp.load(clip, method, **(SMALL | dict(guides=guides) | settings))


def picture(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    """Large and small structures, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (width, height))
    return (0.8 * coarse + 0.2 * rng.integers(0, 256, (height, width, 3))).astype(np.uint8)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The number of windows in each run of the trunk."""
    counted: list[int] = []
    trace = VisionTransformer.trace

    def counting(self, image, *args, **kwargs):
        counted.append(len(image))
        return trace(self, image, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "trace", counting)
    return counted


def same(a: sfp.Result, b: sfp.Result) -> None:
    """Equal to the last bit."""
    assert a.names == b.names
    for key in ("labels", "confidence", "scores", "image"):
        assert np.array_equal(getattr(a, key), getattr(b, key)), key


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in sfp.list_methods() if m != "lposs_plus"])  # lposs
def test_other_words_for_the_same_image(clip, method, runs):
    """One run of the trunk serves them all, and each answer is that of a model without memory."""
    image, other = picture(), picture(70, 100, seed=1)
    model = door(clip, method, short_side=64)  # two windows
    needs = sfp.build_method(method).needs_regions

    def columns(x: np.ndarray) -> np.ndarray | None:
        return np.broadcast_to(np.arange(x.shape[1]) // 24, x.shape[:2]).copy() if needs else None

    for x in (image, other):
        model.segment(x, ["b"], regions=columns(x))
    assert len(runs) >= 2
    once = len(runs)
    queries = [(image, WORDS), (image, OTHER), (other, WORDS), (image, ["a"])]
    results = [model.segment(x, names, regions=columns(x)) for x, names in queries]
    assert len(runs) == once
    fresh = door(clip, method, memory_mb=0, short_side=64)
    for (x, names), result in zip(queries, results, strict=True):
        same(result, fresh.segment(x, names, regions=columns(x)))
    same(results[0], model.segment(image, WORDS, regions=columns(image)))
    if method != "radseg":  # which drops the queries that no patch of a picture is sure of
        assert np.ptp(results[1].scores, axis=(1, 2)).max() > 0


@pytest.mark.slow
def test_settings_that_ask_for_words_elsewhere(clip, runs):
    """In attention rules, in refiners, in what they share: none of the words stays behind."""
    refiners = [dict(type="prompt_denoising", pd_thresh=0.4), dict(type="key_smoothing")]
    for method in (
        dict(type="resclip", refiners=refiners),
        dict(type="cliptrase", cls_logits=True),
        dict(type="sfp", pm="lof", refiners=[dict(type="remove_redundancy"), *refiners]),
        sfp.Method(readouts=[sfp.Readout(blocks=[-1])]),  # lists have no hash: nothing is kept
    ):
        model = door(clip, method)
        for names in (WORDS, OTHER, WORDS):
            same(model.segment(picture(), names), door(clip, method).segment(picture(), names))


def test_a_trunk_that_asks_for_words_runs_again(clip, runs):
    def unlike(trace: sfp.Trace, layer: int) -> Tensor:
        patches = trace.vit.project(trace.outputs[layer]).patches
        return (patches @ trace.query_features().T).amax(-1) < 0.5

    edit = sfp.Purify((-2,), unlike, sfp.registry.bind(dict(type="zero")))
    method = sfp.Method(edits=(edit,))
    model = door(clip, method)
    one, two, again = (model.segment(picture(), names) for names in (WORDS, OTHER, WORDS))
    assert len(runs) == 3
    same(one, again)
    same(two, door(clip, method).segment(picture(), OTHER))
    assert not model.memory.nbytes


def test_memory_is_bounded_and_forgets_what_was_used_least_recently(clip, runs):
    context = dict(text=tiny.queries(3), index=(0, 1, 2))
    batches = [tiny.images(2, seed=i) for i in range(3)]
    method = sfp.build_method("sclip")
    one = 2 * 65 * 32 * 4  # features of two windows: a class token and 64 patches each
    memory = FeatureCache(2 * one)

    def look(i: int) -> int:
        before = len(runs)
        memory.logits(method, clip.visual, batches[i], context, 0)
        assert memory.nbytes <= 2 * one
        return len(runs) - before

    with torch.inference_mode():
        assert [look(i) for i in (0, 1, 0, 2, 0, 1, 2)] == [1, 1, 0, 1, 0, 1, 1]
        assert memory.nbytes == 2 * one
        memory.clear()
        assert memory.nbytes == 0
        # the refiner asks for the trunk's tokens again: they are kept, and counted
        surgery = sfp.build_method("clip_surgery")
        for _ in range(2):
            memory.logits(surgery, clip.visual, batches[0], context, 0)
        assert memory.nbytes == 0  # too large
        assert len(runs) == 7
        large = FeatureCache(2**30)
        large.logits(surgery, clip.visual, batches[0], context, 0)
        assert large.nbytes > 12 * 2 * 65 * 64 * 4


def test_only_new_words_are_encoded(clip, monkeypatch, tmp_path):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    encoded: list[str] = []
    encode = text.encode_queries
    monkeypatch.setattr(
        text, "encode_queries", lambda c, q, t: encoded.extend(q) or encode(c, q, t)
    )
    model = door(clip)
    model.segment(picture(), WORDS)
    assert encoded == ["sky", "clouds", "grass", "a person on a bike"]
    model.segment(picture(), OTHER, background="grass field")
    assert encoded[4:] == ["grass field", "road", "car", "bus", "tree"]
    door(clip).segment(picture(), OTHER)  # another process: from the disk
    assert len(encoded) == 9
    door(clip, templates=["{}!"]).segment(picture(), ["road"])
    assert encoded[9:] == ["road"]
    expected = text.encode_queries(clip, ["tree", "road"], SMALL["templates"])
    torch.testing.assert_close(model.encode(["tree", "road"]), expected)


# -- results -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lists_are_single_images(clip):
    sizes = [
        (90, 130),
        (64, 64),
        (130, 40),
        (90, 130),
        (30, 24),
        (7, 90),
        (80, 81),
        (99, 77),
        (50, 60),
    ]
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    together = door(clip).segment(images, WORDS)
    assert [r.labels.shape for r in together] == sizes
    for image, result in zip(images, together, strict=True):
        alone = door(clip).segment(image, WORDS)
        np.testing.assert_allclose(result.scores, alone.scores, atol=1e-5)
        assert (result.labels != alone.labels).mean() < 2e-3
    assert door(clip).segment([], WORDS) == []
    same(door(clip).segment((images[0],), WORDS)[0], door(clip).segment(images[0], WORDS))


@pytest.fixture
def photo(tmp_path) -> str:
    path = str(tmp_path / "photo.png")
    cv2.imwrite(path, mini.scene(900_009, 300)[0][:, :250, ::-1])
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "background", "model_settings"),
    [
        ("sfp", {}, None, {}),
        ("clip_surgery", {}, ["sand", "water"], {}),
        ("sclip", dict(pamr_steps=3), None, dict(pamr_steps=3)),
        ("sfp_paper", dict(slide_crop=0), None, dict(slide_crop=0)),
        ("sfp", dict(logit_scale=30.0), 0.6, dict(logit_scale=30.0, prob_thd=0.6)),
    ],
    ids=str,
)
def test_against_inference_model(photo, method, settings, background, model_settings):
    """mmseg reads, resizes and predicts the same file with the same protocol."""
    classes = [["background", "grass"], "sky", ["cat", "kitten"], "flower"]
    ours = classes if isinstance(background, float) else [*classes[1:]]
    config = Config.fromfile(str(ROOT / "configs" / "cfg_mini.py"))
    config.model.pop("method")
    config.model.update(method=dict(type=method), scores=True, **model_settings)
    config.model.classes = [background, *ours] if isinstance(background, list) else ours
    expected = inference_model(init_model(config, device="cpu"), photo)
    model = sfp.load("mini", method, device="cpu", short_side=224, **settings)
    result = model.segment(photo, ours, background=background)
    assert result.labels.shape == (300, 250)
    np.testing.assert_allclose(result.scores, expected.seg_logits.data.numpy(), atol=2e-5)
    np.testing.assert_allclose(result.confidence, expected.confidence.data[0].numpy(), atol=2e-5)
    wrong = result.labels != expected.pred_sem_seg.data[0].numpy()
    assert wrong.mean() < 1e-4  # ties
    assert len(result.shares) > 1


def test_scores(clip):
    result = door(clip).segment(picture(), ["sky", "grass", "road"])
    scores = result.scores
    assert scores.shape == (3, 90, 130)
    np.testing.assert_allclose(scores.sum(0), 1, atol=1e-5)
    assert np.array_equal(scores.argmax(0), result.labels)
    assert np.array_equal(scores.max(0), result.confidence)
    for i, name in enumerate(result.names):
        assert np.array_equal(result.score(name), scores[i])
        assert np.array_equal(result.score(i), scores[i])
        assert np.array_equal(result.mask(name), result.labels == i)
    assert sum(result.shares.values()) == pytest.approx(1)
    synonyms = door(clip).segment(picture(), [["sky", "grass"], "road"])
    np.testing.assert_allclose(synonyms.scores[0], scores[:2].max(0), atol=1e-6)
    np.testing.assert_allclose(synonyms.scores[1], scores[2], atol=1e-6)


def test_scores_come_in_slabs(clip, monkeypatch):
    """A large image has them a few rows at a time, and they are the same."""
    expected = door(clip).segment(picture(), WORDS, background=0.4)
    monkeypatch.setattr(result_module, "SLAB", 130 * 4 * 17)
    result = door(clip).segment(picture(), WORDS, background=0.4)
    assert len(list(result._scores.slabs())) == 6
    np.testing.assert_allclose(result.scores, expected.scores, atol=1e-6)
    assert np.array_equal(result.score("grass"), result.scores[2])


def test_backgrounds(clip):
    """None, words and a threshold, each as they are described."""
    image, model = picture(), door(clip)
    plain = model.segment(image, ["sky", "grass", "road"])
    assert plain.names == ("sky", "grass", "road")
    described = model.segment(image, ["sky", "grass"], background="road")
    assert described.names == ("background", "sky", "grass")
    assert np.array_equal(described.labels, np.array([1, 2, 0])[plain.labels])
    several = model.segment(image, ["sky"], background=["road", "grass"])
    np.testing.assert_allclose(several.scores[0], plain.scores[1:].max(0), atol=1e-6)

    level = float(np.quantile(plain.confidence, 0.3))
    cut = model.segment(image, ["sky", "grass", "road"], background=level)
    assert cut.names == ("background", "sky", "grass", "road")
    expected = np.where(plain.confidence < level, 0, plain.labels + 1)
    assert np.array_equal(cut.labels, expected)
    assert 0.2 < cut.shares["background"] < 0.4
    assert np.array_equal(cut.confidence, plain.confidence)
    assert np.array_equal(cut.scores[1:], plain.scores)
    assert not cut.scores[0].any()

    own = model.segment(image, ["sky", ["background", "grass"], "road"], background=level)
    assert own.names == ("sky", "background", "road")
    best = own.scores.max(0)
    assert np.array_equal(own.labels, np.where(best < level, 1, own.scores.argmax(0)))
    assert (own.labels != own.scores.argmax(0)).any()


@pytest.mark.parametrize("words", [["sky", "grass", "road"], ["sky", "grass", "background"]])
def test_a_threshold_acts_before_regions_vote(clip, words):
    """A region's confidence is the winner's share of its pixels, not a probability."""
    image, method = picture(), sfp.build_method("corrclip")
    regions = np.arange(130) // 30 + np.zeros((90, 1), int)  # the first does not vote
    model, given = door(clip, method), dict(classes=words, regions=regions)
    free = model.segment(image, **given, method=replace(method, vote="no"))
    level = float(np.quantile(free.confidence, 0.4))
    voted = model.segment(image, **given, background=level)
    rest = voted.names.index("background")
    added = len(voted.names) - 3
    expected = np.where(free.confidence < level, rest, free.labels + added)
    classes = np.roll(np.arange(len(voted.names)), -added)  # an added background is the last
    for each in range(1, 5):
        inside = regions == each
        expected[inside] = max(classes, key=list(expected[inside]).count)
    assert (expected[regions > 0] == rest).any()
    assert (expected[regions > 0] != rest).any()
    assert np.array_equal(voted.labels, expected)


def test_without_a_background_every_small_class_is_removed(clip):
    image, model = picture(), door(clip)
    shares = model.segment(image, ["sky", "grass", "road"]).shares
    words = sorted(shares, key=shares.get)
    few = float(shares[words[0]])
    assert 0 < few < 0.33
    found = door(clip, area_thd=few + 1e-6).segment(image, words).shares
    assert words[0] not in found
    assert sum(found.values()) == pytest.approx(1)
    alone = door(clip, area_thd=1.0).segment(image, words).shares
    assert alone == {words[-1]: 1}


def test_another_method_for_one_call(clip):
    model = door(clip, "sfp")
    same(
        model.segment(picture(), WORDS, method="sclip"),
        door(clip, "sclip").segment(picture(), WORDS),
    )
    knobs = dict(type="sfp", pm="lof", purify="median")
    same(model.segment(picture(), WORDS, method=knobs), door(clip, knobs).segment(picture(), WORDS))
    same(model.segment(picture(), WORDS), door(clip, "sfp").segment(picture(), WORDS))


def test_looking_inside(clip):
    image, model = picture(120, 200), door(clip)
    shown = model.resized(image)
    assert shown.shape == (80, 133, 3)
    trace = model.trace(image)
    assert trace.embedded.grid == (10, 16)
    pixels = torch.from_numpy(shown).permute(2, 0, 1).float()
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close(trace.image[0], (pixels - mean) / std)
    expected = model.method.run(clip.visual, ((pixels - mean) / std)[None])
    assert list(trace.masks) == list(expected.masks) == [10]
    assert torch.equal(trace.masks[10], expected.masks[10])
    assert not model.trace(image, method="clip").masks
    features = model.method.read(trace)
    assert features.as_map().shape == (1, 32, 10, 16)
    resclip = sfp.build_method("resclip")
    with pytest.raises(LookupError, match="needs the text features"):
        resclip.read(model.trace(image, method="resclip"))
    assert resclip.read(model.trace(image, method=resclip, classes=WORDS)).grid == (10, 16)
    assert visualize.outliers(shown, trace, [5, 10], ["som"]).axes


def test_a_look_inside_has_words_and_colours_too(clip):
    """What `segment` gives to a method: the words themselves, and the mean and std of its images."""
    other = copy.copy(clip)
    other.mean, other.std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    model = door(other)
    for classes in (None, WORDS):
        trace = model.trace(picture(), classes=classes)
        shown = torch.from_numpy(model.resized(picture())).permute(2, 0, 1) / 255
        torch.testing.assert_close(trace.rgb(trace.image[0]), shown)
    assert trace.known_words().queries == ("sky", "clouds", "grass", "a person on a bike")
    assert trace.known_words().banks(["a {}.", "{}"]).shape == (2, 4, 32)


def test_sizes_as_they_are(clip):
    image = picture(64, 96)
    assert np.array_equal(door(clip, short_side=None).resized(image), image)
    same(
        door(clip, short_side=None).segment(image, WORDS),
        door(clip, short_side=64).segment(image, WORDS),
    )
    assert sfp.load("mini", device="cpu").short_side == 224
    assert door(clip, short_side="auto").short_side == 336
    long = door(clip, short_side=336).resized(np.zeros((100, 2000, 3), np.uint8))
    assert long.shape == (102, 2048, 3)  # as the benchmarks: 2048 at most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("int8", torch.float32)]
)
def test_precisions(clip, precision, dtype, runs):
    """Words and image, from memory too. Weights that are given are moved, but never rounded."""
    own = tiny.clip(**tiny.WORDS)
    model = door(own, precision=precision)
    assert own.visual.proj.dtype == dtype
    assert f", {precision}, " in repr(model)
    result = model.segment(picture(), WORDS)
    same(result, model.segment(picture(), WORDS))
    assert len(runs) == 1
    exact = door(clip).segment(picture(), WORDS)
    assert 0 < np.median(abs(result.scores - exact.scores)) < 0.02
    if precision == "int8":
        same(door(own).segment(picture(), WORDS), exact)


def test_damaged_weights_are_named(tmp_path):
    broken = tiny.clip(**tiny.WORDS)
    broken.visual.transformer.resblocks[3].ln_1.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"images 0 to 1: NaN.*resblocks\.3"):
        door(broken).segment([picture(), picture()], WORDS)
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), picture())
    with pytest.raises(FloatingPointError, match=r"a\.png: NaN"):
        door(broken).segment(path, WORDS)


# -- words ---------------------------------------------------------------------------------------


def test_forms_of_classes(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("sky, clouds\ngrass\n")
    expected = load_vocabulary([["sky", "clouds"], "grass"])
    for classes in (
        path,
        str(path),
        [["sky", "clouds"], "grass"],
        (("sky", "clouds"), "grass"),
        expected,
    ):
        assert as_vocabulary(classes) == expected
    assert as_vocabulary(expected, 0.3) == expected
    both = as_vocabulary(path, ["wall", "floor"])
    assert both.queries == ("wall", "floor", "sky", "clouds", "grass")
    assert both.index == (0, 0, 1, 1, 2)
    assert both.names == ("background", "sky", "grass")


@pytest.mark.parametrize(
    ("classes", "background", "error", "message"),
    [
        ([], None, ValueError, "class list is empty"),
        (["cat", ""], None, ValueError, "entry 1 of the class list: the class has no name"),
        (["cat", 3], None, ValueError, r"expected a name or a list of names, got \[3\]"),
        (["cat", ["dog", "dog"]], None, ValueError, "'dog' appears twice"),
        ({"cat"}, None, ValueError, "in label order"),
        (7, None, ValueError, "classes=7: expected a list of names"),
        ("cat, dog", None, ValueError, r"give a list: \['cat', 'dog'\]"),
        ("voc12", None, ValueError, "did you mean 'voc21'"),
        ("nowhere.txt", None, FileNotFoundError, "no class file 'nowhere.txt'"),
        (Path("nowhere"), None, FileNotFoundError, "no class file 'nowhere'"),
        ("voc21", "wall", ValueError, "already include 'background'"),
        (["cat", "wall"], ["wall", "floor"], ValueError, "'wall' is also a name of a class"),
        (["cat"], "", ValueError, "background=''"),
        (["cat"], [], ValueError, r"background=\[\]"),
        (["cat"], 0, ValueError, "between 0 and 1"),
        (["cat"], 40, ValueError, "between 0 and 1"),
        (["cat"], float("nan"), ValueError, "between 0 and 1"),
        (["cat"], True, ValueError, "background=True"),
        (["cat"], {"wall": 1}, ValueError, "expected None, words, or a probability"),
        (["word " * 90], None, ValueError, "CLIP reads at most 77"),
    ],
    ids=str,
)
def test_words_that_are_wrong(clip, classes, background, error, message):
    with pytest.raises(error, match=message):
        door(clip).segment(picture(), classes, background=background)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(method="scilp"), ValueError, "did you mean 'sclip'"),
        (dict(method=dict(type="sfp", purfy=True)), ValueError, "did you mean 'purify'"),
        (dict(device="gpu"), ValueError, "device='gpu' is not available here"),
        (dict(device="meta:x"), ValueError, "device='meta:x'"),
        (dict(precision="fp8"), ValueError, "unknown precision 'fp8'"),
        (dict(short_side=0), ValueError, "short_side=0: expected 1 to 2048"),
        (dict(short_side=4000), ValueError, "short_side=4000"),
        (dict(short_side="336"), ValueError, "short_side='336'"),
        (dict(slide_stride=65), ValueError, "slide_stride=65"),
        (dict(templates="imagnet"), ValueError, "'imagnet'"),
        (dict(templates=["a photo"]), ValueError, "must have one {}"),
        (dict(memory_mb=-1), ValueError, "memory_mb=-1"),
        (dict(window_batch=0), ValueError, "window_batch=0"),
        (dict(pamr_steps=-1), ValueError, "pamr_steps=-1"),
        (dict(guides=dict(dino=dict(type="transfomers"))), ValueError, "did you mean"),
        (dict(guides="dino"), ValueError, "guides='dino': expected a dict of external encoders"),
        (dict(weights="ViT-B/61"), sfp.WeightsError, "did you mean 'ViT-B/16'"),
    ],
    ids=str,
)
def test_settings_that_are_wrong(clip, settings, error, message):
    with pytest.raises(error, match=message):
        sfp.load(**(SMALL | dict(weights=clip) | settings))


def test_a_guide_that_nobody_gave(clip):
    with pytest.raises(LookupError, match="needs the guide 'dino'; given: none"):
        door(clip, "proxyclip", guides=None).segment(picture(), WORDS)
