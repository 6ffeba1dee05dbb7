"""ITACLIP: self-self attention of the last and of middle blocks (Aydın et al., CVPRW 2025).

ITACLIP: Boosting Training-Free Semantic Segmentation with Image, Text, and Architectural Enhancements,
arXiv:2411.12044. The architecture only: no image augmentation, no texts by a language model. Written
from its description, not compared with its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def itaclip(*, layers: Sequence[int] = (6, 7, 9)) -> dict[str, Any]:
    """Half of the last block's sm(qq) + sm(kk), half of the middle layers' mean; no MLP.

    Args:
        layers: middle layers, counted from 0 (7, 8 and 10 counted from 1); none for only the last.
    """
    attention: dict[str, Any] = dict(type="self_self", pairs=("qq", "kk"))
    if layers:
        attention = dict(
            type="fuse_layers", rule=attention, layers=layers, share=0.5, pairs=("qq", "kk")
        )
    return dict(readouts=[dict(attention=attention, ffn=False)])
