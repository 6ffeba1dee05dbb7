"""Checks of what ops from outside this package return; the tests check this package's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfp.tokens import Tokens

TOKENS = ("mitigator", "edit", "source", "reader", "smoother")  # the kinds that return `Tokens`


def check_result(name: str, kind: str, args: tuple[Any, ...], result: Any) -> None:
    """Raises an error that names the op if its result is not what its kind returns (`sfp.kinds`).

    Args:
        name, kind: of the op.
        args: the positional arguments of the call.
        result: what it returned.

    Raises:
        ValueError: for another type or shape.
    """
    shape = tuple(getattr(result, "shape", ()))
    if kind in TOKENS:
        fits = isinstance(result, Tokens)
        expected = "Tokens, e.g. tokens.with_data(...) or tokens.with_patches(...)"
    elif kind == "detector":
        wanted = tuple(args[0].embedded.patches.shape[:2])
        fits = shape == wanted and result.dtype == torch.bool
        expected = f"outliers (B, N) bool, here {wanted}"
    elif kind == "attention":
        batch, tokens = args[0].x.shape[:2]
        fits = len(shape) == 4 and shape[0] == batch and shape[3] == tokens
        expected = f"weights (B, H or 1, M, T), here ({batch}, H or 1, M, {tokens})"
    elif kind == "refiner":
        fits = len(shape) == 4 and shape[1] == args[0].shape[1]
        expected = f"logits (B, Q, h, w) with the Q of its argument, {args[0].shape[1]}"
    else:
        return
    if not fits:
        got = f"{result.dtype} {shape}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"op {name!r} returned {got}, but its kind, {kind}, returns {expected}")
