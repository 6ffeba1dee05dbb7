"""GCLIP: attention map fusion and channel suppression (arXiv:2502.06818).

No official code is known. The equations are those of the paper's abstract page and of a third party's
re-implementation; nothing here has been compared with published features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfp.clip.vit import VisionTransformer
from sfp.functional.precision import upcast
from sfp.registry import METHODS, op
from sfp.trace import absolute_layer


@op("surgery")
def suppress_channel(
    vit: VisionTransformer,
    depth: int | None,
    *,
    blocks: Sequence[int] | None = None,
    channel: int | None = None,
) -> None:
    """GCLIP's channel suppression: scales the MLP's largest output channel to the others' norm.

    Row c of `mlp.c_proj.weight` computes channel c; it is scaled by (mean norm of the other rows) /
    (its norm). The bias stays.

    Args:
        blocks: method layers; by default those from `outlier_onset` to the last.
        channel: by default each block's row of largest norm.
    """
    weights = [block.get_parameter("mlp.c_proj.weight") for block in vit.blocks]  # each (D, 4D)
    norms = torch.stack([upcast(weight).norm(dim=1) for weight in weights])  # (L, D)
    if blocks is None:
        chosen = list(range(outlier_onset(norms), len(norms)))
    else:
        chosen = [absolute_layer(i, len(norms), depth) for i in blocks]
    for i in chosen:
        norm = norms[i]
        c = int(norm.argmax()) if channel is None else channel
        if not 0 <= c < len(norm):
            raise ValueError(f"channel={c} of an MLP with {len(norm)} outputs")
        others = (norm.sum() - norm[c]) / (len(norm) - 1)
        weight = weights[i].detach().clone()
        weight[c] *= others / norm[c]
        linear = vit.blocks[i].get_submodule("mlp.c_proj")
        linear.weight = nn.Parameter(weight, requires_grad=False)


def outlier_onset(norms: Tensor) -> int:
    """The block at which the entropy of the row norms drops, from row norms (L, D).

    The entropy of a block is that of its norms divided by their sum: log D if all norms are equal, and
    smaller if a few are much larger. The drop is the split at which two constants, of which the first
    is larger, best fit the sequence of entropies (least squares); 0 if there is none.
    """
    p = norms / norms.sum(-1, keepdim=True)
    entropy = torch.special.entr(p.double()).sum(-1)  # (L,)
    gains = [1e-9]  # above the rounding errors of equal entropies
    for i in range(1, len(entropy)):
        before, after = entropy[:i].mean(), entropy[i:].mean()
        # reduction of the squared error compared with one constant
        gain = i * (len(entropy) - i) * (before - after).clamp_min(0).square()
        gains.append(float(gain))
    return max(range(len(gains)), key=gains.__getitem__)


@METHODS.register_module()
def gclip(
    *,
    blocks: Sequence[int] = (6, 7),
    head_average: bool = True,
    suppress: bool = True,
    cs_blocks: Sequence[int] | None = None,
    channel: int | None = None,
) -> dict[str, Any]:
    """Mean of sm(qq) and the attention of layers where global tokens emerge; no residual, no MLP.

    Args:
        blocks: those layers, counted from 0; none for only sm(qq).
        head_average: whether all heads share the mean map.
        suppress: whether the outlier channel of the MLPs is suppressed, on a copy of the weights.
        cs_blocks: layers for channel suppression; None finds the first from the weights
            (`outlier_onset`).
        channel: number of the channel; None for each block's largest.
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
