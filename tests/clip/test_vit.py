"""The image tower's linear layers, on the road that no gradients take and on the other."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sfp.clip import vit

sides = st.integers(1, 40)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=3), sides, sides, st.booleans(), st.integers(0, 99))
def test_linear(outer, wide, out, strided, seed):
    random = torch.Generator().manual_seed(seed)
    step = 2 if strided else 1
    x, weight, bias = (
        torch.randn(*shape, step * last, generator=random)[..., ::step]
        for *shape, last in ((*outer, wide), (out, wide), (out,))
    )
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(vit.linear(x, weight, bias).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_operator_is_there():
    """On the machines of CI; elsewhere `linear` is PyTorch's own."""
    assert torch.backends.mkldnn.is_available() == vit.ONEDNN


@pytest.mark.parametrize("name", ["in_proj_bias", "out_proj.bias", "c_fc.bias", "c_proj.bias"])
def test_gradients_of_a_single_bias(name, monkeypatch):
    """Equal to those of PyTorch's own layers, though nothing else wants gradients."""
    block = tiny.clip().visual.blocks[0].requires_grad_(False)
    (bias,) = (p for n, p in block.named_parameters() if n.endswith(name))
    bias.requires_grad_(True)
    x = torch.randn(2, 5, block.ln_1.normalized_shape[0])
    grads = []
    for onednn in (vit.ONEDNN, False):
        monkeypatch.setattr(vit, "ONEDNN", onednn)
        block(x).square().sum().backward()
        grads.append(bias.grad.clone())
        bias.grad = None
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads)
