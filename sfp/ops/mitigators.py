"""Mitigators replace outliers: `(tokens, mask, *, knobs) -> Tokens`.

`mask` marks outliers, (B, N) bool; the other patches are valid and not changed. An image without any
valid patch is not changed either, except by `zero`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sfp.functional.precision import upcast
from sfp.registry import op
from sfp.tokens import Tokens


@op("mitigator")
def neighbour_mean(
    tokens: Tokens, mask: Tensor, *, alone: Literal["nearest", "keep", "zero"] = "nearest"
) -> Tokens:
    """Each outlier becomes the mean of the valid ones among its eight neighbours.

    Args:
        mask: outliers, (B, N) bool.
        alone: replacement for an outlier without valid neighbours: the mean of the "nearest" valid
            patches (in rings around it), its own value ("keep", SC-CLIP's release), or the "zero"
            vector (SFP's release, where the next normalisation gives NaN).
    """
    givers, ring = nearest_ring(tokens.grid, mask)
    reach = ring.isfinite() if alone == "nearest" else ring <= 1  # (B, N, 1)
    weights = upcast((givers & reach).to(tokens.data.dtype))
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    means = (weights @ upcast(tokens.patches)).to(tokens.data.dtype)
    replaced = mask[..., None] if alone == "zero" else mask[..., None] & reach
    return tokens.with_patches(torch.where(replaced, means, tokens.patches))


@op("mitigator")
def median(tokens: Tokens, mask: Tensor) -> Tokens:
    """Each outlier becomes the channel-wise median of its nearest ring of valid patches.

    Unlike the mean, it is robust to an outlier among the neighbours that was not detected. For an even
    number of patches it is the mean of the middle two.
    """
    image, patch = (mask & ~mask.all(-1, keepdim=True)).nonzero(as_tuple=True)  # (M,) each
    if not len(image):
        return tokens
    givers = nearest_ring(tokens.grid, mask)[0][image, patch]  # (M, N)
    count = givers.sum(-1)  # (M,)
    chosen = givers.int().topk(int(count.max()), dim=-1)  # (M, K), givers first
    values = upcast(tokens.patches)[image[:, None], chosen.indices]  # (M, K, D)
    values = values.masked_fill(chosen.values[..., None] == 0, torch.inf).sort(1).values
    row = torch.arange(len(count), device=count.device)
    middle = (values[row, (count - 1) // 2] + values[row, count // 2]) / 2  # (M, D)
    patches = tokens.patches.clone()
    patches[image, patch] = middle.to(patches.dtype)
    return tokens.with_patches(patches)


@op("mitigator")
def nearest(tokens: Tokens, mask: Tensor) -> Tokens:
    """Each outlier becomes a copy of the nearest valid patch; of equally near ones the first."""
    rows, cols = offsets(tokens.grid, mask.device)
    far = (rows.square() + cols.square()) * mask.shape[1]  # (N, N)
    order = far + torch.arange(mask.shape[1], device=mask.device)  # without ties in a row
    order = order[None].masked_fill(mask[:, None], torch.iinfo(order.dtype).max)
    giver = order.argmin(-1)  # (B, N)
    copies = tokens.patches.gather(1, giver[..., None].expand_as(tokens.patches))
    replaced = mask & ~mask.all(-1, keepdim=True)
    return tokens.with_patches(torch.where(replaced[..., None], copies, tokens.patches))


@op("mitigator")
def inpaint(tokens: Tokens, mask: Tensor) -> Tokens:
    """Interpolates outliers smoothly from the valid patches, by solving Laplace's equation.

    Every outlier becomes the mean of its four neighbours, which may be outliers as well; the grid's
    border is free. This is one linear system with N unknowns per image.
    """
    rows, cols = offsets(tokens.grid, mask.device)
    x = upcast(tokens.patches)
    adjacent = (rows.abs() + cols.abs() == 1).to(x)  # (N, N)
    laplace = adjacent.sum(-1).diag() - adjacent
    replaced = (mask & ~mask.all(-1, keepdim=True))[..., None]  # (B, N, 1)
    # rows of the identity for valid patches, which are known; the Laplacian is 0 at outliers
    identity = torch.eye(len(laplace), device=x.device, dtype=x.dtype)
    system = torch.where(replaced, laplace, identity)  # (B, N, N)
    given = x.masked_fill(replaced, 0)
    # one at a time: after torch.set_num_threads, PyTorch 2.13 solves batches on the CPU wrongly
    solved = torch.stack([torch.linalg.solve(a, b) for a, b in zip(system, given, strict=True)]).to(
        tokens.data.dtype
    )
    return tokens.with_patches(torch.where(replaced, solved, tokens.patches))


@op("mitigator")
def zero(tokens: Tokens, mask: Tensor) -> Tokens:
    """Outliers become the zero vector, also in images without valid patches."""
    return tokens.with_patches(tokens.patches.masked_fill(mask[..., None], 0))


@op("mitigator")
def mask_attention(tokens: Tokens, mask: Tensor) -> Tokens:
    """Outliers keep their values, but no token attends to them in any of the following blocks.

    They are removed as keys from the trunk's attention, from the attention rules of readouts (their
    weights move to the other tokens) and from smoothers. They remain queries, so they are still
    computed from the other tokens. Marks from earlier layers are kept; marks that would leave an image
    without a visible patch are ignored.
    """
    before = torch.zeros_like(mask) if tokens.hidden is None else tokens.hidden
    hidden = before | mask
    return replace(tokens, hidden=torch.where(hidden.all(-1, keepdim=True), before, hidden))


def nearest_ring(grid: tuple[int, int], mask: Tensor) -> tuple[Tensor, Tensor]:
    """The valid patches on the first ring around each patch that contains any.

    Returns:
        (B, N, N) bool, whether patch j is one of those for patch i; and (B, N, 1), the number of the
        ring (1: the eight neighbours, 0: a valid patch itself, inf: the image has no valid patch).
    """
    ring = rings(grid, mask.device).masked_fill(mask[:, None], torch.inf)  # (B, N, N)
    first = ring.amin(-1, keepdim=True)  # (B, N, 1)
    return (ring == first) & first.isfinite(), first


def rings(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Chebyshev distance between the patches of a grid: (N, N), 1 for the eight neighbours."""
    rows, cols = offsets(grid, device)
    return torch.maximum(rows.abs(), cols.abs()).float()


def offsets(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Differences in rows and in columns between the patches of a grid, (N, N) each."""
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    cols = torch.arange(grid[1], device=device).repeat(grid[0])
    return rows[:, None] - rows, cols[:, None] - cols
