"""Rotary position embedding (RoPE) of patches: rotates queries and keys according to their position.

RoFormer (Su et al., arXiv:2104.09864), with half of the angles for rows and half for columns, as in
EVA-02 (arXiv:2303.11331) and the Perception Encoder (arXiv:2504.13181).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sfp.functional.kept import kept

BASE = 10000.0  # base of the frequencies


@dataclass(frozen=True)
class RopeConfig:
    """Coordinates for the rotation of queries and keys.

    Attributes:
        order: order of the coordinates, "yx" (EVA) or "xy" (PE).
        side: rows and columns of the grid of training.
        first: coordinate of the first row and column; 1 in PE towers with a class token, which is at 0.
        rescale: whether coordinates are scaled so that any grid covers `side`, as in EVA and in timm's
            PE; otherwise patches are counted from `first`, as in PE's own code. Both are the same on
            the grid of training.
    """

    order: Literal["yx", "xy"]
    side: int
    first: int = 0
    rescale: bool = True


class Rope(nn.Module):
    """Rotates pairs of neighbouring channels (a_0, a_1), (a_2, a_3), ... of a patch's q and k.

    The first half of the pairs is rotated by one coordinate, the second by the other; the angle is
    coordinate * 10000 ** (-i / (d / 4)), i = 0 ... d / 4 - 1. Prefix tokens are not rotated.

    Args:
        config: the coordinates.
        head_width: width d of an attention head, a multiple of 4.

    Attributes:
        rescale: as in `RopeConfig`; may be set.

    Raises:
        ValueError: if the width is not a multiple of 4.
    """

    def __init__(self, config: RopeConfig, head_width: int) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(
                f"rotary positions need heads of width 4, 8, 12, ..., not {head_width}"
            )
        self.head_width = head_width
        self.order, self.side, self.first = config.order, config.side, config.first
        self.rescale = config.rescale

    @property
    def config(self) -> RopeConfig:
        """The coordinates as they are now."""
        return RopeConfig(self.order, self.side, self.first, self.rescale)

    def angles(self, grid: tuple[int, int]) -> Tensor:
        """Rotation angles of the patches of a grid, (N, d / 2) float64 on the CPU."""
        return _angles(self.config, self.head_width, grid)

    def on(self, grid: tuple[int, int], prefix: int) -> Callable[[Tensor], Tensor]:
        """`forward` with a fixed grid and prefix."""
        return functools.partial(self, grid=grid, prefix=prefix)

    def forward(self, x: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
        """Rotates queries or keys (B, H, prefix + h * w, d), in float32 or more; keeps their dtype."""
        numbers = grid[0] * grid[1] * self.head_width
        turn = kept(numbers, _turns, x, self.config, self.head_width, grid)
        patches = x[:, :, prefix:].to(turn.real.dtype).unflatten(-1, (-1, 2))
        turned = torch.view_as_real(torch.view_as_complex(patches.contiguous()) * turn)
        turned = turned.flatten(-2).to(x.dtype)
        return torch.cat([x[:, :, :prefix], turned], dim=2) if prefix else turned


def _angles(config: RopeConfig, head_width: int, grid: tuple[int, int]) -> Tensor:
    sides = []
    for n in grid:
        at = torch.arange(n, dtype=torch.float64, device="cpu") + config.first
        sides.append(at * config.side / n if config.rescale else at)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    quarter = head_width // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    axes = (rows, columns) if config.order == "yx" else (columns, rows)
    return torch.cat([axis.reshape(-1, 1) * frequency for axis in axes], dim=1)


def _turns(like: Tensor, config: RopeConfig, head_width: int, grid: tuple[int, int]) -> Tensor:
    """The angles as complex numbers of length 1, (N, d / 2)."""
    kind = torch.complex128 if like.dtype == torch.float64 else torch.complex64
    angles = _angles(config, head_width, grid)
    return torch.polar(torch.ones_like(angles), angles).to(like.device, kind)
