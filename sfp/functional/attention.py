"""Functions of attention weights, some without computing the full map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast

CHUNK = 2**24  # attention logits held at once


def hide(weights: Tensor, hidden: Tensor) -> Tensor:
    """Sets hidden columns of weights (..., M, T) to zero and rescales each row to its former sum.

    A row with weight only on hidden columns is not changed.

    Args:
        weights: not negative.
        hidden: bool, of a shape that broadcasts to the weights'.
    """
    shown = weights.masked_fill(hidden, 0)
    left = shown.sum(-1, keepdim=True)
    scaled = shown * (weights.sum(-1, keepdim=True) / left.clamp_min(torch.finfo(left.dtype).tiny))
    return torch.where(left > 0, scaled, weights)


def diagonal_weights(q: Tensor, k: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    """The diagonal of softmax(scale * q k^T) in chunks of rows: (B, H, T, d) -> (B, H, T).

    Keys that are `hidden`, (B, 1, 1, T) bool, are excluded; their own weight is 0.
    """
    q, k = upcast(q) * scale, upcast(k)
    rows = max(CHUNK // (k.shape[0] * k.shape[1] * k.shape[2]), 1)
    own = (q * k).sum(-1)  # (B, H, T)
    if hidden is None:
        totals = [(part @ k.mT).logsumexp(-1) for part in q.split(rows, dim=2)]
        return (own - torch.cat(totals, dim=-1)).exp()
    totals = [
        (part @ k.mT).masked_fill(hidden, -torch.inf).logsumexp(-1) for part in q.split(rows, dim=2)
    ]
    return (own - torch.cat(totals, dim=-1)).exp().masked_fill(hidden[:, 0], 0)


def centred_softmax(similarity: Tensor, gain: float, centre: float) -> Tensor:
    """softmax(gain * (S - centre * mean S)) over the entries at or above centre * mean S.

    The mean is over the rows and columns of each map, never over the batch. A row without such entries
    (where the released codes divide by zero) becomes uniform.

    Args:
        similarity: S, (..., M, T).
        gain: inverse temperature (3 in ProxyCLIP, SC-CLIP and SFP).
        centre: factor on the mean (1.2 in ProxyCLIP, 1 in SC-CLIP and SFP).
    """
    logits = gain * (similarity - centre * similarity.mean((-2, -1), keepdim=True))
    # the lowest finite number instead of -inf: the same result, but no NaN in rows without entries
    return logits.masked_fill(logits < 0, torch.finfo(logits.dtype).min).softmax(-1)


def anchored_softmax(
    similarity: Tensor, mean: Tensor, beta: float, gamma: Tensor | float
) -> Tensor:
    """softmax(gamma * (a - beta * mean)) where that is not negative, rows (m, M).

    A row that is negative everywhere keeps only its largest entry.

    Args:
        similarity: a, (m, M).
        mean: (m, 1) or a number.
        beta: factor on the mean.
        gamma: (m, 1) or a number, positive.
    """
    logits = (similarity - beta * mean) * gamma
    least = logits.amax(1, keepdim=True).clamp_max(0)
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


def mean_cosine(*projections: Tensor, concat: bool = False) -> Tensor:
    """Cosines between tokens, averaged over projections and heads: (B, H, T, d) each -> (B, T, T).

    Args:
        *projections: queries, keys, ...
        concat: concatenate the heads of a projection into one vector.
    """
    if concat:
        projections = tuple(x.transpose(1, 2).flatten(2)[:, None] for x in projections)
    return _mean_product([F.normalize(upcast(x), dim=-1) for x in projections])


def mean_product(*projections: Tensor) -> Tensor:
    """Inner products over sqrt(d), averaged as in `mean_cosine`: (B, H, T, d) each -> (B, T, T)."""
    return _mean_product([upcast(x) for x in projections]) * projections[0].shape[-1] ** -0.5


def _mean_product(projections: Sequence[Tensor]) -> Tensor:
    # the mean of products is the product of the concatenated vectors: no separate map per head
    heads = torch.cat(list(projections), dim=1)
    rows = heads.transpose(1, 2).flatten(2)  # (B, T, projections * H * d)
    return rows @ rows.mT / heads.shape[1]


def gaussian_prior(grid: tuple[int, int], std: float, device: torch.device | None = None) -> Tensor:
    """exp(-d^2 / (2 std^2)) of the distance d between patches, in patches: (N, N)."""
    sides = []
    for n in grid:
        x = torch.arange(n, device=device, dtype=torch.float32)
        sides.append((-(x[:, None] - x).square() / (2 * std**2)).exp())
    return torch.kron(*sides)  # a Gaussian is the product of its two sides


def pad_prefix(prior: Tensor, prefix: int) -> Tensor:
    """Adds zeros for the prefix tokens to a map of the patches: (..., N, N) -> (..., T, T)."""
    return F.pad(prior, (prefix, 0, prefix, 0))
