"""8-bit products against the same rounding in float64; options that must leave the model alone."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sfp
from sfp.clip.int8 import Int8Linear, quantised
from sfp.mini import checkpoint
from sfp.mini.scenes import scene
from sfp.ops.detectors import loud_channels
from sfp.registry import bind, list_ops

pytestmark = pytest.mark.usefixtures("no_grad")


def rounded(x):
    """Each row on the 255 levels that its largest value allows, float64."""
    step = x.double().abs().amax(1, keepdim=True) / 127
    return (x / step).round() * step


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(2, 70), st.integers(2, 50), st.integers(0, 999))
def test_the_product_of_the_rounded(rows, wide, out, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, wide, generator=random) * torch.logspace(-3, 3, rows)[:, None]
    weight, bias = torch.randn(out, wide, generator=random), torch.randn(out, generator=random)
    ours = Int8Linear(weight, bias)(x[None])[0]
    expected = rounded(x) @ rounded(weight).T + bias
    # a value on the border of two levels may fall to either: one level of one column
    scale = (x.abs().amax(1, keepdim=True) * weight.abs().amax(1)).double() / 127
    assert ((ours - expected).abs() <= 1.01 * scale + 1e-5 * expected.abs() + 1e-6).all()


def test_rows_do_not_see_each_other():
    layer = Int8Linear(torch.randn(20, 16), torch.randn(20))
    x = torch.randn(3, 5, 16)
    x[0, 0] *= 1e4  # an outlier token
    whole = layer(x)
    assert torch.equal(torch.stack([layer(one) for one in x]), whole)
    assert torch.equal(layer(x, slice(4, 9)), whole[..., 4:9])
    assert layer(torch.zeros(2, 16)).equal(layer.bias.expand(2, -1))


def test_features_are_close_and_the_model_is_left_alone():
    clip = sfp.load_clip(checkpoint())
    names = list(clip.state_dict())
    image = [torch.from_numpy(scene(900_000)[0]).permute(2, 0, 1).flip(0)]
    labels = {}
    for precision in ("fp32", "int8"):
        model = sfp.OpenVocabSegmentor(
            clip, ["tree", "road", "sky"], "sfp", precision=precision, scores=False
        )
        labels[precision] = model.test_step(dict(inputs=image))[0].pred_sem_seg.data
    assert (labels["fp32"] == labels["int8"]).float().mean() > 0.95
    assert list(clip.state_dict()) == names
    assert clip.visual.blocks[0].mlp.c_fc.weight.dtype == torch.float32


def test_all_detectors_read_models_of_8_bits():
    vit = tiny.clip().visual
    trace = quantised(vit).trace(tiny.images(1))
    for name in list_ops("detector"):
        detector = bind(dict(type=name))
        if detector.fn.__module__ != "sfp.ops.sklearn_detectors":  # no weights, and slow to import
            assert detector(trace, 10).shape == (1, 64)
    norms = rounded(vit.blocks[10].mlp.c_proj.weight).norm(dim=1)
    assert loud_channels(trace, 10, 64).tolist() == norms.argsort(descending=True).tolist()


def test_what_8_bits_cannot_do():
    clip = tiny.clip()
    with pytest.raises(
        ValueError, match=r"need a float32 model on a CPU, but this one is torch\.bfloat16"
    ):
        quantised(tiny.clip().bfloat16().visual)
    with pytest.raises(ValueError, match="edits float weights, which an int8 model lacks"):
        sfp.build_method("gclip").features(quantised(clip.visual), tiny.images(1))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
@pytest.mark.parametrize("activation", ["quick_gelu", "swiglu"])
def test_compiled_blocks_give_the_same_labels(activation):
    clip = tiny.clip(activation=activation)
    features = torch.randn(4, clip.text_projection.shape[1])
    image = [torch.randint(0, 256, (3, 90, 70), dtype=torch.uint8)]
    labels = []
    for compiled in (False, True):
        model = sfp.OpenVocabSegmentor(
            clip, list("abcd"), "sfp", query_features=features, compiled=compiled, slide_crop=64,
            slide_stride=32,
        )  # fmt: skip
        labels.append(model.test_step(dict(inputs=image))[0].pred_sem_seg.data)
    assert (labels[0] == labels[1]).float().mean() > 0.999
    assert clip.visual.blocks[0].mlp._compiled_call_impl is None
