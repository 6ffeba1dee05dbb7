"""Op of PEARL: attention with keys that are rotated onto the queries."""

from __future__ import annotations

from torch import Tensor

from sfp.functional.alignment import orthogonal_factor
from sfp.registry import op
from sfp.tokens import Heads, upcast
from sfp.trace import Trace


@op("attention")
def aligned_keys(heads: Heads, trace: Trace, *, alpha: float = 0.08, steps: int = 0) -> Tensor:
    """softmax(s Q (K R)^T + alpha s K_c K_c^T), head by head, (B, H, T, T).

    R is the rotation that brings the centred keys K_c nearest to the centred queries; the means weight
    each patch by the norm of its query, and the class token by 0.

    Args:
        alpha: of the keys' own correlation.
        steps: of Newton-Schulz for R; 0 for a singular value decomposition.
    """
    q, k = upcast(heads.q), upcast(heads.k)
    weights = q.norm(dim=-1, keepdim=True).clone()  # (B, H, T, 1)
    weights[:, :, : heads.prefix] = 0
    weights = weights / weights.sum(2, keepdim=True)
    q_c, k_c = (x - (weights * x).sum(2, keepdim=True) for x in (q, k))
    rotation = orthogonal_factor(k_c.mT @ q_c, steps=steps)  # (B, H, d, d)
    logits = q @ (k @ rotation).mT + alpha * k_c @ k_c.mT
    return (heads.scale * logits).softmax(-1)
