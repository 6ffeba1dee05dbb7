"""Comparisons of features with words: `(features, trace, *, knobs) -> logits (B, Q, h, w)`."""

from __future__ import annotations

from torch import Tensor

from sfp.registry import op
from sfp.tokens import Tokens, cosine_logits
from sfp.trace import Trace


@op("comparison", words=True)
def cosines(features: Tokens, trace: Trace) -> Tensor:
    """Cosine of every patch with every query, as in CLIP's training."""
    return cosine_logits(features, trace.query_features())
