"""Surgery: edits of the weights, made once per model: `(vit, depth, *, knobs) -> None`.

`vit` is a copy whose parameters are still those of the original: replace them, never write into them.
`depth` is what the method's layer numbers are written for (see `Trace.layer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfp.registry import op
from sfp.tokens import upcast
from sfp.trace import absolute_layer

if TYPE_CHECKING:
    from sfp.clip.vit import VisionTransformer


@op("surgery")
def suppress_channel(
    vit: VisionTransformer,
    depth: int | None,
    *,
    blocks: Sequence[int] | None = None,
    channel: int | None = None,
) -> None:
    """GCLIP's channel suppression: the MLP's loudest output channel is scaled to the others' norm.

    Row c of `mlp.c_proj.weight` writes channel c; it is scaled by (mean norm of the other rows) / (its
    norm). The bias stays.

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
        others = (norm.sum() - norm[c]) / (len(norm) - 1)
        weight = weights[i].detach().clone()
        weight[c] *= others / norm[c]
        linear = vit.blocks[i].get_submodule("mlp.c_proj")
        linear.weight = nn.Parameter(weight, requires_grad=False)


def outlier_onset(norms: Tensor) -> int:
    """The block at which the entropy of the row norms drops, from row norms (L, D).

    The entropy of a block is that of its norms divided by their sum: log D if all rows are equal, less
    the more a few stand out. The drop is where two constants, the first the larger, fit the sequence
    of entropies best (least squares); 0 if no such split exists.
    """
    p = norms / norms.sum(-1, keepdim=True)
    entropy = torch.special.entr(p.double()).sum(-1)  # (L,)
    gains = [1e-9]  # more than rounding leaves of equal entropies
    for i in range(1, len(entropy)):
        before, after = entropy[:i].mean(), entropy[i:].mean()
        # how much less the squared error is than that of one constant
        gain = i * (len(entropy) - i) * (before - after).clamp_min(0).square()
        gains.append(float(gain))
    return max(range(len(gains)), key=gains.__getitem__)
