"""One engine for many words, methods and threads: bounded memory, pickling, no stale results."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

import sfp
from sfp import engine as engine_module
from sfp.engine import Engine, Queries, choose_device
from sfp.feature_cache import LRUCache
from sfp.functional.labels import otsu
from sfp.functional.windows import WindowGrid, nearest
from sfp.registry import OPS
from sfp.whole import WholeImage

SMALL = dict(
    device="cpu", short_side=64, slide_crop=64, slide_stride=32, templates=["a {}."], window_batch=2
)
WORDS = [["sky", "clouds"], "grass", "road"]


@pytest.fixture(scope="module")
def model() -> sfp.Model:
    return sfp.load(tiny.clip(**tiny.WORDS), **SMALL)


def picture(seed: int = 0, height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def same(a: sfp.Result, b: sfp.Result) -> None:
    assert a.names == b.names
    for key in ("labels", "confidence", "scores", "image"):
        assert np.array_equal(getattr(a, key), getattr(b, key)), key


@pytest.mark.slow
def test_threads_get_what_one_caller_gets(model):
    """Different words, methods and images at once, with the caches in use."""
    methods = ["sfp", "sclip", "resclip", "clip_surgery", "gclip"]
    words = [WORDS, ["tree", "car"], [["a", "b"], "c", "d", "e"]]
    jobs = [(picture(i % 3), words[i % len(words)], methods[i % len(methods)]) for i in range(30)]
    alone = sfp.load(model.clip, **SMALL, memory_mb=0)
    expected = [alone.segment(image, names, method=method) for image, names, method in jobs]
    model.memory.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: model.segment(job[0], job[1], method=job[2]), jobs))
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_images():
    model = sfp.load(tiny.clip(**tiny.WORDS), **SMALL)
    model.memory.limit = 2**17

    def held() -> int:
        return len(pickle.dumps([vars(model), vars(model.engine)]))

    model.segment(picture(), WORDS)
    before = held()
    for seed in range(40):
        model.segment(picture(seed), [*WORDS, f"word {seed % 5}"])
    assert model.memory.nbytes <= 2**17
    assert len(model.memory._entries) < 40
    assert held() == before  # caches are left out, and there is nothing else


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_models_methods_and_results_travel(model, travel):
    result = model.segment(picture(), WORDS, background=0.4)
    same(travel(result), result)
    same(travel(model).segment(picture(), WORDS, background=0.4), result)
    for name in sfp.list_methods():
        method = sfp.build_method(name)
        assert travel(method) == method


def test_a_refined_result_travels():
    model = sfp.load(tiny.clip(**tiny.WORDS), **SMALL, pamr_steps=2)
    result = model.segment(picture(), WORDS)
    same(pickle.loads(pickle.dumps(result)), result)
    file = io.BytesIO()
    torch.save(sfp.OpenVocabSegmentor(tiny.clip(**tiny.WORDS), WORDS, templates=["{}"]), file)


def change(how: str, clip: sfp.CLIP) -> None:
    block = clip.visual.blocks[4]
    if how == "in place":
        block.mlp.c_fc.weight.mul_(1.5)
    elif how == "data":
        block.mlp.c_fc.weight.data.mul_(1.5)
    elif how == "replaced":
        block.mlp.c_fc.weight = torch.nn.Parameter(block.mlp.c_fc.weight * 1.5)
    elif how == "loaded":
        state = {k: v * 1.1 for k, v in clip.state_dict().items()}
        clip.load_state_dict(state)
    elif how == "text":
        clip.text_projection.data[:, 0] *= 3


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "data", "replaced", "loaded", "text"])
@pytest.mark.parametrize("method", ["sfp", "gclip"])  # gclip: surgery, of which a copy is cached
def test_no_cache_outlives_the_weights(how, method, tmp_path, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    model = sfp.load(tiny.clip(**tiny.WORDS), method, **SMALL)
    old = model.segment(picture(), WORDS)
    change(how, model.clip)
    new = model.segment(picture(), WORDS)
    state = {k: v.clone() for k, v in model.clip.state_dict().items()}
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "other"))
    same(new, sfp.load(state, method, **SMALL).segment(picture(), WORDS))
    assert not np.array_equal(old.confidence, new.confidence)


def test_a_host_may_move_the_weights():
    """The engine notices at its next call."""
    engine = Engine(tiny.clip(**tiny.WORDS), templates=["{}"])
    engine.clip.double()
    assert engine.encode(["sky"]).dtype == torch.float32
    assert engine.clip.visual.proj.dtype == torch.float32
    engine = Engine(tiny.clip(**tiny.WORDS), precision="int8", templates=["{}"])
    engine.clip.to("meta")
    with pytest.raises(ValueError, match=r"int8.*needs a CPU"):
        engine.convert()


def test_windows_meet_their_images():
    """Every window of every image goes through once, in batches of equal size."""
    engine = Engine(tiny.clip(**tiny.WORDS), slide_crop=64, slide_stride=40, window_batch=3)
    images = [
        tiny.images(1, *size, seed=i)[0] for i, size in enumerate([(64, 120), (100, 64), (30, 64)])
    ]
    grids = [engine._grid(image) for image in images]
    seen: list[tuple[int, torch.Tensor]] = []
    wholes = [WholeImage(grid, image) for grid, image in zip(grids, images, strict=True)]
    for numbers, windows, regions in engine._batches(wholes):
        assert len(windows) <= 3
        assert regions is None
        seen += zip(numbers, windows, strict=True)
    expected = [
        (n, g.cut(x, p))
        for n, (x, g) in enumerate(zip(images, grids, strict=True))
        for p in g.places
    ]
    assert len(seen) == len(expected)
    for number, window in seen:
        assert any(
            n == number and torch.equal(w, window) for n, w in expected if w.shape == window.shape
        )
    assert isinstance(grids[0], WindowGrid)


def test_large_images_are_normalised_window_by_window(monkeypatch):
    whole = sfp.load(tiny.clip(**tiny.WORDS), **SMALL).segment(picture(), WORDS)
    monkeypatch.setattr(engine_module, "LARGE", 100)
    model = sfp.load(tiny.clip(**tiny.WORDS), **SMALL)
    assert model.input(picture()).dtype == torch.uint8
    same(model.segment(picture(), WORDS), whole)


def test_least_recently_used():
    cache: LRUCache[str] = LRUCache(3)
    for key in "abc":
        cache.put(key, key)
    assert cache.get("a") == "a"
    cache.put("d", "d")
    assert [cache.get(key) for key in "abcd"] == ["a", None, "c", "d"]
    cache.put("c", "longer", 2)
    assert (cache.get("c"), cache.size) == ("longer", 3)
    cache.put("e", "too large", 4)
    assert cache.get("e") is None
    assert copy.deepcopy(cache).size == 0
    cache.clear()
    assert (cache.size, cache.get("c")) == (0, None)


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device='gpu' is not available here"):
        choose_device("gpu")


def test_weights_without_a_name_keep_the_size_of_the_mini_clip():
    """A fine-tuned mini CLIP sees images as the shipped one does."""
    clip = sfp.load_clip("mini")
    for weights in (clip, clip.state_dict()):
        assert sfp.load(weights).short_side == 224
    assert sfp.load(tiny.clip(**tiny.WORDS)).short_side == 336


def test_autocast_has_features_of_its_own():
    model = sfp.load(tiny.clip(**tiny.WORDS), **SMALL)
    plain = model.segment(picture(), WORDS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.segment(picture(), WORDS)
    assert not np.array_equal(plain.confidence, cast.confidence)
    same(model.segment(picture(), WORDS), plain)


def test_the_scale_that_the_model_was_trained_with():
    clip = tiny.clip(**tiny.WORDS)
    assert sfp.load(clip, **SMALL).engine.logit_scale == 40.0
    own = sfp.load(clip, **SMALL, logit_scale="auto").engine.logit_scale
    assert own == pytest.approx(float(clip.logit_scale.exp()))
    with pytest.raises(ValueError, match="logit_scale='own': expected a number or 'auto'"):
        sfp.load(clip, **SMALL, logit_scale="own")


def test_thresholds_of_two_numbers_and_units_are_checked():
    for wrong in ((0.5, 0.2), (0.1,), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="expected a number, or the least and the largest"):
            Engine(tiny.clip(), prob_thd=wrong)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        Engine(tiny.clip(), pamr_unit="meen")
    for wrong in ((), (0, 8)):
        with pytest.raises(ValueError, match=r"pamr_dilations=.*at least one, from 1 pixel"):
            Engine(tiny.clip(), pamr_dilations=wrong)


def test_logits_of_padded_images_are_cut_where_the_image_ends():
    """Also those that are resampled to the output's size at once."""
    engine = Engine(tiny.clip(), slide_crop=0, pad_windows=True)
    image, queries = tiny.images(1, 60, 84)[0], Queries(tiny.queries(3), (0, 1, 2))
    method = replace(sfp.build_method("sclip"), direct=True)
    ((sheet,),) = engine.logits([method], [image], [(120, 180)], queries)
    patches = sheet.tiles.permute(2, 0, 1)[None]
    pixels = F.interpolate(patches, scale_factor=8, mode="bilinear", align_corners=False)
    assert pixels.shape[2:] == (64, 88)
    inner = pixels[..., 2:-2, 2:-2]
    expected = F.interpolate(inner, (120, 180), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(sheet.rows(0, 120), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (dict(type="cliper", select=12), "select=12 of 12 readouts"),
        (dict(type="gclip", channel=64), "channel=64 of an MLP with 64 outputs"),
    ],
    ids=str,
)
def test_numbers_of_things_that_the_model_lacks(node, message):
    engine, method = Engine(tiny.clip(), slide_crop=0), sfp.build_method(node)
    image, queries = tiny.images(1, 64, 64)[0], Queries(tiny.queries(3), (0, 1, 2))
    with pytest.raises(ValueError, match=message):
        engine.logits([method], [image], [(64, 64)], queries)


