"""SAM's last attention, compared with the library's own block."""

from __future__ import annotations

import pytest
import segmentors
import torch

from sfp.guides import SamGuide

SamVisionAttention = pytest.importorskip("transformers.models.sam.modeling_sam").SamVisionAttention

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("size", [(48, 80), (90, 30), (64, 64)], ids=str)
def test_attention_is_that_of_the_library(size):
    model = segmentors.sam()
    layer = model.vision_encoder.layers[-1]
    for table in (layer.attn.rel_pos_h, layer.attn.rel_pos_w):
        table.data.normal_()
    guide = SamGuide(model=model, image_mean=[120.0] * 3, image_std=[60.0] * 3)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    weights, values = guide.last_attention(image)
    tokens, grid = guide._entering_last(image)
    library = SamVisionAttention(model.config.vision_config, window_size=0)
    library.load_state_dict(layer.attn.state_dict())
    _, attention = library(layer.layer_norm1(tokens), output_attentions=True)  # (heads, 16, 16)
    side = tokens.shape[1]
    whole = attention.view(-1, side, side, side, side)[
        :, : grid[0], : grid[1], : grid[0], : grid[1]
    ]
    torch.testing.assert_close(weights, whole.flatten(3).flatten(1, 2))
    assert values.shape[1:3] == grid
    assert grid == tuple(-(-round(side * 64 / max(size)) // 16) for side in size)
    assert guide(image.repeat(2, 1, 1, 1)).data.shape[:2] == (2, grid[0] * grid[1])
