"""Natural outliers: which detectors find hubs, the patches that all others attend to?

The reference is the attention of the other patches, and not that of the class token, by which SOM
ranks: a patch is a *hub* of block i if its output receives several times an even share of the patches'
attention in block i + 1. Detectors see only block i.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.method import Detector
from sfp.outliers.planted import Tally
from sfp.tables import cell
from sfp.trace import Trace

TIMES = 3.0  # even shares that make a patch a hub


def received(trace: Trace, layer: int) -> Tensor:
    """The attention that each patch receives from the others in a block, relative to the mean: (B, N).

    With uniform attention every patch receives 1. Attention of a patch to itself and to prefix tokens
    is left out.

    Args:
        trace: a run.
        layer: block, from 0.
    """
    prefix = trace.embedded.prefix
    weights = trace.mean_attention(layer)[:, prefix:, prefix:].float()  # (B, N, N)
    weights = weights - weights.diagonal(dim1=1, dim2=2).diag_embed()
    drawn = (weights / weights.sum(-1, keepdim=True)).sum(1)
    return drawn * drawn.shape[-1] / drawn.sum(-1, keepdim=True)


def hubs(trace: Trace, layer: int, times: float = TIMES) -> Tensor:
    """Patches whose output of a block receives `times` an even share in the next one: (B, N) bool.

    Args:
        trace: a run.
        layer: block, from 0; not the last.
        times: number of even shares.
    """
    return received(trace, layer + 1) >= times


@torch.no_grad()
def study(
    vit: VisionTransformer,
    batches: Iterable[Tensor],
    detectors: Mapping[str, Detector],
    layers: Sequence[int],
    times: float = TIMES,
) -> dict[str, Any]:
    """Measures how well detectors find hubs in some blocks, over all images.

    Args:
        vit: the frozen image tower.
        batches: normalised images, (B, 3, H, W) each.
        detectors: detectors by name.
        layers: blocks, from 0, none of them the last.
        times: see `hubs`.

    Returns:
        "images", "times", "layers"; "hubs": hubs per image for each layer; "detectors": by name
        "layers", for each layer "precision" (None if nothing is marked), "recall" (None if there are no
        hubs) and "marked" per image, and "ms", the median time for one image and layer.

    Raises:
        ValueError: for invalid layers, or without images.
    """
    if not layers or not all(0 <= layer < len(vit.blocks) - 1 for layer in layers):
        raise ValueError(
            f"layers {list(layers)}: expected blocks from 0 to {len(vit.blocks) - 2}, since hubs are "
            "defined by the attention of the next block"
        )
    tally, images = Tally(), 0
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    for batch in batches:
        trace = vit.trace(batch)
        images += len(batch)
        for layer in layers:
            truth = hubs(trace, layer, times)
            trace.mean_attention(layer)  # cached, so that it is not part of a detector's time
            tally.add(layer, value=truth.sum(-1))
            for name, detector in detectors.items():
                began = time.perf_counter()
                marked = detector(trace, layer)
                seconds[name].append((time.perf_counter() - began) / len(batch))
                counts = [(marked & truth).sum(-1), marked.sum(-1)]
                tally.add(name, layer, value=torch.stack(counts, -1))
    if not images:
        raise ValueError("no images to look for hubs in")

    def scores(name: str, layer: int) -> dict[str, float | None]:
        hit, marked = tally[name, layer].tolist()
        there = float(tally[layer,])
        return dict(
            precision=round(hit / marked, 4) if marked else None,
            recall=round(hit / there, 4) if there else None,
            marked=round(marked / images, 2),
        )

    return dict(
        images=images,
        times=times,
        layers=list(layers),
        hubs=[round(float(tally[layer,]) / images, 2) for layer in layers],
        detectors={
            name: dict(
                layers=[scores(name, layer) for layer in layers],
                ms=round(1e3 * sorted(seconds[name])[len(seconds[name]) // 2], 2),
            )
            for name in detectors
        },
    )


def sheet(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a study, the best detectors first (mean of the layers' F1)."""
    header = ["detector", *(f"block {i}" for i in result["layers"]), "marked", "ms"]
    rows = [["hubs per image", *(f"{n:.1f}" for n in result["hubs"]), "", ""]]
    for name in sorted(result["detectors"], key=lambda n: -_f1(result["detectors"][n]["layers"])):
        found = result["detectors"][name]
        each = found["layers"]
        marked = sum(one["marked"] for one in each) / len(each)
        cells = [f"{cell(one['precision'])} / {cell(one['recall'])}" for one in each]
        rows.append([name, *cells, f"{marked:.1f}", f"{found['ms']:.1f}"])
    return header, rows


def _f1(layers: Sequence[Mapping[str, float | None]]) -> float:
    pairs = [(one["precision"] or 0.0, one["recall"] or 0.0) for one in layers]
    return sum(2 * p * r / (p + r) for p, r in pairs if p + r) / len(pairs)
