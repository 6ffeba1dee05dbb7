"""Attention rules: `(heads, trace, *, knobs) -> weights (B, H or 1, M, T)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import centred_softmax
from sfp.registry import op
from sfp.tokens import Heads
from sfp.trace import Trace


@op("attention")
def self_self(heads: Heads, trace: Trace, *, pairs: Sequence[str] = ("qq", "kk")) -> Tensor:
    """Sum of softmax(a b^T / sqrt(d)) over pairs of projections, (B, H, T, T).

    ("qq", "kk") is SCLIP's and SFP's, ("qq",) ClearCLIP's; ("qk",) is ordinary attention. Rows sum to
    the number of pairs, as in the papers.
    """
    maps = (heads.logits(pair[0], pair[1]).softmax(-1) for pair in pairs)
    total = next(maps)
    for weights in maps:
        total += weights
    return total


@op("attention")
def affinity_attention(
    heads: Heads,
    trace: Trace,
    *,
    affinity: Callable[[Trace], Tensor],
    gain: float = 3.0,
    centre: float = 1.0,
) -> Tensor:
    """Attention from an affinity of the patches, one map for all heads, (B, 1, T, T).

    softmax(gain * (S - centre * mean S)) where that is not negative. A prefix token, which has no
    affinity, attends to itself and is attended by nobody else.
    """
    weights = centred_softmax(trace.once(affinity), gain, centre)
    if heads.prefix:
        weights = F.pad(weights, (heads.prefix, 0, heads.prefix, 0))
        own = torch.arange(heads.prefix, device=weights.device)
        weights[:, own, own] = 1
    return weights[:, None]


@op("attention")
def average(
    heads: Heads, trace: Trace, *, rules: Sequence[Callable[[Heads, Trace], Tensor]]
) -> Tensor:
    """Mean of the weights of several rules."""
    total = rules[0](heads, trace)
    for rule in rules[1:]:
        total = total + rule(heads, trace)
    return total / len(rules)
