"""LaVG: find objects first, name them afterwards (In Defense of Lazy Visual Grounding, ECCV 2024).

Regions are found without words, by normalised cuts of a DINO's keys (`sfp.masks.cuts`), and each takes
the word closest to its mean features. Nothing is trained, and no model was trained on masks.

Written from its description, without official code or numbers to compare with. Features are unit
vectors, so that a region's product with a word is the mean of its pixels' cosines. The dense CRF that
sharpens masks is not included. Published with SCLIP's features: a mean of 38.8 over the eight
benchmarks.
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
    """Logits of an image, averaged over each region's pixels, (1, Q, rows, columns).

    Windows are stitched by area; logits of pixels are interpolated bilinearly. Rows and columns are
    those of the regions. Where masks overlap, their means are averaged; pixels without a region keep
    their own logits.

    Args:
        logits: logits of the windows, (W, Q, h, w).
        trace: trace of the windows, with regions of the image.
        least: pixels belong to a mask if its value is larger.
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
    return dict(composition(base, refiners=[dict(type="region_mean")]), direct=True)
