"""What every registered method must do, on a tiny random CLIP. Registering a method adds its tests.

A preset's bool and Literal knobs are tried with all their values; numbers are moved a little. Where
that would be no change, or no valid value, `OTHERS` says what to try instead. What a method needs from
outside (a guide, say) is in `CONTEXT`.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from tiny import Sam, Sam3, Scorer, words
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.functional.windows import WindowGrid
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")


def colours(pixels: Tensor, output: str | None = None) -> sfp.Tokens:
    """A stand-in for an external encoder: mean colours of cells of 6 pixels, squared as an output."""
    if output is not None:
        pixels = pixels * pixels.abs()
    maps = F.avg_pool2d(pixels.float(), 6)
    return sfp.Tokens(maps.flatten(2).mT, (maps.shape[2], maps.shape[3]), prefix=0)


colours.across = lambda entering, join: join(entering)  # type: ignore[attr-defined]


def stripes(pixels: Tensor) -> Tensor:
    """A stand-in for masks: columns of 20 pixels; in dark images none where it is dark."""
    columns = torch.arange(pixels.shape[-1]) // 20 + 1
    bright = pixels[:, 0].mean((1, 2), keepdim=True) > 0
    return columns * (bright | (pixels[:, 0] > 0))


CONTEXT: dict[str, Callable[[], dict[str, Any]]] = {
    "activesam": lambda: dict(guides=dict(sam3=Sam3()), words=words(5)),
    "cliptrase": lambda: dict(guides=dict(dino=colours)),
    "corrclip": lambda: dict(guides=dict(dino=colours)),
    "fsa": lambda: dict(guides=dict(dino=colours)),
    "gla_clip": lambda: dict(guides=dict(dino=colours)),
    "trident": lambda: dict(guides=dict(dino=colours, sam=Sam())),
    "lposs": lambda: dict(guides=dict(dino=colours)),
    "lposs_plus": lambda: dict(guides=dict(dino=colours)),
    "ov_stitcher": lambda: dict(guides=dict(dino=colours)),
    "proxyclip": lambda: dict(guides=dict(dino=colours)),
    "region_memory": lambda: dict(guides=dict(dino=colours)),
    "s2c2seg": lambda: dict(guides=dict(dino=colours, clipseg=Scorer()), words=words(5)),
    "sam3": lambda: dict(guides=dict(sam3=Sam3()), words=words(5)),
    "segearth_ov3": lambda: dict(guides=dict(sam3=Sam3()), words=words(5)),
}
"""Further context of `Method.logits` by method, made when it is needed."""

START: dict[str, dict[str, Any]] = {
    "activesam": dict(prune_above=2),
    "freecp": dict(redundant=-1.0, ambiguous=0.5),
    "object_presence": dict(height=1.3),
    "rfclip": dict(factor=2.0),
}
"""Knobs with which the others matter on random weights."""

OTHERS: dict[tuple[str, str], list[Any]] = {
    # a knob of a switched-off part, or with another knob that it needs: the whole set of knobs
    ("activesam", "guide"): [],
    ("activesam", "score"): [0.999],
    ("activesam", "prune_above"): [None],
    ("activesam", "prune_side"): [None],
    ("activesam", "prune_most"): [],  # tests/methods/test_sam3.py, as the next three
    ("activesam", "hypernyms"): [],
    ("activesam", "names"): [],
    ("activesam", "windows"): [],
    ("clip_surgery", "surgery_blocks"): [0, 3],
    ("cliptrase", "cells"): [1, 4],
    ("cliptrase", "guide"): ["dino"],
    ("cliptrase", "restore"): [-2],
    ("cliper", "dataset"): ["voc21", "city_scapes"],
    ("cliper", "cut"): [0.9],
    ("cliper", "select"): [3],
    ("cliper", "score_thd"): [],  # of the decision, as the next three
    ("cliper", "background_thd"): [],
    ("cliper", "background"): [True],
    ("cliper", "min_max"): [],
    ("floss", "base"): ["sclip"],
    ("floss", "experts"): [],  # a file, which tests/methods/test_floss.py writes; as the next two
    ("floss", "logit_scale"): [],
    ("floss", "cells"): [],
    ("freecp", "base"): ["sclip"],
    ("freecp", "dataset"): ["voc21"],
    ("freecp", "redundant"): [0.2],
    ("freecp", "ambiguous"): [2.0],
    ("freecp", "background"): [True],
    ("freecp", "crop_side"): [48],
    ("freecp", "crop_text"): [],
    ("corrclip", "output"): [None],
    ("corrclip", "eps"): [2.0],
    ("corrclip", "guide"): [],
    ("corrclip", "late"): [1],
    ("corrclip", "correct"): [],  # what it does is in the labels
    ("fsa", "guide"): [],
    ("ov_stitcher", "guide"): [],
    ("ov_stitcher", "output"): [None],
    ("ov_stitcher", "eps"): [2.0],
    ("ov_stitcher", "late"): [1],
    ("ov_stitcher", "correct"): [],  # what it does is in the labels
    ("ov_stitcher", "floor"): [],  # of several windows
    ("gla_clip", "guide"): [],
    ("gla_clip", "beta"): [0.5],
    ("gla_clip", "gamma"): [1.0],
    ("gla_clip", "threshold"): [0.95],
    ("gla_clip", "rounds"): [0],
    ("gclip", "blocks"): [(3,), ()],
    ("gclip", "cs_blocks"): [(2, 3)],
    ("gclip", "channel"): [3],
    ("gem", "ss_attn_temp"): [10.0],
    ("itaclip", "layers"): [(3,), ()],
    ("lavg", "base"): ["clearclip"],
    ("lposs", "base"): ["clearclip"],
    ("lposs", "guide"): [],
    ("lposs", "output"): [],
    ("lposs", "neighbours"): [5],
    ("lposs_plus", "base"): ["clearclip"],
    ("lposs_plus", "side"): [5],
    ("maskclip", "ks_thresh"): [1.0],
    ("maskclip", "pd_thresh"): [0.9],
    ("proxyclip", "guide"): [None],
    ("object_presence", "base"): ["sclip"],
    ("object_presence", "dataset"): ["voc20"],
    ("object_presence", "image_weight"): [0.5],
    ("object_presence", "move"): [0.5],
    ("object_presence", "height"): [0.5],
    ("object_presence", "scope"): [],  # the same without windows; see test_windows_of_an_image
    ("radseg", "recursive"): [None, 1.0],
    ("radseg", "aggregate"): [None, 1.0],
    ("radseg", "least"): [],  # a part of the decision
    ("region_memory", "base"): ["clearclip"],
    (
        "region_memory",
        "memory",
    ): [],  # a file; tests/methods/test_region_memory.py, as the next four
    ("region_memory", "guide"): [],
    ("region_memory", "output"): [],
    ("region_memory", "count"): [],
    ("region_memory", "share"): [],
    ("resclip", "dataset"): ["voc20", "voc21"],
    ("resclip", "layers"): [(3,), (7, 8)],
    ("resclip", "lambda_rcs"): [0.1],
    ("resclip", "tau_sfr"): [1.0],
    ("resclip", "lambda_sfr"): [0.1],
    ("resclip", "temp_thd"): [0.9],
    ("resclip", "logit_scale"): [2.0],
    ("rfclip", "channels"): [(3, 5)],
    ("rfclip", "factor"): [5.0],
    ("rfclip", "count"): [3],
    ("rfclip", "scope"): [],
    ("rfclip", "dataset"): [None, "voc20"],
    ("rfclip", "image_weight"): [0.5],
    ("rfclip", "move"): [0.5],
    ("rfclip", "height"): [2.0],
    ("s2c2seg", "base"): ["sclip"],
    ("s2c2seg", "guide"): [],
    ("s2c2seg", "share"): [0.7],
    ("s2c2seg", "most"): [1],
    ("s2c2seg", "repair"): [],  # tests/methods/test_s2c2seg.py, as the next
    ("s2c2seg", "sure"): [],
    ("sam3", "guide"): [],
    ("sam3", "score"): [0.999],
    ("sam3", "most"): [1],
    ("sam3", "windows"): [],  # tests/methods/test_sam3.py
    ("segearth_ov3", "guide"): [],
    ("segearth_ov3", "dataset"): ["voc21"],
    ("segearth_ov3", "score"): [0.999],
    ("segearth_ov3", "windows"): [],
    ("sfp", "pm"): ["l2_norm", "lof"],
    ("sfp", "purify"): [False, "median", "mask_attention"],
    ("sfp", "layers"): ["all", (-3, -2)],
    ("sfp", "top_k"): [2],
    ("sfp", "res_scale"): [0.5],
    ("sfp", "beta"): [0.9],
    ("sfp", "enhancer"): ["qk", "kk", "qq+vv"],
    ("sfp_paper", "pm"): ["l2_norm", "lof"],
    ("sfp_paper", "purify"): [False, "median", "mask_attention"],
    ("sfp_paper", "layers"): [(-2,)],
    ("sfp_paper", "enhancer"): ["qk", "kk", "qq+vv"],
    ("textregion", "threshold"): [None],
    ("textregion", "bias"): [0.1],
    ("textregion", "resample"): [],  # of images of another size than the tower's
    ("trident", "guide"): [],
    ("trident", "sam"): [None],
    ("trident", "dataset"): ["voc20"],
    ("trident", "factor"): [0.0],
    ("trident", "negative"): [],  # tests/methods/test_parity_choice.py
    ("trident", "halves"): [True],
    ("trident", "floor"): [],  # the same where windows lie on whole cells
    ("scclip", "beta"): [0.9],
}

NOT_STITCHED = {"ov_stitcher": "already has an image stage"}
"""Presets that have no use for `stitched=True`, and the reason that they give."""

NAMES = sfp.list_methods()
assert NAMES


@functools.cache
@torch.random.fork_rng()  # the caller draws the same numbers whether or not it is the first
def tiny(layers: int = 12) -> sfp.CLIP:
    """Two heads, patches of 8 pixels, an 8x8 grid."""
    torch.manual_seed(layers)
    clip = sfp.CLIP(
        embed_dim=32,
        image_size=64,
        patch=8,
        width=128,
        layers=layers,
        context=8,
        vocab=16,
        text_width=64,
        text_layers=1,
    )
    for name, p in clip.named_parameters():
        if "in_proj_weight" in name:  # attention that is not uniform
            p.data *= 4
    return clip.requires_grad_(False).eval()


def images(batch: int = 2, height: int = 64, width: int = 64) -> Tensor:
    """A colour per image, a few smooth shapes, a little noise: patches that are alike, and not."""
    generator = torch.Generator().manual_seed(height * width)
    coarse = torch.randn(batch, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    noise = torch.randn(batch, 3, height, width, generator=generator)
    return F.interpolate(coarse, (height, width), mode="bilinear") + 0.1 * noise


def text() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(5, 32, generator=generator), dim=-1)


def context(method: sfp.Method, name: str, pixels: Tensor) -> dict[str, Any]:
    """What a method needs besides images (B, 3, H, W) and words."""
    extra = CONTEXT[name]() if name in CONTEXT else {}
    return dict(extra, regions=stripes(pixels)) if method.needs_regions else extra


def run(method: sfp.Method, name: str, pixels: Tensor, clip: sfp.CLIP | None = None) -> Tensor:
    extra = context(method, name, pixels)
    return method.logits((clip or tiny()).visual, pixels, text(), **extra)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(64, 64), (72, 40)], ids=str)
def test_images_of_a_batch_do_not_see_each_other(name, size):
    """On the native grid and on one that needs resampling."""
    method, pixels = sfp.build_method(name), images(2, *size)
    both = run(method, name, pixels)
    assert both.shape[:2] == (2, 5)
    assert both.isfinite().all()
    assert not torch.allclose(both[0], both[1])
    # up to rounding: matrix products of other sizes add in another order
    torch.testing.assert_close(run(method, name, pixels[1:])[0], both[1])
    other = torch.stack([pixels[0], pixels[1].flip(-1) * 3])
    assert torch.equal(run(method, name, other)[0], both[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stitched(name):
    """With one window the preset itself; with several, one grid on which windows see one another."""
    if name in NOT_STITCHED:
        with pytest.raises(ValueError, match=NOT_STITCHED[name]):
            sfp.build_method(name, stitched=True)
        return
    method, stitched = sfp.build_method(name), sfp.build_method(name, stitched=True)

    def read(method: sfp.Method, image: Tensor, grid: WindowGrid) -> Tensor:
        extra = context(method, name, image[None])
        whole = WholeImage(grid, image, regions=extra.get("regions", [None])[0])
        windows, ids = zip(*(whole.cut(place) for place in grid.places), strict=True)
        if "regions" in extra:
            extra["regions"] = torch.stack(ids)
        return method.logits(tiny().visual, torch.stack(windows), text(), whole=whole, **extra)[0]

    one = WindowGrid.over((64, 64), 64, 32)
    (image,) = images(1)
    torch.testing.assert_close(read(stitched, image, one), read(method, image, one))
    (image,) = images(1, 64, 104)
    grid = WindowGrid.over((64, 104), 64, 32)  # windows at 0, 32 and 40
    changed = image[..., :40].repeat(1, 1, 3)[..., :104]
    together, other = (read(stitched, x, grid) for x in (image, changed))
    assert len(together) == 1
    assert together.shape[2] / together.shape[3] == pytest.approx(64 / 104, rel=0.05)
    assert together.isfinite().all()
    assert not torch.allclose(together, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_features_and_input(name):
    method, pixels = sfp.build_method(name), images()
    before = pixels.clone()
    weights = {k: v.clone() for k, v in tiny().visual.state_dict().items()}
    extra = context(method, name, pixels)
    tokens, trace = method.features(tiny().visual, pixels, text=text(), **extra)
    assert tokens.data.shape[0] == 2
    assert tokens.data.shape[2] == 32
    assert tokens.data.dtype == torch.float32
    assert len(trace.outputs) == 11
    assert torch.equal(pixels, before)
    for k, v in tiny().visual.state_dict().items():
        assert torch.equal(v, weights[k]), k


@pytest.mark.parametrize("name", NAMES)
def test_resampled_positions_follow_the_grid(name):
    """4x16 has as many patches as the native 8x8, and must not take its table as it is."""
    visual = tiny().visual
    embedded = visual.embed(images(1, 32, 128), sfp.build_method(name).positions)
    unfitted = visual.embed(images(1, 32, 128), lambda table, grid: table.reshape(*grid, -1))
    assert (embedded.data - unfitted.data).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_deeper_model(name):
    """24 blocks: layers move with the depth, or are taken literally."""
    scaled = run(sfp.build_method(name), name, images(1), tiny(24))
    assert scaled.isfinite().all()
    if "depth" not in inspect.signature(sfp.METHODS.get(name)).parameters:
        literal = run(sfp.build_method(name, depth=None), name, images(1), tiny(24))
        assert literal.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_another_default_type(name):
    """Some programs set it; float32 weights and images stay float32."""
    method = sfp.build_method(name)
    expected = run(method, name, images(1))
    pixels, words = images(1), text()
    torch.set_default_dtype(torch.float64)
    try:
        method = sfp.build_method(name)
        extra = context(method, name, pixels)
        found = method.logits(tiny().visual, pixels, words, **extra)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_knob(name):
    knobs = list(inspect.signature(sfp.METHODS.get(name)).parameters)
    if not knobs:
        with pytest.raises(ValueError, match="no knob 'knobb'"):
            sfp.build_method(name, knobb=1)
        return
    with pytest.raises(ValueError, match=f"did you mean '{knobs[0]}'"):
        sfp.build_method(name, **{knobs[0] + "x": 1})


def test_unknown_method():
    with pytest.raises(ValueError, match="did you mean 'naclip'"):
        sfp.build_method("naclp")


def other_values(name: str, knob: str) -> list[Any]:
    """What to try for a knob, other than its default."""
    if (name, knob) in OTHERS:
        return OTHERS[name, knob]
    preset = sfp.METHODS.get(name)
    default = inspect.signature(preset).parameters[knob].default
    hint = typing.get_type_hints(preset)[knob]
    if isinstance(default, bool):
        return [not default]
    if typing.get_origin(hint) is Literal:
        return [value for value in typing.get_args(hint) if value != default]
    if isinstance(default, int):
        return [default - 1 if default > 1 else default + 1]
    if isinstance(default, float):
        return [default * 0.5]
    pytest.fail(f"say in OTHERS what to try for knob {knob!r} of {name!r}")


KNOBS = [
    (name, knob) for name in NAMES for knob in inspect.signature(sfp.METHODS.get(name)).parameters
]
assert KNOBS


@functools.cache
def by_default(name: str) -> Tensor:
    return run(sfp.build_method(name, **START.get(name, {})), name, images())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "knob"), KNOBS)
def test_every_knob_changes_the_result(name, knob):
    start, default = START.get(name, {}), by_default(name)
    for value in other_values(name, knob):
        changed = run(sfp.build_method(name, **{**start, knob: value}), name, images())
        assert changed.shape != default.shape or (changed - default).abs().max() > 1e-6, value


CHOICES = [
    (name, knob)
    for name, knob in KNOBS
    if typing.get_origin(typing.get_type_hints(sfp.METHODS.get(name))[knob]) is Literal
]


@pytest.mark.parametrize(("name", "knob"), CHOICES)
def test_unknown_choice_names_the_valid_ones(name, knob):
    valid = typing.get_args(typing.get_type_hints(sfp.METHODS.get(name))[knob])
    text_choices = [value for value in valid if isinstance(value, str)]
    with pytest.raises(ValueError, match=f"did you mean '{text_choices[0]}'"):
        sfp.build_method(name, **{knob: text_choices[0] + "x"})


def test_clip_is_the_plain_forward_pass():
    tokens, _ = sfp.build_method("clip").features(tiny().visual, images())
    torch.testing.assert_close(tokens.cls[:, 0], tiny().encode_image(images()))


@pytest.mark.parametrize(
    ("name", "knobs"), [("gclip", dict(blocks=(13, 15))), ("itaclip", dict(layers=(13, 15, 19)))]
)
def test_layers_of_a_deeper_model(name, knobs):
    """The same relative depth by default: block i of 12 ends where block 2i + 1 of 24 does."""
    scaled = run(sfp.build_method(name), name, images(), tiny(24))
    literal = run(sfp.build_method(name, depth=None, **knobs), name, images(), tiny(24))
    assert torch.equal(scaled, literal)
