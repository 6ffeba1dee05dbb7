"""Linear layers on CPUs with oneDNN, since `F.linear` uses MKL, which takes a quarter longer on AMD.

The operator is private to PyTorch; torch.compile uses it too. It is only used if it has been checked to
be correct, and not with FLOP counters, tracing and autocast, which do not know it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.dispatch import plain


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer x W^T + b, (..., K) -> (..., N), like `F.linear`.

    In float32 on a CPU and without gradients it uses oneDNN, unless that is switched off by
    `torch.backends.mkldnn.flags(enabled=False)`.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and plain(x, weight, bias)
        and bias.is_contiguous()  # the operator assumes a stride of 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)))
        and torch.backends.mkldnn.enabled
        and works()
    ):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


@functools.cache
def works() -> bool:
    """Whether this PyTorch has the operator and it agrees with `F.linear`; checked once."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight, bias = (
        torch.linspace(-1, 1, n).sin().reshape(shape)
        for n, shape in ((2 * 3 * 8, (2, 3, 8)), (5 * 8, (5, 8)), (5, (5,)))
    )
    try:
        found = _product(x, weight, bias)
    except Exception:  # absent, or with other arguments
        return False
    expected = F.linear(x, weight, bias)
    return found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
