"""Text towers as different people write them, under the names and with the switches of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfp.clip.checkpoints.published import LayoutError
from sfp.clip.checkpoints.renaming import (
    BLOCKS,
    count_blocks,
    from_transformers,
    hidden_width,
    shape_of,
    turned,
)
from sfp.clip.text_towers import TextConfig

VOCABULARY = 49408  # OpenAI's byte pairs, which open_clip, MetaCLIP and DFN share

_TRANSFORMERS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}


def read(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], TextConfig]:
    """A text tower's tensors under our names, and its sizes.

    Args:
        state: what is left of a state dict when the image tower has been taken out.
        config: the configuration that lies beside the weights, parsed.

    Raises:
        LayoutError: if sizes cannot be read off, or the tower has another tokenizer.
    """
    if any(name.startswith("text_model.") for name in state):
        named = from_transformers(state, _TRANSFORMERS, "text_model.", "")
    else:
        if twice := next((k for k in state if f"text.{k}" in state), None):
            raise LayoutError(f"both {twice} and text.{twice}: two text towers in one file")
        named = {name.removeprefix("text."): value for name, value in state.items()}
    if "text_projection" not in named and "text_projection.weight" in named:  # a Linear's
        named["text_projection"] = turned(named.pop("text_projection.weight"))
    return named, _plain(named)


def _plain(state: Mapping[str, Tensor]) -> TextConfig:
    """The sizes of OpenAI's tower."""
    vocab, width = shape_of(state, "token_embedding.weight", 2)
    if vocab > VOCABULARY:
        raise LayoutError(
            f"a vocabulary of {vocab} tokens: the text tower was trained with another tokenizer than "
            f"CLIP's ({VOCABULARY} byte pairs), which this package does not have"
        )
    return TextConfig(
        context=shape_of(state, "positional_embedding", 2)[0],
        vocab=vocab,
        width=width,
        layers=count_blocks(state, BLOCKS),
        embed_dim=shape_of(state, "text_projection", 2)[1],
        hidden=hidden_width(state),
    )
