"""The kinds of ops as types: their arguments, apart from knobs, and their results.

A knob or field annotated with one of these takes a config node or function of that kind, which
`sfp.registry.bind` checks when a method is built. Letters for shapes are those of `sfp.tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.functional.windows import LogitSheet
from sfp.registry import Kind
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

Detector = Annotated[Callable[[Trace, int], Tensor], Kind("detector")]
"""(trace, absolute layer) -> outliers, (B, N) bool."""

Mitigator = Annotated[Callable[[Tokens, Tensor], Tokens], Kind("mitigator")]
"""(tokens, outliers (B, N) bool) -> tokens without them."""

Edit = Annotated[Callable[[Trace, int], Tokens], Kind("edit")]
"""(trace, absolute layer) -> the tokens that leave that layer from now on."""

Affinity = Annotated[Callable[[Trace], Tensor], Kind("affinity")]
"""(trace) -> similarities of patches, (B, N, N)."""

Rule = Annotated[Callable[[Heads, Trace], Tensor], Kind("attention")]
"""(heads, trace) -> attention weights, (B, H or 1, M, T)."""

Source = Annotated[Callable[[Trace], Tokens], Kind("source")]
"""(trace) -> the tokens that are read."""

Stage = Annotated[Callable[[Trace], Trace], Kind("image")]
"""(trace of all windows of an image) -> the trace that is read."""

Reader = Annotated[Callable[[Trace], Tokens], Kind("reader")]
"""(trace) -> tokens of width D, before the final normalisation and projection."""

Residual = Annotated[Callable[[Tokens, Tokens], Tensor], Kind("residual")]
"""(tokens, source) -> the residual that is added to the first block's output, (B, T or 1, D)."""

Smoother = Annotated[Callable[[Tokens, Trace], Tokens], Kind("smoother")]
"""(tokens, trace) -> tokens."""

Comparison = Annotated[Callable[[Tokens, Trace], Tensor], Kind("comparison")]
"""(features of width C, trace) -> query logits (B, Q, h, w)."""

Refiner = Annotated[Callable[[Tensor, Trace], Tensor], Kind("refiner")]
"""(logits (B, Q, h, w), trace) -> logits, on a finer grid or the same."""

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> maps of output rows start to stop, (Q or K, stop - start, W)."""

Decision = Annotated[Callable[[LogitSheet, Rows, Sequence[int]], Rows], Kind("decision")]
"""(merged logits, the same by rows of the image, class of each query) -> class scores by rows."""

Points = Annotated[Callable[[Trace], list[Tensor]], Kind("points")]
"""(trace) -> point prompts of each image, (P, n, 2) with x and y in 0..1."""

Surgery = Annotated[Callable[[VisionTransformer, "int | None"], None], Kind("surgery")]
"""(vit, depth) -> None: replaces weights of a copy of the model."""

Positions = Annotated[Callable[[Tensor, tuple[int, int]], Tensor], Kind("positions")]
"""(position embedding (h0, w0, D), grid) -> position embedding (h, w, D)."""
