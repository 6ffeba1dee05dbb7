"""LaVG: find objects first, name them afterwards (In Defense of Lazy Visual Grounding, ECCV 2024*).

Regions are found without words, by normalised cuts of a DINO's keys (`sfp.masks.cuts`), and each takes
the word that its mean features are closest to. Nothing is trained, and no masks are in any training.

Written from its description, no official code or numbers were at hand. Features are taken as unit
vectors, so that a region's product with a word is the mean of its pixels' cosines. The dense CRF that
sharpens masks is not here. Published with SCLIP's features: a mean of 38.8 over the eight benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.regions import cells_of_masks
from sfp.ops.image import window_grid
from sfp.registry import METHODS, composition, op
from sfp.trace import Trace


@op("refiner", whole=True, regions=True)
def region_mean(logits: Tensor, trace: Trace, *, least: float = 0.0) -> Tensor:
    """Logits of an image in which each region has the mean of its pixels', (1, Q, rows, columns).

    Windows are stitched by area; the logits of pixels are bilinear. Rows and columns are those of the
    regions. Where masks overlap, their means are averaged; pixels in no region keep their own.

    Args:
        logits: of the windows, (W, Q, h, w).
        trace: of the windows, with regions of the image.
        least: pixels are inside where a mask's value is larger.
    """
    joined = logits
    if len(logits) > 1:
        joined = window_grid(trace).stitch(logits)
    member = (trace.region_masks() > least).to(joined)  # (R, H, W)
    size = (member.shape[1], member.shape[2])
    weights = cells_of_masks(member, (joined.shape[2], joined.shape[3]))  # (R, h * w)
    mean = joined[0].flatten(1) @ weights.T / weights.sum(1).clamp_min(1)  # (Q, R)
    covered = member.sum(0)
    painted = (mean @ member.flatten(1)).unflatten(1, size) / covered.clamp_min(1)
    return torch.where(covered > 0, painted, resize(joined, size))


@METHODS.register_module()
def lavg(*, base: str | Mapping[str, Any] = "sclip") -> dict[str, Any]:
    """The logits of another preset, averaged over regions. Needs regions.

    Published: `regions=dict(propose=dict(type="cuts", model="facebook/dino-vitb8"))`.

    Args:
        base: the preset, by name or with knobs.
    """
    fields = composition(base)
    refiners = [*fields.get("refiners", ()), dict(type="region_mean")]
    return dict(fields, refiners=refiners, direct=True)
