"""CLIP: the unmodified patch tokens of the last layer (Radford et al., ICML 2021, arXiv:2103.00020)."""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def clip() -> dict[str, Any]:
    """The plain forward pass, the baseline for all other methods."""
    return dict()
