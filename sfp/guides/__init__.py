"""External encoders that guide a method: frozen modules, CLIP-normalised images -> patch `Tokens`.

A config defines them by name,
`guides=dict(dino=dict(type="transformers", model="facebook/dino-vitb8"))`, and ops access them by that
name (`trace.guide("dino")`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sfp.guides.clipseg import ClipSegGuide
from sfp.guides.sam import SamGuide
from sfp.guides.sam3 import Sam3Guide
from sfp.guides.transformers import TransformersGuide
from sfp.registry import GUIDES, build

__all__ = ["GUIDES", "ClipSegGuide", "Sam3Guide", "SamGuide", "TransformersGuide", "build_guides"]


def build_guides(nodes: Mapping[str, Mapping[str, Any] | nn.Module] | None) -> nn.ModuleDict:
    """The guides of a config by name; modules are used as they are.

    Raises:
        ValueError: for an unknown type or knob; the message names the valid ones. Also for anything
            that is neither a config node nor a module.
    """
    if nodes is not None and not hasattr(nodes, "items"):
        raise ValueError(f"guides={nodes!r}: expected a dict of external encoders by name")
    guides = nn.ModuleDict()
    for name, node in (nodes or {}).items():
        guide = build(GUIDES, node, f"guide {name!r}")
        if not isinstance(guide, nn.Module):
            raise ValueError(
                f"guide {name!r} is a {type(guide).__name__}: expected dict(type=..., ...) or a "
                "torch.nn.Module whose forward(images) returns Tokens"
            )
        guides[name] = guide
    return guides
