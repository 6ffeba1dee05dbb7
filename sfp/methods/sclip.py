"""SCLIP: correlative self-attention in the last block (Wang et al., ECCV 2024, arXiv:2312.01597)."""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def sclip(*, csa: bool = True) -> dict[str, Any]:
    """softmax(qq) + softmax(kk) instead of softmax(qk); residual and FFN stay.

    Args:
        csa: False for the plain forward pass, as in the release.
    """
    attention = dict(type="self_self", pairs=("qq", "kk")) if csa else None
    return dict(readouts=[dict(attention=attention)])
