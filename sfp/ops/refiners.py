"""Refiners of the query logits: `(logits (B, Q, h, w), trace, *, knobs) -> logits`.

They act on cosine similarities, window by window, before windows are merged; any method can use them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.registry import op
from sfp.tokens import upcast
from sfp.trace import Trace


def global_logits(trace: Trace) -> Tensor:
    """Cosine of CLIP's image embedding with every query, (B, Q).

    Raises:
        LookupError: if the run was given no text.
    """
    if trace.text is None:
        raise LookupError("this refiner compares with text features, and the trace has none")
    image = F.normalize(upcast(trace.global_embedding()), dim=-1)  # (B, C)
    return image @ trace.text.to(image).T


@op("refiner", words=True)
def remove_redundancy(logits: Tensor, trace: Trace, *, temperature: float = 2.0) -> Tensor:
    """CLIP Surgery's feature surgery: what a patch shares with all queries is no evidence.

    w s - mean over queries of w s, with s the logits and w the queries' weights for the whole image,
    softmax(temperature * global logits) over its mean. The paper writes it on features of size
    (N, Q, C); summed over C it is this.
    """
    weights = (temperature * global_logits(trace)).softmax(-1)  # (B, Q)
    weighted = logits * (weights / weights.mean(-1, keepdim=True))[..., None, None]
    return weighted - weighted.mean(1, keepdim=True)


@op("refiner", words=True)
def global_bias(logits: Tensor, trace: Trace, *, weight: float = -0.3) -> Tensor:
    """Adds a share of the whole image's logits; a negative one removes its bias (SegEarth-OV)."""
    return logits + weight * global_logits(trace)[..., None, None]


@op("refiner")
def key_smoothing(
    logits: Tensor, trace: Trace, *, ks_thresh: float = 1.0, scale: float = 100.0
) -> Tensor:
    """Unsure patches take the logits of patches with similar keys (MaskCLIP).

    Weights are cosines of the last block's keys, all heads together, with rows of L1 norm 1.

    Args:
        ks_thresh: patches whose most probable query is less probable are smoothed; 1 is all.
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
    """Queries that are probable nowhere in the window leave it, with a logit of -100 (MaskCLIP).

    Args:
        pd_thresh: least probability that a query must have in some patch.
        scale: inverse temperature of the probabilities.
    """
    best = (scale * logits).softmax(1).amax((-2, -1), keepdim=True)  # (B, Q, 1, 1)
    return logits.masked_fill(best < pd_thresh, -100)
