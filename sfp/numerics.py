"""Finds where NaN and infinite values come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.method import Method
from sfp.registry import functions


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
    for name, values in _in_order(method, vit, image, context):
        if not finite(values):
            return name
    return "no part when it ran again"


def _in_order(
    method: Method, vit: VisionTransformer, image: Tensor, context: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The name of each part, and what it outputs."""
    yield "the image", image
    for name, weight in method.operate(vit).named_parameters():
        yield f"the weights visual.{name}", weight
    trace = method.run(vit, image, **context)
    yield "the patch embedding (visual.conv1 to visual.ln_pre)", trace.embedded.data
    for i, tokens in enumerate(trace.outputs):
        yield f"block {i} (visual.transformer.resblocks.{i})", tokens.data
    for each in trace.alone() if method.needs_whole and trace.whole is None else [trace]:
        seen = method.seen(each)
        for i, readout in enumerate(method.readouts):
            yield f"readout {i}{_described(readout)}", readout(seen).data
        features = method.read(each)
        yield "the projection (visual.ln_post, visual.proj)", features.data
        logits = method.comparison(features, seen)
        yield f"the comparison {_name(method.comparison)}, or the text features", logits
        for refine in method.refiners:
            logits = refine(logits, seen)
            yield f"the refiner {_name(refine)}", logits


def _described(readout: Any) -> str:
    blocks = getattr(readout, "blocks", None)
    through = f" (through block {', '.join(map(str, blocks))})" if blocks else ""
    ops = [_name(part) for part in functions(readout) if part is not readout]
    return through + (f", of {', '.join(ops)}" if ops else "")


def _name(part: Any) -> str:
    fn = getattr(part, "fn", part)
    return str(getattr(fn, "__name__", fn))
