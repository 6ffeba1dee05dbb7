"""SAM's image encoder as a guide: the attention of its last block, which is global."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.registry import GUIDES
from sfp.tokens import Tokens


@GUIDES.register_module(name="sam")
class SamGuide(FrozenModel):
    """A frozen SAM (Kirillov et al., 2023): attention and values of its last block, for Trident.

    Images are resized bilinearly with antialiasing so that the longer side fills SAM's square; the rest
    is padded with zeros, whose positions are removed.

    Args:
        model: a name on the Hugging Face hub, e.g. "facebook/sam-vit-base", or a folder; or a
            `SamModel`.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = pretrained(model, "AutoModelForMaskGeneration", "sam")
        super().__init__(model, Renormalise(image_mean=image_mean, image_std=image_std))

    @torch.no_grad()
    def last_attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Of one image (1, 3, H, W): weights (heads, h * w, h * w), and values (heads, h, w, d).

        The softmax is over all positions of SAM's square, of which those of the image are returned.
        """
        tokens, grid = self._entering_last(image)  # (1, side, side, D)
        layer = self.model.vision_encoder.layers[-1]
        own, side = layer.attn, tokens.shape[1]
        qkv = own.qkv(layer.layer_norm1(tokens)).flatten(1, 2)  # (1, side^2, 3 D)
        qkv = qkv.unflatten(-1, (3, own.num_attention_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = (x[0].float() for x in qkv)  # (heads, side^2, d)
        maps = q.unflatten(1, (side, side))[:, : grid[0], : grid[1]]  # (heads, h, w, d)
        relative = None
        if getattr(own, "use_rel_pos", False):
            rows = _relative(maps, own.rel_pos_h.float(), side, rows=True)  # (heads, h, w, side)
            columns = _relative(maps, own.rel_pos_w.float(), side, rows=False)
            relative = rows, columns
        patches = grid[0] * grid[1]
        weights = q.new_empty(len(q), patches, patches)
        for i in range(len(q)):  # a map of all heads at once takes 0.8 GB, several times
            logits = (maps[i].flatten(0, 1) * own.scale) @ k[i].T  # (h * w, side^2)
            logits = logits.unflatten(0, grid).unflatten(2, (side, side))
            if relative is not None:
                logits += relative[0][i, ..., None]
                logits += relative[1][i, ..., None, :]
            full = logits.flatten(2).softmax(-1).unflatten(2, (side, side))
            weights[i] = full[:, :, : grid[0], : grid[1]].flatten(2).flatten(0, 1)
        values = v.unflatten(1, (side, side))[:, : grid[0], : grid[1]]
        return weights, values

    @torch.no_grad()
    def forward(self, image: Tensor, output: str | None = None) -> Tokens:
        """Values of the last block, all heads concatenated, of images (B, 3, H, W): (B, h * w, D)."""
        each = [self.last_attention(one[None])[1].permute(1, 2, 0, 3).flatten(2) for one in image]
        grid = (each[0].shape[0], each[0].shape[1])
        return Tokens(torch.stack(each).flatten(1, 2), grid, prefix=0)

    def _entering_last(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input tokens of the last block, and the rows and columns that belong to the image."""
        vision = self.model.config.vision_config
        side, patch = vision.image_size, vision.patch_size
        height, width = image.shape[-2:]
        scale = side / max(height, width)
        inner = tuple(max(int(length * scale + 0.5), 1) for length in (height, width))
        pixels = self.resized(image, inner)
        pixels = F.pad(pixels, (0, side - inner[1], 0, side - inner[0]))
        encoder = self.model.vision_encoder
        x = encoder.patch_embed(pixels.to(next(self.model.parameters()).dtype))
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        for layer in encoder.layers[:-1]:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        return x, (-(-inner[0] // patch), -(-inner[1] // patch))


def _relative(queries: Tensor, table: Tensor, side: int, *, rows: bool) -> Tensor:
    """q_i . R[distance from i to j] along one side: (heads, h, w, side).

    Args:
        queries: queries of the image's positions, (heads, h, w, d).
        table: relative position embedding for distances -(side - 1) to side - 1, (2 side - 1, d).
        side: number of positions along a side of the square.
        rows: whether distances are between rows; otherwise between columns.
    """
    at = torch.arange(queries.shape[1 if rows else 2], device=queries.device)
    distance = at[:, None] - torch.arange(side, device=queries.device) + side - 1
    return torch.einsum("nhwd,hsd->nhws" if rows else "nhwd,wsd->nhws", queries, table[distance])
