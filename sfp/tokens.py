"""Tokens with their grid, and the projections of one block.

Letters used for shapes everywhere: `B` windows, `H` heads, `P` prefix tokens (CLS), `N = h * w`
patches, `T = P + N` tokens, `D` width, `d` head width, `C` embedding, `Q` text queries, `K` classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast


@dataclass(frozen=True)
class Tokens:
    """A batch of token sequences, prefix first, then the patches in row-major order.

    Attributes:
        data: (B, T, D).
        grid: patch rows and columns (h, w).
        prefix: number of tokens before the patches.
        hidden: patches that no token attends to from here on, (B, N) bool, never all of an image;
            None hides none. Set by the mitigator `mask_attention`, and passed on with the tokens.
        stand_in: computes a substitute class token (B, 1, D) in towers without one; None if there is
            no substitute.
        pooled: whether they have been through the tower's attention pool.

    Raises:
        ValueError: if `data` does not hold `prefix + h * w` tokens.
    """

    data: Tensor
    grid: tuple[int, int]
    prefix: int = 1
    hidden: Tensor | None = None
    stand_in: Callable[[Tokens], Tensor] | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        expected = self.prefix + self.grid[0] * self.grid[1]
        if self.data.ndim != 3 or self.data.shape[1] != expected:
            raise ValueError(
                f"tokens of shape {tuple(self.data.shape)} do not fit a {self.grid[0]}x{self.grid[1]} "
                f"grid with {self.prefix} prefix token(s): expected (B, {expected}, D)"
            )

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """Concatenates batches with equal layouts."""
        hidden = [x.hidden for x in parts if x.hidden is not None]
        return replace(
            parts[0],
            data=torch.cat([x.data for x in parts]),
            hidden=torch.cat(hidden) if hidden else None,
        )

    def __getitem__(self, images: slice) -> Tokens:
        """Some images of the batch."""
        hidden = None if self.hidden is None else self.hidden[images]
        return replace(self, data=self.data[images], hidden=hidden)

    @property
    def cls(self) -> Tensor:
        """The class token or its substitute, (B, 1, D).

        Raises:
            ValueError: if there is neither.
        """
        if self.prefix:
            return self.data[:, :1]
        if self.stand_in is None:
            raise ValueError("these tokens have no class token: they are patches only")
        return self.stand_in(self)

    @property
    def patches(self) -> Tensor:
        """(B, N, D)."""
        return self.data[:, self.prefix :]

    def as_map(self) -> Tensor:
        """The patches as a feature map, (B, D, h, w)."""
        return self.patches.mT.unflatten(2, self.grid)

    def with_data(self, data: Tensor) -> Tokens:
        """Tokens with the same layout and other values, (B, T, any width)."""
        return replace(self, data=data)

    def with_patches(self, patches: Tensor) -> Tokens:
        """Tokens with the same prefix and other patches, (B, N, D)."""
        return replace(self, data=torch.cat([self.data[:, : self.prefix], patches], dim=1))

    def only_patches(self) -> Tokens:
        """The same tokens without their prefix."""
        return replace(self, data=self.patches, prefix=0)

    def with_cls(self) -> Tokens:
        """The same tokens preceded by a class token, or by its substitute if they have none.

        Raises:
            ValueError: if there is neither.
        """
        if self.prefix:
            return self
        return replace(self, data=torch.cat([self.cls, self.data], dim=1), prefix=1)


@dataclass(frozen=True)
class Heads:
    """One block's projections of its input tokens, each computed on first use.

    Attributes:
        project: computes projections of `x` by name, adjacent in "qkv": (B, H, T, d) each.
        x: (B, T, D), the normalised tokens that are projected.
        scale: factor on the attention logits, d ** -0.5.
        grid, prefix, hidden: as in `Tokens`.
        rotate: applies rotary position embedding to queries and keys (`sfp.clip.rope`), or None.
        join: turns the concatenated outputs of the heads, (B, M, D), into the output of the attention.
        pooled: whether this is the attention of a pool (`Tokens.pooled`).
    """

    project: Callable[[Tensor, str], tuple[Tensor, ...]]
    x: Tensor
    scale: float
    grid: tuple[int, int]
    prefix: int
    hidden: Tensor | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    join: Callable[[Tensor], Tensor] = lambda mixed: mixed
    pooled: bool = False
    _made: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def q(self) -> Tensor:
        """Queries, (B, H, T, d)."""
        return self._make("q")

    @property
    def k(self) -> Tensor:
        """Keys, (B, H, T, d)."""
        return self._make("k")

    @property
    def v(self) -> Tensor:
        """Values, (B, H, T, d)."""
        return self._make("v")

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, computed by one product if none exists yet."""
        if not self._made:
            for name, x in zip("qkv", self.project(self.x, "qkv"), strict=True):
                self._made[name] = self._placed(name, x)
        return self.q, self.k, self.v

    def _make(self, name: str) -> Tensor:
        if name not in self._made:
            (x,) = self.project(self.x, name)
            self._made[name] = self._placed(name, x)
        return self._made[name]

    def _placed(self, name: str, x: Tensor) -> Tensor:
        return x if self.rotate is None or name == "v" else self.rotate(x)

    def unrotated(self) -> Heads:
        """The same projections without rotary positions."""
        return replace(self, rotate=None)

    @property
    def hidden_keys(self) -> Tensor | None:
        """`hidden` for all tokens, broadcastable to attention weights: (B, 1, 1, T) bool."""
        if self.hidden is None:
            return None
        return F.pad(self.hidden, (self.prefix, 0))[:, None, None]

    def logits(self, a: str, b: str) -> Tensor:
        """Scaled products of two projections, e.g. `logits("q", "k")`: (B, H, T, T), >= float32.

        Columns of hidden tokens hold the lowest finite number, which softmax turns into 0.
        """
        return self.similar(getattr(self, a), getattr(self, b))

    def similar(self, a: Tensor, b: Tensor) -> Tensor:
        """Like `logits`, of two tensors (B, H, M, d) and (B, H, T, d): (B, H, M, T)."""
        products = (upcast(a) * self.scale) @ upcast(b).mT
        if (hidden := self.hidden_keys) is None:
            return products
        return products.masked_fill(hidden, torch.finfo(products.dtype).min)


def cosine_logits(features: Tokens, text: Tensor) -> Tensor:
    """Cosine of patch features with unit queries (Q, C): (B, Q, h, w) in at least float32."""
    unit = F.normalize(upcast(features.patches), dim=-1)  # (B, N, C)
    return (unit @ text.to(unit).T).mT.unflatten(2, features.grid)
