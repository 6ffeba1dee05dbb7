"""Attention rules: `(heads, trace, *, knobs) -> weights (B, H or 1, M, T)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import centred_softmax, gaussian_prior, pad_prefix
from sfp.kinds import Affinity, Rule
from sfp.registry import Some, op
from sfp.tokens import Heads
from sfp.trace import Trace

Pair = Literal["qq", "qk", "qv", "kq", "kk", "kv", "vq", "vk", "vv"]


@op("attention")
def self_self(heads: Heads, trace: Trace, *, pairs: Some[Pair] = ("qq", "kk")) -> Tensor:
    """Sum of softmax(a b^T / sqrt(d)) over pairs of projections, (B, H, T, T).

    ("qq", "kk") is SCLIP's and SFP's, ("qq",) ClearCLIP's; ("qk",) is ordinary attention. Rows sum to
    the number of pairs, as in the papers.
    """
    maps = (heads.logits(pair[0], pair[1]).softmax(-1) for pair in pairs)
    total = next(maps)
    for weights in maps:
        total = total + weights  # not in place, because autograd needs the maps
    return total


@op("attention")
def identity(heads: Heads, trace: Trace) -> Tensor:
    """Every token attends only to itself, (B, 1, T, T), so that values are unchanged (MaskCLIP)."""
    batch, _, tokens, _ = heads.v.shape
    eye = torch.eye(tokens, device=heads.v.device, dtype=heads.v.dtype)
    return eye.expand(batch, 1, tokens, tokens)


@op("attention")
def neighbour(heads: Heads, trace: Trace, *, std: float = 5.0, pair: Pair = "kk") -> Tensor:
    """softmax(a b^T / sqrt(d) + Gaussian of the patch distance), (B, H, T, T) (NACLIP).

    Args:
        std: standard deviation of the Gaussian, in patches. The Gaussian is added unscaled, and is 0
            from and to the class token.
        pair: the projections a and b.
    """
    prior = pad_prefix(gaussian_prior(heads.grid, std, heads.k.device), heads.prefix)  # (T, T)
    return (heads.logits(pair[0], pair[1]) + prior).softmax(-1)


@op("attention")
def fuse_layers(
    heads: Heads,
    trace: Trace,
    *,
    rule: Rule,
    layers: Some[int],
    share: float,
    pairs: Some[Pair] = ("qk",),
    head_average: bool = False,
) -> Tensor:
    """Mixes the weights of a rule with the attention of earlier layers (GCLIP, ITACLIP).

    (1 - share) * rule + share * mean over layers of `self_self`.

    Args:
        rule: rule for the weights of the readout's own block.
        layers: method layers.
        share: weight of the layers' mean.
        pairs: attention of those layers, as in `self_self`; ("qk",) is their own.
        head_average: average both maps over heads.
    """
    earlier = trace.once(earlier_layers, layers=tuple(layers), pairs=tuple(pairs))
    skip = trace.embedded.prefix - heads.prefix  # for a readout without prefix tokens
    own, earlier = rule(heads, trace), earlier[..., skip:, skip:]
    if head_average or own.shape[1] != earlier.shape[1]:  # a pool may have another number of heads
        own, earlier = own.mean(1, keepdim=True), earlier.mean(1, keepdim=True)
    return own + share * (earlier - own)


def earlier_layers(trace: Trace, *, layers: Sequence[int], pairs: Sequence[Pair]) -> Tensor:
    """Mean over method layers of `self_self`, (B, H, T, T)."""
    maps = (self_self(trace.heads(trace.layer(i)), trace, pairs=pairs) for i in layers)
    total = next(maps).clone()
    for weights in maps:
        total += weights
    return total / len(layers)


@op("attention")
def affinity_attention(
    heads: Heads,
    trace: Trace,
    *,
    affinity: Affinity,
    gain: float = 3.0,
    centre: float = 1.0,
) -> Tensor:
    """Attention from an affinity of the patches, one map for all heads, (B, 1, T, T).

    softmax(gain * (S - centre * mean S)) where that is not negative. Prefix tokens, which have no
    affinity, attend only to themselves, and no other token attends to them.
    """
    weights = centred_softmax(trace.once(affinity), gain, centre)
    if heads.prefix:
        weights = F.pad(weights, (heads.prefix, 0, heads.prefix, 0))
        own = torch.arange(heads.prefix, device=weights.device)
        weights[:, own, own] = 1
    return weights[:, None]


@op("attention")
def unrotated(heads: Heads, trace: Trace, *, rule: Rule) -> Tensor:
    """A rule's weights without rotary positions of queries and keys (EVA-02, PE).

    With rotary positions, self-self attention depends on the distance of patches; whether this helps is
    not known. No effect in towers without rotary positions.

    Args:
        rule: rule for the weights.
    """
    return rule(heads.unrotated(), trace)


@op("attention")
def average(heads: Heads, trace: Trace, *, rules: Some[Rule]) -> Tensor:
    """Mean of the weights of several rules."""
    total = rules[0](heads, trace)
    for rule in rules[1:]:
        total = total + rule(heads, trace)
    return total / len(rules)
