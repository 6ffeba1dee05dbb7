"""A fast ViT of CLIP's depth: random weights, width 128, a 14 x 14 grid."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.vit import ImageConfig, VisionTransformer


@functools.cache
@torch.random.fork_rng()
def vit():
    """Twelve narrow blocks whose attention is not uniform; a 14x14 grid at 112 pixels."""
    torch.manual_seed(0)
    model = VisionTransformer(
        ImageConfig(image_size=112, patch=8, width=128, layers=12, embed_dim=32)
    )
    for name, p in model.named_parameters():
        if "in_proj_weight" in name:
            p.data *= 4
    return model.requires_grad_(False).eval()


def images(batch: int = 2, height: int = 112, width: int = 112) -> Tensor:
    generator = torch.Generator().manual_seed(height + width)
    coarse = torch.randn(batch, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear")
    return smooth + 0.3 * torch.randn(batch, 3, height, width, generator=generator)
