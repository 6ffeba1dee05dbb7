"""Linear layers on CPUs by oneDNN, which `F.linear` leaves to MKL: on AMD that takes a quarter longer.

PyTorch has no public name for the operator; torch.compile puts it in too. It is used where it has been
found to be right, and where nothing looks on: FLOP counters, tracing and autocast know nothing of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.dispatch import plain


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The linear layer x W^T + b, (..., K) -> (..., N), as `F.linear`.

    In float32 on a CPU, where nobody wants gradients, by oneDNN.
    `torch.backends.mkldnn.flags(enabled=False)` switches that off.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == bias.dtype == torch.float32
        and plain(x, weight, bias)
        and bias.is_contiguous()  # the operator takes its stride for 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)))
        and torch.backends.mkldnn.enabled
        and works()
    ):
        return _product(x, weight, bias)
    return F.linear(x, weight, bias)


@functools.cache
def works() -> bool:
    """Whether this PyTorch has the operator, and it gives what `F.linear` gives; asked once."""
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
