"""Ops of ProxyCLIP: attention from an external encoder, on that encoder's grid."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import centred_softmax
from sfp.functional.windows import interpolation
from sfp.registry import op
from sfp.tokens import Heads, upcast
from sfp.trace import Trace


@op("affinity")
def guide_similarity(trace: Trace, *, guide: str) -> Tensor:
    """Cosine similarity of a guide's patches, (B, M, M) on its own grid.

    Args:
        guide: name of an external encoder (see `Trace.guide`).
    """
    unit = F.normalize(upcast(trace.guide(guide).patches), dim=-1)
    return unit @ unit.mT


@op("attention")
def proxy_attention(
    heads: Heads,
    trace: Trace,
    *,
    affinity: Callable[[Trace], Tensor],
    guide: str,
    gain: float = 3.0,
    centre: float = 1.2,
) -> Tensor:
    """Attention of a guide's patches to CLIP's, one map for all heads, (B, 1, M, T).

    softmax(gain * (S - centre * mean S)) where that is not negative, times the matrix that resamples
    CLIP's patches to the guide's grid: the same as resampling the values first, as ProxyCLIP does.
    Prefix tokens are attended by nobody. The readout needs `layout=guide`.

    Args:
        affinity: S, (B, M, M).
        guide: whose grid S lives on.
        gain: gamma of the paper.
        centre: beta of the paper.
    """
    weights = centred_softmax(trace.once(affinity), gain, centre)  # (B, M, M)
    rows, columns = (
        interpolation(source, target).to(weights)
        for source, target in zip(heads.grid, trace.guide(guide).grid, strict=True)
    )
    weights = weights.unflatten(2, trace.guide(guide).grid)  # (B, M, h', w')
    weights = (rows.T @ weights @ columns).flatten(2)  # (B, M, N)
    return F.pad(weights, (heads.prefix, 0))[:, None]
