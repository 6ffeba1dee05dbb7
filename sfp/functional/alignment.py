"""The rotation that brings one point set onto another (orthogonal Procrustes)."""

from __future__ import annotations

import torch
from torch import Tensor


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
