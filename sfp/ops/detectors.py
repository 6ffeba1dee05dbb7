"""Detectors: which patches are outliers? `(trace, layer, *, knobs) -> (B, N) bool`.

`layer` is an absolute block number; the detector judges that block's output, or the attention that
made it. No image of a batch influences another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfp.clip.int8 import float_weight
from sfp.functional.precision import exact, upcast
from sfp.registry import op
from sfp.trace import Trace


def largest(score: Tensor, count: int | None) -> Tensor:
    """Marks at most the `count` largest finite scores of each row: (B, N) -> (B, N) bool."""
    marked = score.isfinite()
    if count is None or count >= score.shape[-1]:
        return marked
    top = score.topk(count, dim=-1).indices
    return marked & torch.zeros_like(marked).scatter(-1, top, True)


def standing_out(score: Tensor, above: float, count: int | None = None) -> Tensor:
    """Marks scores (B, N) above `above` times their row's median, at most the `count` largest."""
    usual = score.median(-1, keepdim=True).values
    return largest(score.masked_fill(score <= above * usual, -torch.inf), count)


@op("detector")
def som(trace: Trace, layer: int, *, gain: float = 1.0, top_k: int | None = None) -> Tensor:
    """Self-adaptive Outlier Mitigator: patches that the class token attends to more than they do.

    Patch j is an outlier if gain * A[cls, j] > A[j, j], with A averaged over heads (SFP, ICCV 2025).

    Args:
        gain: 1 in the paper; the release multiplies by res_cls 0.3 * res_scale 5.0 = 1.5.
        top_k: keep only those that the class token attends to most; 10 in the release.
    """
    drawn, own = trace.mean_row_and_diagonal(layer)
    drawn = gain * drawn
    return largest(drawn.masked_fill(drawn <= own, -torch.inf), top_k)


@op("detector")
def cls_self_ratio(
    trace: Trace, layer: int, *, above: float = 10.0, top_k: int | None = None
) -> Tensor:
    """SOM's comparison as a ratio, computed per head, relative to the image's median.

    r_j = mean over heads of A[cls, j] / A[j, j]; a patch is an outlier if its ratio is more than
    `above` times the median of its image. This differs from `som` where heads disagree, since the mean
    of ratios is not the ratio of means: one head in which a patch hardly attends to itself is enough.
    It also ignores whether the class token attends much to all patches of a layer. The detector is "in
    the style of SegEarth-OV"; we had no code of that form, so normalisation and threshold are our
    interpretation.

    Args:
        above: multiple of the median; ours, an order of magnitude.
        top_k: keep only those with the largest ratios.
    """
    own = trace.self_weight(layer)  # (B, H, N)
    # a hidden patch has neither weight: its ratio is 0
    quotient = trace.cls_row(layer) / own.clamp_min(torch.finfo(own.dtype).tiny)
    return standing_out(quotient.mean(1), above, top_k)


@op("detector")
def cls_attention(trace: Trace, layer: int, *, top_k: int = 10) -> Tensor:
    """The `top_k` patches that the class token attends to most, averaged over heads.

    SOM's ranking without its comparison; ten as in the release of SFP.
    """
    return largest(trace.cls_row(layer).mean(1), top_k)


@op("detector")
def attention_received(
    trace: Trace, layer: int, *, above: float = 3.0, top_k: int | None = None
) -> Tensor:
    """Patches that all patches attend to: CLIPtrase's "global patches" (Shao et al., ECCV 2024).

    These are patches whose column mean of the patch-to-patch attention, averaged over heads, is more
    than `above` times the median of the image. The paper shows them as bright stripes of attention maps
    and gives no threshold.

    Args:
        above: multiple of the median; ours.
        top_k: keep only those that receive most.
    """
    prefix = trace.embedded.prefix
    received = trace.attention(layer)[:, :, prefix:, prefix:].mean((1, 2))  # (B, N)
    return standing_out(received, above, top_k)


@op("detector")
def l2_norm(trace: Trace, layer: int, *, top_k: int = 10) -> Tensor:
    """The `top_k` patches of largest L2 norm (SFP release, `pm="L2"`)."""
    return largest(upcast(trace.outputs[layer].patches).norm(dim=-1), top_k)


@op("detector")
def weight_norm_channel(
    trace: Trace, layer: int, *, channels: int = 1, above: float = 6.0
) -> Tensor:
    """Patches with extreme values in the channel that the block's weights amplify most (GCLIP).

    GCLIP (arXiv:2502.06818) identifies the channel that carries outliers from the weights: the row of
    the MLP's second layer with the largest norm. The criterion for patches is ours: a value more than
    `above` robust deviations (1.4826 times the median absolute deviation) from the image's median.

    Args:
        channels: number of channels, by decreasing row norm; one extreme value is enough.
        above: threshold in robust deviations.
    """
    chosen = loud_channels(trace, layer, channels)  # (C,)
    value = upcast(trace.outputs[layer].patches)[..., chosen]  # (B, N, C)
    apart = (value - value.median(1, keepdim=True).values).abs()
    spread = 1.4826 * apart.median(1, keepdim=True).values
    return (apart > above * spread).any(-1)


def loud_channels(trace: Trace, layer: int, count: int = 1) -> Tensor:
    """The channels with the largest output weights of block `layer`'s MLP, largest first."""
    rows = float_weight(trace.vit.blocks[layer].get_submodule("mlp.c_proj"))  # (D, 4D)
    return rows.norm(dim=1).topk(min(count, len(rows))).indices


@op("detector")
def lof(trace: Trace, layer: int, *, neighbours: int = 30, contamination: float = 0.05) -> Tensor:
    """Local outlier factor as SC-CLIP releases it (Bai et al., 2024; SFP's `pm="LOF"`).

    Args:
        neighbours: k.
        contamination: patches above the (1 - contamination) quantile of the scores are outliers.
    """
    scores = lof_scores(trace.outputs[layer].patches, neighbours)
    return scores > scores.quantile(1 - contamination, dim=-1, keepdim=True)


def squared_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances of all pairs, (B, N, D) -> (B, N, N), at least 0, as `x`.

    By a matrix product in double precision, whose rounding is below that of differences in single
    precision, and which is seven times as fast.
    """
    dtype = exact(x.device)
    if dtype != torch.float64:  # a device without it
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    y = (x - x.mean(1, keepdim=True)).to(dtype)
    length = y.square().sum(-1)  # (B, N)
    squares = length[:, :, None] + length[:, None] - 2 * (y @ y.mT)
    squares.diagonal(dim1=1, dim2=2).zero_()
    return squares.clamp_min(0).to(x.dtype)


def lof_scores(x: Tensor, neighbours: int) -> Tensor:
    """SC-CLIP's local outlier factor, (B, N, D) -> (B, N).

    Unlike the textbook's, it uses squared distances, and the reachability of a point uses its own
    k-distance, so that its density is the inverse of that distance.
    """
    x = upcast(x)
    k = min(neighbours, x.shape[1] - 1)
    distance = squared_distances(x)  # (B, N, N)
    nearest = distance.topk(k + 1, dim=-1, largest=False)
    reach = nearest.values[..., -1]  # (B, N); 0 where more than k tokens are the same
    floor = torch.finfo(x.dtype).eps * reach.amax(-1, keepdim=True)
    reach = torch.maximum(reach, floor.clamp_min(1e-30))
    density = 1 / reach
    around = nearest.indices[..., 1:].flatten(1)  # (B, N * k), the point itself left out
    return density.gather(1, around).view(*reach.shape, k).mean(-1) / density
