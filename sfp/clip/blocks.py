"""The blocks of the towers: attention, MLP and the residual stream, under OpenAI's parameter names."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.dispatch import unshared
from sfp.clip.onednn import linear
from sfp.clip.rope import Rope
from sfp.functional.attention import hide
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

Rule = Callable[[Heads, Trace], Tensor]
"""An attention rule: (heads, trace) -> weights, (B, H or 1, M, T)."""

HEAD_WIDTH = 64  # in all CLIP towers except the image towers of open_clip's largest models


class Linear(nn.Linear):
    """`nn.Linear` with oneDNN where that is faster."""

    allocates = True  # a new tensor for its output

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    allocates = True

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return F.silu(x * 1.702) * (1 / 1.702)

    def forward_(self, x: Tensor) -> Tensor:
        """The same, in place."""
        return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


class MLP(nn.Sequential):
    """A block's MLP. Its hidden layer, the widest tensor of a block, is activated in place."""

    allocates = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); never overwrites tensors needed by a hook or for gradients."""
        before: nn.Module | None = None
        for layer in self:
            if (
                isinstance(layer, QuickGELU)
                and before is not None
                and not x.requires_grad
                and unshared(before, layer)
            ):
                x = layer.forward_(x)
            else:
                x = layer(x)
            before = layer
        return x


def mlp(width: int, activation: str, hidden: int, after: nn.Module | None = None) -> MLP:
    """The MLP of a block: two linear layers with an activation, a key of `ACTIVATIONS`, in between.

    In post-norm blocks a norm, `after`, follows.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        c_fc=Linear(width, hidden),
        gelu=ACTIVATIONS[activation](),
        c_proj=Linear(hidden, width),
    )
    if after is not None:
        layers["after"] = after
    return MLP(layers)


class GatedMLP(nn.Module):
    """SwiGLU: c_proj(norm(silu(gate) * value)), where `c_fc` computes both (arXiv:2002.05202).

    Args:
        width: token width D.
        hidden: width of gate and value.
        eps: epsilon of the norm; None for no norm.
    """

    allocates = True

    def __init__(self, width: int, hidden: int, eps: float | None = None) -> None:
        super().__init__()
        self.c_fc = Linear(width, 2 * hidden)
        self.norm = None if eps is None else nn.LayerNorm(hidden, eps)
        self.c_proj = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        y = F.silu(gate) * value
        return self.c_proj(y if self.norm is None else self.norm(y))


class HeadProjections(nn.Module):
    """The input projections (queries, keys, values) and the output projection of attention.

    Args:
        heads: number of attention heads.
        out_proj: linear layer (B, T, D) -> (B, T, D).
        norm: norm of the heads' output before `out_proj`, (B, T, D) -> (B, T, D); None for none.
        after: norm after `out_proj`; None for none.
    """

    def __init__(
        self,
        heads: int,
        out_proj: nn.Module,
        norm: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm = norm
        self.out_proj = out_proj
        self.after = after

    def join(self, mixed: Tensor) -> Tensor:
        """The attention's output (B, T, D) from the concatenated outputs of the heads, (B, T, D)."""
        y = self.out_proj(mixed if self.norm is None else self.norm(mixed))
        return y if self.after is None else self.after(y)

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`, (B, T, D) -> (B, T, rows)."""
        raise NotImplementedError

    def project(self, x: Tensor, names: str = "qkv") -> tuple[Tensor, ...]:
        """Some of the queries, keys and values of `x`, each (B, H, T, d), by one product.

        Args:
            x: (B, T, D).
            names: contiguous part of "qkv".
        """
        width = x.shape[-1]
        start = "qkv".index(names) * width
        out = self.linear(x, slice(start, start + len(names) * width))
        return out.unflatten(-1, (len(names), self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(HeadProjections):
    """The weights of multi-head attention, packed as in `nn.MultiheadAttention`.

    Args:
        width: token width D.
        heads: number of attention heads.
        norm, after: see `HeadProjections`.
    """

    out_proj: Linear

    def __init__(
        self,
        width: int,
        heads: int,
        norm: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__(heads, Linear(width, width), norm, after)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`."""
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])


class Block(nn.Module):
    """A residual attention block: x + attention(ln_1(x)), then x + mlp(ln_2(x)).

    In a post-norm block (EVA02-E) the norms are the last layers of attention and MLP, and `ln_1` and
    `ln_2` leave tokens as they are.

    Args:
        width: token width D.
        heads: number of attention heads.
        activation: activation of the MLP, a key of `ACTIVATIONS`, or "swiglu".
        hidden: width of the MLP's hidden layer, 4 D by default.
        eps: epsilon of the norms.
        inner_norms: whether the heads' output and the hidden layer of a SwiGLU are normalised (EVA-02).
        post_norm: whether norms come after attention and MLP instead of before them.
        rope: rotary position embedding of queries and keys, or None.

    Raises:
        ValueError: for a post-norm block with a SwiGLU.
    """

    mlp: MLP | GatedMLP

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str = "quick_gelu",
        hidden: int | None = None,
        *,
        eps: float = 1e-5,
        inner_norms: bool = False,
        post_norm: bool = False,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.rope = rope
        inner = nn.LayerNorm(width, eps) if inner_norms else None
        first, second = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, inner, first if post_norm else None)
        self.ln_1 = nn.Identity() if post_norm else first
        if activation != "swiglu":
            self.mlp = mlp(width, activation, hidden, second if post_norm else None)
        elif post_norm:
            raise ValueError("no post-norm block with a SwiGLU is known")
        else:
            self.mlp = GatedMLP(width, hidden, eps if inner_norms else None)
        self.ln_2 = nn.Identity() if post_norm else second
        self._last = ("after", "after") if post_norm else ("out_proj", "c_proj")

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        hidden: Tensor | None = None,
        rotate: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The block as it was trained, with fused attention: (B, T, D) -> (B, T, D).

        Args:
            x: tokens.
            causal: whether tokens attend only to themselves and earlier tokens.
            hidden: keys that get no attention, (B, 1, 1 or T, T) bool; not together with `causal`.
            rotate: rotation of queries and keys for the tokens' grid, from `Rope.on`.
        """
        q, k, v = self.attn.project(self.ln_1(x))
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self._finish(fused_attention(q, k, v, causal, hidden), residual=x, ffn=True)

    def heads(self, x: Tokens) -> Heads:
        """This block's projections of `x`, each computed on first use."""
        width = x.data.shape[-1] // self.attn.num_heads
        return Heads(
            self.attn.project,
            self.ln_1(x.data),
            width**-0.5,
            x.grid,
            x.prefix,
            x.hidden,
            rotate=self.rope and self.rope.on(x.grid, x.prefix),
            join=self.attn.join,
        )

    def advance(self, x: Tokens, heads: Heads) -> Tokens:
        """`forward` for tokens whose `heads` are already known."""
        q, k, v = heads.all()
        mixed = fused_attention(q, k, v, hidden=heads.hidden_keys)
        return x.with_data(self._finish(mixed, residual=x.data, ffn=True))

    def read(
        self,
        x: Tokens,
        *,
        residual: Tensor | None,
        attention: Rule | None = None,
        ffn: bool = True,
        trace: Trace,
        layout: Tokens | None = None,
    ) -> Tokens:
        """Reads tokens with this block's weights, but with a chosen attention, residual and FFN.

        Args:
            x: the tokens to read.
            residual: (B, T or 1, D) added to the attention's output, or None.
            attention: rule that gives the attention weights; None for the block's own, fused.
            ffn: whether the block's MLP (with its residual) follows.
            trace: trace that the rule may use.
            layout: tokens with the grid and prefix of the output, one for each row of the weights; by
                default `x`.
        """
        heads = self.heads(x)
        if attention is None:
            q, k, v = heads.all()
            mixed = fused_attention(q, k, v, hidden=heads.hidden_keys)
        else:
            weights = attention(heads, trace)
            if (hidden := heads.hidden_keys) is not None:
                weights = hide(weights, hidden)
            mixed = weighted_values(weights, heads.v)
        return (layout or x).with_data(self._finish(mixed, residual, ffn))

    def look(self, x: Tensor, around: Tokens, seen: Tensor | None = None) -> Tensor:
        """Sends tokens (B, R, D) through the block, attending to other tokens but not to each other.

        Args:
            x: tokens without a position in the image.
            around: input tokens of the block, to which they attend.
            seen: to which of them, (B or 1, 1, R or 1, T) bool; None for all that are not hidden.
        """
        (q,) = self.attn.project(self.ln_1(x), "q")
        heads = self.heads(around)
        if seen is None and heads.hidden_keys is not None:
            seen = ~heads.hidden_keys
        mixed = F.scaled_dot_product_attention(q, heads.k, heads.v, attn_mask=seen)
        return self._finish(mixed.transpose(1, 2).flatten(2), residual=x, ffn=True)

    def _finish(self, mixed: Tensor, residual: Tensor | None, ffn: bool) -> Tensor:
        y = self.attn.join(mixed)  # (B, T, D)
        of_attention, of_mlp = self._last
        if residual is not None:
            y = _sum(y, residual, getattr(self.attn, of_attention))
        if not ffn:
            return y
        return _sum(self.mlp(self.ln_2(y)), y, self.mlp, self.mlp.get_submodule(of_mlp))


def _sum(y: Tensor, x: Tensor, *layers: nn.Module) -> Tensor:
    """The sum, in place in `y` if only `layers` have seen it and gradients do not need it."""
    return y.add_(x) if unshared(*layers) else y + x


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without storing the weights: (B, H, T, d) -> (B, T, D).

    The keys `hidden`, (B, 1, 1 or T, T) bool, get no attention.
    """
    shown = None if hidden is None else ~hidden
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shown, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Values (B, H, T, d) mixed by weights (B, H or 1, M, T): (B, M, D)."""
    weights = weights.to(v.dtype)
    if weights.shape[1] == 1:  # one map for all heads: one product of whole rows
        return weights[:, 0] @ v.transpose(1, 2).flatten(2)
    return (weights @ v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """A stack of blocks, named as in OpenAI's checkpoints.

    Args:
        width, activation, hidden, eps, inner_norms, post_norm, rope: as in `Block`.
        layers: number of blocks.
        head_width: width d of an attention head.

    Raises:
        ValueError: if the heads do not fill the width.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        activation: str = "quick_gelu",
        *,
        head_width: int = HEAD_WIDTH,
        hidden: int | None = None,
        eps: float = 1e-5,
        inner_norms: bool = False,
        post_norm: bool = False,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        if head_width < 1 or width % head_width:
            raise ValueError(
                f"tokens of width {width} cannot be divided into attention heads of width "
                f"{head_width}: pass the width of the heads to load_clip (head_width, text_head_width)"
            )
        self.resblocks = nn.ModuleList(
            Block(
                width,
                width // head_width,
                activation,
                hidden,
                eps=eps,
                inner_norms=inner_norms,
                post_norm=post_norm,
                rope=rope,
            )
            for _ in range(layers)
        )


def drawn(*shape: int, std: float) -> nn.Parameter:
    """A parameter with normally distributed random values."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))
