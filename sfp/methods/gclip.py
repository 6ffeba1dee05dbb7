"""GCLIP: attention map fusion and channel suppression (arXiv:2502.06818).

No official code is known: equations as in the paper's abstract page and a third party's
re-implementation, and nothing here has been compared with published features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def gclip(
    *,
    blocks: Sequence[int] = (6, 7),
    head_average: bool = True,
    suppress: bool = True,
    cs_blocks: Sequence[int] | None = None,
    channel: int | None = None,
) -> dict[str, Any]:
    """Mean of sm(qq) with ordinary attention of layers where global tokens emerge; no residual, no MLP.

    Args:
        blocks: those layers, counted from 0; none for sm(qq) alone.
        head_average: whether all heads share the mean map.
        suppress: whether the outlier channel of the MLPs is suppressed, on a copy of the weights.
        cs_blocks: in which layers; None finds the first from the weights (`outlier_onset`).
        channel: which; None is each block's loudest.
    """
    attention: dict[str, Any] = dict(type="self_self", pairs=("qq",))
    if blocks:
        attention = dict(
            type="fuse_layers",
            rule=attention,
            layers=blocks,
            share=len(blocks) / (len(blocks) + 1),  # equal weights for all maps
            head_average=head_average,
        )
    surgery = dict(type="suppress_channel", blocks=cs_blocks, channel=channel)
    return dict(
        readouts=[dict(attention=attention, residual=None, ffn=False)],
        surgery=[surgery] if suppress else [],
    )
