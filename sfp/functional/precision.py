"""Numerically accurate sums and products."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024  # pixels in one float32 product


def upcast(x: Tensor) -> Tensor:
    """`x` in at least float32: similarities and softmax lose too much in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


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
