"""The kinds of ops as types: their arguments, apart from knobs, and their results.

A knob or field annotated with one of these takes a config node or function of that kind, which
`sfp.registry.bind` checks when a method is built. Letters for shapes are those of `sfp.tokens`.

Ops from outside this package are checked when they are registered and whenever they are called; its own
are checked by the tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.functional.windows import LogitSheet
from sfp.registry import Kind
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

Detector = Annotated[Callable[[Trace, int], Tensor], Kind("detector", "trace, layer")]
"""(trace, absolute layer) -> outliers, (B, N) bool."""

Mitigator = Annotated[Callable[[Tokens, Tensor], Tokens], Kind("mitigator", "tokens, mask")]
"""(tokens, outliers (B, N) bool) -> tokens without them."""

Edit = Annotated[Callable[[Trace, int], Tokens], Kind("edit", "trace, layer")]
"""(trace, absolute layer) -> the tokens that leave that layer from now on."""

Affinity = Annotated[Callable[[Trace], Tensor], Kind("affinity", "trace")]
"""(trace) -> similarities of patches, (B, N, N)."""

Rule = Annotated[Callable[[Heads, Trace], Tensor], Kind("attention", "heads, trace")]
"""(heads, trace) -> attention weights, (B, H or 1, M, T)."""

Source = Annotated[Callable[[Trace], Tokens], Kind("source", "trace")]
"""(trace) -> the tokens that are read."""

Stage = Annotated[Callable[[Trace], Trace], Kind("image", "trace")]
"""(trace of all windows of an image) -> the trace that is read."""

Reader = Annotated[Callable[[Trace], Tokens], Kind("reader", "trace")]
"""(trace) -> tokens of width D, before the final normalisation and projection."""

Residual = Annotated[Callable[[Tokens, Tokens], Tensor], Kind("residual", "tokens, source")]
"""(tokens, source) -> the residual that is added to the first block's output, (B, T or 1, D)."""

Smoother = Annotated[Callable[[Tokens, Trace], Tokens], Kind("smoother", "tokens, trace")]
"""(tokens, trace) -> tokens."""

Comparison = Annotated[Callable[[Tokens, Trace], Tensor], Kind("comparison", "features, trace")]
"""(features of width C, trace) -> query logits (B, Q, h, w)."""

Refiner = Annotated[Callable[[Tensor, Trace], Tensor], Kind("refiner", "logits, trace")]
"""(logits (B, Q, h, w), trace) -> logits, on a finer grid or the same."""

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> maps of output rows start to stop, (Q or K, stop - start, W)."""

Decision = Annotated[
    Callable[[LogitSheet, Rows, Sequence[int]], Rows], Kind("decision", "sheet, rows, index")
]
"""(merged logits, the same by rows of the image, class of each query) -> class scores by rows."""

Points = Annotated[Callable[[Trace], list[Tensor]], Kind("points", "trace")]
"""(trace) -> point prompts of each image, (P, n, 2) with x and y in 0..1."""

Surgery = Annotated[
    Callable[[VisionTransformer, "int | None"], None], Kind("surgery", "vit, depth")
]
"""(vit, depth) -> None: replaces weights of a copy of the model."""

Positions = Annotated[
    Callable[[Tensor, tuple[int, int]], Tensor], Kind("positions", "embedding, grid")
]
"""(position embedding (h0, w0, D), grid) -> position embedding (h, w, D)."""

KINDS = {
    mark.name: mark
    for hint in list(globals().values())
    for mark in getattr(hint, "__metadata__", ())
    if isinstance(mark, Kind)
}
TOKENS = ("mitigator", "edit", "source", "reader", "smoother")  # the kinds that return `Tokens`


def check_signature(fn: Callable[..., Any], kind: str) -> None:
    """Raises a ValueError that names an op if it does not take the arguments of its kind."""
    if kind not in KINDS:
        return
    expected, signature = KINDS[kind].arguments, inspect.signature(fn)
    knobs = {p.name: None for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    try:
        signature.bind(*expected.split(", "), **knobs)
    except TypeError:
        raise ValueError(
            f"op {fn.__name__!r} of kind {kind!r} has the signature {signature}: expected "
            f"({expected}, *, knobs)"
        ) from None


def check_result(name: str, kind: str, args: tuple[Any, ...], result: Any) -> None:
    """Raises an error that names the op if its result is not what its kind returns.

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
