"""Masks of whole objects vote on the labels of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.labels import Labels
from sfp.functional.precision import sum_over_pixels

BUDGET = 2**24  # numbers held at once


@dataclass(frozen=True)
class MaskSheet:
    """Masks of an image as small maps of logits, positive inside, rendered in slabs on demand.

    Attributes:
        maps: (M, h, w).
        row_matrix: (H, h).
        column_matrix: (W, w).
        scores: the proposer's confidence in each, (M,), or None.
    """

    maps: Tensor
    row_matrix: Tensor
    column_matrix: Tensor
    scores: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return len(self.row_matrix), len(self.column_matrix)

    def rows(self, start: int, stop: int) -> Tensor:
        """Mask logits of image rows start to stop, (M, stop - start, W)."""
        return self.row_matrix[start:stop] @ self.maps @ self.column_matrix.T


def same_area(image: Tensor, side: int, multiple: int = 1) -> Tensor:
    """Resizes an image (3, H, W) to about the area of a square, keeping its aspect ratio: (3, h, w).

    Parameters tuned for the number of patches of a square, such as DBSCAN's distance, then suit images
    of any shape and size.

    Args:
        image: floats.
        side: side of the square in pixels.
        multiple: both sides become multiples of this, and at least this.
    """
    height, width = image.shape[-2:]
    scale = side / (height * width) ** 0.5
    size = [max(round(length * scale / multiple), 1) * multiple for length in (height, width)]
    resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)
    return resized[0]


def paint_masks(masks: MaskSheet, paint: Literal["smallest", "largest", "score"]) -> Tensor:
    """An id map from masks that may overlap: (H, W) int64, 0 where there is no mask, else from 1.

    Memory is small for images of any size, since masks are rendered one slab of rows at a time, twice.

    Args:
        masks: mask logits; pixels above 0 belong to the mask.
        paint: where masks overlap, use the smallest, the largest, or the one with the highest score; of
            equal ones the first.

    Raises:
        ValueError: for "score" if the proposer gives no scores.
    """
    height, width = masks.size
    count = len(masks.maps)
    ids = torch.zeros(height, width, dtype=torch.int64, device=masks.maps.device)
    if not count:
        return ids
    step = max(BUDGET // (count * width), 1)
    slabs = [slice(start, min(start + step, height)) for start in range(0, height, step)]
    if paint == "score":
        if masks.scores is None:
            raise ValueError(
                'paint="score": this proposer gives no scores; use "smallest" or "largest"'
            )
        rank = masks.scores.double().cpu()
    else:
        areas = sum((masks.rows(s.start, s.stop) > 0).flatten(1).sum(1).cpu() for s in slabs)
        rank = torch.as_tensor(areas, dtype=torch.float64)
    order = rank.argsort(descending=paint != "smallest", stable=True).to(ids.device)
    for slab in slabs:
        member = (masks.rows(slab.start, slab.stop) > 0)[order]
        ids[slab] = torch.where(member.any(0), order[member.byte().argmax(0)] + 1, 0)
    return ids


def mask_boxes(member: Tensor) -> Tensor:
    """Bounding boxes of masks (M, h, w) bool: (M, 4) as x0, y0, x1, y1, ends excluded; 0 if empty."""
    sides = []
    for dim in (1, 2):  # over rows: which columns; over columns: which rows
        used = member.any(dim)  # (M, cells)
        first = used.byte().argmax(1)
        after = used.shape[1] - used.flip(1).byte().argmax(1)
        sides.append(torch.stack([first, after]) * used.any(1))
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=1)


def box_overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of all pairs of boxes (M, 4): (M, M), 0 where both are empty."""
    boxes = boxes.float()
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return both / (area[:, None] + area - both).clamp_min(1)


def stability(maps: Tensor, offset: float = 1.0) -> Tensor:
    """Stability of masks, (M,): the ratio of the areas above `offset` and above `-offset`.

    Args:
        maps: mask logits, (M, h, w).
        offset: distance from the threshold 0.
    """
    high, low = ((maps > t).flatten(1).sum(1) for t in (offset, -offset))
    return high / low.clamp_min(1)


def without_doubles(maps: Tensor, scores: Tensor, overlap: float) -> Tensor:
    """Non-maximum suppression of masks by their boxes.

    Args:
        maps: mask logits, (M, h, w).
        scores: (M,); of equal ones the first is better.
        overlap: largest intersection over union with the box of a better mask.

    Returns:
        The indices of the masks that are kept, ascending.
    """
    near = (box_overlaps(mask_boxes(maps > 0)) > overlap).cpu()
    kept: list[int] = []
    for i in scores.cpu().argsort(descending=True, stable=True).tolist():
        if not bool(near[i, kept].any()):
            kept.append(i)
    return torch.tensor(sorted(kept), dtype=torch.int64, device=maps.device)


