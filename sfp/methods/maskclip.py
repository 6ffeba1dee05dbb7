"""MaskCLIP: the last block's values, unmixed (Zhou et al., ECCV 2022, arXiv:2112.01071)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.registry import METHODS, op
from sfp.trace import Trace


@op("refiner")
def key_smoothing(
    logits: Tensor, trace: Trace, *, ks_thresh: float = 1.0, scale: float = 100.0
) -> Tensor:
    """Replaces the logits of uncertain patches by those of patches with similar keys (MaskCLIP).

    Weights are cosines of the last block's keys, all heads together, with rows of L1 norm 1.

    Args:
        ks_thresh: patches are smoothed if their largest probability is smaller; 1 smooths all.
        scale: inverse temperature of those probabilities.
    """
    keys = trace.heads(len(trace.vit.blocks) - 1)
    k = upcast(keys.k.transpose(1, 2).flatten(2)[:, keys.prefix :])  # (B, N, D)
    k = F.normalize(k, dim=-1)
    weights = F.normalize(k @ k.mT, p=1, dim=-1)  # (B, N, N)
    smooth = (logits.flatten(2) @ weights.mT).view_as(logits)
    confidence = (scale * logits).softmax(1).amax(1, keepdim=True)  # (B, 1, h, w)
    return torch.where(confidence < ks_thresh, smooth, logits)


@op("refiner")
def prompt_denoising(
    logits: Tensor, trace: Trace, *, pd_thresh: float = 0.5, scale: float = 100.0
) -> Tensor:
    """Removes queries that are not probable anywhere in the window, by a logit of -100 (MaskCLIP).

    Args:
        pd_thresh: least probability that a query must have in some patch.
        scale: inverse temperature of the probabilities.
    """
    best = (scale * logits).softmax(1).amax((-2, -1), keepdim=True)  # (B, Q, 1, 1)
    return logits.masked_fill(best < pd_thresh, -100)


@METHODS.register_module()
def maskclip(
    *,
    ignore_residual: bool = False,
    ks_thresh: float | None = None,
    pd_thresh: float | None = None,
) -> dict[str, Any]:
    """Every token attends only to itself in the last block.

    The release keeps the block's residual and MLP. Later papers (ClearCLIP, SegEarth-OV, FLOSS) report
    as "MaskCLIP" the form without both, which scores much lower on some datasets (VOC20 74.9 -> 61.4).

    Args:
        ignore_residual: True for that reduced form.
        ks_thresh: key smoothing of patches less confident than this; None for none.
        pd_thresh: prompt denoising of classes less confident than this; None for none. It runs after
            key smoothing, so that the logits it sets are not smoothed.
    """
    readout: dict[str, Any] = dict(attention=dict(type="identity"))
    if ignore_residual:
        readout.update(residual=None, ffn=False)
    refiners = []
    if ks_thresh is not None:
        refiners.append(dict(type="key_smoothing", ks_thresh=ks_thresh))
    if pd_thresh is not None:
        refiners.append(dict(type="prompt_denoising", pd_thresh=pd_thresh))
    return dict(readouts=[readout], refiners=refiners)
