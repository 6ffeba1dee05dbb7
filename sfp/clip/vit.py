"""The vision transformer of OpenAI's CLIP, with options for those of other families.

Methods never subclass or patch it. They run its blocks once (`trace`), edit tokens between blocks, and
send tokens through some blocks again (`Block.read`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.adaptor import Adaptor, AdaptorConfig
from sfp.clip.blocks import HEAD_WIDTH, Block, Transformer, drawn
from sfp.clip.checkpoints.published import OPENAI_MEAN, OPENAI_STD, RGB
from sfp.clip.pool import AttentionPool, PoolConfig
from sfp.clip.rope import Rope, RopeConfig
from sfp.functional.grid import resample_positions
from sfp.registry import Op
from sfp.tokens import Tokens
from sfp.trace import Trace

AS_DINO = Op(resample_positions)


@dataclass(frozen=True)
class ImageConfig:
    """The sizes and switches of an image tower; the defaults are those of OpenAI's CLIP.

    Attributes:
        image_size: side in pixels of the square images of the position embedding.
        usual_size: usual side of images for the tower, if it differs (C-RADIO).
        patch: side of a patch, in pixels.
        width: token width D.
        layers: number of blocks.
        embed_dim: width C of the joint image-text space.
        activation: activation of the MLPs, a key of `sfp.clip.blocks.ACTIVATIONS`, or "swiglu".
        head_width: width d of an attention head.
        hidden: width of the MLPs' hidden layer, 4 D by default.
        eps: epsilon of all norms.
        stem: widths and strides of convolutions before the patch embedding, each followed by a GELU
            (MobileCLIP-B).
        conv_bias: whether the patch embedding has a bias.
        prefix: number P of tokens before the patches: 0, 1 (class token), or more (registers).
        table_prefix: whether the position embedding has a first entry for the class token.
        ln_pre: whether tokens are normalised before the first block.
        inner_norms, post_norm: as in `Block` (EVA-02).
        rope: rotary position embedding of queries and keys, or None.
        ln_post: whether tokens are normalised after the last block.
        pool: how the image's embedding is computed: from the class token ("cls"), from the mean of the
            patches before the last norm ("mean", CLIPA), or by an attention pool.
        proj: whether a matrix projects into the joint space; otherwise tokens are already in it.
        proj_bias: whether a bias is added to the projection.
        adaptor: MLP that projects into the joint space instead of a matrix (C-RADIO), or None.
        positions: rule that resamples the position embedding to another grid.
        mean, std: normalisation of the images, RGB in 0..1.
    """

    image_size: int
    patch: int
    width: int
    layers: int
    embed_dim: int
    usual_size: int | None = None
    activation: str = "quick_gelu"
    head_width: int = HEAD_WIDTH
    hidden: int | None = None
    eps: float = 1e-5
    stem: tuple[tuple[int, int], ...] = ()
    conv_bias: bool = False
    prefix: int = 1
    table_prefix: bool = True
    ln_pre: bool = True
    inner_norms: bool = False
    post_norm: bool = False
    rope: RopeConfig | None = None
    ln_post: bool = True
    pool: Literal["cls", "mean"] | PoolConfig = "cls"
    proj: bool = True
    proj_bias: bool = False
    adaptor: AdaptorConfig | None = None
    positions: Op = AS_DINO
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD


class VisionTransformer(nn.Module):
    """An image tower.

    Args:
        config: its sizes and switches.

    Attributes:
        patch: side of a patch, in pixels.
        prefix: number of tokens before the patches.
        positions: rule that resamples the position embedding to another grid.
        native_grid: rows and columns of the position embedding.
        usual_grid: rows and columns of patches in images of the usual size.
        embed_dim: width C of the joint space.
        is_int8: whether the blocks' weights are rounded to 8 bits (`sfp.clip.int8`).
    """

    is_int8 = False

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        width, side = config.width, config.image_size // config.patch
        self.switches = repr(config)  # part of the fingerprint, besides the weights
        self.patch = config.patch
        self.prefix = config.prefix
        self.embed_dim = config.embed_dim
        self.native_grid = (side, side)
        usual = (config.usual_size or config.image_size) // config.patch
        self.usual_grid = (usual, usual)
        self.positions = config.positions
        self.averages = config.pool == "mean"
        self.stem = nn.ModuleList()
        channels = 3
        for out, stride in config.stem:
            self.stem.append(nn.Conv2d(channels, out, stride, stride=stride))
            channels = out
        step = config.patch // math.prod(stride for _, stride in config.stem)
        self.conv1 = nn.Conv2d(channels, width, step, stride=step, bias=config.conv_bias)
        if config.prefix:
            self.class_embedding = drawn(width, std=width**-0.5)
        self.register_embedding = None
        if config.prefix > 1:
            self.register_embedding = drawn(config.prefix - 1, width, std=width**-0.5)
        self.table_prefix = int(config.table_prefix and config.prefix > 0)
        self.positional_embedding = drawn(self.table_prefix + side**2, width, std=width**-0.5)
        self.ln_pre = nn.LayerNorm(width, config.eps) if config.ln_pre else nn.Identity()
        self.rope = Rope(config.rope, config.head_width) if config.rope else None
        self.transformer = Transformer(
            width,
            config.layers,
            config.activation,
            head_width=config.head_width,
            hidden=config.hidden,
            eps=config.eps,
            inner_norms=config.inner_norms,
            post_norm=config.post_norm,
            rope=self.rope,
        )
        self.ln_post = nn.LayerNorm(width, config.eps) if config.ln_post else nn.Identity()
        self.pool = None
        if isinstance(config.pool, PoolConfig):
            heads = config.pool.heads or width // config.head_width
            self.pool = AttentionPool(config.pool, width, heads, config.activation, config.eps)
            width = config.pool.width
        self.proj = drawn(width, config.embed_dim, std=width**-0.5) if config.proj else None
        self.proj_bias = nn.Parameter(torch.zeros(config.embed_dim)) if config.proj_bias else None
        self.adaptor = Adaptor(config.adaptor, width, config.embed_dim) if config.adaptor else None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.conv1.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.conv1.weight.dtype

    @property
    def blocks(self) -> Sequence[Block]:
        """The residual blocks, first to last."""
        return self.transformer.resblocks  # type: ignore[return-value]

    def embed(self, image: Tensor, positions: Callable | None = None) -> Tokens:
        """The tokens that enter the first block.

        Pixels beyond the last whole patch are dropped, as by CLIP's strided convolution.

        Args:
            image: normalised images, (B, 3, H, W), each side at least one patch.
            positions: rule that resamples the position embedding (h0, w0, D) to another grid; by
                default that of the tower's training.

        Raises:
            ValueError: if the image has another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[-2:]) < self.patch:
            raise ValueError(
                f"expected images of shape (B, 3, H, W) with sides of at least {self.patch} pixels "
                f"(one patch), got {tuple(image.shape)}"
            )
        maps = image.to(self.dtype)
        for conv in self.stem:
            maps = F.gelu(conv(maps))
        maps = self.conv1(maps)  # (B, D, h, w)
        grid = (maps.shape[2], maps.shape[3])
        table = self.positional_embedding[self.table_prefix :].unflatten(0, self.native_grid)
        # grids are compared, not token counts: 4x16 has as many tokens as 8x8
        if grid != self.native_grid:
            table = (positions or self.positions)(table, grid)
        tokens = [maps.flatten(2).mT + table.flatten(0, 1)]  # (B, N, D)
        if self.register_embedding is not None:
            tokens.insert(0, self.register_embedding.expand(image.shape[0], -1, -1))
        if self.prefix:
            first = self.positional_embedding[0] if self.table_prefix else 0
            tokens.insert(0, (self.class_embedding + first).expand(image.shape[0], 1, -1))
        stand_in = None if self.prefix or self.pool is None else self.gathered
        return Tokens(
            self.ln_pre(torch.cat(tokens, dim=1)), grid, prefix=self.prefix, stand_in=stand_in
        )

    def trace(
        self,
        image: Tensor,
        edits: Sequence[Callable[[Trace, int], Tokens]] = (),
        *,
        positions: Callable | None = None,
        **context: Any,
    ) -> Trace:
        """Runs every block but the last once, and keeps the blocks' outputs.

        Args:
            image: normalised images, (B, 3, H, W).
            edits: applied after each block, in order; their result is the input of the next block.
            positions: as in `embed`.
            **context: further fields of the `Trace`, e.g. `text`.
        """
        trace = Trace(self, image, self.embed(image, positions), **context)
        trace.edits, trace.positions = tuple(edits), positions
        for i, block in enumerate(self.blocks[:-1]):
            heads = trace.start(i)
            trace.outputs.append(block.advance(trace.entering(i), heads))
            for edit in edits:
                trace.outputs[i] = edit(trace, i)
        return trace

    def project(self, x: Tokens, pool_mlp: bool = True) -> Tokens:
        """The contribution of single tokens to the image's embedding: (B, T, D) -> (B, T, C).

        Final normalisation and projection. In towers with a pool, the path of a value through the pool,
        which gives the image's embedding if all tokens are equal.

        Args:
            x: tokens that left the last block, or the pool (`Tokens.pooled`).
            pool_mlp: whether the pool's MLP follows, if it has one; TextRegion leaves it out.
        """
        y = x.data
        if not x.pooled:
            y = self.ln_post(y)
            y = y if self.pool is None else self.pool.values(y)
        if self.pool is not None:
            y = self.pool.finish(y, pool_mlp)
        return replace(x, data=self.joint(y), stand_in=None)

    def joint(self, y: Tensor) -> Tensor:
        """Pooled vectors (..., D or E) in the joint space, (..., C)."""
        if self.adaptor is not None:
            return self.adaptor(y)
        if self.proj is not None:
            y = y @ self.proj
        return y if self.proj_bias is None else y + self.proj_bias

    def embedding(self, x: Tokens) -> Tensor:
        """The image's embedding (B, C), not normalised, from the tokens that left the last block."""
        if self.pool is not None:
            y = self.pool.finish(self.pool(x.with_data(self.ln_post(x.data))))
        elif self.averages:
            y = self.ln_post(x.patches.mean(1))
        else:
            y = self.ln_post(x.data[:, 0])
        return self.joint(y)

    def pooled(self, x: Tokens) -> Tokens:
        """The contribution of single tokens to the pool, (B, T, E); the pool's output replaces CLS.

        Raises:
            ValueError: if the tower has no attention pool.
        """
        pool = self.pool
        if pool is None:
            raise ValueError("this tower has no attention pool")
        normal = x.with_data(self.ln_post(x.data))
        stand_in = None if x.stand_in is None else lambda _: pool(normal)[:, None]
        return replace(x, data=pool.values(normal.data), stand_in=stand_in, pooled=True)

    def gathered(self, x: Tokens) -> Tensor:
        """The mean of tokens with the weights of the pool's query, averaged over heads, (B, 1, D).

        It replaces the class token in towers without one.
        """
        return self.gathering(x).mean(1, keepdim=True).to(x.data.dtype) @ x.data

    def gathering(self, x: Tokens) -> Tensor:
        """The attention of the pool's query to each token, (B, H, T).

        Raises:
            ValueError: if the tower has no attention pool.
        """
        if self.pool is None:
            raise ValueError("this tower has neither a class token nor an attention pool")
        return self.pool.attention(x.with_data(self.ln_post(x.data)))

    def forward(self, image: Tensor) -> Tensor:
        """The image's embedding, (B, C), not normalised."""
        tokens = self.embed(image)
        rotate = self.rope and self.rope.on(tokens.grid, tokens.prefix)
        x = tokens.data
        for block in self.blocks:
            x = block(x, rotate=rotate)
        return self.embedding(tokens.with_data(x))
