"""Ops of ResCLIP: a first segmentation feeds back into the last block's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sfp.functional.attention import gaussian_prior, pad_prefix
from sfp.functional.clusters import resize
from sfp.functional.feedback import feedback_mask, patch_modes
from sfp.functional.labels import class_scores
from sfp.functional.pamr import pamr
from sfp.registry import op
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


@op("attention")
def scaled(
    heads: Heads, trace: Trace, *, rule: Callable[[Heads, Trace], Tensor], gain: float
) -> Tensor:
    """A rule's weights times a number.

    It scales what the heads put out, but not the bias of `out_proj`: without that, `ln_post` would
    undo it in a block without residual.
    """
    return gain * rule(heads, trace)


@op("attention")
def feedback_keys(
    heads: Heads,
    trace: Trace,
    *,
    feedback: Callable[[Trace], Tensor],
    share: float = 0.7,
    gain: float = 1.8,
    std: float = 5.0,
) -> Tensor:
    """softmax(gain * ((1 - share) * kk + share * M) + Gaussian of the patch distance), (B, H, T, T).

    ResCLIP's Semantic Feedback Refinement of `neighbour`, NACLIP's attention. The class token has no
    feedback and no Gaussian: zeros.

    Args:
        feedback: affinity M.
        share: lambda_sfr.
        gain: tau_sfr.
        std: of the Gaussian, in patches.
    """
    mask = pad_prefix(trace.once(feedback), heads.prefix)[:, None]  # (B, 1, T, T)
    prior = pad_prefix(gaussian_prior(heads.grid, std, heads.k.device), heads.prefix)  # (T, T)
    return (gain * ((1 - share) * heads.logits("k", "k") + share * mask) + prior).softmax(-1)


@op("affinity", words=True)
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
