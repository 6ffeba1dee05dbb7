"""PEARL: keys aligned with queries by a rotation, and text-aware propagation of the logits.

Code: github.com/PGSmall/PEARL. Its text-aware term uses only the diagonal of the queries' similarity
matrix (`einsum("cc,bcij->bcij")`) and so ignores relations between classes. The default here is the
paper's full matrix; `inter_class=False` is the release. The other settings (crops, thresholds) are
NACLIP's without PAMR. The release propagates after windows are merged, where NACLIP runs PAMR; here
logits propagate in each window, which is the same for whole images (`slide_crop=0`). Not compared with
a run of the official code.
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

    R is the rotation that brings the centred keys K_c closest to the centred queries. The subtracted
    means weight each patch by the norm of its query, and the class token by 0.

    Args:
        alpha: weight of the keys' own correlation.
        steps: Newton-Schulz steps for R; 0 for a singular value decomposition.
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
        matrix: for K^T Q, the result is the R with R^T R = 1 that minimises |K R - Q|.
        steps: 0 for the singular value decomposition, else the number of Newton-Schulz steps
            X <- 1.5 X - 0.5 X X^T X. These need only matrix products, but leave small singular values
            small.
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
    """Solves (rho + tau Laplacian) F = rho Z for F on a finer grid (PEARL's TLP), (B, Q, h', w').

    Confident cells keep their logits Z; neighbours of similar colour and class are drawn together.

    Args:
        size: the grid has about `size` x `size` cells in the aspect ratio of the patch grid, and at
            least as many cells as the patch grid.
        logit_scale: inverse temperature of the softmax over queries.
        edge: how fast the weight of an edge decays with the colour difference.
        tau: strength of the propagation.
        steps: number of conjugate gradient steps.
        inter_class: whether cells of different but similar queries agree (the paper); False compares
            each query only with itself, as the release's einsum does.
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
    """Confidences of the cells, and edge weights between neighbours.

    Args:
        image: (B, C, h, w).
        p: class probabilities, (B, Q, h, w).
        similarity: similarities S of the queries, (Q, Q).
        edge: how fast edge weights decay with the colour difference over its mean in the image.
        floor: lower bound of the confidence.

    Returns:
        Confidences max(p, floor)^2 (1 + p_i^T S p_i), (B, 1, h, w), and the weights of the edges
        exp(-edge |difference| / mean) (1 + p_i^T S p_j), downwards (B, 1, h - 1, w) and to the right
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
    """p_i^T S p_j for class probabilities (B, Q, ...) of two cells and S (Q, Q): (B, 1, ...)."""
    return (p * torch.einsum("qr,br...->bq...", similarity, other)).sum(1, keepdim=True)


def laplacian(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """sum_j w_ij (x_i - x_j) over the four neighbours, (..., h, w).

    Args:
        x: maps, (..., h, w).
        down: weights of the edges to the cell below, (..., h - 1, w).
        right: weights of the edges to the cell on the right, (..., h, w - 1).
    """
    fall = down * (x[..., :-1, :] - x[..., 1:, :])
    run = right * (x[..., :-1] - x[..., 1:])
    below, beside = F.pad(fall, (0, 0, 0, 1)), F.pad(run, (0, 1))
    return below - F.pad(fall, (0, 0, 1, 0)) + beside - F.pad(run, (1, 0))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, *, steps: int
) -> Tensor:
    """Solves A x = target for a symmetric positive definite A over the last two dimensions.

    Every map (h, w) has its own step sizes, so that none depends on the others.

    Args:
        apply: function x -> A x.
        target: right-hand side, (..., h, w).
        start: initial x, (..., h, w).
        steps: number of iterations; a map that converges earlier no longer changes.
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
        newton_schulz: Newton-Schulz steps for the rotation (5 in the release's fast mode); 0 computes
            it exactly.
        propagate: whether logits are propagated.
        size: side of the propagation's grid, in cells per window; 224 on Cityscapes.
        tau, steps: strength of the propagation and iterations of its solver.
        inter_class: False for the release's diagonal text term.
        logit_scale: inverse temperature of the probabilities used in the propagation.
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
