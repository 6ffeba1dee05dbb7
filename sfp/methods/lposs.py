"""LPOSS and LPOSS+: logits that propagate between patches, then between pixels, of the whole image.

The code is github.com/vladan-stojnic/LPOSS (Stojnić et al., CVPR 2025). Patches of all windows are the
nodes of a graph, with edges between nearby patches of similar DINO values; LPOSS+ continues between
pixels of similar colour. Both levels are refiners for any preset: `propagate_patches` and
`propagate_pixels`.

| | here | release |
| --- | --- | --- |
| base | MaskCLIP with residual and FFN; `base` | the same, of open_clip's LAION ViT-B/16 |
| neighbours | a matrix product in chunks, sparse products | faiss and cupy, on a GPU |
| more neighbours than nodes | all nodes | fails |
| windows of no multiple of the patch | remaining pixels left out, or zeros around | black after them |

Published: short side 448, windows of 224 pixels, stride 112; no thresholds. Ten steps of the solver do
not converge at alpha 0.95, so results depend on the number of steps. Distances of patches are in
pixels, so the graph depends on the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.graphs import PixelGraph, lab_of_rgb, neighbour_graph, propagate
from sfp.functional.precision import exact, upcast
from sfp.registry import METHODS, Count, composition, op
from sfp.tokens import Tokens
from sfp.trace import Trace

QUERIES = 16  # number of queries whose pixel maps are propagated at once


@op("refiner", whole=True)
def propagate_patches(
    logits: Tensor,
    trace: Trace,
    *,
    guide: str = "dino",
    output: str | None = "v",
    neighbours: Count = 400,
    power: float = 3.0,
    decay: float = 0.01,
    alpha: float = 0.95,
    steps: int = 10,
) -> Tensor:
    """Logits (W, Q, h, w) of all windows of an image, propagated between their patches (LPOSS).

    Nodes are the guide's patches; logits on another grid are resized to the guide's.

    Args:
        guide: external encoder whose features determine which patches are similar.
        output: output of the guide (see `Trace.guide`): "v", the values of its last block, or None for
            the tokens of its last layer.
        neighbours, power, decay: as in `sfp.functional.graphs.neighbour_graph`; distances are between
            patch centres in the resized image.
        alpha, steps: as in `sfp.functional.graphs.propagate`.
    """
    whole = trace.whole
    assert whole is not None
    trace.one_by_one(logits, "propagate_patches")
    features: Tokens = trace.guide(guide, output)
    if logits.shape[-2:] != features.grid:
        logits = F.interpolate(logits, features.grid, mode="bilinear", align_corners=False)
    unit = F.normalize(upcast(features.patches).flatten(0, 1), dim=-1)  # (W * N, C)
    dtype = exact(logits.device)
    graph = neighbour_graph(
        unit,
        whole.grid.positions(features.grid).to(unit),
        neighbours=neighbours,
        power=power,
        decay=decay,
    ).to(dtype)
    values = logits.permute(0, 2, 3, 1)  # (W, h, w, Q)
    solved = propagate(
        lambda x: graph @ x, values.flatten(0, 2).to(dtype), alpha=alpha, steps=steps
    )
    return solved.to(logits.dtype).view(values.shape).permute(0, 3, 1, 2)


@op("refiner", whole=True)
def propagate_pixels(
    logits: Tensor,
    trace: Trace,
    *,
    side: int = 13,
    tau: float = 0.01,
    alpha: float = 0.95,
    steps: int = 10,
) -> Tensor:
    """Merged logits of an image, propagated between pixels of similar colour (LPOSS+), (1, Q, H, W).

    Colours are CIE L*a*b*, with L divided by 100, and a and b by 128.

    Args:
        side: side of the square of pixels that each pixel is connected to.
        tau: scale of colour distances; edges have the weight exp(-distance / tau).
        alpha, steps: as in `sfp.functional.graphs.propagate`.
    """
    whole = trace.whole
    assert whole is not None
    pixels = upcast(whole.prepare(whole.source))
    size = (pixels.shape[1], pixels.shape[2])
    grid = whole.grid if len(logits) == len(whole.grid.places) else whole.grid.whole
    merged = grid.sheet(logits, size).rows(0, size[0])  # (Q, H, W)
    lab = lab_of_rgb(trace.rgb(pixels)) / pixels.new_tensor([100.0, 128.0, 128.0])[:, None, None]
    graph = PixelGraph.of_colours(lab, side=side, tau=tau)

    def spread(x: Tensor) -> Tensor:
        return graph.spread(x.T.unflatten(1, size)).flatten(1).T

    solved = [
        propagate(spread, part.flatten(1).T, alpha=alpha, steps=steps).T.unflatten(1, size)
        for part in merged.split(QUERIES)
    ]
    return torch.cat(solved)[None]


@METHODS.register_module()
def lposs(
    *,
    base: str | Mapping[str, Any] = "maskclip",
    guide: str = "dino",
    output: str | None = "v",
    neighbours: Count = 400,
    power: float = 3.0,
    decay: float = 0.01,
    alpha: float = 0.95,
    steps: int = 10,
) -> dict[str, Any]:
    """The logits of another preset, propagated between the patches of the image. Needs a guide.

    Args:
        base: the preset, by name or with knobs. Unless it sets `positions`, the position embedding is
            sampled on the exact grid, as in the release.
        guide, output: external encoder, provided by the caller, and the output used.
        neighbours, power, decay: parameters of the graph (k, gamma, sigma), as in `propagate_patches`.
        alpha, steps: parameters of the solver, as in `propagate_patches`.
    """
    refiner = dict(
        type="propagate_patches",
        guide=guide,
        output=output,
        neighbours=neighbours,
        power=power,
        decay=decay,
        alpha=alpha,
        steps=steps,
    )
    usual = dict(type="resample_positions", offset=0.0)
    return {"positions": usual, **composition(base, refiners=[refiner])}


@METHODS.register_module()
def lposs_plus(
    *,
    base: str | Mapping[str, Any] = "lposs",
    side: int = 13,
    tau: float = 0.01,
    alpha: float = 0.95,
    steps: int = 10,
) -> dict[str, Any]:
    """The merged logits of another preset, by default `lposs`, propagated between pixels.

    Args:
        base: the preset, by name or with knobs.
        side, tau: parameters of the graph, as in `propagate_pixels`.
        alpha, steps: parameters of the solver, as in `propagate_pixels`.
    """
    refiner = dict(type="propagate_pixels", side=side, tau=tau, alpha=alpha, steps=steps)
    return composition(base, refiners=[refiner])