def test_each_image_has_a_threshold_of_its_own():
    """Otsu's, between two numbers: labels are those of that number."""
    method, queries = sfp.build_method("sclip"), Queries(tiny.queries(3), (0, 1, 2))
    images = list(tiny.images(2, 64, 96, seed=3))
    plain = Engine(tiny.clip(), slide_crop=64, slide_stride=32)
    both = Engine(tiny.clip(), slide_crop=64, slide_stride=32, prob_thd=(0.2, 0.9))
    (sheets,) = plain.logits([method], images, [(64, 96)] * 2, queries)
    for image, sheet in zip(images, sheets, strict=True):
        free = plain.label(image, sheet, queries.index)
        own = min(max(float(otsu(free.confidence)), 0.2), 0.9)
        expected = free.labels.masked_fill(free.confidence < own, 0)
        found = both.label(image, sheet, queries.index)
        assert torch.equal(found.labels, expected)
        assert not torch.equal(found.labels, free.labels)


def test_edits_may_need_regions_but_not_all_windows():
    try:

        @sfp.op("detector", regions=True)
        def second_region(trace: sfp.Trace, layer: int) -> torch.Tensor:
            return nearest(trace.regions, trace.embedded.grid).flatten(1) == 2

        @sfp.op("detector", whole=True)
        def of_all_windows(trace: sfp.Trace, layer: int) -> torch.Tensor: ...

        engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32)
        ids = torch.ones(64, 96, dtype=torch.long)
        words, (image,) = Queries(tiny.queries(3), (0, 1, 2)), tiny.images(1, 64, 96)

        def logits(regions: torch.Tensor) -> torch.Tensor:
            method = sfp.build_method("sfp", pm="second_region")
            ((sheet,),) = engine.logits([method], [image], [(64, 96)], words, regions=[regions])
            return sheet.tiles  # (8, 2 * 8, Q), the windows from left to right

        without = logits(ids)
        ids[20:40, 70:90] = 2  # in the right window only
        changed = (logits(ids) != without).any(-1)
        assert not changed[:, :8].any()
        assert changed[:, 8:].any()
        with pytest.raises(ValueError, match=r"of_all_windows.*whole=True"):
            sfp.build_method("sfp", pm="of_all_windows")
    finally:
        for name in ("second_region", "of_all_windows"):
            OPS.module_dict.pop(name, None)
