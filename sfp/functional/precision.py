"""Sums and products that keep their digits."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # pixels in one float32 product


def upcast(x: Tensor) -> Tensor:
    """`x` in at least float32: similarities and softmax lose too much in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def native_half(device: torch.device) -> str | None:
    """The half precision that a device has instructions for: "fp16", "bf16" or None.

    A CPU is asked for AMX, AVX512-bf16 or Arm's bf16. Others compute in bf16 too, by way of float32.
    """
    if device.type == "cuda":
        return "fp16"
    look_up = getattr(torch.cpu, "get_capabilities", dict)  # PyTorch 2.11 and later
    has = look_up() if device.type == "cpu" else {}
    return "bf16" if any(has.get(x) for x in ("amx_bf16", "avx512_bf16", "bf16")) else None


def exact(device: torch.device) -> torch.dtype:
    """The type to add up in: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def sum_over_pixels(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T with an error that does not grow with the number of pixels: (M, P), (K, P) -> (M, K).

    Blocks of pixels are multiplied in the precision of the inputs and added up in `exact`.
    """
    total = torch.zeros(len(a), len(b), dtype=exact(a.device), device=a.device)
    for left, right in zip(a.split(BLOCK, 1), b.split(BLOCK, 1), strict=True):
        total += left @ right.T
    return total
