"""SegEarth-OV: three self-attentions, and logits without the global bias (Li et al., CVPR 2025).

SegEarth-OV: Towards Training-Free Open-Vocabulary Segmentation for Remote Sensing Images,
arXiv:2410.01768. Without its learned upsampler. Written from its description, not compared with its
code: the global logits from CLIP's own image embedding and the default weight are our interpretation.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sfp.registry import METHODS, op
from sfp.trace import Trace


@op("refiner", words=True)
def global_bias(logits: Tensor, trace: Trace, *, weight: float = -0.3) -> Tensor:
    """Adds a share of the whole image's logits; a negative one removes its bias (SegEarth-OV)."""
    return logits + weight * trace.global_logits()[..., None, None]


@METHODS.register_module()
def segearth(*, ignore_residual: bool = True, cls_token_lambda: float = -0.3) -> dict[str, Any]:
    """sm(qq) + sm(kk) + sm(vv), no residual, no MLP; a share of the image's logits is subtracted.

    Args:
        ignore_residual: False keeps the last block's residual and MLP.
        cls_token_lambda: weight of the whole image's logits that are added to every patch's.
    """
    kept: dict[str, Any] = dict(residual=None, ffn=False) if ignore_residual else {}
    return dict(
        readouts=[dict(attention=dict(type="self_self", pairs=("qq", "kk", "vv")), **kept)],
        refiners=[dict(type="global_bias", weight=cls_token_lambda)],
    )
