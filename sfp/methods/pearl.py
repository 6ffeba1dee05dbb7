"""PEARL: keys aligned with queries by a rotation, and text-aware propagation of the logits.

Code: github.com/PGSmall/PEARL. Its text-aware term multiplies by the diagonal of the queries'
similarity alone (`einsum("cc,bcij->bcij")`), so that it knows nothing of how classes relate; the
default here is the full matrix of the paper, `inter_class=False` the release. The other settings
(crops, thresholds) are NACLIP's without PAMR. The propagation stands where NACLIP's PAMR does, after
windows are merged; here it runs in each window, which is the same for whole images (`slide_crop=0`).
Not compared with a run of the official code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.clusters import resize
from sfp.functional.precision import upcast
from sfp.registry import METHODS, op
from sfp.tokens import Heads
from sfp.trace import Trace


@op("attention")
def aligned_keys(heads: Heads, trace: Trace, *, alpha: float = 0.08, steps: int = 0) -> Tensor:
    """softmax(s Q (K R)^T + alpha s K_c K_c^T), head by head, (B, H, T, T).

    R is the rotation that brings the centred keys K_c nearest to the centred queries; the means weight
    each patch by the norm of its query, and the class token by 0.

    Args:
        alpha: of the keys' own correlation.
        steps: of Newton-Schulz for R; 0 for a singular value decomposition.
    """
    q, k = upcast(heads.q), upcast(heads.k)
    weights = q.norm(dim=-1, keepdim=True).clone()  # (B, H, T, 1)
    weights[:, :, : heads.prefix] = 0
    weights = weights / weights.sum(2, keepdim=True)
    q_c, k_c = (x - (weights * x).sum(2, keepdim=True) for x in (q, k))
    rotation = orthogonal_factor(k_c.mT @ q_c, steps=steps)  # (B, H, d, d)
    logits = q @ (k @ rotation).mT + alpha * k_c @ k_c.mT
    return (heads.scale * logits).softmax(-1)


def orthogonal_factor(matrix: Tensor, *, steps: int = 0) -> Tensor:
    """The orthogonal matrix nearest to `matrix`, (..., d, d): U V^T of its singular vectors.

    Args:
        matrix: K^T Q gives the R with R^T R = 1 that makes |K R - Q| least.
        steps: 0 for the singular value decomposition; else that many Newton-Schulz steps
            X <- 1.5 X - 0.5 X X^T X, matrix products alone, which leave small singular values small.
    """
    if not steps:
        left, _, right = torch.linalg.svd(matrix)
        return left @ right
    tiny = torch.finfo(matrix.dtype).tiny
    x = matrix / torch.linalg.matrix_norm(matrix, keepdim=True).clamp_min(tiny)
    for _ in range(steps):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    return x


@op("refiner", words=True)
def text_aware_propagation(
    logits: Tensor,
    trace: Trace,
    *,
    size: int = 80,
    logit_scale: float = 40.0,
    edge: float = 5.0,
    tau: float = 1.0,
    steps: int = 25,
    inter_class: bool = True,
) -> Tensor:
    """Logits solve (rho + tau Laplacian) F = rho Z on a finer grid (PEARL's TLP), (B, Q, h', w').

    Confident cells hold their logits; neighbours of like colour and like meaning pull on each other.

    Args:
        size: the grid has about `size` x `size` cells, in the proportions of the patch grid, and
            never fewer than that.
        logit_scale: inverse temperature of the softmax over queries.
        edge: how fast a colour step cuts an edge.
        tau: strength of the pull.
        steps: of conjugate gradients.
        inter_class: whether cells of different but similar queries agree (the paper); False compares
            each query with itself alone, as the release's einsum does.
    """
    height, width = logits.shape[-2:]
    shape = (
        max(round(size * math.sqrt(height / width)), height),
        max(round(size * math.sqrt(width / height)), width),
    )
    z = resize(logits, shape)
    pixels = trace.image.to(z)
    image = F.interpolate(pixels, shape, mode="bilinear", align_corners=False, antialias=True)
    text = F.normalize(trace.query_features().to(z), dim=-1)
    similarity = (
        text @ text.T if inter_class else torch.eye(len(text), device=z.device, dtype=z.dtype)
    )
    p = (logit_scale * z).softmax(1)
    return propagate(z, *propagation_weights(image, p, similarity, edge=edge), tau=tau, steps=steps)


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


def agreement(p: Tensor, other: Tensor, similarity: Tensor) -> Tensor:
    """p_i^T S p_j of two cells' class probabilities (B, Q, ...) each, S (Q, Q): (B, 1, ...)."""
    return (p * torch.einsum("qr,br...->bq...", similarity, other)).sum(1, keepdim=True)


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


@METHODS.register_module()
def pearl(
    *,
    alpha: float = 0.08,
    newton_schulz: int = 0,
    propagate: bool = True,
    size: int = 80,
    tau: float = 1.0,
    steps: int = 25,
    inter_class: bool = True,
    logit_scale: float = 40.0,
) -> dict[str, Any]:
    """Attention output of the last block alone: no residual, no FFN. Needs the text features.

    Args:
        alpha: weight of the keys' own correlation; 0.3 on ADE20K and Cityscapes.
        newton_schulz: steps for the rotation (5 in the release's fast mode); 0 for an exact one.
        propagate: whether logits are propagated.
        size: side of the propagation's grid, in cells per window; 224 on Cityscapes.
        tau, steps: strength of the propagation and iterations of its solver.
        inter_class: False for the release's diagonal text term.
        logit_scale: inverse temperature of the probabilities that steer the propagation.
    """
    rule = dict(type="aligned_keys", alpha=alpha, steps=newton_schulz)
    refiner = dict(
        type="text_aware_propagation",
        size=size,
        tau=tau,
        steps=steps,
        inter_class=inter_class,
        logit_scale=logit_scale,
    )
    return dict(
        readouts=[dict(attention=rule, residual=None, ffn=False)],
        refiners=[refiner] if propagate else [],
    )
