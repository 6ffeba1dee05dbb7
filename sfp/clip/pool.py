"""Attention pools, between the patches and the joint space in SigLIP, PE and CoCa.

A learned query attends to all tokens, which gives the image's embedding. Dense features use the same
path for single tokens, for which the softmax is 1: a token contributes W_o (W_v x + b_v) + b_o,
followed by whatever follows the attention. For CLIP this is MaskCLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfp.clip.blocks import (
    Linear,
    Rule,
    drawn,
    fused_attention,
    linear,
    mlp,
    weighted_values,
)
from sfp.functional.attention import hide
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace


@dataclass(frozen=True)
class PoolConfig:
    """The sizes of an `AttentionPool`.

    Attributes:
        width: width E of queries, keys, values and the result.
        heads: number of attention heads; None for as many as the blocks have.
        hidden: width of the MLP's hidden layer; None for no MLP (CoCa).
        norm: whether the result is normalised at the end (CoCa).
    """

    width: int
    heads: int | None = None
    hidden: int | None = None
    norm: bool = False


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens.

    The query is a constant, so its projection is stored instead. Of CoCa's 256 queries only the first
    contributes to the image's embedding.

    Args:
        config: sizes.
        width: token width D.
        heads: number of attention heads.
        activation: activation of the MLP, a key of `ACTIVATIONS`.
        eps: epsilon of the norms.
    """

    def __init__(
        self, config: PoolConfig, width: int, heads: int, activation: str, eps: float
    ) -> None:
        super().__init__()
        if config.width % heads:
            raise ValueError(f"a pool of width {config.width} cannot be divided into {heads} heads")
        self.width, self.num_heads = config.width, heads
        self.query = drawn(config.width, std=1.0)
        self.in_proj_weight = drawn(2 * config.width, width, std=width**-0.5)  # keys, then values
        self.in_proj_bias = nn.Parameter(torch.zeros(2 * config.width))
        self.out_proj = Linear(config.width, config.width)
        self.ln = self.mlp = None
        if config.hidden is not None:
            self.ln = nn.LayerNorm(config.width, eps)
            self.mlp = mlp(config.width, activation, config.hidden)
        self.norm = nn.LayerNorm(config.width, eps) if config.norm else None

    def forward(self, x: Tokens) -> Tensor:
        """The query's output for normalised tokens (B, T, D), before the MLP: (B, E)."""
        heads = self.heads(x)
        query = self.query.unflatten(0, (self.num_heads, 1, -1)).expand(len(x.data), -1, -1, -1)
        mixed = fused_attention(query, heads.k, heads.v, hidden=heads.hidden_keys)  # (B, 1, E)
        return self.out_proj(mixed[:, 0])

    def attention(self, x: Tokens) -> Tensor:
        """The attention weights of the query, (B, H, T)."""
        heads = self.heads(x)
        query = self.query.unflatten(0, (self.num_heads, 1, -1)).expand(len(x.data), -1, -1, -1)
        return heads.similar(query, heads.k).softmax(-1)[:, :, 0]

    def values(self, x: Tensor) -> Tensor:
        """The contributions of single tokens, (B, T, D) -> (B, T, E)."""
        rows = slice(self.width, None)
        return self.out_proj(linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows]))

    def finish(self, y: Tensor, use_mlp: bool = True) -> Tensor:
        """What follows the attention: MLP with its residual, norm; (..., E) -> (..., E)."""
        if self.mlp is not None and self.ln is not None and use_mlp:
            y = y + self.mlp(self.ln(y))
        return y if self.norm is None else self.norm(y)

    def heads(self, x: Tokens) -> Heads:
        """Keys and values of normalised tokens. Since there is only one query, q is the keys."""
        scale = (self.width // self.num_heads) ** -0.5
        return Heads(
            self._project,
            x.data,
            scale,
            x.grid,
            x.prefix,
            x.hidden,
            join=self.out_proj,
            pooled=True,
        )

    def read(
        self,
        x: Tokens,
        *,
        attention: Rule,
        trace: Trace,
        heads: Heads | None = None,
        residual: Tensor | None = None,
        layout: Tokens | None = None,
    ) -> Tokens:
        """A separate output for every token: W_o sum_j A_ij v_j + b_o, (B, M, E).

        Args:
            x: normalised tokens.
            attention: rule for the weights A.
            trace: trace that the rule may use.
            heads: projections for the rule instead of the pool's keys; if they have another number of
                heads, the mean of their weights is used.
            residual: (B, T or 1, E) added to the result, or None.
            layout: as in `Block.read`.
        """
        own = self.heads(x)
        weights = attention(heads or own, trace)
        if weights.shape[1] not in (1, self.num_heads):
            weights = weights.mean(1, keepdim=True)
        if (hidden := own.hidden_keys) is not None:
            weights = hide(weights, hidden)
        y = self.out_proj(weighted_values(weights, own.v))
        return (layout or x).with_data(y if residual is None else y + residual)

    def _project(self, x: Tensor, names: str = "qkv") -> tuple[Tensor, ...]:
        """As `HeadProjections.project`."""
        chosen = "".join(sorted(set(names.replace("q", "k"))))
        start = "kv".index(chosen) * self.width
        rows = slice(start, start + len(chosen) * self.width)
        out = linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
        made = out.unflatten(-1, (len(chosen), self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        of = dict(zip(chosen, made.unbind(0), strict=True))
        return tuple(of["k" if name == "q" else name] for name in names)
