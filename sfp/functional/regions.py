"""Functions of id maps, which give the region of each pixel. 0 is no region."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.labels import Labels
from sfp.functional.windows import interpolation


def components(joined: Tensor) -> Tensor:
    """Connected components of an undirected graph, numbered by their first members.

    Args:
        joined: adjacency, (n, n) bool, symmetric.

    Returns:
        (n,) int64.
    """
    number = torch.arange(len(joined), device=joined.device)
    joined = joined | torch.eye(len(joined), dtype=torch.bool, device=joined.device)
    while True:  # each node takes the smallest number among its neighbours, until nothing changes
        smallest = torch.where(joined, number, len(joined)).amin(1)
        if torch.equal(smallest, number):
            return number.unique(return_inverse=True)[1]
        number = smallest


def region_means(features: Tensor, ids: Tensor, count: int) -> Tensor:
    """Mean feature of each region: (N, D) and (N,) in 0..count-1 -> (count, D)."""
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, ids, features)
    return sums / ids.bincount(minlength=count).clamp_min(1)[:, None]


def cells_of_masks(member: Tensor, grid: tuple[int, int]) -> Tensor:
    """The weight of each cell of a grid in masks, for bilinear resampling of the grid to their pixels.

    Its product with a map on the grid is the sum of the resampled map over the pixels of each mask,
    without computing the resampled map.

    Args:
        member: masks, (R, H, W), 1 inside and 0 outside.
        grid: rows and columns of the cells, which cover the image of the masks.

    Returns:
        (R, rows * columns).
    """
    rows, columns = (
        interpolation(cells, pixels, member)
        for cells, pixels in zip(grid, member.shape[1:], strict=True)
    )
    return (rows.T @ member @ columns).flatten(1)


def region_distances(features: Tensor, ids: Tensor) -> Tensor:
    """Distances between the mean features of regions, in the order of their ids, (R, R).

    max(f f^T) - f f^T for the unit means f, which is never negative.

    Args:
        features: unit rows, (N, D).
        ids: (N,); regions 0 are left out.
    """
    inside = ids != 0
    known, index = ids[inside].unique(return_inverse=True)
    cosine = F.normalize(region_means(features[inside], index, len(known)), dim=-1)
    cosine = cosine @ cosine.T
    return cosine.max() - cosine if len(known) else cosine


def merge_regions(features: Tensor, ids: Tensor, eps: float) -> Tensor:
    """Merges similar regions; 0 is kept, the others are renumbered from 1.

    The result is the connected components of pairs at most `eps` apart, that is, DBSCAN with
    `min_samples=1`.

    Args:
        features: unit rows, (N, D).
        ids: (N,) int64.
        eps: largest distance (`region_distances`).
    """
    merged = torch.zeros_like(ids)
    inside = ids != 0
    known, index = ids[inside].unique(return_inverse=True)
    if len(known):
        joined = region_distances(features, ids) <= eps
        merged[inside] = 1 + components(joined)[index]
    return merged


def vote_in_regions(labels: Labels, ids: Tensor, classes: int) -> Labels:
    """Gives all pixels of a region their most frequent label, the smallest of equals.

    Args:
        labels: labels of the image, (H, W).
        ids: region of each pixel, (H, W); region 0 is not changed.
        classes: number of classes.

    Returns:
        Labels whose confidence inside regions is the winner's share; scores are not changed.
    """
    inside = ids != 0
    known, index = ids[inside].unique(return_inverse=True)
    if not len(known):
        return labels
    votes = (index * classes + labels.labels[inside]).bincount(minlength=len(known) * classes)
    votes = votes.view(len(known), classes)
    share = (votes.amax(1) / votes.sum(1)).to(labels.confidence)
    new, confidence = labels.labels.clone(), labels.confidence.clone()
    new[inside], confidence[inside] = votes.argmax(1)[index], share[index]
    return replace(labels, labels=new, confidence=confidence)
