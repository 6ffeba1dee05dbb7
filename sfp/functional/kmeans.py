"""Spherical k-means: clustering by cosine."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import exact

CHUNK = 2**24  # similarities in memory at once


def spherical_kmeans(
    points: Tensor, count: int, *, iterations: int = 100, restarts: int = 10, seed: int = 0
) -> tuple[Tensor, float]:
    """Finds unit centres that maximise the mean cosine with the points nearest to them.

    Lloyd's algorithm: every point joins its most similar centre, every centre becomes the normalised
    sum of its points, until nothing changes. Initialisation is by k-means++ (each further centre is a
    point, drawn with probability proportional to 1 - its cosine with the nearest centre so far). A
    centre that loses all points moves to the point that fits worst.

    Args:
        points: unit vectors, (N, D) float32.
        count: number of centres.
        iterations: largest number of iterations per initialisation.
        restarts: number of initialisations, of which the best result is kept.
        seed: seed of the initialisations; equal seeds give equal ones on every device.

    Returns:
        (count, D) centres and the mean cosine.

    Raises:
        ValueError: if there are fewer points than centres.

    Example:
        >>> points = torch.tensor([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
        >>> spherical_kmeans(points, 2)[1]  # doctest: +ELLIPSIS
        0.96...
    """
    if not 0 < count <= len(points):
        raise ValueError(
            f"{count} clusters of {len(points)} points: expected at least 1 cluster, and no more "
            "clusters than points"
        )
    generator = torch.Generator().manual_seed(seed)
    best: tuple[Tensor, float] | None = None
    for _ in range(restarts):
        centres = _start(points, count, generator)
        previous = None
        for _ in range(iterations):
            cosine, nearest = _nearest(points, centres)
            if previous is not None and torch.equal(nearest, previous):
                break
            previous = nearest
            sums = _sums(points, nearest, count)
            empty = nearest.bincount(minlength=count) == 0
            if bool(empty.any()):
                sums[empty] = points[cosine.argsort()[: int(empty.sum())]]
            centres = F.normalize(sums, dim=1)
        score = _nearest(points, centres)[0].double().mean().item()
        if best is None or score > best[1]:
            best = (centres, score)
    assert best is not None
    return best


def _sums(points: Tensor, nearest: Tensor, count: int) -> Tensor:
    """The sum of each centre's points, (count, D), with an error independent of their number."""
    sums = torch.zeros(count, points.shape[1], dtype=exact(points.device), device=points.device)
    step = max(CHUNK // points.shape[1], 1)
    for part, own in zip(points.split(step), nearest.split(step), strict=True):
        sums.index_add_(0, own, part.to(sums))
    return sums.to(points)


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine with the most similar centre, (N,), and its number, (N,)."""
    parts = [(p @ centres.T).max(1) for p in points.split(max(CHUNK // len(centres), 1))]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def _start(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: (count, D)."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator, device="cpu"))]
    far = torch.full((len(points),), torch.inf, dtype=torch.float64, device="cpu")
    for _ in range(1, count):
        far = torch.minimum(far, 1 - (points @ points[chosen[-1]]).double().cpu()).clamp_min(0)
        # drawn by hand: torch.multinomial refuses more than 2**24 weights
        sums = far.cumsum(0)
        at = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu") * sums[-1]
        chosen.append(min(int(torch.searchsorted(sums, at, right=True)), len(points) - 1))
    return points[chosen].clone()
