"""Parts of readouts: the tokens that are read, residuals, and smoothers of the result.

sources    `(trace, *, knobs) -> Tokens`
residuals  `(tokens, source, *, knobs) -> (B, T or 1, D)`
smoothers  `(tokens, trace, *, knobs) -> Tokens`
readers    `(trace, *, knobs) -> Tokens`, in place of a readout
"""

from __future__ import annotations

from torch import Tensor

from sfp.functional.attention import hide
from sfp.kinds import Affinity, Rule
from sfp.registry import Some, op
from sfp.tokens import Tokens
from sfp.trace import Trace


@op("source")
def layer_sum(trace: Trace, *, layers: Some[int]) -> Tokens:
    """Sum of the outputs of several method layers (SC-CLIP's multi-level features)."""
    first, *rest = (trace.output(layer) for layer in layers)
    last = rest[-1] if rest else first  # the last one hides whatever any of them hides
    return last.with_data(sum((tokens.data for tokens in rest), first.data))


@op("source")
def read_last(trace: Trace, *, attention: Rule | None, reduced: bool = True) -> Tokens:
    """The output of the last block with another attention rule, e.g. for `trace.guess`.

    Args:
        attention: the rule; None for the block's own attention.
        reduced: leave out the residual and the FFN.
    """
    last = len(trace.vit.blocks) - 1
    tokens = trace.entering(last)
    return trace.vit.blocks[last].read(
        tokens,
        residual=None if reduced else tokens.data,
        attention=attention,
        ffn=not reduced,
        trace=trace,
    )


@op("residual")
def own_tokens(tokens: Tokens, source: Tokens) -> Tensor:
    """The ordinary residual connection: the tokens that are read."""
    return tokens.data


@op("residual")
def cls_token(tokens: Tokens, source: Tokens, *, scale: float = 0.3) -> Tensor:
    """The source's class token times `scale`, the same for all patches (SC-CLIP's `res_cls`)."""
    return scale * source.cls


@op("smoother")
def aggregate(tokens: Tokens, trace: Trace, *, affinity: Affinity) -> Tokens:
    """Each patch becomes the affinity-weighted mean of all: rows of S, divided by their sum."""
    weights = trace.once(affinity)
    if tokens.hidden is not None:
        weights = hide(weights, tokens.hidden[:, None])
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    return tokens.with_patches(weights.to(tokens.data.dtype) @ tokens.patches)


@op("reader")
def embedded_patches(trace: Trace) -> Tokens:
    """The patches that entered the first block, for methods that do not use CLIP's tokens."""
    return trace.embedded.only_patches()
