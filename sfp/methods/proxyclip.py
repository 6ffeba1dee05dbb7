"""ProxyCLIP: attention from an external encoder (Lan et al., ECCV 2024, arXiv:2408.04883).

The last block's values, resampled to the guide's grid, are mixed by the similarity of the guide's
patches. The release runs DINO ViT-B/8 on windows of 336 pixels (stride 112). Here, unlike there, the
mean similarity is that of each image, not of the batch, and rows and columns are not confused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import centred_softmax
from sfp.functional.windows import interpolation
from sfp.kinds import Affinity
from sfp.registry import METHODS, op
from sfp.tokens import Heads
from sfp.trace import Trace


@op("attention")
def proxy_attention(
    heads: Heads,
    trace: Trace,
    *,
    affinity: Affinity,
    guide: str,
    gain: float = 3.0,
    centre: float = 1.2,
) -> Tensor:
    """Attention of a guide's patches to CLIP's, one map for all heads, (B, 1, M, T).

    softmax(gain * (S - centre * mean S)) where that is not negative, times the matrix that resamples
    CLIP's patches to the guide's grid: the same as resampling the values first, as ProxyCLIP does.
    Prefix tokens get no attention. The readout needs `layout=guide`.

    Args:
        affinity: affinity S of the guide's patches, (B, M, M).
        guide: name of the guide.
        gain: gamma of the paper.
        centre: beta of the paper.
    """
    weights = centred_softmax(trace.once(affinity), gain, centre)  # (B, M, M)
    weights = to_guide(weights, heads.grid, trace.guide(guide).grid)
    return F.pad(weights, (heads.prefix, 0))[:, None]


def to_guide(weights: Tensor, grid: tuple[int, int], guide: tuple[int, int]) -> Tensor:
    """Weights for a guide's patches, converted to weights for CLIP's patches resampled to its grid.

    Args:
        weights: weights of patches on the guide's grid, (..., m, M).
        grid: rows and columns of CLIP's N patches.
        guide: rows and columns of the guide's M patches.

    Returns:
        (..., m, N).
    """
    rows, columns = (
        interpolation(source, target, weights) for source, target in zip(grid, guide, strict=True)
    )
    return (rows.T @ weights.unflatten(-1, guide) @ columns).flatten(-2)


@METHODS.register_module()
def proxyclip(
    *, guide: str | None = "dino", beta: float = 1.2, gamma: float = 3.0
) -> dict[str, Any]:
    """Attention output of the last block alone: no residual, no FFN; on the guide's grid.

    Args:
        guide: name of the guide, which the caller provides (`guides=dict(dino=...)`); None is plain
            CLIP, as in the release.
        beta: factor on the mean similarity; smaller similarities are left out.
        gamma: inverse temperature.
    """
    if guide is None:
        return dict()
    affinity = dict(type="guide_similarity", guide=guide)
    rule = dict(type="proxy_attention", affinity=affinity, guide=guide, gain=gamma, centre=beta)
    readout = dict(keep_cls=False, attention=rule, residual=None, ffn=False, layout=guide)
    return dict(readouts=[readout])
