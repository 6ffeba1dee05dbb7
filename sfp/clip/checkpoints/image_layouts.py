"""Image towers as different people write them, under the names and with the switches of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sfp.clip.blocks import HEAD_WIDTH
from sfp.clip.checkpoints.published import HEAD_WIDTHS, LayoutError
from sfp.clip.checkpoints.renaming import (
    BLOCKS,
    count_blocks,
    from_transformers,
    hidden_width,
    shape_of,
    turned,
)
from sfp.clip.vit import ImageConfig

PREFIXES = ("visual.", "vision_model.", "visual_projection.")  # of an image tower's tensors

_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # their spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "visual_projection.weight": "visual.proj",
}


def read(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], ImageConfig]:
    """An image tower's tensors under our names, and its sizes.

    Args:
        state: tensors whose names begin with one of `PREFIXES`.
        config: the configuration that lies beside the weights, parsed.

    Raises:
        LayoutError: if sizes cannot be read off; the message says of what.
    """
    if any(name.startswith("vision_model.") for name in state):
        named = from_transformers(state, _TRANSFORMERS, "vision_model.", "visual.")
        named["visual.proj"] = turned(named["visual.proj"])
    else:
        named = dict(state)
    return named, _plain(named)


def _plain(state: Mapping[str, Tensor]) -> ImageConfig:
    """The sizes of OpenAI's tower."""
    if not any(name.startswith("visual.ln_pre.") for name in state):
        raise LayoutError(
            "this CLIP has no visual.ln_pre, as CLIPA, whose image tower averages its patches and "
            "whose text tower has another tokenizer"
        )
    width, _, _, patch = shape_of(state, "visual.conv1.weight", 4)
    rows = shape_of(state, "visual.positional_embedding", 2)[0]
    side = round((rows - 1) ** 0.5)
    if side * side + 1 != rows:
        raise LayoutError(f"position table of {rows} rows: expected a square grid plus CLS")
    return ImageConfig(
        image_size=side * patch,
        patch=patch,
        width=width,
        layers=count_blocks(state, f"visual.{BLOCKS}"),
        embed_dim=shape_of(state, "visual.proj", 2)[1],
        head_width=HEAD_WIDTHS.get(width, HEAD_WIDTH),
        hidden=hidden_width(state, "visual."),
    )
