"""Mitigators against loops over cells; hidden keys against sequences without them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from narrow import images, vit
from scipy.sparse.linalg import cg
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.clip.vit import ImageConfig, VisionTransformer
from sfp.functional import attention
from sfp.functional.attention import hide
from sfp.ops.mitigators import inpaint
from sfp.outliers.planted import Plant
from sfp.registry import OPS, bind
from sfp.tokens import Tokens

pytestmark = pytest.mark.usefixtures("no_grad")

MITIGATORS, DETECTORS = sfp.list_ops("mitigator"), sfp.list_ops("detector")
assert MITIGATORS
assert DETECTORS
LAYER = 6
GRID = (5, 7)


def mitigate(name: str, tokens: Tokens, mask: Tensor, **knobs) -> Tokens:
    return bind(dict(type=name, **knobs), "mitigator")(tokens, mask)


@functools.cache
def tokens() -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens(torch.randn(4, 1 + 35, 6, generator=generator), GRID)


@functools.cache
def mask() -> Tensor:
    """A corner of 2x2, a third at random, everything but one patch, and nothing."""
    marks = torch.zeros(4, *GRID, dtype=torch.bool)
    marks[0, :2, :2] = True
    marks[1] = torch.rand(GRID, generator=torch.Generator().manual_seed(1)) < 0.3
    marks[2] = True
    marks[2, 3, 1] = False
    return marks.flatten(1)


def loop(fill) -> Tensor:
    """`fill(map (h, w, D), marks (h, w), row, col)` for every outlier, from the untouched values."""
    out = tokens().data.clone()
    for b in range(4):
        values = tokens().patches[b].unflatten(0, GRID)
        marks = mask()[b].unflatten(0, GRID)
        for row, col in marks.nonzero().tolist():
            out[b, 1 + row * GRID[1] + col] = fill(values, marks, row, col)
    return out


def nearest_ring(values: Tensor, marks: Tensor, row: int, col: int) -> Tensor:
    valid = (~marks).nonzero().tolist()
    far = [max(abs(r - row), abs(c - col)) for r, c in valid]
    return torch.stack(
        [values[r, c] for (r, c), f in zip(valid, far, strict=True) if f == min(far)]
    )


def test_neighbour_mean():
    expected = loop(lambda *cell: nearest_ring(*cell).mean(0))
    torch.testing.assert_close(mitigate("neighbour_mean", tokens(), mask()).data, expected)


def test_median():
    def fill(*cell):
        return torch.from_numpy(np.median(nearest_ring(*cell).numpy(), axis=0))

    torch.testing.assert_close(mitigate("median", tokens(), mask()).data, loop(fill))


def test_nearest():
    def fill(values, marks, row, col):
        valid = (~marks).nonzero().tolist()  # row-major: `min` takes the first of equals
        r, c = min(valid, key=lambda at: (at[0] - row) ** 2 + (at[1] - col) ** 2)
        return values[r, c]

    assert torch.equal(mitigate("nearest", tokens(), mask()).data, loop(fill))


def test_inpaint_is_harmonic():
    """Outliers are the mean of their four neighbours; a plane is continued as a plane."""
    filled = mitigate("inpaint", tokens(), mask()).patches.unflatten(1, GRID)
    for b, row, col in mask().unflatten(1, GRID).nonzero().tolist():
        around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
        inside = [filled[b, r, c] for r, c in around if 0 <= r < 5 and 0 <= c < 7]
        torch.testing.assert_close(
            filled[b, row, col], torch.stack(inside).mean(0), atol=1e-5, rtol=1e-4
        )
    plane = torch.arange(5.0)[:, None, None] + 2 * torch.arange(7.0)[None, :, None]
    inner = torch.zeros(GRID, dtype=torch.bool)
    inner[1:4, 2:5] = True
    spoilt = Tokens(plane.masked_fill(inner[..., None], 99).reshape(1, 35, 1), GRID, prefix=0)
    filled = mitigate("inpaint", spoilt, inner.reshape(1, 35)).patches
    torch.testing.assert_close(filled, plane.reshape(1, 35, 1))


def test_inpaint_against_another_solver():
    marks = mask()[1].numpy()
    rows, cols = np.divmod(np.arange(35), 7)
    touch = abs(rows[:, None] - rows) + abs(cols[:, None] - cols) == 1
    laplace = np.diag(touch.sum(1)) - touch.astype(float)
    x = tokens().patches[1].double().numpy()
    right = -laplace[marks][:, ~marks] @ x[~marks]
    expected = np.stack([cg(laplace[np.ix_(marks, marks)], b, rtol=1e-10)[0] for b in right.T], -1)
    filled = mitigate("inpaint", tokens(), mask()).patches[1].numpy()[marks]
    np.testing.assert_allclose(filled, expected, atol=1e-5)


def test_zero():
    assert torch.equal(mitigate("zero", tokens(), mask()).data, loop(lambda *cell: torch.zeros(6)))


@pytest.mark.parametrize("name", MITIGATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_contract(name, dtype):
    """Batch equals singles; valid patches and the prefix are untouched; nothing is written into."""
    given = tokens().with_data(tokens().data.to(dtype))
    before = given.data.clone()
    out = mitigate(name, given, mask())
    assert out.data.dtype == dtype
    assert torch.equal(given.data, before)
    assert out.data.isfinite().all()
    assert torch.equal(out.patches[~mask()], given.patches[~mask()])
    assert torch.equal(out.data[:, :1], given.data[:, :1])
    for i in range(4):
        single = mitigate(name, given.with_data(given.data[i : i + 1]), mask()[i : i + 1])
        torch.testing.assert_close(single.data[0], out.data[i], atol=1e-6, rtol=1e-5)
        assert single.hidden is None or torch.equal(single.hidden[0], out.hidden[i])


@pytest.mark.parametrize("name", [n for n in MITIGATORS if n not in ("zero", "box_blend")])
def test_an_image_of_outliers_only_stays(name):
    everything = torch.ones_like(mask())
    everything[1] = mask()[1]  # the others of the batch do not matter
    out = mitigate(name, tokens(), everything)
    assert torch.equal(out.data[[0, 2, 3]], tokens().data[[0, 2, 3]])
    if name == "mask_attention":
        assert torch.equal(out.hidden.any(-1), torch.tensor([False, True, False, False]))
    else:
        assert not torch.equal(out.data[1], tokens().data[1])


# -------------------------------------------------------------------------------- hidden keys


def test_hidden_accumulate_but_never_all():
    first = mitigate("mask_attention", tokens(), mask())
    assert torch.equal(first.hidden, mask())
    second = mitigate("mask_attention", first, ~mask())  # together: everything
    assert torch.equal(second.hidden, first.hidden)
    third = mitigate("mask_attention", first, torch.roll(mask(), 1, 0) & ~mask().roll(2, 1))
    assert (third.hidden >= first.hidden).all()
    assert not third.hidden.all(-1).any()


def wide(grid: tuple[int, int] = (4, 6)) -> tuple[Tokens, Tensor]:
    """Tokens as wide as `vit`, two images, other patches hidden in each."""
    generator = torch.Generator().manual_seed(2)
    n = grid[0] * grid[1]
    data = torch.randn(2, 1 + n, 128, generator=generator)
    hidden = torch.rand(2, n, generator=generator) < 0.4
    return Tokens(data, grid, hidden=hidden), hidden


@pytest.mark.parametrize("prefix", [1, 0])
def test_hiding_equals_deleting_the_keys(prefix):
    """For all that still see, in the trunk and in readouts: as if the hidden tokens were not there."""
    given, hidden = wide()
    given = given if prefix else given.only_patches()
    assert torch.equal(given.hidden, hidden)
    block = vit().blocks[3]
    trace = vit().trace(images())
    rules = [None, *(bind(dict(type="self_self", pairs=p)) for p in (("qk",), ("qq", "kk", "vv")))]
    for i in range(2):
        keep = torch.cat([torch.ones(prefix, dtype=torch.bool), ~hidden[i]])
        left = given.data[i : i + 1, keep]
        # what is left over is no grid: a row of patches
        fewer = Tokens(left, (1, int(keep.sum()) - prefix), prefix)
        ran = block.advance(given, block.heads(given)).data[i : i + 1, keep]
        alone = block.advance(fewer, block.heads(fewer)).data
        torch.testing.assert_close(ran, alone, atol=1e-5, rtol=1e-4)
        for rule in rules:
            for residual in (given, None):
                knobs = dict(attention=rule, ffn=False, trace=trace)
                read = block.read(given, residual=given.data if residual else None, **knobs)
                expected = block.read(fewer, residual=fewer.data if residual else None, **knobs)
                torch.testing.assert_close(
                    read.data[i : i + 1, keep], expected.data, atol=1e-5, rtol=1e-4
                )


def test_hidden_patches_still_ask():
    """What a hidden patch receives: its own query over the keys of the others."""
    given, hidden = wide()
    block = vit().blocks[3]
    heads = block.heads(given)
    keep = torch.cat([torch.ones(1, dtype=torch.bool), ~hidden[0]])
    q, k, v = (part[:1] for part in (heads.q, heads.k, heads.v))
    mixed = (q @ k[:, :, keep].mT / 8).softmax(-1) @ v[:, :, keep]
    expected = given.data[:1] + block.attn.out_proj(mixed.transpose(1, 2).flatten(2))
    expected = expected + block.mlp(block.ln_2(expected))
    torch.testing.assert_close(block.advance(given, heads).data[:1], expected, atol=1e-5, rtol=1e-4)


def test_trace_reports_the_attention_that_ran(monkeypatch):
    marks = torch.zeros(2, 196, dtype=torch.bool)
    marks[0, :2], marks[1, 100:140] = True, True
    edit = sfp.Purify([LAYER], lambda trace, i: marks, bind(dict(type="mask_attention")))
    trace = vit().trace(images(), [edit])
    assert all(tokens.hidden is None for tokens in trace.outputs[:LAYER])
    for i in (LAYER + 1, 11):
        full = trace.attention(i)  # (B, H, T, T)
        torch.testing.assert_close(full.sum(-1), torch.ones(2, 2, 197))
        assert (full[..., 1:].masked_select(marks[:, None, None]) == 0).all()
        torch.testing.assert_close(trace.cls_row(i), full[:, :, 0, 1:])
        own = full.diagonal(dim1=-2, dim2=-1)[..., 1:]
        torch.testing.assert_close(trace.self_weight(i), own)
        monkeypatch.setattr(attention, "CHUNK", 10)  # now every map is too large to make
        row, diagonal = trace.mean_row_and_diagonal(i)
        monkeypatch.undo()
        torch.testing.assert_close(row, full[:, :, 0, 1:].mean(1))
        torch.testing.assert_close(diagonal, own.mean(1))
        for ours, expected in zip(trace.mean_row_and_diagonal(i), (row, diagonal), strict=True):
            torch.testing.assert_close(ours, expected)
        assert trace.mean_attention(i) is trace.mean_attention(i)
    plain = vit().trace(images())
    for i in range(LAYER + 1):
        assert torch.equal(trace.attention(i), plain.attention(i))
    assert not torch.allclose(trace.global_embedding(), plain.global_embedding(), atol=1e-3)
    tokens, _ = sfp.Method(edits=[edit]).features(vit(), images())
    torch.testing.assert_close(trace.global_embedding(), tokens.cls[:, 0], atol=1e-5, rtol=1e-4)


def test_hide_keeps_row_sums_and_rows_without_rest():
    weights = torch.tensor([[0.5, 0.5, 1.0], [0.0, 0.0, 1.0], [0.2, 0.8, 0.0]])
    hidden = torch.tensor([False, False, True])
    expected = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.2, 0.8, 0.0]])
    torch.testing.assert_close(hide(weights, hidden), expected)


def test_hidden_patches_leave_the_smoothers():
    given, hidden = wide()
    affinity = lambda trace: torch.ones(2, 24, 24)  # noqa: E731 - an affinity of equals
    smoothed = OPS.get("aggregate")(given, vit().trace(images()), affinity=affinity)
    for i in range(2):
        mean = given.patches[i][~hidden[i]].mean(0)
        torch.testing.assert_close(smoothed.patches[i], mean.expand(24, -1), atol=1e-5, rtol=1e-4)
    assert smoothed.hidden is given.hidden


def test_unused_it_changes_nothing():
    given = wide()[0]
    shown = replace(given, hidden=None)
    block = vit().blocks[0]
    assert block.heads(shown).hidden_keys is None
    none = replace(given, hidden=torch.zeros_like(given.hidden))
    torch.testing.assert_close(
        block.advance(none, block.heads(none)).data, block.advance(shown, block.heads(shown)).data
    )


# -------------------------------------------------------------------------------- in the methods


# what passes from a detector to a mitigator is a mask: each with one of the others, in both methods
PAIRS = [(purify, "som") for purify in MITIGATORS]
PAIRS += [("neighbour_mean", pm) for pm in DETECTORS if pm != "som"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
@pytest.mark.parametrize(("purify", "pm"), PAIRS)
def test_every_part_gives_finite_features(method, purify, pm):
    """A 2x2 cluster in a corner of a random ViT; in batches, on a grid that is not square."""
    corner = torch.zeros(2, 8, 12, dtype=torch.bool)
    corner[:, :2, -2:] = True
    composed = sfp.build_method(method, purify=purify, pm=pm, layers=[LAYER, -2])
    plant = Plant(LAYER, corner.flatten(1), 50.0)
    planted = replace(composed, edits=(plant, *composed.edits))
    batch = images(2, 64, 96)
    features, trace = planted.features(vit(), batch)
    assert features.data.isfinite().all()
    assert F.normalize(features.patches, dim=-1).isfinite().all()
    assert sorted(trace.masks) == [LAYER, 10]
    # a fill that sees only what it is given
    first = replace(planted, edits=(replace(plant, mask=plant.mask[:1]), *composed.edits))
    single, _ = first.features(vit(), batch[:1])
    torch.testing.assert_close(single.data[0], features.data[0], atol=2e-4, rtol=1e-3)


def test_inpainting_survives_a_change_of_threads():
    """After `torch.set_num_threads`, PyTorch 2.13's solver of batches is wrong on the CPU."""
    tokens = Tokens(torch.randn(3, 1 + 12 * 16, 8), (12, 16))
    mask = torch.rand(3, 12 * 16) < 0.2
    before = inpaint(tokens, mask).data
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        torch.set_num_threads(2)
        torch.testing.assert_close(inpaint(tokens, mask).data, before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
@pytest.mark.parametrize("purify", MITIGATORS)
@pytest.mark.parametrize("marks", ["corner", "all", "all of one"])
def test_any_mask_gives_finite_features(method, purify, marks):
    def detector(trace, layer):
        mask = corner_of(2)
        mask[0 if marks == "all of one" else slice(None)] |= marks != "corner"
        return mask

    composed = sfp.build_method(method, purify=purify, layers="all")
    edits = [replace(edit, detector=detector) for edit in composed.edits]
    features, _ = replace(composed, edits=edits).features(vit(), images())
    assert features.data.isfinite().all()


def corner_of(images: int) -> Tensor:
    """A 2x2 cluster in the first corner of a 14x14 grid."""
    marks = torch.zeros(images, 14, 14, dtype=torch.bool)
    marks[:, :2, :2] = True
    return marks.flatten(1)


def base_b16() -> VisionTransformer:
    torch.manual_seed(0)
    size = ImageConfig(image_size=224, patch=16, width=768, layers=12, embed_dim=512)
    return VisionTransformer(size).requires_grad_(False).eval()


@functools.cache
def planted(model: Callable[[], VisionTransformer]) -> sfp.Trace:
    """The trunk of a model with a 14x14 grid and a loud 2x2 corner."""
    vision = model()
    side = 14 * vision.patch
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return vision.trace(image, [Plant(9, corner_of(1), 20.0)], depth=12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "pm"),
    [*((vit, pm) for pm in [*DETECTORS, "corner"]), (base_b16, "som"), (base_b16, "corner")],
)
def test_corner_cluster(model, pm):
    """Where the official code gives NaN: a 2x2 corner, purified at the layer that it purifies."""
    before = planted(model)
    # "corner": exactly those four, whatever a detector would say
    mask = corner_of(1) if pm == "corner" else bind(dict(type=pm), "detector")(before, 10)
    for purify in MITIGATORS:
        composed = sfp.build_method("sfp", purify=purify)
        (edit,) = (replace(edit, detector=lambda trace, layer: mask) for edit in composed.edits)
        trace = sfp.Trace(before.vit, before.image, before.embedded, depth=12)
        trace.outputs = list(before.outputs)
        trace.outputs[10] = edit(trace, 10)
        for readout in composed.readouts:
            assert before.vit.project(readout(trace)).data.isfinite().all(), purify


@pytest.mark.slow
def test_purify_flag():
    default = sfp.build_method("sfp")
    assert default == sfp.build_method("sfp", purify="neighbour_mean")
    assert sfp.build_method("sfp", purify=False).edits == ()
    (edit,) = sfp.build_method("sfp_paper", purify=dict(type="neighbour_mean", alone="keep")).edits
    assert edit.mitigator == bind(dict(type="neighbour_mean", alone="keep"))
    outputs = [
        sfp.build_method("sfp", purify=flag, pm="l2_norm").features(vit(), images())[0].data
        for flag in (False, *MITIGATORS)
    ]
    for i, one in enumerate(outputs):
        assert not any(torch.allclose(one, other, atol=1e-4) for other in outputs[:i])


@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
def test_unknown_mitigators(method):
    with pytest.raises(ValueError, match="did you mean 'median'"):
        sfp.build_method(method, purify="mediam")
    with pytest.raises(ValueError, match="of kind 'detector', but 'mitigator' is needed"):
        sfp.build_method(method, purify="som")
    with pytest.raises(ValueError, match="did you mean 'alone'"):
        sfp.build_method(method, purify=dict(type="neighbour_mean", alon="keep"))
