"""Detectors: which patches are outliers? `(trace, layer, *, knobs) -> (B, N) bool`.

`layer` is an absolute block number; the detector judges that block's output, or the attention that
made it. No image of a batch influences another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfp.registry import op
from sfp.tokens import upcast
from sfp.trace import Trace


def largest(score: Tensor, count: int | None) -> Tensor:
    """Marks each row's finite scores, at most the `count` largest of them: (B, N) -> (B, N) bool."""
    marked = score.isfinite()
    if count is None or count >= score.shape[-1]:
        return marked
    top = score.topk(count, dim=-1).indices
    return marked & torch.zeros_like(marked).scatter(-1, top, True)


@op("detector")
def som(trace: Trace, layer: int, *, gain: float = 1.0, top_k: int | None = None) -> Tensor:
    """Self-adaptive Outlier Mitigator: patches that the class token attends to more than they do.

    Patch j is an outlier if gain * A[cls, j] > A[j, j], with A averaged over heads (SFP, ICCV 2025).

    Args:
        gain: 1 in the paper; the release multiplies by res_cls 0.3 * res_scale 5.0 = 1.5.
        top_k: keep only those that the class token attends to most; 10 in the release.
    """
    drawn = gain * trace.cls_row(layer).mean(1)  # (B, N)
    own = trace.self_weight(layer).mean(1)
    return largest(drawn.masked_fill(drawn <= own, -torch.inf), top_k)


@op("detector")
def l2_norm(trace: Trace, layer: int, *, top_k: int = 10) -> Tensor:
    """The `top_k` patches of largest L2 norm (SFP release, `pm="L2"`)."""
    return largest(upcast(trace.outputs[layer].patches).norm(dim=-1), top_k)


@op("detector")
def lof(trace: Trace, layer: int, *, neighbours: int = 30, contamination: float = 0.05) -> Tensor:
    """Local outlier factor as SC-CLIP releases it (Bai et al., 2024; SFP's `pm="LOF"`).

    Args:
        neighbours: k.
        contamination: patches above the (1 - contamination) quantile of the scores are outliers.
    """
    scores = lof_scores(trace.outputs[layer].patches, neighbours)
    return scores > scores.quantile(1 - contamination, dim=-1, keepdim=True)


def lof_scores(x: Tensor, neighbours: int) -> Tensor:
    """SC-CLIP's local outlier factor, (B, N, D) -> (B, N).

    Not the textbook's: distances are squared, and the reachability of a point uses its own
    k-distance, so that its density is the inverse of that distance.
    """
    x = upcast(x)
    k = min(neighbours, x.shape[1] - 1)
    exact = "donot_use_mm_for_euclid_dist"  # differences of near points survive
    distance = torch.cdist(x, x, compute_mode=exact).square()  # (B, N, N)
    nearest = distance.topk(k + 1, dim=-1, largest=False)
    reach = nearest.values[..., -1]  # (B, N); 0 where more than k tokens are the same
    floor = torch.finfo(x.dtype).eps * reach.amax(-1, keepdim=True)
    reach = torch.maximum(reach, floor.clamp_min(1e-30))
    density = 1 / reach
    around = nearest.indices[..., 1:].flatten(1)  # (B, N * k), the point itself left out
    return density.gather(1, around).view(*reach.shape, k).mean(-1) / density
