"""ResCLIP: attention of earlier blocks and a first pass (Yang et al., CVPR 2025, arXiv:2411.15851).

NACLIP's reduced last block, with two additions. RCS: attention of the middle blocks is mixed into it.
SFR: the attention of a second pass is corrected by which patches a first segmentation labels the same.

The paper's main rows use no post-processing, but the release runs PAMR inside the feedback. Its flags
`use_rcs` and `use_sfr` are always true by mistake; here they work. It tunes four constants per dataset,
listed in `DATASETS`; its other settings (crops, thresholds) are NACLIP's.

It has not been compared with the release (its SFR runs on CUDA only). Where the description is open,
this is our interpretation: the Gaussian prior is added after SFR's scale, the class token gets no
feedback, distances are divided by the largest of the grid, and the blur has no padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import gaussian_prior, pad_prefix
from sfp.functional.clusters import resize
from sfp.functional.labels import class_scores
from sfp.functional.pamr import pamr
from sfp.kinds import Affinity, Rule, Source
from sfp.registry import METHODS, Some, op, tuned
from sfp.tokens import Heads
from sfp.trace import Trace

# temp_thd, lambda_rcs, tau_sfr, lambda_sfr
DATASETS = dict(
    ade20k=(0.25, 0.3, 2.1, 0.7),
    city_scapes=(0.10, 0.2, 2.1, 0.6),
    coco_object=(0.11, 0.4, 1.8, 0.7),
    coco_stuff164k=(0.11, 0.4, 1.8, 0.7),
    context59=(0.25, 0.4, 1.8, 0.7),
    context60=(0.30, 0.3, 1.8, 0.7),
    voc20=(0.10, 0.6, 2.1, 0.6),
    voc21=(0.50, 0.3, 2.2, 0.7),
)


@op("attention")
def scaled(heads: Heads, trace: Trace, *, rule: Rule, gain: float) -> Tensor:
    """A rule's weights times a number.

    It scales the outputs of the heads, but not the bias of `out_proj`. Without that bias, `ln_post`
    would undo the scale in a block without residual.
    """
    return gain * rule(heads, trace)


@op("attention")
def feedback_keys(
    heads: Heads,
    trace: Trace,
    *,
    feedback: Affinity,
    share: float = 0.7,
    gain: float = 1.8,
    std: float = 5.0,
) -> Tensor:
    """softmax(gain * ((1 - share) * kk + share * M) + Gaussian of the patch distance), (B, H, T, T).

    ResCLIP's Semantic Feedback Refinement of `neighbour`, NACLIP's attention. The class token has no
    feedback and no Gaussian: zeros.

    Args:
        feedback: affinity M.
        share: lambda_sfr of the paper, the share of M.
        gain: tau_sfr of the paper, an inverse temperature.
        std: standard deviation of the Gaussian, in patches.
    """
    mask = pad_prefix(trace.once(feedback), heads.prefix)[:, None]  # (B, 1, T, T)
    prior = pad_prefix(gaussian_prior(heads.grid, std, heads.k.device), heads.prefix)  # (T, T)
    return (gain * ((1 - share) * heads.logits("k", "k") + share * mask) + prior).softmax(-1)


@op("affinity", words=True)
def semantic_feedback(
    trace: Trace,
    *,
    source: Source,
    temp_thd: float = 0.25,
    logit_scale: float = 40.0,
    blur: float = 5.0,
    pamr_steps: int = 10,
    pamr_dilations: Some[int] = (8, 16),
) -> Tensor:
    """Affinity of patches with the same label in a first segmentation (ResCLIP), (B, N, N).

    First-pass logits are refined by PAMR at pixel resolution. Each pixel takes its class, or 0 if that
    is less probable than `temp_thd`, and each patch its most frequent class; `feedback_mask` turns
    these labels into an affinity.

    Args:
        source: tokens of the first pass.
        temp_thd: least probability of a class.
        logit_scale: inverse temperature of the softmax over queries.
        blur: standard deviation of the mask's Gaussian, in patches.
        pamr_steps, pamr_dilations: parameters of PAMR; 0 steps for none.
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
    return feedback_mask(patch_modes(torch.stack(labels), grid, patch, index[-1] + 1), grid, blur)


