"""Small tensors made on the host from sizes and settings alone, kept for the next call.

What is made on the host would otherwise go to a GPU at every call, which waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfp.clip.dispatch import intercepted

T = TypeVar("T")
KEPT = 2**20  # most numbers of what is kept


def kept(numbers: int, make: Callable[..., T], like: Tensor, *args: Any) -> T:
    """`make(like, *args)` of so many numbers, of the type and on the device of `like`.

    It is not to be written to. Whoever traces gets a new one: what its tracer makes is of no use
    afterwards.

    Args:
        numbers: that it has; large ones are not kept.
        make: looks at the type and the device of its first argument only.
        like: any tensor.
        *args: hashable.
    """
    if numbers > KEPT or intercepted():
        return make(like, *args)
    return _kept(make, like.dtype, like.device, *args)


def constant(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Python numbers as a tensor on the device of `like`, as long as `values`, not to be written to."""
    return kept(len(values), _constant, like, tuple(values), dtype)


def _constant(like: Tensor, values: tuple[float, ...], dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], dtype: torch.dtype, device: torch.device, *args: Any) -> Any:
    with torch.inference_mode(False):  # what is kept also serves callers with gradients
        return make(torch.empty(0, dtype=dtype, device=device), *args)
