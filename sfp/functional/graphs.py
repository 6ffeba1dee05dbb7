"""Graphs of patches or pixels, and propagation of values along their edges (LPOSS).

F = Y + alpha W_n F, solved for F: every node combines its own value with those of its neighbours. The
function `propagate` works for a sparse matrix of patches and for a square stencil of pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**24  # similarities in memory at once


def propagate(
    spread: Callable[[Tensor], Tensor],
    values: Tensor,
    *,
    alpha: float = 0.95,
    steps: int = 10,
    tolerance: float = 1e-6,
) -> Tensor:
    """Solves (1 - alpha W) F = Y by conjugate gradients from 0, separately for each column.

    For alpha near 1 a few steps do not converge, so that the result depends on their number; LPOSS
    takes 10.

    Args:
        spread: x -> W x for x of the values' shape; W is symmetric, its eigenvalues at most 1.
        values: Y, (N, Q); columns are independent.
        alpha: weight of the neighbours' values; 0 returns Y.
        steps: largest number of steps.
        tolerance: a column stops when its residual is at most this times the norm of its Y.

    Returns:
        F, (N, Q).
    """
    target = values.norm(dim=0)  # (Q,)
    tiny = torch.finfo(values.dtype).tiny
    solution, residual = torch.zeros_like(values), values
    direction, left = residual, residual.square().sum(0)
    for _ in range(steps):
        going = left.sqrt() > tolerance * target
        if not bool(going.any()):
            break
        image = direction - alpha * spread(direction)
        stride = left / (direction * image).sum(0).clamp_min(tiny) * going
        solution = solution + stride * direction
        residual = residual - stride * image
        now = torch.where(going, residual.square().sum(0), left)
        direction, left = residual + now / left.clamp_min(tiny) * direction, now
    return solution


def normalised(degree: Tensor) -> Tensor:
    """D^-1/2 of the degrees; nodes without edges are treated as having degree 1."""
    return torch.where(degree > 0, degree, 1.0).rsqrt()


def neighbour_graph(
    features: Tensor, positions: Tensor, *, neighbours: int, power: float, decay: float
) -> Tensor:
    """W_n of the nearest neighbours in feature space, damped by distance: sparse (N, N).

    w_ij = max(0, f_i . f_j)^power exp(-decay |p_i - p_j|) for the `neighbours` j with the largest
    f_i . f_j, including i; then W + W^T, so that mutual pairs count twice; without loops;
    D^-1/2 W D^-1/2.

    Args:
        features: unit rows, (N, C).
        positions: positions of the nodes in pixels, (N, 2).
        neighbours: k; all nodes if there are fewer.
        power: gamma.
        decay: rate per pixel.
    """
    count, k = len(features), min(neighbours, len(features))
    rows, columns, weights = [], [], []
    step = max(CHUNK // count, 1)
    for start in range(0, count, step):
        similarity, nearest = (features[start : start + step] @ features.T).topk(k, dim=1)
        own = torch.arange(start, start + len(nearest), device=features.device)
        apart = (positions[own][:, None] - positions[nearest]).norm(dim=-1)  # (step, k)
        weights.append((similarity.clamp_min(0) ** power * (-decay * apart).exp()).flatten())
        rows.append(own.repeat_interleave(k))
        columns.append(nearest.flatten())
    row, column, weight = torch.cat(rows), torch.cat(columns), torch.cat(weights)
    edge = row != column
    row, column, weight = row[edge], column[edge], weight[edge]
    both = torch.sparse_coo_tensor(
        torch.stack([torch.cat([row, column]), torch.cat([column, row])]),
        torch.cat([weight, weight]),
        (count, count),
        device=weight.device,
        check_invariants=False,
    ).coalesce()
    scale = normalised(both.sum(1).to_dense())
    at = both.indices()
    values = both.values() * scale[at[0]] * scale[at[1]]
    return torch.sparse_coo_tensor(
        at, values, both.shape, device=at.device, is_coalesced=True, check_invariants=False
    )


@dataclass(frozen=True)
class PixelGraph:
    """W_n of the pixels in a square around each pixel, as a stencil.

    Attributes:
        weights: weights of the edges to the pixels at `offsets`, (edges, H, W), 0 outside the image;
            edges are symmetric.
        offsets: (row, column) of one from each pair of opposite neighbours.
    """

    weights: Tensor
    offsets: tuple[tuple[int, int], ...]

    @classmethod
    def of_colours(cls, lab: Tensor, *, side: int, tau: float) -> PixelGraph:
        """exp(-distance of colours / tau) between the pixels of a square, normalised.

        Args:
            lab: colours, (3, H, W), scaled for the distance.
            side: side of the square in pixels; odd.
            tau: scale of the distance.
        """
        reach = side // 2
        offsets = tuple(
            (y, x)
            for y in range(reach + 1)
            for x in range(-reach, reach + 1)
            if (y, x) > (0, 0)  # the others are opposite to one of these
        )
        weights = lab.new_zeros(len(offsets), *lab.shape[1:])
        degree = torch.zeros_like(lab[0])
        for edge, (here, there) in zip(weights, pairs(lab.shape[1:], offsets), strict=True):
            edge[here] = (-(lab[here] - lab[there]).norm(dim=0) / tau).exp()
            degree[here] += edge[here]
            degree[there] += edge[here]
        scale = normalised(degree)
        for edge, (here, there) in zip(weights, pairs(lab.shape[1:], offsets), strict=True):
            edge[here] *= scale[here] * scale[there]
        return cls(weights, offsets)

    def spread(self, values: Tensor) -> Tensor:
        """W x of values (Q, H, W)."""
        total = torch.zeros_like(values)
        both = zip(self.weights, pairs(values.shape[1:], self.offsets), strict=True)
        for edge, (here, there) in both:
            own = edge[here]
            total[here].addcmul_(own, values[there])
            total[there].addcmul_(own, values[here])
        return total


def pairs(size: tuple[int, ...], offsets: tuple[tuple[int, int], ...]) -> Iterator[tuple[Any, Any]]:
    """For each offset, indices of the pixels with such a neighbour, and of the neighbours."""
    height, width = size
    for y, x in offsets:
        rows = (slice(0, max(height - y, 0)), slice(y, None))
        columns = (slice(max(-x, 0), min(width, width - x)), slice(max(x, 0), width + min(x, 0)))
        if width <= abs(x):
            columns = (slice(0, 0), slice(0, 0))
        yield (..., rows[0], columns[0]), (..., rows[1], columns[1])


def lab_of_rgb(rgb: Tensor) -> Tensor:
    """CIE L*a*b* under D65 of sRGB colours in 0..1, (3, H, W)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp_min(0) + 0.055) / 1.055) ** 2.4)
    matrix = rgb.new_tensor(
        [
            [0.412453, 0.357580, 0.180423],
            [0.212671, 0.715160, 0.072169],
            [0.019334, 0.119193, 0.950227],
        ]
    )
    white = rgb.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    xyz = torch.einsum("cd,dhw->chw", matrix, linear) / white
    small = (6 / 29) ** 3
    f = torch.where(xyz > small, xyz.clamp_min(small) ** (1 / 3), xyz * (841 / 108) + 4 / 29)
    x, y, z = f
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])