def fuse_contained(
    maps: Tensor, seen: Tensor, *, boxes: float = 0.2, share: float = 0.8
) -> tuple[Tensor, Tensor]:
    """Fuses masks that largely contain one another, by the maximum of their logits (TextRegion).

    A mask joins the first earlier mask that has not itself joined another and whose box and area
    overlap enough.

    Args:
        maps: mask logits, (M, h, w); wholes before their parts.
        seen: the part of the same maps that decides about overlap, (M, h', w').
        boxes: the intersection over union of the boxes must exceed this.
        share: the ratio of the intersection to the smaller area must exceed this.

    Returns:
        (G, h, w), and the index of the first mask of each, (G,).
    """
    member = (seen > 0).flatten(1).float()
    both, area = member @ member.T, member.sum(1)
    inside = both / torch.minimum(area[:, None], area).clamp_min(1) > share
    alike = (inside & (box_overlaps(mask_boxes(seen > 0)) > boxes)).cpu()
    leaders: list[int] = []
    group = []
    for i in range(len(maps)):
        own = next((n for n, leader in enumerate(leaders) if alike[i, leader]), len(leaders))
        if own == len(leaders):
            leaders.append(i)
        group.append(own)
    first, number = (
        torch.tensor(x, dtype=torch.int64, device=maps.device) for x in (leaders, group)
    )
    number = number[:, None, None].expand_as(maps)
    return maps[first].scatter_reduce(0, number, maps, "amax"), first


def vote_in_masks(
    masks: MaskSheet,
    labels: Labels,
    classes: int,
    *,
    mean: bool = False,
    share: float = 0.0,
    prob_thd: float = 0.0,
) -> Labels:
    """Gives all pixels of a mask one label, by their vote.

    In mask m with pixels P_m, class k gets the share s_mk = (1 / |P_m|) sum over p in P_m of b_pk. The
    ballot b_p is 1 for the label of p and otherwise 0 (a majority vote), or with `mean` the class
    probabilities of p. A pixel takes the class with the largest share (the first of equal ones) in the
    smallest mask that contains it (the first of equal ones), since small masks are parts of larger
    ones. Pixels in no mask are not changed.

    Memory is small for images of any size, since masks are rendered one slab of rows at a time, twice.

    Args:
        masks: mask logits at the size of the labels; pixels above 0 belong to the mask.
        labels: labels of the image; with scores if `mean`.
        classes: number of classes K.
        mean: average probabilities instead of counting labels.
        share: masks whose winner has a smaller share are ignored.
        prob_thd: with `mean`, pixels of masks whose winner has a smaller share become class 0; like the
            threshold of `assign`, which was applied before the mean.

    Returns:
        Labels; inside masks, `confidence` is the winner's share and `scores`, if given, are all shares.

    Raises:
        ValueError: for `mean` without scores.
    """
    if mean and labels.scores is None:
        raise ValueError("the mean of probabilities needs labels with scores")
    height, width = labels.labels.shape
    count = len(masks.maps)
    if not count:
        return labels
    step = max(BUDGET // (max(count, classes) * width), 1)
    slabs = [slice(start, min(start + step, height)) for start in range(0, height, step)]

    def inside(slab: slice) -> Tensor:
        return masks.rows(slab.start, slab.stop) > 0  # (M, rows, W)

    def ballots(slab: slice) -> Tensor:
        if mean:
            return labels.scores[:, slab].flatten(1).float()  # type: ignore[index]
        return F.one_hot(labels.labels[slab].flatten(), classes).T.float()  # (K, rows * W)

    areas = torch.zeros(count, dtype=torch.float64, device="cpu")
    votes = torch.zeros(count, classes, dtype=torch.float64, device="cpu")
    for slab in slabs:
        members = inside(slab).flatten(1).float()
        areas += members.sum(1).cpu()  # exact: a slab has less than 2**24 pixels
        votes += sum_over_pixels(members, ballots(slab)).cpu()
    shares = votes / areas.clamp_min(1)[:, None]
    best, winner = shares.amax(1), shares.argmax(1)
    usable = ((areas > 0) & (best >= share)).nonzero()[:, 0]
    if not len(usable):
        return labels
    order = usable[areas[usable].argsort(stable=True)].to(labels.labels.device)
    best, shares = (x.to(labels.confidence) for x in (best, shares))
    winner = winner.to(order)

    new = labels.labels.clone()
    confidence = labels.confidence.clone()
    scores = None if labels.scores is None else labels.scores.clone()
    for slab in slabs:
        member = inside(slab)[order]
        covered = member.any(0)  # (rows, W)
        owner = order[member.byte().argmax(0)[covered]]  # argmax gives the first: the smallest mask
        new[slab][covered] = winner[owner]
        confidence[slab][covered] = best[owner]
        if scores is not None:
            scores[:, slab][:, covered] = shares[owner].T.to(scores)
        if mean:
            new[slab][covered & (confidence[slab] < prob_thd)] = 0
    return Labels(new, confidence, scores)
