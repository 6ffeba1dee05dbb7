"""ProxyCLIP: attention from an external encoder (Lan et al., ECCV 2024, arXiv:2408.04883).

The guide's patches attend to each other by similarity, and the last block's values, resampled to the
guide's grid, follow. The release runs DINO ViT-B/8 on windows of 336 pixels (stride 112). Unlike it,
this takes the mean similarity of each image, not of the batch, and keeps rows and columns apart.
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
    Prefix tokens are attended by nobody. The readout needs `layout=guide`.

    Args:
        affinity: S, (B, M, M).
        guide: whose grid S lives on.
        gain: gamma of the paper.
        centre: beta of the paper.
    """
    weights = centred_softmax(trace.once(affinity), gain, centre)  # (B, M, M)
    weights = to_guide(weights, heads.grid, trace.guide(guide).grid)
    return F.pad(weights, (heads.prefix, 0))[:, None]


def to_guide(weights: Tensor, grid: tuple[int, int], guide: tuple[int, int]) -> Tensor:
    """Weights of a guide's patches for CLIP's, which are resampled to the guide's grid.

    Args:
        weights: of patches on the guide's grid, (..., m, M).
        grid: CLIP's rows and columns, N patches.
        guide: the guide's.

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
        beta: factor on the mean similarity; what lies below is left out.
        gamma: inverse temperature.
    """
    if guide is None:
        return dict()
    affinity = dict(type="guide_similarity", guide=guide)
    rule = dict(type="proxy_attention", affinity=affinity, guide=guide, gain=gamma, centre=beta)
    readout = dict(keep_cls=False, attention=rule, residual=None, ffn=False, layout=guide)
    return dict(readouts=[readout])
