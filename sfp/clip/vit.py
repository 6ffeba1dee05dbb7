"""The one vision transformer of this package: OpenAI CLIP's parameter names, nobody's method.

Methods never subclass or patch it. They run its trunk once (`trace`), edit tokens between blocks, and
send chosen tokens through chosen blocks again (`Block.read`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.checkpoints.published import OPENAI_MEAN, OPENAI_STD, RGB
from sfp.clip.dispatch import unshared
from sfp.clip.onednn import linear
from sfp.functional.attention import hide
from sfp.functional.grid import resample_positions
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

Rule = Callable[[Heads, Trace], Tensor]
"""An attention rule: (heads, trace) -> weights, (B, H or 1, M, T)."""

HEAD_WIDTH = 64  # of every CLIP tower but the image towers of open_clip's largest models


@dataclass(frozen=True)
class ImageConfig:
    """The sizes and switches of an image tower; the defaults are those of OpenAI's CLIP.

    Attributes:
        image_size: side of the square training images, in pixels.
        patch: side of a patch, in pixels.
        width: token width D.
        layers: number of blocks.
        embed_dim: width C of the joint image-text space.
        activation: of the MLPs, a key of `ACTIVATIONS`.
        head_width: width d of an attention head.
        hidden: width of the MLPs' hidden layer, 4 D by default.
        mean, std: normalisation of the images, RGB in 0..1.
    """

    image_size: int
    patch: int
    width: int
    layers: int
    embed_dim: int
    activation: str = "quick_gelu"
    head_width: int = HEAD_WIDTH
    hidden: int | None = None
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD


class Linear(nn.Linear):
    """`nn.Linear` by oneDNN where that is faster."""

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
        """The same in the memory of `x`."""
        return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "quick_gelu": QuickGELU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "relu": nn.ReLU,
}


class MLP(nn.Sequential):
    """A block's MLP. Its hidden layer, the widest tensor of a block, is activated in place."""

    allocates = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); nothing that a hook or a gradient may need is overwritten."""
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


class HeadProjections(nn.Module):
    """The projections of multi-head attention into queries, keys and values, and out of them.

    Args:
        heads: their number.
        out_proj: linear layer (B, T, D) -> (B, T, D).
    """

    def __init__(self, heads: int, out_proj: nn.Module) -> None:
        super().__init__()
        self.num_heads = heads
        self.out_proj = out_proj

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`, (B, T, D) -> (B, T, rows)."""
        raise NotImplementedError

    def project(self, x: Tensor, names: str = "qkv") -> tuple[Tensor, ...]:
        """Some of the queries, keys and values of `x`, each (B, H, T, d), by one product.

        Args:
            x: (B, T, D).
            names: neighbours in "qkv".
        """
        width = x.shape[-1]
        start = "qkv".index(names) * width
        out = self.linear(x, slice(start, start + len(names) * width))
        return out.unflatten(-1, (len(names), self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Attention(HeadProjections):
    """The weights of multi-head attention, packed as in `nn.MultiheadAttention`."""

    out_proj: Linear

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(heads, Linear(width, width))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        nn.init.xavier_uniform_(self.in_proj_weight)

    def linear(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of the packed projection of `x`."""
        return linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])


class Block(nn.Module):
    """A residual attention block: x + attention(ln_1(x)), then x + mlp(ln_2(x)).

    Args:
        width: token width D.
        heads: number of attention heads.
        activation: of the MLP, a key of `ACTIVATIONS`.
        hidden: width of the MLP's hidden layer, 4 D by default.
        eps: of the layer norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str = "quick_gelu",
        hidden: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = hidden or 4 * width
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(
            OrderedDict(
                c_fc=Linear(width, hidden),
                gelu=ACTIVATIONS[activation](),
                c_proj=Linear(hidden, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, causal: bool = False, hidden: Tensor | None = None) -> Tensor:
        """The block as it was trained, with fused attention: (B, T, D) -> (B, T, D).

        Args:
            x: tokens.
            causal: whether a token sees only itself and those before it.
            hidden: keys that do not take part, (B, 1, 1 or T, T) bool; not together with `causal`.
        """
        q, k, v = self.attn.project(self.ln_1(x))
        return self._finish(fused_attention(q, k, v, causal, hidden), residual=x, ffn=True)

    def heads(self, x: Tokens) -> Heads:
        """The projections with which this block reads `x`, each made when it is asked for."""
        width = x.data.shape[-1] // self.attn.num_heads
        return Heads(self.attn.project, self.ln_1(x.data), width**-0.5, x.grid, x.prefix, x.hidden)

    def advance(self, x: Tokens, heads: Heads) -> Tokens:
        """`forward` for tokens whose `heads` are already there."""
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
            trace: what the rule may look at.
            layout: tokens whose grid and prefix the output takes, one row of weights each; those of
                `x` by default.
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

    def _finish(self, mixed: Tensor, residual: Tensor | None, ffn: bool) -> Tensor:
        y = self.attn.out_proj(mixed)  # (B, T, D)
        if residual is not None:
            y = _sum(y, residual, self.attn.out_proj)
        return _sum(self.mlp(self.ln_2(y)), y, self.mlp, self.mlp[-1]) if ffn else y


def _sum(y: Tensor, x: Tensor, *layers: nn.Module) -> Tensor:
    """The sum, in the memory of `y` if only `layers` have had it; gradients do not need it."""
    return y.add_(x) if unshared(*layers) else y + x


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, hidden: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v without keeping the weights: (B, H, T, d) -> (B, T, D).

    Keys that are `hidden`, (B, 1, 1 or T, T) bool, do not take part.
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
    """A stack of blocks, under the name that OpenAI's checkpoints give it.

    Args:
        width, activation, hidden, eps: as in `Block`.
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
    ) -> None:
        super().__init__()
        if head_width < 1 or width % head_width:
            raise ValueError(
                f"tokens of width {width} cannot be divided into attention heads of {head_width}: "
                "say how wide the heads are (head_width, text_head_width)"
            )
        self.resblocks = nn.ModuleList(
            Block(width, width // head_width, activation, hidden, eps) for _ in range(layers)
        )


def drawn(*shape: int, std: float) -> nn.Parameter:
    """A parameter of normal random numbers."""
    return nn.Parameter(torch.empty(shape).normal_(std=std))


class VisionTransformer(nn.Module):
    """An image tower.

    Args:
        config: its sizes and switches.

    Attributes:
        patch: side of a patch, in pixels.
        native_grid: rows and columns of the position table.
        embed_dim: width C of the joint space.
        is_int8: whether the blocks' weights are rounded to 8 bits (`sfp.clip.int8`).
    """

    is_int8 = False

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width, patch = config.width, config.patch
        self.switches = astuple(config)  # what the fingerprint sees besides the weights
        self.patch = patch
        self.embed_dim = config.embed_dim
        self.native_grid = (config.image_size // patch, config.image_size // patch)
        tokens = 1 + self.native_grid[0] * self.native_grid[1]
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = drawn(width, std=width**-0.5)
        self.positional_embedding = drawn(tokens, width, std=width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(
            width,
            config.layers,
            config.activation,
            head_width=config.head_width,
            hidden=config.hidden,
        )
        self.ln_post = nn.LayerNorm(width)
        self.proj = drawn(width, config.embed_dim, std=width**-0.5)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.conv1.weight.dtype

    @property
    def blocks(self) -> Sequence[Block]:
        """The residual blocks, first to last."""
        return self.transformer.resblocks  # type: ignore[return-value]

    def embed(self, image: Tensor, positions: Callable = resample_positions) -> Tokens:
        """The tokens that enter the first block.

        Pixels beyond the last whole patch are left out, as CLIP's strided convolution does.

        Args:
            image: normalised images, (B, 3, H, W), each side at least one patch.
            positions: rule that fits the position table (h0, w0, D) to another grid.

        Raises:
            ValueError: if the image is no such batch.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[-2:]) < self.patch:
            raise ValueError(
                f"expected images of shape (B, 3, H, W) with sides of at least {self.patch} pixels "
                f"(one patch), got {tuple(image.shape)}"
            )
        maps = self.conv1(image.to(self.conv1.weight.dtype))  # (B, D, h, w)
        grid = (maps.shape[2], maps.shape[3])
        table = self.positional_embedding[1:].unflatten(0, self.native_grid)  # (h0, w0, D)
        # grids are compared, not token counts: 4x16 has as many tokens as 8x8
        if grid != self.native_grid:
            table = positions(table, grid)
        patches = maps.flatten(2).mT + table.flatten(0, 1)  # (B, N, D)
        cls = (self.class_embedding + self.positional_embedding[0]).expand(len(image), 1, -1)
        return Tokens(self.ln_pre(torch.cat([cls, patches], dim=1)), grid)

    def trace(
        self,
        image: Tensor,
        edits: Sequence[Callable[[Trace, int], Tokens]] = (),
        *,
        positions: Callable = resample_positions,
        **context: Any,
    ) -> Trace:
        """Runs every block but the last, once, and keeps what the blocks put out.

        Args:
            image: normalised images, (B, 3, H, W).
            edits: applied after each block, in order; what they return feeds the next block.
            positions: as in `embed`.
            **context: further fields of the `Trace`, e.g. `text`.
        """
        trace = Trace(self, image, self.embed(image, positions), **context)
        for i, block in enumerate(self.blocks[:-1]):
            heads = trace.start(i)
            trace.outputs.append(block.advance(trace.entering(i), heads))
            for edit in edits:
                trace.outputs[i] = edit(trace, i)
        return trace

    def project(self, x: Tokens) -> Tokens:
        """Final normalisation and projection into the joint space: (B, T, D) -> (B, T, C)."""
        return x.with_data(self.ln_post(x.data) @ self.proj)

    def forward(self, image: Tensor) -> Tensor:
        """CLIP's image embedding, (B, C), not normalised."""
        x = self.embed(image).data
        for block in self.blocks:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj
