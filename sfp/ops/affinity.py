"""Affinities: similarities of patches, `(trace, *, knobs) -> (B, N, N)`.

Call them as `trace.once(affinity)`, since several parts of a method may need the same one.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.kinds import Mitigator
from sfp.registry import op
from sfp.trace import Trace


@op("affinity")
def similarity(
    trace: Trace,
    *,
    layer: int,
    cut: float | None = None,
    fill: Mitigator | None = None,
    fill_from: int = -2,
) -> Tensor:
    """Cosine similarity of a layer's patches.

    Args:
        layer: method layer whose output is used.
        cut: smaller entries become 0 (0.4 in SC-CLIP and SFP).
        fill: mitigator applied first, to the outliers found by an edit at `fill_from`.
        fill_from: method layer of those outliers; no effect if no edit ran there.
    """
    tokens = trace.output(layer)
    mask = trace.masks.get(trace.layer(fill_from))
    if fill is not None and mask is not None:
        tokens = fill(tokens, mask)
    unit = F.normalize(upcast(tokens.patches), dim=-1)
    cosine = unit @ unit.mT
    return cosine if cut is None else cosine.masked_fill(cosine < cut, 0)


@op("affinity")
def guide_similarity(trace: Trace, *, guide: str) -> Tensor:
    """Cosine similarity of a guide's patches, (B, M, M) on its own grid.

    Args:
        guide: name of an external encoder (see `Trace.guide`).
    """
    unit = F.normalize(upcast(trace.guide(guide).patches), dim=-1)
    return unit @ unit.mT
