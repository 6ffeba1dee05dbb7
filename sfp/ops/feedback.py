"""Ops of ResCLIP: attention of earlier blocks, and of a first segmentation, in the last block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.feedback import feedback_mask, patch_modes
from sfp.functional.grid import gaussian_prior, pad_prefix
from sfp.functional.labels import class_scores
from sfp.functional.pamr import pamr
from sfp.registry import Op, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace


@op("source")
def read_last(
    trace: Trace, *, attention: Callable[[Heads, Trace], Tensor], reduced: bool = True
) -> Tokens:
    """The last block under another attention rule, e.g. for `trace.guess`.

    Args:
        attention: the rule.
        reduced: whether its residual and FFN are left out.
    """
    last = len(trace.vit.blocks) - 1
    tokens = trace.entering(last)
    return trace.vit.blocks[last].read(
        tokens,
        residual=None if reduced else tokens.data,
        attention=attention,
        ffn=not reduced,
        trace=trace,
    )


def layers_attention(trace: Trace, *, layers: Sequence[int]) -> Tensor:
    """Mean over layers of the attention weights of each head, (B, H, T, T)."""
    total = trace.attention(trace.layer(layers[0])).clone()
    for layer in layers[1:]:
        total += trace.attention(trace.layer(layer))
    return total / len(layers)


@op("attention")
def residual_cross(
    heads: Heads,
    trace: Trace,
    *,
    rule: Callable[[Heads, Trace], Tensor],
    layers: Sequence[int] = (5, 6, 7, 8),
    share: float = 0.4,
    gain: float = 2.0,
) -> Tensor:
    """gain * ((1 - share) * rule + share * mean attention of earlier blocks), head by head.

    ResCLIP's Residual Cross-correlation Self-attention.

    Args:
        rule: weights of the last block.
        layers: method layers of the earlier blocks.
        share: lambda_rcs.
        gain: tau_rcs; it scales what the heads put out, but not the bias of `out_proj`: without that,
            `ln_post` would undo it.
    """
    earlier = trace.once(Op(layers_attention, (("layers", tuple(layers)),)))
    dropped = trace.embedded.prefix - heads.prefix  # a readout without the class token
    earlier = earlier[:, :, dropped:, dropped:]
    return gain * ((1 - share) * rule(heads, trace) + share * earlier)


@op("attention")
def feedback_keys(
    heads: Heads,
    trace: Trace,
    *,
    std: float = 5.0,
    feedback: Callable[[Trace], Tensor] | None = None,
    share: float = 0.7,
    gain: float = 1.8,
) -> Tensor:
    """softmax(gain * ((1 - share) * kk + share * M) + Gaussian of the patch distance), (B, H, T, T).

    ResCLIP's Semantic Feedback Refinement of NACLIP's attention; without feedback it is NACLIP's. The
    class token has no feedback and no Gaussian: zeros.

    Args:
        std: of the Gaussian, in patches.
        feedback: affinity M; None leaves kk as it is.
        share: lambda_sfr.
        gain: tau_sfr.
    """
    logits = heads.logits("k", "k")
    if feedback is not None:
        mask = pad_prefix(trace.once(feedback), heads.prefix)[:, None]  # (B, 1, T, T)
        logits = gain * ((1 - share) * logits + share * mask)
    prior = gaussian_prior(heads.grid, std).to(logits)
    return (logits + pad_prefix(prior, heads.prefix)).softmax(-1)


@op("affinity")
def semantic_feedback(
    trace: Trace,
    *,
    source: Callable[[Trace], Tokens],
    temp_thd: float = 0.25,
    logit_scale: float = 40.0,
    blur: float = 5.0,
    pamr_steps: int = 10,
    pamr_dilations: Sequence[int] = (8, 16),
) -> Tensor:
    """Which patches a first segmentation labels alike (ResCLIP), (B, N, N).

    First-pass logits at pixel resolution, refined by PAMR; the class of each pixel, 0 where it is less
    probable than `temp_thd`; the most frequent class of each patch; then `feedback_mask`.

    Args:
        source: tokens of the first pass.
        temp_thd: least probability of a class.
        logit_scale: inverse temperature of the softmax over queries.
        blur: std of the mask's Gaussian, in patches.
        pamr_steps, pamr_dilations: PAMR's; 0 steps for none.
    """
    logits = trace.guess(source)  # (B, Q, h, w)
    grid, patch = trace.embedded.grid, trace.vit.patch
    size = (grid[0] * patch, grid[1] * patch)
    index = tuple(trace.index or range(logits.shape[1]))
    labels = []
    # image by image: a batch's logits at pixel resolution would be large
    for image, coarse in zip(trace.image[..., : size[0], : size[1]], logits, strict=True):
        fine = resize(coarse, size)[None]
        if pamr_steps:
            guide = image[None].to(fine)
            fine = pamr(guide, fine, steps=pamr_steps, dilations=pamr_dilations)
        confidence, label = class_scores(fine[0], index, logit_scale).max(0)
        labels.append(label.masked_fill(confidence < temp_thd, 0))
    return feedback_mask(patch_modes(torch.stack(labels), grid, patch), grid, blur)
