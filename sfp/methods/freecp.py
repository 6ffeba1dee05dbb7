"""FreeCP: drops classes without evidence in the image; similar classes compete for image crops.

The code is github.com/chenqi1126/FreeCP; it works with the logits of any method. Activations spread
along CLIP's own attention. A class is redundant if its activation and its spread map disagree; classes
are ambiguous if their spread maps overlap, and only those that win a crop of the image stay.

| | here | release |
| --- | --- | --- |
| text of the crops | `crop_text`, a file; else the same words | some 20 sentences of a language model |
| boxes | `edges="inside"` | the same: the last row and column of the grid lie in no box |
| queries | each on its own; synonyms compete too | one per class |
| base | any preset | MaskCLIP and SCLIP keep the FFN, without the residual |

Published: short side 448, windows of 384, stride 112 (Cityscapes 560 and 224). Scores are maps from 0
to 1 without a softmax; on datasets with a background class, its score is the remainder (`DATASETS`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from sfp.files import read_once
from sfp.functional.clusters import resize
from sfp.functional.kept import constant
from sfp.functional.precision import upcast
from sfp.functional.regions import components
from sfp.kinds import Affinity
from sfp.registry import METHODS, composition, op, tuned
from sfp.trace import Trace

Box = tuple[int, int, int, int]  # first column, first row, end column, end row; in patches

# redundant, ambiguous, whether class 0 is a background
DATASETS = dict(
    ade20k=(0.05, 0.7, False),
    city_scapes=(0.1, 0.8, False),
    coco_object=(0.15, 0.8, True),
    coco_stuff164k=(0.05, 0.7, False),
    context59=(0.1, 0.7, False),
    context60=(0.1, 0.7, True),
    voc20=(0.15, 0.7, False),
    voc21=(0.15, 0.8, True),
)


@op("affinity")
def sinkhorn(trace: Trace, *, affinity: Affinity, rounds: int = 3, square: bool = True) -> Tensor:
    """A doubly stochastic, symmetric and squared version of an affinity (FreeCP), (B, N, N).

    Args:
        affinity: not negative.
        rounds: number of times that columns, then rows, are divided by their sums.
        square: whether the symmetric part (T + T^T) / 2 is multiplied with itself.
    """
    weights = trace.once(affinity)
    for _ in range(rounds):
        weights = weights / weights.sum(-2, keepdim=True)
        weights = weights / weights.sum(-1, keepdim=True)
    weights = (weights + weights.mT) / 2
    return weights @ weights if square else weights


def boxes(activation: Tensor, share: float, edges: str = "inside") -> list[Box]:
    """Bounding boxes of the regions where a map is large, and of the holes in them.

    The boxes of holes are grown by one cell. Regions are 8-connected.

    Args:
        activation: (h, w), from 0 to 1; it is quantised to 8 bits, as in the release.
        share: share of the map's maximum above which cells belong to a region.
        edges: "inside": boxes end before the last row and column of the map (the release); "whole":
            they may include these.
    """
    import cv2

    level = (255 * activation).floor().to(torch.uint8).cpu().numpy()  # (h, w)
    above = (level > int(share * int(level.max()))).astype(np.uint8)
    contours, _ = cv2.findContours(above, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)
    height, width = level.shape
    last = 1 if edges == "inside" else 0
    found = []
    for x, y, across, down in map(cv2.boundingRect, contours):
        found.append((x, y, min(x + across, width - last), min(y + down, height - last)))
    return found


def spread(maps: Tensor, weights: Tensor, share: float, edges: str = "inside") -> Tensor:
    """Activations (Q, h, w) within their boxes, spread along weights (N, N) and rescaled to 0..1."""
    inside = torch.zeros_like(maps, dtype=torch.bool)
    for mask, activation in zip(inside, maps, strict=True):
        for left, top, right, bottom in boxes(activation, share, edges):
            mask[top:bottom, left:right] = True
    refined = (maps * inside).flatten(1) @ weights.mT  # (Q, N)
    low, high = refined.amin(1, keepdim=True), refined.amax(1, keepdim=True)
    return ((refined - low) / (high - low + 1e-8)).view_as(maps)


def redundancy(probs: Tensor, refined: Tensor) -> Tensor:
    """Overlap of each query's probabilities and spread map, (Q, h, w) each: (Q,).

    It is sum P r / (sum P + sum r).
    """
    overlap = (probs * refined).flatten(1).sum(1)
    return overlap / (probs.flatten(1).sum(1) + refined.flatten(1).sum(1))


def soft_iou(maps: Tensor) -> Tensor:
    """Soft IoU of all pairs of maps (Q, h, w), sum of minima over sum of maxima: (Q, Q)."""
    rows = maps.flatten(1)
    both = torch.stack([torch.minimum(row, rows).sum(1) for row in rows])
    sizes = rows.sum(1)
    return both / (sizes[:, None] + sizes - both)  # max(a, b) = a + b - min(a, b)


def crop_winners(
    trace: Trace, image: Tensor, found: Sequence[Box], text: Tensor, side: int
) -> list[int]:
    """The query (of `text`, (n, C)) most similar to each crop of an image, by CLIP's embedding.

    Args:
        trace: its model embeds the crops.
        image: normalised, (3, H, W).
        found: boxes on the patch grid, with an area.
        text: unit features.
        side: pixels of the square that crops are resized to.
    """
    patch = trace.vit.patch
    crops = [
        F.interpolate(
            image[None, :, top * patch : bottom * patch, left * patch : right * patch],
            (side, side),
            mode="bilinear",
            align_corners=False,
        )
        for left, top, right, bottom in found
    ]
    embedded = F.normalize(upcast(trace.vit(torch.cat(crops))), dim=-1)  # (boxes, C)
    return (embedded @ text.to(embedded).T).argmax(1).tolist()


def unambiguous(
    trace: Trace,
    image: Tensor,
    maps: Tensor,
    text: Tensor,
    *,
    ambiguous: float,
    box_share: float,
    edges: str,
    crop_side: int,
) -> list[int]:
    """The queries that remain after those with overlapping maps have competed for crops.

    Args:
        trace, image, text: as in `crop_winners`.
        maps: spread maps of the queries, (Q, h, w).
        ambiguous: soft IoU that joins two queries.
        box_share, edges: of the boxes, as in `boxes`.
        crop_side: as `side` of `crop_winners`.
    """
    left: list[int] = []
    joined = components(soft_iou(maps) >= ambiguous).tolist()
    for number in range(max(joined) + 1):
        group = [i for i, own in enumerate(joined) if own == number]
        found = boxes(maps[group].mean(0), box_share, edges)
        real = [box for box in found if box[0] < box[2] and box[1] < box[3]]
        if len(group) == 1 or len(real) < len(found):  # a box without area counts for all of them
            left += group
        elif real:
            won = crop_winners(trace, image, real, text[group], crop_side)
            left += [group[i] for i in set(won)]
    return sorted(left)


@op("refiner", words=True)
def class_purification(
    logits: Tensor,
    trace: Trace,
    *,
    affinity: Affinity,
    redundant: float = 0.1,
    ambiguous: float = 0.7,
    background: bool = False,
    logit_scale: float = 100.0,
    box_share: float = 0.4,
    edges: Literal["inside", "whole"] = "inside",
    crop_side: int = 112,
    crop_text: str | None = None,
) -> Tensor:
    """Spread activations, from 0 to 1, of the queries that occur in the image; 0 for others (FreeCP).

    Args:
        affinity: affinity along which activations spread; logits on another grid are resized to its
            grid, that of the patches.
        redundant: queries whose overlap of probability and spread map is no larger are dropped (r_p);
            below 0, none is.
        ambiguous: soft IoU of spread maps from which queries compete (a_p); above 1, none do.
        background: whether class 0 is made of background words, which take part in the softmax only.
        logit_scale: inverse temperature of the softmax.
        box_share: share of its maximum above which an activation makes boxes.
        edges: as in `boxes`.
        crop_side: pixels of the square that crops are resized to.
        crop_text: safetensors file with unit text features "queries", (Q, C), that crops are compared
            with (the release's sentences); None for the words themselves.
    """
    trace.one_by_one(logits, "class_purification")
    weights = trace.once(affinity)
    if weights.shape[-1] != logits[0, 0].numel():  # of another grid, a guide's
        logits = resize(logits, trace.embedded.grid)
    index = trace.index or range(logits.shape[1])
    named = [i for i, own in enumerate(index) if own > 0 or not background]
    shown = constant(named, logits, torch.long)
    text = trace.query_features() if crop_text is None else _crop_text(crop_text, len(index))
    text = F.normalize(text.to(logits), dim=-1)[shown]
    probs = (logit_scale * logits).softmax(1)
    purified = torch.zeros_like(probs)
    for image, own, along, out in zip(trace.image, probs, weights, purified, strict=True):
        tiny = torch.finfo(own.dtype).tiny  # a single query has the probability 1 everywhere
        scaled = (own - own.min()) / (own.max() - own.min()).clamp_min(tiny)
        refined = spread(scaled[shown], along.to(own), box_share, edges)
        kept = (redundancy(own[shown], refined) > redundant).nonzero()[:, 0]
        if len(kept) > 1:
            left = unambiguous(
                trace,
                image,
                refined[kept],
                text[kept],
                ambiguous=ambiguous,
                box_share=box_share,
                edges=edges,
                crop_side=crop_side,
            )
            kept = kept[left]
        out[shown[kept]] = refined[kept]
    return purified


@read_once(2)
def _crop_text(path: str, queries: int) -> Tensor:
    with torch.inference_mode(False):  # they are also used by calls with gradients
        text = load_file(path)["queries"]
    if len(text) != queries:
        raise ValueError(
            f"crop_text={path!r} has {len(text)} rows 'queries': expected one for each of the "
            f"{queries} queries, background words included"
        )
    return text


@METHODS.register_module()
def freecp(
    *,
    base: str | Mapping[str, Any] = "clearclip",
    dataset: str = "context59",
    redundant: float | None = None,
    ambiguous: float | None = None,
    background: bool | None = None,
    logit_scale: float = 100.0,
    box_share: float = 0.4,
    edges: Literal["inside", "whole"] = "inside",
    crop_side: int = 112,
    crop_text: str | None = None,
    rounds: int = 3,
    square: bool = True,
) -> dict[str, Any]:
    """Purified activations from the logits of another preset. Needs the text features.

    Args:
        base: the preset, by name or with knobs.
        dataset: dataset whose constants replace those of the next three that are None; see `DATASETS`.
        redundant, ambiguous: thresholds r_p and a_p, as in `class_purification`.
        background: whether class 0 consists of background words and gets the remainder of the others.
        logit_scale: inverse temperature of the softmax; CLIP's own, 100.
        box_share, edges: parameters of the boxes, as in `class_purification`.
        crop_side, crop_text: parameters of the crops, as in `class_purification`.
        rounds, square: parameters of the affinity, as in `sinkhorn`.
    """
    values = tuned(
        dataset, DATASETS, redundant=redundant, ambiguous=ambiguous, background=background
    )
    refiner = dict(
        type="class_purification",
        affinity=dict(
            type="sinkhorn",
            affinity=dict(type="mean_attention"),
            rounds=rounds,
            square=square,
        ),
        **values,
        logit_scale=logit_scale,
        box_share=box_share,
        edges=edges,
        crop_side=crop_side,
        crop_text=crop_text,
    )
    return dict(
        composition(base, refiners=[refiner]),
        decision=dict(type="as_scores", rest=values["background"]),
    )
