"""Tiny SAM, SAM 2 and DINO models with random weights; nothing is downloaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

DECODER = dict(
    hidden_size=16,
    mlp_dim=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    iou_head_hidden_dim=16,
)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that masks have both sides and scores differ."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return model.requires_grad_(False).eval()


def sam(seed: int = 0, side: int = 64, mask_channels: int = 4) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    vision = dict(
        hidden_size=16,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side,
        patch_size=16,
        window_size=2,
        global_attn_indexes=[1],
        mlp_dim=32,
        num_pos_feats=8,
    )
    prompts = dict(
        hidden_size=16, image_size=side, patch_size=16, mask_input_channels=mask_channels
    )
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER
    )
    return scramble(transformers.SamModel(config), seed)


def sam2(seed: int = 0, side: int = 64, mask_channels: int = 4) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="4.56")
    backbone = dict(
        model_type="sam2_hiera_det_model",
        hidden_size=8,
        num_attention_heads=1,
        image_size=[side, side],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[8, 4, 4, 4],
        window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[3],
    )
    vision = dict(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[side // n] * 2 for n in (4, 8, 16)],
        fpn_hidden_size=16,
    )
    prompts = dict(
        hidden_size=16, image_size=side, patch_size=16, mask_input_channels=mask_channels
    )
    config = transformers.Sam2Config(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=DECODER
    )
    return scramble(transformers.Sam2Model(config), seed)


def dino(seed: int = 0, patch: int = 8) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        patch_size=patch,
        image_size=8 * patch,
    )
    return scramble(transformers.ViTModel(config, add_pooling_layer=False), seed)


def eomt(seed: int = 0, side: int = 64) -> nn.Module:
    """An EoMT with 9 queries and 4 classes, for squares of 64 pixels."""
    transformers = pytest.importorskip("transformers", minversion="4.54")
    config = transformers.EomtConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_blocks=1,
        num_upscale_blocks=1,
        num_queries=9,
        num_labels=4,
        image_size=side,
        patch_size=16,
    )
    return scramble(transformers.EomtForUniversalSegmentation(config), seed)


def mask2former(seed: int = 0) -> nn.Module:
    """A Mask2Former on a Swin of four single blocks, with 9 queries and 4 classes."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=9,
        num_labels=4,
    )
    return scramble(transformers.Mask2FormerForUniversalSegmentation(config), seed)


def sam3(side: int = 56) -> nn.Module:
    """A `Sam3Model` on 4 x 4 patches, with 6 instances."""
    part = dict(hidden_size=32, num_attention_heads=2, intermediate_size=32)
    transformers = pytest.importorskip("transformers", "5")
    config = transformers.Sam3Config(
        vision_config=dict(
            backbone_config=dict(
                part,
                model_type="sam3_vit_model",
                num_hidden_layers=2,
                image_size=side,
                patch_size=14,
                window_size=2,
                global_attn_indexes=[1],
                pretrain_image_size=28,
            ),
            fpn_hidden_size=32,
        ),
        text_config=dict(
            part,
            model_type="clip_text_model",
            vocab_size=49408,
            num_hidden_layers=2,
            max_position_embeddings=32,
            projection_dim=16,
        ),
        geometry_encoder_config=dict(part, num_layers=1),
        detr_encoder_config=dict(part, num_layers=1),
        detr_decoder_config=dict(part, num_layers=2, num_queries=6),
        mask_decoder_config=dict(hidden_size=32, num_attention_heads=2),
    )
    return scramble(transformers.Sam3Model(config))
