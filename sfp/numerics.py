"""Finds where NaN and infinite values come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.method import Method


def finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass without a temporary.

    Any such value makes the sum NaN or infinite; finite values do not, because it is taken in float64.
    """
    return bool(x.sum(dtype=torch.float64 if x.device.type == "cpu" else torch.float32).isfinite())


def first_bad(
    method: Method, vit: VisionTransformer, image: Tensor, context: dict[str, Any]
) -> str:
    """The first part, in order of execution, that outputs a NaN or infinite value.

    Args:
        method, vit, image, context: as for `Method.run`, which runs again.
    """
    if not finite(image):
        return "the image"
    for name, weight in method.operate(vit).named_parameters():
        if not finite(weight):
            return f"the weights visual.{name}"
    trace = method.run(vit, image, **context)
    if not finite(trace.embedded.data):
        return "the patch embedding (visual.conv1 to visual.ln_pre)"
    for i, tokens in enumerate(trace.outputs):
        if not finite(tokens.data):
            return f"block {i} (visual.transformer.resblocks.{i})"
    for each in trace.alone() if method.needs_whole and trace.whole is None else [trace]:
        for i, readout in enumerate(method.readouts):
            if not finite(readout(method.seen(each)).data):
                blocks = getattr(readout, "blocks", None)
                through = f" (through block {', '.join(map(str, blocks))})" if blocks else ""
                return f"readout {i}{through}"
    if not finite(method.read(trace).data):
        return "the projection (visual.ln_post, visual.proj)"
    return "the refiners of the logits, or the text features"
