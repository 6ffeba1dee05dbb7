"""Affinities: how alike are two patches? `(trace, *, knobs) -> (B, N, N)`.

Use them through `trace.once(affinity)`: several parts of a method ask for the same one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from sfp.registry import op
from sfp.tokens import Tokens, upcast
from sfp.trace import LayerError, Trace


@op("affinity")
def similarity(
    trace: Trace,
    *,
    layer: int,
    cut: float | None = None,
    fill: Callable[[Tokens, Tensor], Tokens] | None = None,
    fill_from: int = -2,
) -> Tensor:
    """Cosine similarity of a layer's patches.

    Args:
        layer: method layer whose output is compared.
        cut: smaller entries become 0 (0.4 in SC-CLIP and SFP).
        fill: mitigator applied first, to the outliers that an edit found at `fill_from`.
        fill_from: method layer of those outliers; nothing is filled if no edit ran there.
    """
    tokens = trace.output(layer)
    mask = trace.masks.get(trace.layer(fill_from))
    if fill is not None and mask is not None:
        tokens = fill(tokens, mask)
    unit = F.normalize(upcast(tokens.patches), dim=-1)
    cosine = unit @ unit.mT
    return cosine if cut is None else cosine.masked_fill(cosine < cut, 0)


@op("affinity")
def mean_attention(trace: Trace, *, first: int = 0, last: int = -2) -> Tensor:
    """Patch-to-patch attention, averaged over heads and over a range of layers.

    SFP's Hierarchical Attention Integrator sums layers l0 to L-1 of the poster, counted from 1:
    `first` = l0 - 1.

    Args:
        first, last: method layers, both included.
    """
    start, stop = trace.layer(first), trace.layer(last) + 1
    if start >= stop:
        raise LayerError(f"mean_attention: layer {first} comes after layer {last}")
    prefix = trace.embedded.prefix
    maps = (trace.mean_attention(i)[:, prefix:, prefix:] for i in range(start, stop))
    total = next(maps).clone()
    for attention in maps:
        total += attention
    return total / (stop - start)