def patch_modes(labels: Tensor, grid: tuple[int, int], patch: int, classes: int) -> Tensor:
    """The most frequent label of each patch, the smallest in a tie: (B, H, W) -> (B, N) int64."""
    cells = labels[:, : grid[0] * patch, : grid[1] * patch]
    cells = cells.unflatten(2, (grid[1], patch)).unflatten(1, (grid[0], patch))
    cells = cells.transpose(2, 3).flatten(3).flatten(1, 2)  # (B, N, pixels)
    counts = torch.zeros(*cells.shape[:2], classes, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(2, cells, torch.ones_like(cells))
    return counts.argmax(-1)


def feedback_mask(labels: Tensor, grid: tuple[int, int], std: float) -> Tensor:
    """Affinity of patches with the same label, (B, N) -> (B, N, N), from 0 to 1.

    1 for patches with the same label, times exp(-Chebyshev distance / its maximum in the grid) if the
    straight segment between them crosses another label. Each row is blurred by a Gaussian over patch
    numbers (without padding) and divided by its sum; then all are divided by the image's largest entry.

    Args:
        labels: labels of the patches.
        grid: rows and columns of patches.
        std: standard deviation of the Gaussian, in patches.
    """
    steps, length = segment_steps(grid, labels.device)
    same = labels[:, :, None] == labels[:, None]  # (B, N, N)
    straight = same
    for step in steps:
        straight = straight & (labels[:, step] == labels[:, :, None])
    decay = torch.exp(-length.float() / max(max(grid) - 1, 1))
    mask = torch.where(straight, 1.0, decay) * same  # (B, N, N)
    number = torch.arange(len(length), device=labels.device, dtype=mask.dtype)
    blur = torch.exp(-(number[:, None] - number).square() / (2 * std**2))
    mask = F.normalize(mask @ blur, p=1, dim=-1)
    return mask / mask.amax((-2, -1), keepdim=True)


def segment_steps(
    grid: tuple[int, int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The patches on the straight segment between any two patches of a grid.

    The segment from i to j is sampled once per row or column, whichever it crosses more of, and each
    sample belongs to the nearest patch; the segment from j to i has the same patches.

    Returns:
        (steps, N, N) int64 patch numbers, where segments shorter than `steps` repeat their end, and the
        (N, N) Chebyshev distances.
    """
    rows = torch.arange(grid[0], device=device).repeat_interleave(grid[1])
    cols = torch.arange(grid[1], device=device).repeat(grid[0])
    length = torch.maximum(*((x[:, None] - x).abs() for x in (rows, cols)))  # (N, N)
    double = 2 * length.clamp_min(1)
    steps = []
    for step in range(max(grid)):
        walked = length.clamp_max(step)
        # in integers, because floats would round the two directions differently
        row, col = (
            (2 * (x[:, None] * (double // 2) + walked * (x - x[:, None])) + double // 2) // double
            for x in (rows, cols)
        )
        steps.append(row * grid[1] + col)
    return torch.stack(steps), length


@METHODS.register_module()
def resclip(
    *,
    dataset: str = "context59",
    use_rcs: bool = True,
    use_sfr: bool = True,
    layers: Some[int] = (5, 6, 7, 8),
    gaussian_std: float = 5.0,
    tau_rcs: float = 2.0,
    lambda_rcs: float | None = None,
    tau_sfr: float | None = None,
    lambda_sfr: float | None = None,
    temp_thd: float | None = None,
    logit_scale: float = 40.0,
    blur: float = 5.0,
    pamr_steps: int = 10,
) -> dict[str, Any]:
    """Attention output of the last block alone: no residual, no FFN. Needs the text features.

    Args:
        dataset: dataset whose constants replace those that are None; see `DATASETS`.
        use_rcs, use_sfr: whether the two additions are used; without both it is NACLIP.
        layers: blocks whose attention RCS adds.
        gaussian_std: standard deviation of NACLIP's prior, in patches.
        tau_rcs, lambda_rcs: scale and share of RCS.
        tau_sfr, lambda_sfr: scale and share of SFR.
        temp_thd: pixels of the first segmentation with a smaller probability become class 0.
        logit_scale: inverse temperature of its softmax.
        blur: standard deviation of the feedback mask's Gaussian, in patches.
        pamr_steps: steps of PAMR on the first segmentation; 0 for none.
    """
    temp_thd, lambda_rcs, tau_sfr, lambda_sfr = tuned(
        dataset,
        DATASETS,
        temp_thd=temp_thd,
        lambda_rcs=lambda_rcs,
        tau_sfr=tau_sfr,
        lambda_sfr=lambda_sfr,
    ).values()

    def with_rcs(rule: dict[str, Any]) -> dict[str, Any]:
        if not use_rcs:
            return rule
        fused = dict(type="fuse_layers", rule=rule, layers=layers, share=lambda_rcs)
        return dict(type="scaled", rule=fused, gain=tau_rcs)

    rule = with_rcs(dict(type="neighbour", std=gaussian_std))
    if use_sfr:
        feedback = dict(
            type="semantic_feedback",
            source=dict(type="read_last", attention=rule),
            temp_thd=temp_thd,
            logit_scale=logit_scale,
            blur=blur,
            pamr_steps=pamr_steps,
        )
        rule = with_rcs(
            dict(
                type="feedback_keys",
                std=gaussian_std,
                feedback=feedback,
                share=lambda_sfr,
                gain=tau_sfr,
            )
        )
    return dict(readouts=[dict(attention=rule, residual=None, ffn=False)])
