"""Mitigators: what stands in for an outlier? `(tokens, mask, *, knobs) -> Tokens`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sfp.registry import op, suggest
from sfp.tokens import Tokens, upcast


@op("mitigator")
def neighbour_mean(
    tokens: Tokens, mask: Tensor, *, alone: Literal["nearest", "keep", "zero"] = "nearest"
) -> Tokens:
    """Each outlier becomes the mean of those of its eight neighbours that are none.

    Args:
        mask: outliers, (B, N) bool.
        alone: what an outlier without such a neighbour becomes: the mean of the "nearest" patches
            that are no outliers (by rings around it); its own value ("keep", SC-CLIP's release); or
            the "zero" vector (SFP's release, whose next normalisation then gives NaN).
    """
    if alone not in ("nearest", "keep", "zero"):
        raise ValueError(
            f"neighbour_mean: unknown alone={alone!r}{suggest(alone, ('nearest', 'keep', 'zero'))}"
        )
    far = float(sum(tokens.grid))
    ring = rings(tokens.grid, mask.device).expand(len(mask), -1, -1)  # (B, N, N)
    ring = ring.masked_fill(mask[:, None], far)
    nearest = ring.amin(-1, keepdim=True)  # (B, N, 1)
    reach = nearest < far if alone == "nearest" else nearest <= 1
    givers = (ring == nearest) & reach
    weights = upcast(givers.to(tokens.data.dtype))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    means = (weights @ upcast(tokens.patches)).to(tokens.data.dtype)
    replaced = mask[..., None] if alone == "zero" else mask[..., None] & reach
    return tokens.with_patches(torch.where(replaced, means, tokens.patches))


def rings(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Chebyshev distance between the patches of a grid: (N, N), 1 for the eight neighbours."""
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    cols = torch.arange(grid[1], device=device).repeat(grid[0])
    apart = [(x[:, None] - x[None]).abs() for x in (rows, cols)]
    return torch.maximum(*apart).float()
