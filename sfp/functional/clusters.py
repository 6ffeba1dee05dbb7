"""CLIPtrase's clustering: clusters of patches, segments of pixels, and votes of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from sfp.functional.precision import sum_over_pixels, upcast
from sfp.functional.windows import interpolation

BUDGET = 2**24  # numbers in memory at once


def dbscan(
    rows: Tensor,
    *,
    eps: float,
    min_samples: int,
    keep: Tensor | None = None,
    affinities: bool = True,
) -> Tensor:
    """Density clusters of the patches of one image (scikit-learn's DBSCAN, Euclidean).

    Args:
        rows: affinities, (N, N), or features, (N, C); patches are neighbours if their rows are close.
        eps: largest distance of neighbours.
        min_samples: number of neighbours, including itself, that makes a patch a core point.
        keep: (N,) bool; other patches are left out: their rows and, for affinities, their columns.
        affinities: whether `rows` are affinities.

    Returns:
        (N,) int64 cluster numbers from 0; -1 for patches without a cluster.
    """
    from sklearn.cluster import DBSCAN  # slow to import, and only one method needs it

    kept = torch.ones_like(rows[:, 0], dtype=torch.bool) if keep is None else keep
    labels = torch.full(kept.shape, -1, device=rows.device)
    if bool(kept.any()):
        points = rows[kept][:, kept] if affinities else rows[kept]
        found = DBSCAN(eps=eps, min_samples=min_samples).fit(points.cpu().numpy()).labels_
        labels[kept] = torch.from_numpy(found).to(labels)
    return labels


def prototypes(rows: Tensor, labels: Tensor) -> Tensor:
    """Mean row of each cluster, (K, N), without rows labelled -1."""
    member = labels == torch.arange(int(labels.max()) + 1, device=labels.device)[:, None]  # (K, N)
    member = member.to(rows)
    return member @ rows / member.sum(1, keepdim=True)


def cluster_peaks(rows: Tensor, labels: Tensor, grid: tuple[int, int], count: int = 1) -> Tensor:
    """Points that represent clusters, at the centres of patches: (K, count, 2).

    The first is the cluster's patch where its prototype is largest; each further one is the patch
    farthest from the previous ones (a cluster with fewer patches repeats its first).

    Args:
        rows: affinities of one image, (N, N).
        labels: clusters of the patches, (N,); -1 for none.
        grid: rows and columns of patches.
        count: points per cluster.

    Returns:
        x and y, from 0 to 1 of the image's width and height; K is 0 if no patch has a cluster.
    """
    height, width = grid
    maps = prototypes(rows, labels)
    places = torch.arange(height * width, device=rows.device)
    at = torch.stack([places % width, places // width], dim=1).to(maps)  # (N, 2), in patches
    points = []
    for k, prototype in enumerate(maps):
        members = (labels == k).nonzero()[:, 0]
        chosen = members[prototype[members].argmax()][None]
        for _ in range(1, count):
            far = torch.cdist(at[members], at[chosen]).amin(1)
            chosen = torch.cat([chosen, members[far.argmax()][None] if far.any() else chosen[:1]])
        points.append((at[chosen] + 0.5) / at.new_tensor([width, height]))
    return torch.stack(points) if points else at.new_zeros(0, count, 2)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resampling (`align_corners=False`), (..., h, w) -> (..., H, W)."""
    rows, columns = (
        interpolation(cells, pixels, maps)
        for cells, pixels in zip(maps.shape[-2:], size, strict=True)
    )
    return rows @ maps @ columns.T


def median_filter(maps: Tensor, window: int = 7) -> Tensor:
    """Median of the `window` x `window` square around each cell, edges mirrored: (K, h, w)."""
    half = window // 2
    for dim in (1, 2):
        # mirrored including the edge (c b a | a b c), unlike torch's "reflect"
        cells = torch.arange(-half, maps.shape[dim] + half, device=maps.device)
        cells = torch.where(cells < 0, -1 - cells, cells) % (2 * maps.shape[dim])
        maps = maps.index_select(dim, torch.minimum(cells, 2 * maps.shape[dim] - 1 - cells))
    return maps.unfold(1, window, 1).unfold(2, window, 1).flatten(3).median(-1).values


def smooth_maps(maps: Tensor, *, up: int = 4, window: int = 7) -> Tensor:
    """Cluster maps (K, h, w), upsampled `up` times and median-filtered."""
    height, width = maps.shape[1:]
    return median_filter(resize(maps, (up * height, up * width)), window)


def segments(rows: Tensor, labels: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Which cluster's prototype is largest at each pixel, (H, W) int64.

    Args:
        rows: affinities of one image, (N, N).
        labels: clusters of the patches, at least one of them not -1.
        grid: rows and columns of patches.
        size: (H, W).
    """
    maps = smooth_maps(prototypes(rows, labels).unflatten(1, grid))
    return resize(maps, size).max(0).indices  # many times faster than argmax


def vote_shares(masks: Tensor, choice: Tensor, classes: int) -> Tensor:
    """For every pixel, the share of its mask that votes for each class.

    Args:
        masks: mask number of each pixel, (H, W).
        choice: class that each pixel votes for, (H, W).
        classes: number of classes K.

    Returns:
        (K, H, W) float32; the largest is the mask's most frequent class.
    """
    count = int(masks.max()) + 1
    votes = (masks * classes + choice).flatten().bincount(minlength=count * classes)
    votes = votes.view(count, classes).float()
    return (votes / votes.sum(1, keepdim=True).clamp_min(1)).T[:, masks]


def mask_means(masks: Tensor, logits: Tensor) -> Tensor:
    """Each pixel's logits (Q, H, W) averaged over its mask (H, W)."""
    values, own = upcast(logits).flatten(1), masks.flatten()
    numbers = torch.arange(int(masks.max()) + 1, device=masks.device)[:, None]
    # in chunks, because each mask is a row over all pixels
    sums = [
        sum_over_pixels(values, (own == some).to(values))
        for some in numbers.split(max(BUDGET // len(own), 1))
    ]  # (Q, some masks) each
    sizes = own.bincount(minlength=len(numbers)).clamp_min(1)
    return (torch.cat(sums, dim=1) / sizes).to(values)[:, masks]
