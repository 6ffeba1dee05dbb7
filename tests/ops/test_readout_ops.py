"""Hand-sized checks of the ops behind NACLIP, GCLIP, MaskCLIP and SegEarth-OV."""

from __future__ import annotations

import copy

import pytest
import torch
from conformance import Case, cases, clip, image
from torch.nn import functional as F

import sfp
from sfp.functional.attention import gaussian_prior, pad_prefix
from sfp.methods.gclip import outlier_onset, suppress_channel
from sfp.methods.maskclip import key_smoothing, prompt_denoising
from sfp.methods.naclip import neighbour_only
from sfp.methods.segearth import global_bias
from sfp.ops.attention import fuse_layers, identity, self_self

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("name", cases("unit/gaussian"))
def test_golden_gaussian(name):
    case = Case(name)
    h, w = case.hyper["grid"]
    prior = gaussian_prior((h, w), case.hyper["std"])
    case.check("addition_nocls", prior)
    case.check("addition", pad_prefix(prior, 1))
    double = (2 * h - 1, 2 * w - 1)
    centre = gaussian_prior(double, case.hyper["std"])[double[0] * double[1] // 2]
    case.check("window", centre.view(double))


@pytest.fixture(scope="module")
def trace():
    with torch.no_grad():
        return clip().visual.trace(torch.cat([image("sq"), image("sqb")]), depth=12)


def test_neighbour_only_by_brute_force(trace):
    heads = trace.heads(11)
    weights = neighbour_only(heads, trace, std=3.0)
    prior = pad_prefix(gaussian_prior(heads.grid, 3.0), 1)
    for i in range(2):  # the release averages over the batch as well
        q, k = heads.q[i].norm(dim=-1), heads.k[i].norm(dim=-1)  # (H, T)
        level = torch.stack([a[:, None] * b for a, b in zip(q, k, strict=True)]).mean()
        expected = (level / 8 * prior).softmax(-1)
        torch.testing.assert_close(weights[i, 0], expected)


def test_identity_passes_values(trace):
    heads = trace.heads(11)
    assert torch.equal(identity(heads, trace) @ heads.v, heads.v)


def test_fuse_layers_is_a_weighted_mean(trace):
    heads, rule = trace.heads(11), lambda heads, trace: self_self(heads, trace, pairs=("qq",))
    fused = fuse_layers(heads, trace, rule=rule, layers=(6, 7), share=2 / 3)
    maps = [rule(heads, trace), trace.attention(6), trace.attention(7)]
    torch.testing.assert_close(fused, sum(maps) / 3)
    shared = fuse_layers(heads, trace, rule=rule, layers=(6, 7), share=2 / 3, head_average=True)
    torch.testing.assert_close(shared, fused.mean(1, keepdim=True))


def planted(first: int, channel: int) -> sfp.CLIP:
    """A model whose MLPs write one channel eight times as loud from a block on."""
    model = copy.deepcopy(clip())
    for block in model.visual.blocks[first:]:
        block.mlp.c_proj.weight[channel] *= 8
    return model


@pytest.mark.parametrize("first", [1, 5, 7, 11])
def test_planted_channel_is_found(first):
    visual = planted(first, channel=17).visual
    norms = torch.stack([block.mlp.c_proj.weight.norm(dim=1) for block in visual.blocks])
    assert outlier_onset(norms) == first
    operated = copy.deepcopy(visual)
    suppress_channel(operated, 12)
    for i, (block, old) in enumerate(zip(operated.blocks, visual.blocks, strict=True)):
        new, old = block.mlp.c_proj.weight, old.mlp.c_proj.weight
        others = [c for c in range(len(new)) if c != 17]
        assert torch.equal(new[others], old[others])
        if i >= first:
            torch.testing.assert_close(new[17].norm(), old[others].norm(dim=1).mean())
            torch.testing.assert_close(F.normalize(new[17], dim=0), F.normalize(old[17], dim=0))
        else:
            assert torch.equal(new, old)


def test_onset_of_weights_without_a_drop():
    assert outlier_onset(torch.ones(12, 8)) == 0
    rising = torch.ones(12, 8)
    rising[:4, 2] = 9
    assert outlier_onset(rising) == 0


def test_surgery_leaves_the_model_alone():
    model = planted(7, channel=17)
    before = copy.deepcopy(model.visual.state_dict())
    method = sfp.build_method("gclip")
    method.features(model.visual, image("sq"))
    for name, value in model.visual.state_dict().items():
        assert torch.equal(value, before[name]), name
    operated = method.operate(model.visual)
    assert operated is method.operate(model.visual)
    changed = {
        name
        for name, value in operated.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {f"transformer.resblocks.{i}.mlp.c_proj.weight" for i in range(7, 12)}
    shared = dict(model.visual.named_parameters())["conv1.weight"]
    assert dict(operated.named_parameters())["conv1.weight"] is shared


def test_surgery_layers_scale_with_depth():
    torch.manual_seed(0)
    deep = sfp.CLIP(
        embed_dim=8, image_size=16, patch=8, width=64, layers=24,
        context=4, vocab=8, text_width=64, text_layers=1,
    ).visual  # fmt: skip
    for depth, changed in ((12, 15), (None, 7)):
        operated = copy.deepcopy(deep)
        suppress_channel(operated, depth, blocks=(7,), channel=3)
        pairs = zip(deep.blocks, operated.blocks, strict=True)
        differ = [not torch.equal(a.mlp.c_proj.weight, b.mlp.c_proj.weight) for a, b in pairs]
        assert [i for i, d in enumerate(differ) if d] == [changed]


def test_key_smoothing_by_brute_force(trace):
    logits = torch.randn(2, 4, 14, 14) / 30
    smooth = key_smoothing(logits, trace, ks_thresh=0.6)
    keys = trace.heads(11).k[:, :, 1:].transpose(1, 2).flatten(2)  # (B, N, D)
    sure = (100 * logits).softmax(1).amax(1).flatten(1) >= 0.6
    assert 0 < sure.sum() < sure.numel()
    for b, i in ((0, 0), (0, 77), (1, 150)):
        cosine = F.cosine_similarity(keys[b, i], keys[b], dim=-1)  # (N,)
        expected = (logits[b].flatten(1) * cosine).sum(-1) / cosine.abs().sum()
        expected = logits[b].flatten(1)[:, i] if sure[b, i] else expected
        torch.testing.assert_close(smooth[b].flatten(1)[:, i], expected)


def test_prompt_denoising(trace):
    logits = torch.zeros(2, 3, 2, 2)
    logits[0, 0], logits[0, 1, 0, 0] = 1, 2  # query 1 wins one patch, query 2 none
    logits[1, 2] = 1
    out = prompt_denoising(logits, trace, pd_thresh=0.5)
    dropped = (out == -100).all(-1).all(-1)
    assert dropped.tolist() == [[False, False, True], [True, True, False]]
    assert torch.equal(out[~dropped], logits[~dropped])


def test_global_bias_needs_text(trace):
    with pytest.raises(LookupError, match="text"):
        global_bias(torch.zeros(2, 3, 14, 14), trace)


def test_global_bias():
    text = F.normalize(torch.randn(3, 64), dim=-1)
    run = clip().visual.trace(image("sq"), text=text, depth=12)
    out = global_bias(torch.zeros(1, 3, 2, 2), run, weight=-0.5)
    cosine = F.normalize(clip().encode_image(image("sq")), dim=-1) @ text.T
    torch.testing.assert_close(out[0, :, 1, 1], -0.5 * cosine[0])
