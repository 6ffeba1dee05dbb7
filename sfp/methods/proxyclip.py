"""ProxyCLIP: attention from an external encoder (Lan et al., ECCV 2024, arXiv:2408.04883).

The guide's patches attend to each other by similarity, and the last block's values, resampled to the
guide's grid, follow. The release runs DINO ViT-B/8 on windows of 336 pixels (stride 112). Unlike it,
this takes the mean similarity of each image, not of the batch, and keeps rows and columns apart.
"""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


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
