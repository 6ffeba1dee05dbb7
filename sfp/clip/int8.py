"""8-bit products on CPUs: two to four times as fast as float32, and close to it, but not equal."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sfp.clip.vit import Attention, VisionTransformer


class Int8Linear(nn.Module):
    """A linear layer whose weights and inputs are rounded to 8 bits, each row with a scale of its own.

    A row of the input is one token's. So a token with huge values, as CLIP's outliers are, costs the
    others no precision, and a batch gives what its images give alone.

    Args:
        weight: (N, K) float32.
        bias: (N,).
    """

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
        """(..., K) -> (..., N), or the outputs `rows` alone."""
        flat = x.flatten(0, -2)
        scale = _row_scale(flat)  # (M, 1)
        # the private name is PyTorch's only plain int8 x int8 -> int32 product; torchao uses it too
        sums = torch._int_mm((flat / scale).round_().to(torch.int8), self.weight[rows].T)
        out = torch.addcmul(self.bias[rows], sums.float().mul_(scale), self.scale[rows])
        return out.unflatten(0, x.shape[:-1])


def _row_scale(x: Tensor) -> Tensor:
    """What a row's largest value becomes 127 by, (M, K) -> (M, 1)."""
    return x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127


class Int8Attention(Attention):
    """`Attention` with 8-bit projections, made from one with float weights."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.num_heads = attention.num_heads
        self.in_proj = Int8Linear(attention.in_proj_weight, attention.in_proj_bias)
        out = attention.out_proj
        self.out_proj = Int8Linear(out.weight, out.bias)  # type: ignore[assignment]

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`."""
        return self.in_proj(x, rows)


@torch.no_grad()
def quantised(vit: VisionTransformer) -> VisionTransformer:
    """A copy whose blocks run with `Int8Linear` layers; all else is shared with `vit`.

    Raises:
        ValueError: if the model is not a float32 one on the CPU.
    """
    if vit.proj.device.type != "cpu" or vit.proj.dtype != torch.float32:
        raise ValueError(
            f"8-bit weights are for float32 models on the CPU, this one is {vit.proj.dtype} on "
            f"{vit.proj.device}: on a GPU use precision='fp16' or 'bf16'"
        )
    copied = copy.deepcopy(vit, {id(p): p for p in vit.parameters()})
    for block in copied.blocks:
        block.attn = Int8Attention(block.attn)
        for name in ("c_fc", "c_proj"):
            linear = block.mlp.get_submodule(name)
            setattr(block.mlp, name, Int8Linear(linear.weight, linear.bias))  # type: ignore[arg-type]
    return copied
