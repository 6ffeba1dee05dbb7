"""CLIP: the last layer's patch tokens, as they are (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def clip() -> dict[str, Any]:
    """The plain forward pass; the baseline that every other method improves."""
    return dict()
