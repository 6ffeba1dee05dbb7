"""Text towers: from texts to token ids to embeddings, for every family of image-text models.

`CLIP.encode_text` delegates to one of these. A tower brings its tokenizer, because ids mean nothing
without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from sfp.clip import tokenizer
from sfp.clip.vit import HEAD_WIDTH, Transformer, drawn


class TextTower(nn.Module):
    """What a text tower has to offer.

    Attributes:
        context: longest text, in tokens.
        embed_dim: width C of the joint space.
        vocab: number of token ids.
    """

    context: int
    embed_dim: int
    vocab: int

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids (B, L) int64, L at most `context`.

        Raises:
            ValueError: if a text is too long; the message names it.
        """
        raise NotImplementedError

    def ends(self, ids: Tensor) -> Tensor:
        """Index (B,) of the last token that the embedding of a text depends on, ids (B, L)."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, C) embeddings, not normalised.

        Raises:
            ValueError: if the ids are no such batch.
        """
        raise NotImplementedError

    def _check(self, ids: Tensor) -> None:
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise ValueError(
                f"expected token ids of shape (B, <= {self.context}), got {tuple(ids.shape)}"
            )


@dataclass(frozen=True)
class TextConfig:
    """The sizes of a `ClipText`, whose arguments these are."""

    vocab: int
    context: int
    width: int
    layers: int
    embed_dim: int
    activation: str = "quick_gelu"
    head_width: int = HEAD_WIDTH
    hidden: int | None = None

    def build(self) -> TextTower:
        """The tower, with random weights.

        Raises:
            ValueError: if the heads do not fill the width.
        """
        return ClipText(**asdict(self))


class ClipText(TextTower):
    """The text tower of OpenAI's CLIP, under OpenAI's parameter names.

    Args:
        vocab: number of token ids.
        context: longest text, in tokens.
        width, layers: token width D and number of blocks.
        embed_dim: width C of the joint space.
        activation: "quick_gelu" (OpenAI) or "gelu".
        head_width, hidden: as in `Transformer`.
    """

    def __init__(
        self,
        *,
        vocab: int,
        context: int,
        width: int,
        layers: int,
        embed_dim: int,
        activation: str = "quick_gelu",
        head_width: int = HEAD_WIDTH,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.context, self.embed_dim, self.vocab = context, embed_dim, vocab
        self.transformer = Transformer(
            width, layers, activation, head_width=head_width, hidden=hidden
        )
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = drawn(context, width, std=0.01)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = drawn(width, embed_dim, std=width**-0.5)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """OpenAI's byte-pair ids with start and end marks, zero-padded to the longest text."""
        return tokenizer.tokenize(texts, self.context)

    def ends(self, ids: Tensor) -> Tensor:
        """Where the end-of-text token stands: it has the highest id."""
        return ids.argmax(-1)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> (B, C).

        The tower is causal, so everything after the longest text's end cannot change the result and
        is cut off.
        """
        self._check(ids)
        end = self.ends(ids)  # (B,)
        length = int(end.max()) + 1
        x = self.token_embedding(ids[:, :length]) + self.positional_embedding[:length]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)  # (B, length, D)
        x = x[torch.arange(len(x), device=x.device), end]
        return self.ln_final(x) @ self.text_projection
