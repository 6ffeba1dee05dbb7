"""Numerically accurate sums and products."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # pixels in one float32 product
INSTRUCTIONS = {  # of Intel's, AMD's and Arm's CPUs, as `torch.cpu.get_capabilities` names them
    "bf16": ("amx_bf16", "avx512_bf16", "bf16"),
    "fp16": ("amx_fp16", "avx512_fp16", "fp16_arith"),
    "int8": ("amx_int8", "avx512_vnni", "avx_vnni", "dot"),
}


def upcast(x: Tensor) -> Tensor:
    """`x` in at least float32: similarities and softmax lose too much in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def cpu_has(precision: str) -> bool | None:
    """Whether this CPU has instructions for products in "bf16", "fp16" or "int8": looked up.

    None where PyTorch cannot tell (before 2.11).
    """
    look_up = getattr(torch.cpu, "get_capabilities", None)
    return any(look_up().get(name) for name in INSTRUCTIONS[precision]) if look_up else None


def native_half(device: torch.device) -> str | None:
    """The half precision that a device has instructions for: "fp16" on CUDA, "bf16" or None."""
    if device.type == "cpu":
        return "bf16" if cpu_has("bf16") else None
    return "fp16" if device.type == "cuda" else None


def exact(device: torch.device) -> torch.dtype:
    """The dtype for accumulation: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T with an error independent of the number of pixels: (M, P), (K, P) -> (M, K).

    Blocks of pixels are multiplied in the precision of the inputs and accumulated in `exact`.
    """
    total = torch.zeros(len(a), len(b), dtype=exact(a.device), device=a.device)
    for left, right in zip(a.split(BLOCK, 1), b.split(BLOCK, 1), strict=True):
        total += left @ right.T
    return total
