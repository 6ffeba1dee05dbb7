"""8-bit products on CPUs: close to float32, not equal; faster where a CPU has instructions for them."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.blocks import Attention, HeadProjections
from sfp.clip.dispatch import plain
from sfp.clip.vit import VisionTransformer
from sfp.functional.precision import cpu_has, upcast


class Int8Linear(nn.Module):
    """A linear layer with weights and inputs quantized to 8 bits, with one scale per row.

    Each row of the input is one token. So tokens with huge values, like CLIP's outliers, do not reduce
    the precision of others, and a batch gives the same results as its single images.

    Args:
        weight: (N, K) float32.
        bias: (N,).
    """

    allocates = True  # a new tensor for its output
    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        scale = _row_scale(weight)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))  # (N, K)
        self.register_buffer("scale", scale[:, 0])  # (N,)
        self.register_buffer("bias", bias.detach())

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """(..., K) -> (..., N), or only the outputs `rows`.

        Raises:
            RuntimeError: if gradients are required, since rounding has none.
        """
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("8-bit models have no gradients: use precision='fp32'")
        flat = x.flatten(0, -2)
        scale = _row_scale(flat)  # (M, 1)
        sums = product((flat / scale).round_().to(torch.int8), self.weight[rows])
        out = torch.addcmul(self.bias[rows], sums.mul_(scale), self.scale[rows])
        return out.unflatten(0, x.shape[:-1])


def float_weight(linear: nn.Module) -> Tensor:
    """The weights of a linear layer, of 8 bits or not, (N, K) in at least float32."""
    if isinstance(linear, Int8Linear):
        return linear.weight * linear.scale[:, None]
    return upcast(linear.get_parameter("weight"))


def _row_scale(x: Tensor) -> Tensor:
    """The scale that maps each row's largest magnitude to 127, (M, K) -> (M, 1)."""
    return x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Products x W^T of int8 matrices (M, K) and (N, K): (M, N) float32.

    Uses an operator private to PyTorch (torchao uses it too), provided that the CPU has 8-bit
    instructions, the operator was checked to be correct, and PyTorch is not being observed (see
    `dispatch`); otherwise `F.linear` in float32.
    """
    if plain(x, weight) and works():
        return torch._int_mm(x, weight.T).float()
    return F.linear(x.float(), weight.float())


@functools.cache
def works() -> bool:
    """Whether the operator is fast on this CPU and agrees with `F.linear`; checked once."""
    if cpu_has("int8") is False:  # it would be tens of times slower
        return False
    x = torch.arange(-127, 128, dtype=torch.int16)[:240].to(torch.int8).reshape(10, 24)
    weight = x.flip(0)[:8]
    try:
        found = torch._int_mm(x, weight.T)
    except Exception:  # absent, or with other arguments
        return False
    return torch.equal(found.float(), F.linear(x.float(), weight.float()))


class Int8Attention(HeadProjections):
    """8-bit projections, made from an `Attention` with float weights."""

    def __init__(self, attention: Attention) -> None:
        out = attention.out_proj
        super().__init__(
            attention.num_heads,
            Int8Linear(out.weight, out.bias),
            attention.norm,
            attention.after,
        )
        self.in_proj = Int8Linear(attention.in_proj_weight, attention.in_proj_bias)

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`."""
        return self.in_proj(x, rows)


@torch.no_grad()
def quantised(vit: VisionTransformer) -> VisionTransformer:
    """A copy whose blocks use `Int8Linear` layers (`is_int8`); everything else is shared with `vit`.

    Raises:
        ValueError: if the model is not a float32 one on the CPU.
    """
    if vit.device.type != "cpu" or vit.dtype != torch.float32:
        raise ValueError(
            f"8-bit weights need a float32 model on a CPU, but this one is {vit.dtype} on "
            f"{vit.device}: on a GPU use precision='fp16' or 'bf16'"
        )
    if vit.is_int8:
        return vit
    copied = copy.deepcopy(vit, {id(p): p for p in vit.parameters()})
    for block in copied.blocks:
        block.attn = Int8Attention(block.attn)  # type: ignore[assignment]
        for name in ("c_fc", "c_proj"):
            linear = block.mlp.get_submodule(name)
            setattr(block.mlp, name, Int8Linear(linear.weight, linear.bias))  # type: ignore[arg-type]
    copied.is_int8 = True
    return copied
