"""Parts of attention maps without the maps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.tokens import upcast

CHUNK = 2**24  # attention logits held at once


def diagonal_weights(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The diagonal of softmax(scale * q k^T) in chunks of rows: (B, H, T, d) -> (B, H, T)."""
    q, k = upcast(q) * scale, upcast(k)
    rows = max(CHUNK // (k.shape[0] * k.shape[1] * k.shape[2]), 1)
    totals = [(part @ k.mT).logsumexp(-1) for part in q.split(rows, dim=2)]
    return ((q * k).sum(-1) - torch.cat(totals, dim=-1)).exp()


def centred_softmax(similarity: Tensor, gain: float, centre: float) -> Tensor:
    """softmax(gain * (S - centre * mean S)) over what lies at or above the centre.

    The mean is over the rows and columns of each map, never over the batch. A row that has nothing
    above the centre (the released codes divide by zero there) becomes uniform.

    Args:
        similarity: S, (..., M, T).
        gain: inverse temperature (3 in ProxyCLIP, SC-CLIP and SFP).
        centre: factor on the mean (1.2 in ProxyCLIP, 1 in SC-CLIP and SFP).
    """
    logits = gain * (similarity - centre * similarity.mean((-2, -1), keepdim=True))
    # the lowest finite number instead of -inf: equal where a row has survivors, no NaN where not
    return logits.masked_fill(logits < 0, torch.finfo(logits.dtype).min).softmax(-1)


def mean_cosine(*projections: Tensor) -> Tensor:
    """Cosines between tokens, averaged over projections and heads: (B, H, T, d) each -> (B, T, T)."""
    units = (F.normalize(upcast(x), dim=-1) for x in projections)
    return torch.stack([x @ x.mT for x in units]).mean((0, 2))


def gaussian_prior(grid: tuple[int, int], std: float, device: torch.device | None = None) -> Tensor:
    """exp(-d^2 / (2 std^2)) of the distance d between patches, in patches: (N, N)."""
    sides = []
    for n in grid:
        x = torch.arange(n, device=device, dtype=torch.float32)
        sides.append((-(x[:, None] - x).square() / (2 * std**2)).exp())
    return torch.kron(*sides)  # a Gaussian is the product of its two sides


def pad_prefix(prior: Tensor, prefix: int) -> Tensor:
    """Zeros for the prefix tokens around a map of the patches: (..., N, N) -> (..., T, T)."""
    return F.pad(prior, (prefix, 0, prefix, 0))
