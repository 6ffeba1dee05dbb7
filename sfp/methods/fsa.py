"""FSA: a second pass of ProxyCLIP that uses feedback from the first one (code by chi-chi-zx).

Every patch has a distribution over the words, from ProxyCLIP's logits minus those of uniform attention.
Patches whose distributions are close in Kullback-Leibler divergence attend to each other, both within
ProxyCLIP's attention and in addition to it.

The release runs ProxyCLIP's setting (windows of 336 pixels, stride 112, padded to multiples of 56). It
fails on windows that are not square and keeps the divergences of all classes in memory; here they are
computed by one matrix product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.blocks import weighted_values
from sfp.functional.attention import centred_softmax
from sfp.functional.precision import upcast
from sfp.kinds import Affinity
from sfp.methods.proxyclip import to_guide
from sfp.registry import METHODS, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

TINY = 1e-10  # below the logarithms, as in the release


def divergence(probs: Tensor) -> Tensor:
    """Kullback-Leibler divergences between all pairs of rows, (B, M, Q) -> (B, M, M).

    sum_q p_iq (ln p_iq - ln p_jq), at least 0.
    """
    logs = (probs + TINY).log()
    own = (probs * logs).sum(-1, keepdim=True)
    return (own - probs @ logs.mT).clamp_min(0)


def closest(similarity: Tensor, keep: float) -> Tensor:
    """The largest entries of each row that hold a share `keep` of its softmax, (..., M) bool.

    Entries are taken in descending order as long as the cumulative softmax, including their own, is at
    most `keep`; the first is always taken.
    """
    weights, order = similarity.softmax(-1).sort(dim=-1, descending=True, stable=True)
    kept = weights.cumsum(-1) <= keep
    kept[..., 0] = True
    return torch.zeros_like(kept).scatter(-1, order, kept)


def feedback_weights(similarity: Tensor, lam: float, keep: float) -> Tensor:
    """softmax(s * e^(lam * s)) over the `closest` of each row, (..., M)."""
    sharp = similarity * (lam * similarity).exp()
    return sharp.masked_fill(~closest(similarity, keep), -torch.inf).softmax(-1)


@op("attention", words=True)
def word_feedback(
    heads: Heads,
    trace: Trace,
    *,
    affinity: Affinity,
    guide: str,
    gain: float = 3.0,
    centre: float = 1.2,
    lam: float = 3.0,
    keep: float = 0.45,
    first_scale: float = 20.0,
    uniform_scale: float = 35.0,
) -> Tensor:
    """ProxyCLIP's attention A, corrected by the words found in a first pass, (B, 1, M, T).

    (a A + A a + a) / 3, where a is the attention between patches with close distributions over the
    words. For the same readout as `proxy_attention`, in the last block: no residual, no FFN,
    `layout=guide`.

    Args:
        affinity, guide, gain, centre: as in `proxy_attention`.
        lam: additional weight of closer patches (`feedback_weights`); 2.3 for ViT-H/14.
        keep: share of a row's softmax that is kept.
        first_scale: factor on the cosines of the first pass.
        uniform_scale: factor on those of uniform attention, which are subtracted.
    """
    first = centred_softmax(trace.once(affinity), gain, centre)  # (B, M, M)
    p, u = first_looks(heads, trace, first, guide)
    probs = (first_scale * p - uniform_scale * u).softmax(-1)
    close = feedback_weights(1 / (1 + divergence(probs)), lam, keep).to(first)
    weights = (close @ first + first @ close + close) / 3
    return F.pad(to_guide(weights, heads.grid, trace.guide(guide).grid), (heads.prefix, 0))[:, None]


def first_looks(heads: Heads, trace: Trace, weights: Tensor, guide: str) -> tuple[Tensor, Tensor]:
    """Cosines with the words for a guide's patches with given attention, and for uniform attention.

    Args:
        heads: projections of the patches, with or without a prefix, which is left out.
        trace: trace with text features.
        weights: attention between the guide's patches, (B, M, M).
        guide: external encoder of those patches.

    Returns:
        (B, M, Q) and (B, 1, Q), at least float32.
    """
    values = heads.v[:, :, heads.prefix :]
    uniform = torch.full_like(weights[:, :1], 1 / weights.shape[2])
    looks = to_guide(torch.cat([weights, uniform], 1), heads.grid, trace.guide(guide).grid)
    mixed = heads.join(weighted_values(looks[:, None], values))
    grid = (1, mixed.shape[1])
    features = trace.project(Tokens(mixed, grid, prefix=0, pooled=heads.pooled))
    unit = F.normalize(upcast(features.data), dim=-1)
    cosines = unit @ trace.query_features().to(unit).T
    return cosines[:, :-1], cosines[:, -1:]


@METHODS.register_module()
def fsa(
    *,
    guide: str = "dino",
    beta: float = 1.2,
    gamma: float = 3.0,
    lam: float = 3.0,
    keep: float = 0.45,
    first_scale: float = 20.0,
    uniform_scale: float = 35.0,
) -> dict[str, Any]:
    """Attention output of the last block alone, on the guide's grid. Needs a guide and the words.

    Args:
        guide: name of the guide, which the caller provides.
        beta, gamma: as in `proxyclip`.
        lam, keep, first_scale, uniform_scale: as in `word_feedback`.
    """
    rule = dict(
        type="word_feedback",
        affinity=dict(type="guide_similarity", guide=guide),
        guide=guide,
        gain=gamma,
        centre=beta,
        lam=lam,
        keep=keep,
        first_scale=first_scale,
        uniform_scale=uniform_scale,
    )
    return dict(
        readouts=[dict(keep_cls=False, attention=rule, residual=None, ffn=False, layout=guide)]
    )
