"""Caches small tensors that depend only on sizes and settings.

They are computed on the host, and without a cache every call would wait for their transfer to the GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfp.clip.dispatch import intercepted

T = TypeVar("T")
KEPT = 2**20  # largest number of elements of a cached tensor
_LOCAL = threading.local()


def kept(numbers: int, make: Callable[..., T], like: Tensor, *args: Any) -> T:
    """`make(like, *args)`, cached by the dtype and device of `like`. The result must not be modified.

    Nothing is cached during tracing, because traced tensors cannot be used afterwards.

    Args:
        numbers: number of elements of the result; large ones are not cached.
        make: the function; it may only use the dtype and device of its first argument.
        like: any tensor.
        *args: hashable arguments.
    """
    if numbers > KEPT or intercepted():
        return make(like, *args)
    found = _kept(make, like.dtype, like.device, *args)
    if (holding := getattr(_LOCAL, "holding", None)) is not None:
        holding.append(found)
    return found


@contextmanager
def held() -> Iterator[list[Any]]:
    """Collects all that `kept` returns to this thread: what others drop from the cache stays alive."""
    holding: list[Any] = []
    _LOCAL.holding = holding
    try:
        yield holding
    finally:
        del _LOCAL.holding


def constant(values: Sequence[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Python numbers as a cached tensor on the device of `like`, which must not be modified."""
    return kept(len(values), _constant, like, tuple(values), dtype)


def _constant(like: Tensor, values: tuple[float, ...], dtype: torch.dtype | None) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)


@lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], dtype: torch.dtype, device: torch.device, *args: Any) -> Any:
    with torch.inference_mode(False):  # cached for callers with gradients, too
        return make(torch.empty(0, dtype=dtype, device=device), *args)
