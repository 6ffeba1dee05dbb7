"""Text towers: from texts to token ids to embeddings, for every family of image-text models.

`CLIP.encode_text` delegates to one of these. A tower includes its tokenizer, since ids are only
meaningful with it. There are two types: transformers like CLIP's, with options, and BERTs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sfp.clip.blocks import (
    ACTIVATIONS,
    HEAD_WIDTH,
    MLP,
    Attention,
    Linear,
    Transformer,
    drawn,
    fused_attention,
)
from sfp.clip.tokenizers import TIPS, BytePairs, MissingTokenizer, Rules, Tokenizer

POOLS = ("argmax", "end", "last", "mean", "class")


class TextTower(nn.Module):
    """Base class of text towers.

    Attributes:
        context: maximal length of a text in tokens.
        embed_dim: width C of the joint space.
        vocab: number of token ids.
        tokenizer: tokenizer of the tower.
        templates: name of the prompt templates that the model's authors use, a key of `TEMPLATES`.
    """

    context: int
    embed_dim: int
    vocab: int
    tokenizer: Tokenizer
    templates: str

    def __init__(self, config: TextConfig | BertConfig) -> None:
        super().__init__()
        self.context, self.embed_dim, self.vocab = config.context, config.embed_dim, config.vocab
        self.templates = "tipsv2" if config.rules == TIPS else "imagenet"
        self.switches = astuple(config)  # part of the fingerprint, besides the weights
        self.tokenizer = (
            BytePairs(config.context, full=not (config.causal or config.hide_padding))
            if config.rules is None
            else MissingTokenizer("this text tower was built without a tokenizer file")
        )

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L) int64, L at most `context`; raises the errors of `Tokenizer`."""
        return self.tokenizer(texts)

    def ends(self, ids: Tensor) -> Tensor:
        """Index (B,) of the last token that the embedding of a text depends on, ids (B, L)."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, C) embeddings, not normalised.

        Raises:
            ValueError: if the ids have another shape.
        """
        raise NotImplementedError

    def _cut(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The ids up to the last one that an embedding depends on, and the `ends`."""
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise ValueError(
                f"expected token ids of shape (B, <= {self.context}), got {tuple(ids.shape)}"
            )
        end = self.ends(ids)
        return ids[:, : int(end.max()) + 1], end


@dataclass(frozen=True)
class TextConfig:
    """The sizes and switches of a `TextTransformer`; the defaults are those of OpenAI's CLIP.

    Attributes:
        vocab: number of token ids.
        context: longest text, in tokens.
        width, layers: token width D and number of blocks.
        embed_dim: width C of the joint space.
        activation: activation of the MLPs, a key of `ACTIVATIONS`.
        head_width: width d of an attention head.
        hidden: width of the MLPs' hidden layer, 4 D by default.
        eps: epsilon of the layer norms.
        causal: whether tokens attend only to themselves and earlier tokens.
        hide_padding: whether tokens with the id `pad` get no attention.
        pool: token that becomes the embedding: that with the largest id ("argmax"), the first with
            the id `end` ("end"), the one at the last position ("last"), the mean of all but padding
            ("mean"), or an appended class token ("class", CoCa).
        end, pad: ids of the end token and of padding.
        positions: "learned", or "sinusoids", where token embeddings are multiplied by the square root
            of D (TIPSv2).
        projection: "matrix", "linear" (with a bias), or "none", for which C = D.
        rules: rules of the tokenizer; None for OpenAI's byte pairs.
    """

    vocab: int
    context: int
    width: int
    layers: int
    embed_dim: int
    activation: str = "quick_gelu"
    head_width: int = HEAD_WIDTH
    hidden: int | None = None
    eps: float = 1e-5
    causal: bool = True
    hide_padding: bool = False
    pool: str = "argmax"
    end: int = -1
    pad: int = 0
    positions: str = "learned"
    projection: str = "matrix"
    rules: Rules | None = None

    def build(self) -> TextTransformer:
        """The tower, with random weights.

        Raises:
            ValueError: if the heads do not fill the width.
        """
        return TextTransformer(self)


class TextTransformer(TextTower):
    """A pre-norm transformer over tokens, under OpenAI's parameter names.

    Args:
        config: its sizes and switches.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        self.causal, self.hide_padding, self.pool = config.causal, config.hide_padding, config.pool
        self.end, self.pad = config.end, config.pad
        width = config.width
        self.transformer = Transformer(
            width,
            config.layers,
            config.activation,
            head_width=config.head_width,
            hidden=config.hidden,
            eps=config.eps,
        )
        self.token_embedding = nn.Embedding(config.vocab, width)
        self.positional_embedding = (
            drawn(config.context + (self.pool == "class"), width, std=0.01)
            if config.positions == "learned"
            else None
        )
        self.cls_emb = drawn(width, std=0.01) if self.pool == "class" else None
        self.ln_final = nn.LayerNorm(width, eps=config.eps)
        self.text_projection: Any = None
        if config.projection == "matrix":
            self.text_projection = drawn(width, config.embed_dim, std=width**-0.5)
        elif config.projection == "linear":
            self.text_projection = Linear(width, config.embed_dim)

    def ends(self, ids: Tensor) -> Tensor:
        """Index (B,) of the token that becomes the embedding, or of the last one that it sees."""
        if self.pool == "argmax" and self.causal:
            return ids.argmax(-1)
        if self.pool == "end":
            return ids.eq(self.end).int().argmax(-1)
        if self.pool == "mean":
            return _last(ids != self.pad)
        return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, C).

        Tokens that cannot change the result are left out: in a causal tower, all after the end of the
        longest text; in one that hides padding, the padding.
        """
        ids, end = self._cut(ids)
        x = self._embed(ids)  # (B, L, D)
        hidden = self._hidden(ids)
        for block in self.transformer.resblocks:
            x = block(x, causal=self.causal and hidden is None, hidden=hidden)
        if self.pool == "mean":
            shown = (ids != self.pad)[..., None]
            x = (self.ln_final(x) * shown).sum(1) / shown.sum(1)
        else:
            if self.pool == "argmax":
                end = ids.argmax(-1)
            elif self.pool == "class":
                end = end + 1
            x = self.ln_final(x[torch.arange(len(x), device=x.device), end])  # (B, D)
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(x)
        return x if self.text_projection is None else x @ self.text_projection

    def _embed(self, ids: Tensor) -> Tensor:
        x = self.token_embedding(ids)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.expand(len(x), 1, -1)], 1)
        if self.positional_embedding is None:
            return x * x.shape[-1] ** 0.5 + sinusoids(*x.shape[1:]).to(x)
        return x + self.positional_embedding[: x.shape[1]]

    def _hidden(self, ids: Tensor) -> Tensor | None:
        """Keys excluded from attention, including those of later tokens, (B, 1, 1 or L, L) bool."""
        if self.pool == "class":
            # CoCa was trained with this mask shifted by one: the first token is always visible, and the
            # class token only if the text fills the context
            padding = nn.functional.pad(ids == self.pad, (1, 0))[:, None, None]
        elif self.hide_padding:
            padding = (ids == self.pad)[:, None, None]
        else:
            return None
        if not self.causal:
            return padding
        length = padding.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        return padding | future


def sinusoids(length: int, width: int) -> Tensor:
    """Positions as sines and cosines, (length, width) float32 [sin | cos].

    The wavelengths are a geometric series from 2 pi to 10^4 times 2 pi, both ends included.
    """
    rates = 1e4 ** -torch.linspace(0, 1, width // 2)
    angles = torch.arange(length)[:, None] * rates  # (length, width / 2)
    return torch.cat([angles.sin(), angles.cos()], 1)


def _last(shown: Tensor) -> Tensor:
    """Index of the last True in each row of (B, L); 0 where there is none."""
    return (shown * torch.arange(shown.shape[1], device=shown.device)).amax(-1)


@dataclass(frozen=True)
class BertConfig:
    """The sizes and switches of a `BertText`.

    Attributes:
        vocab: number of token ids.
        context: longest text, in tokens.
        rows: number of positions in the position embedding.
        width, layers, hidden: token width D, number of blocks, width of the MLPs' hidden layer.
        embed_dim: width C of the joint space.
        head: layers from the first token to the embedding: "linear"; "mlp" (linear, GELU, linear); or
            "norm" (layer norm, linear with bias, linear), as in AltCLIP.
        head_hidden: width between the two linear layers of a head.
        activation: activation of the MLPs.
        head_width: width d of an attention head.
        eps: epsilon of the layer norms.
        pad: id of padding, which gets no attention.
        first: position of the first token: 0, or `pad` + 1 in RoBERTas.
        rules: rules of the tokenizer.
    """

    vocab: int
    context: int
    rows: int
    width: int
    layers: int
    hidden: int
    embed_dim: int
    head: str = "linear"
    head_hidden: int = 0
    activation: str = "gelu"
    head_width: int = HEAD_WIDTH
    eps: float = 1e-12
    pad: int = 0
    first: int = 0
    rules: Rules | None = None
    causal: bool = False
    hide_padding: bool = True

    def build(self) -> BertText:
        """The tower, with random weights.

        Raises:
            ValueError: if the heads do not fill the width.
        """
        return BertText(self)


class BertText(TextTower):
    """BERT or RoBERTa; the first token of the last layer becomes the embedding.

    Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (NAACL 2019). All tokens have
    the same token type, whose embedding is included in the position embedding.

    Args:
        config: its sizes and switches.

    Raises:
        ValueError: if the heads do not fill the width.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        width, eps = config.width, config.eps
        if width % config.head_width:
            raise ValueError(
                f"tokens of width {width} cannot be divided into attention heads of width "
                f"{config.head_width}: pass the width of the heads to load_clip (text_head_width)"
            )
        self.pad, self.first = config.pad, config.first
        self.token_embedding = nn.Embedding(config.vocab, width)
        self.positional_embedding = drawn(config.rows, width, std=0.02)
        self.ln_embedding = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(
            PostNormBlock(width, config.hidden, config.head_width, config.activation, eps)
            for _ in range(config.layers)
        )
        self.head = _HEADS[config.head](config)

    def ends(self, ids: Tensor) -> Tensor:
        """Index of the last token that is not padding."""
        return _last(ids != self.pad)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, C)."""
        ids, _ = self._cut(ids)
        positions = self.positional_embedding[self.first :][: ids.shape[1]]
        x = self.ln_embedding(self.token_embedding(ids) + positions)
        hidden = (ids == self.pad)[:, None, None]
        for block in self.blocks:
            x = block(x, hidden)  # (B, L, D)
        return self.head(x[:, 0])


def _linear(config: BertConfig) -> nn.Module:
    return nn.Sequential(nn.Linear(config.width, config.embed_dim, bias=False))


def _mlp(config: BertConfig) -> nn.Module:
    return nn.Sequential(
        nn.Linear(config.width, config.head_hidden, bias=False),
        nn.GELU(),
        nn.Linear(config.head_hidden, config.embed_dim, bias=False),
    )


def _norm(config: BertConfig) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(config.width, eps=config.eps),
        Linear(config.width, config.head_hidden),
        nn.Linear(config.head_hidden, config.embed_dim, bias=False),
    )


_HEADS = {"linear": _linear, "mlp": _mlp, "norm": _norm}


class PostNormBlock(nn.Module):
    """BERT's block: y = ln_1(x + attention(x)), then ln_2(y + mlp(y)).

    Args:
        width, hidden, head_width: D, width of the MLP's hidden layer, width d of a head.
        activation: activation of the MLP, a key of `ACTIVATIONS`.
        eps: epsilon of the layer norms.
    """

    def __init__(
        self, width: int, hidden: int, head_width: int, activation: str, eps: float
    ) -> None:
        super().__init__()
        self.attn = Attention(width, width // head_width)
        self.ln_1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(
            OrderedDict(
                c_fc=Linear(width, hidden),
                gelu=ACTIVATIONS[activation](),
                c_proj=Linear(hidden, width),
            )
        )
        self.ln_2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D); the keys `hidden`, (B, 1, 1, L) bool, get no attention."""
        q, k, v = self.attn.project(x)
        mixed = fused_attention(q, k, v, hidden=hidden)
        x = self.ln_1(x + self.attn.out_proj(mixed))
        return self.ln_2(x + self.mlp(x))
