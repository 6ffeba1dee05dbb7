"""Logits that flow along image and text similarity on a grid (PEARL's text-aware propagation)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, *, steps: int
) -> Tensor:
    """Solves A x = target for a symmetric positive definite A over the last two dimensions.

    Every map (h, w) has steps of its own, so that none depends on the others.

    Args:
        apply: x -> A x.
        target: (..., h, w).
        start: where to begin.
        steps: iterations; a map that is solved earlier stays as it is.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    tiny = torch.finfo(target.dtype).tiny
    x, residual = start, target - apply(start)
    direction, left = residual, dot(residual, residual)
    for _ in range(steps):
        image = apply(direction)
        stride = left / dot(direction, image).clamp_min(tiny)
        x, residual = x + stride * direction, residual - stride * image
        now = dot(residual, residual)
        direction, left = residual + now / left.clamp_min(tiny) * direction, now
    return x


def laplacian(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j) over the four neighbours, (..., h, w).

    Args:
        x: maps.
        down: weights of the edges to the cell below, (..., h - 1, w).
        right: of those to the cell on the right, (..., h, w - 1).
    """
    fall = down * (x[..., :-1, :] - x[..., 1:, :])
    run = right * (x[..., :-1] - x[..., 1:])
    below, beside = F.pad(fall, (0, 0, 0, 1)), F.pad(run, (0, 1))
    return below - F.pad(fall, (0, 0, 1, 0)) + beside - F.pad(run, (1, 0))


def agreement(p: Tensor, other: Tensor, similarity: Tensor) -> Tensor:
    """p_i^T S p_j of two cells' class probabilities (B, Q, ...) each, S (Q, Q): (B, 1, ...)."""
    return (p * torch.einsum("qr,br...->bq...", similarity, other)).sum(1, keepdim=True)


def propagation_weights(
    image: Tensor, p: Tensor, similarity: Tensor, *, edge: float = 5.0, floor: float = 0.05
) -> tuple[Tensor, Tensor, Tensor]:
    """What a cell holds on to, and how strongly neighbours pull on it.

    Args:
        image: (B, C, h, w).
        p: class probabilities, (B, Q, h, w).
        similarity: S of the queries, (Q, Q).
        edge: how fast a colour step, over the image's mean step, cuts an edge.
        floor: least confidence.

    Returns:
        Confidences max(p, floor)^2 (1 + p_i^T S p_i), (B, 1, h, w), and the edges
        exp(-edge |step| / mean) (1 + p_i^T S p_j) downwards (B, 1, h - 1, w) and to the right
        (B, 1, h, w - 1).
    """
    hold = p.amax(1, keepdim=True).clamp_min(floor).square() * (1 + agreement(p, p, similarity))
    steps = [image.diff(dim=dim).abs().mean(1, keepdim=True) for dim in (2, 3)]
    both = torch.cat([step.flatten(1) for step in steps], dim=1)  # (B, edges)
    mean = both.mean(1)[:, None, None, None].clamp_min(torch.finfo(both.dtype).tiny)
    down, right = ((-edge * step / mean).exp() for step in steps)
    down = down * (1 + agreement(p[:, :, :-1], p[:, :, 1:], similarity))
    right = right * (1 + agreement(p[..., :-1], p[..., 1:], similarity))
    return hold, down, right


def propagate(
    logits: Tensor,
    hold: Tensor,
    down: Tensor,
    right: Tensor,
    *,
    tau: float = 1.0,
    steps: int = 25,
) -> Tensor:
    """Solves (hold + tau * Laplacian) F = hold * logits for F, (B, Q, h, w)."""
    return conjugate_gradients(
        lambda x: hold * x + tau * laplacian(x, down, right), hold * logits, logits, steps=steps
    )
