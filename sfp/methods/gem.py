"""GEM: self-self attention in a stream beside the last blocks (Bousselham et al., CVPR 2024).

Grounding Everything: Emerging Localization Properties in Vision-Language Transformers,
arXiv:2312.00878.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.registry import METHODS, AtLeast, op
from sfp.tokens import Heads
from sfp.trace import Trace


@op("attention")
def normalised_self_self(
    heads: Heads, trace: Trace, *, iterations: int = 1, temperature: float | None = None
) -> Tensor:
    """Mean over y = q, k, v of softmax(t y^ y^T), y^ the unit rows of y, (B, H, T, T) (GEM).

    Args:
        iterations: number of times that y is first replaced by softmax(t y^ y^T) y^.
        temperature: t; by default the mean norm, for each image, of the tokens that were projected,
            over sqrt(d).
    """
    t: float | Tensor
    if temperature is None:
        t = heads.scale * upcast(heads.x).norm(dim=-1).mean(-1)[:, None, None, None]
    else:
        t = temperature
    maps = []
    for y in (heads.q, heads.k, heads.v):
        unit = F.normalize(upcast(y), dim=-1)
        for _ in range(iterations):
            mixed = F.scaled_dot_product_attention(t * unit, unit, unit, scale=1.0)
            unit = F.normalize(mixed, dim=-1)
        maps.append((t * unit @ unit.mT).softmax(-1))
    return (maps[0] + maps[1] + maps[2]) / 3


@METHODS.register_module()
def gem(
    *,
    depth: Annotated[int, AtLeast(2)] = 7,
    ss_attn_iter: int = 1,
    ss_attn_temp: float | None = None,
    ignore_residual: bool = False,
) -> dict[str, Any]:
    """Mean self-self attention of normalised q, k and v, summed over the last blocks; no MLP.

    Args:
        depth: the last `depth - 1` blocks are used, counted as in the release; not the field `depth`
            of `Method`, which GEM does not need.
        ss_attn_iter: rounds in which q, k and v are first smoothed by their own similarity.
        ss_attn_temp: factor on the cosines; None for the mean norm of the block's input / sqrt(d).
        ignore_residual: ClearCLIP's variant without the residual between blocks, in which only the last
            block counts.
    """
    attention = dict(type="normalised_self_self", iterations=ss_attn_iter, temperature=ss_attn_temp)
    if ignore_residual:
        readout: dict[str, Any] = dict(attention=attention, residual=None, ffn=False)
    else:
        readout = dict(blocks=range(1 - depth, 0), attention=attention, ffn=False)
    positions = dict(type="resample_positions", offset=0, antialias=True)
    return dict(readouts=[readout], positions=positions)
