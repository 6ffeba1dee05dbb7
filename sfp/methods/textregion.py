"""TextRegion: the tokens of each mask are pooled, and words are compared with regions (MIT licence).

Code by avaxiao. Class-agnostic masks, which may be soft and overlap, replace attention: the values of
the last block are summed over each mask, as if the class token attended only to it. The image is used
at two scales, in tiles and as a whole, resized to a square. Patches more similar to other regions than
to their own hold global information and are removed from all masks. Nothing is trained; the masks are
those of SAM 2, which was trained on masks without class names.

| | here | release |
| --- | --- | --- |
| tiles | any windows, stitched by area; `slide_tiles=True` for tiles | tiles |
| values in the sum | not normalised; `unit_values=True` as the demo | demo, by mistake: unit length |
| FFN after the sum | `ffn=False` | evaluation: no; demo: yes |
| masks | given, or any proposer (`paint="none"`) | SAM 2.1, 16 points per side |
| towers with a pool | mean over a mask, the pool's values, `pool_mlp=False` | SigLIP 2, PE |

Published settings: towers of 336 pixels, tiles of 336 (`slide_crop=336, slide_tiles=True`), short side
672, `logit_scale=50`; thresholds of the background VOC21 0.4, Context60 0.35, COCO-Object 0.5; for
SigLIP 2 and PE `beta=0.5, pool_mlp=False`, and for SigLIP 2 also its scale and bias. The release's copy
of PE rotates patches by the angles of neighbouring positions; here by their own.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.blocks import Block
from sfp.functional.clusters import resize
from sfp.functional.precision import upcast
from sfp.functional.windows import squeezed
from sfp.kinds import Rule
from sfp.ops.attention import self_self
from sfp.ops.image import window_grid
from sfp.registry import METHODS, op
from sfp.tokens import Tokens, cosine_logits
from sfp.trace import Trace

LARGE = 1e4  # safely within the range of half precision
Resample = Literal["bicubic", "bilinear"]


def squeezed_runs(trace: Trace, *, halves: bool, resample: Resample) -> Trace:
    """CLIP's image tower on the whole image, resized to the square of its training.

    Args:
        trace: trace of the windows.
        halves: whether the left and the right half are resized separately, as a batch of two.
        resample: as in `squeezed`.
    """
    assert trace.whole is not None
    image, visual = trace.whole.pixels[None], trace.vit
    native = (visual.patch * visual.usual_grid[0], visual.patch * visual.usual_grid[1])
    parts = [image]
    if halves and image.shape[-1] > 1:
        middle = image.shape[-1] // 2
        parts = [image[..., :middle], image[..., middle:]]
    return trace.over(torch.cat([squeezed(upcast(part), native, resample) for part in parts]))


def dense_values(trace: Trace) -> Tensor:
    """The features to pool, of each window: values of the last block, all heads, (W, D, h, w).

    For a tower with an attention pool, the input tokens of the pool.
    """
    if trace.vit.pool is not None:
        leaving = trace.leaving().only_patches()
        return upcast(leaving.with_data(trace.vit.ln_post(leaving.data)).as_map())
    last = trace.vit.blocks[-1]
    tokens = trace.entering(len(trace.vit.blocks) - 1).only_patches()
    (values,) = last.attn.project(last.ln_1(tokens.data), "v")  # (W, H, N, d)
    return upcast(values.transpose(1, 2).flatten(2).mT.unflatten(2, tokens.grid))


def side_by_side(maps: Tensor) -> Tensor:
    """Maps of the parts of an image from left to right, (n, D, h, w), as one: (1, D, h, n * w)."""
    return torch.cat(tuple(maps), dim=-1)[None]


def two_scales(trace: Trace, *, beta: float, halves: bool, resample: Resample) -> Tensor:
    """The windows' values on one grid, plus `beta` times those of the whole image, (1, D, h, w).

    Args:
        trace: trace of the windows.
        beta: weight of the whole image.
        halves, resample: as in `squeezed_runs`.
    """
    fine = window_grid(trace).stitch(dense_values(trace))
    if not beta:
        return fine
    whole = trace.once(squeezed_runs, halves=halves, resample=resample)
    coarse = side_by_side(dense_values(whole))
    return fine + beta * resize(coarse, (fine.shape[2], fine.shape[3]))


def foreignness(features: Tensor, member: Tensor) -> Tensor:
    """How much more similar patches are to their own regions than to others, (N,).

    The mean, over a patch's own regions, of its mean cosine with their patches (itself included), minus
    the same over all other regions. For patches without a region the first term is 0.

    Args:
        features: features of the patches, (N, D).
        member: which patches belong to each region, (R, N) bool.
    """
    unit = F.normalize(features, dim=-1)
    own = member.to(unit)
    means = own @ unit / (own.sum(1, keepdim=True) + 1e-9)  # (R, D)
    similar = unit @ means.T  # (N, R): means of cosines are cosines with means
    inside = own.T
    near = (similar * inside).sum(1) / (inside.sum(1) + 1e-9)
    far = (similar * (1 - inside)).sum(1) / ((1 - inside).sum(1) + 1e-9)
    return near - far


def region_weights(trace: Trace, *, threshold: float | None, **scales: Any) -> Tensor:
    """Weight of each patch of the grid of `two_scales` in each region, (R, N), from 0 to 1.

    Args:
        trace: trace of the windows.
        threshold: patches of a smaller `foreignness` are removed from all regions; None keeps all.
        **scales: arguments of `two_scales`.
    """
    maps = trace.once(two_scales, **scales)
    masks = trace.region_masks().to(maps)
    weights = resize(masks[None], (maps.shape[2], maps.shape[3]))[0].clamp(0, 1).flatten(1)
    return kept_patches(maps[0].flatten(1).T, weights, threshold)


def kept_patches(features: Tensor, weights: Tensor, threshold: float | None) -> Tensor:
    """Weights (R, N) of patches (N, D), 0 where a patch's `foreignness` is below a threshold."""
    if threshold is None:
        return weights
    return weights.masked_fill(foreignness(features, weights > 0) < threshold, 0)


def pooled_values(
    values: Tensor, weights: Tensor, block: Block, *, ffn: bool, unit_values: bool
) -> Tensor:
    """Output of a block for a token that attends to each region, (R, D).

    Rows beyond the range of half precision are scaled down, which the layer norm after them undoes.

    Args:
        values: values of the block, all heads, (N, D).
        weights: attention to the patches, not divided by its sum, (R, N).
        block: the last block.
        ffn: whether its MLP follows, with its residual.
        unit_values: whether values have unit length in the sum.
    """
    rows = F.normalize(values, dim=-1) if unit_values else values
    dtype = next(block.parameters()).dtype
    total = weights.sum(1, keepdim=True).clamp_min(1)
    mean = (weights @ rows / total).to(dtype)
    bias = upcast(block.attn.join(torch.zeros_like(mean[:1])))
    y = bias + total * (upcast(block.attn.join(mean)) - bias)
    if ffn:
        y = y + upcast(block.mlp(block.ln_2(_shortened(y).to(dtype))))
    return _shortened(y).to(dtype)


def _shortened(y: Tensor) -> Tensor:
    return y / (y.abs().amax(1, keepdim=True) / LARGE).clamp_min(1)


@op("reader", whole=True, regions=True)
def region_pool(
    trace: Trace,
    *,
    beta: float = 1.0,
    threshold: float | None = 0.07,
    ffn: bool = False,
    unit_values: bool = False,
    halves: bool = False,
    resample: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tokens:
    """One token per region of the whole image, (1, R, D), computed like the class token.

    The sum of the last block's values over the region's mask, followed by the rest of the block. In a
    tower with an attention pool, the mean of the pool's input, through the pool's values.

    Args:
        beta: weight of the whole image beside the windows.
        threshold: patches of a smaller `foreignness` are removed from all masks; None keeps all.
        ffn: whether the MLP of the last block follows, with its residual.
        unit_values: whether values have unit length in the sum.
        halves: whether the halves of the image are resized separately, instead of the whole.
        resample: how they are resized: "bicubic" with antialiasing or "bilinear" without.
    """
    scales = dict(beta=beta, halves=halves, resample=resample)
    maps = trace.once(two_scales, **scales)
    weights = trace.once(region_weights, threshold=threshold, **scales)
    rows, pool = maps[0].flatten(1).T, trace.vit.pool
    if pool is None:
        last = trace.vit.blocks[-1]
        data = pooled_values(rows, weights, last, ffn=ffn, unit_values=unit_values)
    else:
        data = pool.values(region_means(rows, weights).to(trace.vit.dtype))
    return Tokens(data[None], (1, len(data)), prefix=0, pooled=pool is not None)


def region_means(features: Tensor, weights: Tensor) -> Tensor:
    """Means of features (N, D) over the patches of positive weight (R, N): (R, D)."""
    inside = (weights > 0).to(features)
    return inside @ features / inside.sum(1, keepdim=True).clamp_min(1)


@op("comparison", words=True, whole=True, regions=True)
def region_logits(
    features: Tokens,
    trace: Trace,
    *,
    beta: float = 1.0,
    threshold: float | None = 0.07,
    halves: bool = False,
    resample: Literal["bicubic", "bilinear"] = "bicubic",
    scale: float = 1.0,
    bias: float = 0.0,
    attention: Rule = self_self,
) -> Tensor:
    """Logits of regions at their pixels, summed where masks overlap, (1, Q, rows, columns).

    Rows and columns are those of the masks, or of the patches if there are more of these. Pixels
    without a mask take the cosines of the last block with another attention, those of the whole image
    added to those of the windows; 0 in a tower with an attention pool.

    Args:
        features: features of the regions, from `region_pool`.
        trace: trace of the windows.
        beta, threshold, halves, resample: as in `region_pool`.
        scale, bias: factor on the regions' cosines and bias; for SigLIP, those of its training.
        attention: attention rule for pixels without a mask.
    """
    scales = dict(beta=beta, halves=halves, resample=resample)
    weights = trace.once(region_weights, threshold=threshold, **scales)
    maps = trace.once(two_scales, **scales)
    masks = trace.region_masks().to(weights)
    size = (max(masks.shape[1], maps.shape[2]), max(masks.shape[2], maps.shape[3]))
    masks = masks if masks.shape[1:] == size else resize(masks, size)
    kept = weights.gt(0).any(1)
    masks = masks.clamp(0, 1) * kept[:, None, None]  # (R, rows, columns)
    own = scale * cosine_logits(features, trace.query_features())[0, :, 0] + bias  # (Q, R)
    logits = (own @ masks.flatten(1)).unflatten(1, masks.shape[1:])
    covered = masks.sum(0) > 0
    if bool(covered.all()):  # no pixel needs the cosines of the last block
        return logits[None]
    other = logits.new_zeros(1, len(logits), 1, 1)
    if trace.vit.pool is None:
        other = outside(trace, attention, halves=halves, resample=resample)
        other = resize(other, size)
    return torch.where(covered, logits[None], other)


def outside(trace: Trace, attention: Rule, *, halves: bool, resample: Resample) -> Tensor:
    """Cosines of the last block with another attention, at two scales, (1, Q, h, w).

    Args:
        trace: trace of the windows.
        attention: attention rule.
        halves, resample: as in `squeezed_runs`.
    """

    def cosines(run: Trace) -> Tensor:
        x = run.entering(len(run.vit.blocks) - 1)
        read = run.vit.blocks[-1].read(x, residual=x.data, attention=attention, trace=run)
        return cosine_logits(run.project(read), trace.query_features())

    fine = window_grid(trace).stitch(cosines(trace))
    whole = trace.once(squeezed_runs, halves=halves, resample=resample)
    return fine + resize(side_by_side(cosines(whole)), (fine.shape[2], fine.shape[3]))


@METHODS.register_module()
def textregion(
    *,
    beta: float = 1.0,
    threshold: float | None = 0.07,
    ffn: bool = False,
    unit_values: bool = False,
    halves: bool = False,
    resample: Literal["bicubic", "bilinear"] = "bicubic",
    scale: float = 1.0,
    bias: float = 0.0,
) -> dict[str, Any]:
    """Values of the last block pooled in masks; needs regions (`regions=`), which may overlap.

    Args:
        beta: weight of the whole image beside the windows; published: 1, for SigLIP 2 and PE 0.5.
        threshold: patches are removed from all masks if their mean cosine with their own regions, minus
            that with other regions, is smaller; None keeps all.
        ffn: whether the MLP of the last block follows (the release's demo).
        unit_values: whether values have unit length in the sum (the demo, by mistake).
        halves: whether the halves of the image are resized separately (published: Cityscapes).
        resample: how the whole image is resized: "bicubic" with antialiasing or "bilinear" without.
        scale, bias: factor on the regions' cosines and bias; for SigLIP, those of its training.
    """
    scales = dict(beta=beta, threshold=threshold, halves=halves, resample=resample)
    return dict(
        readouts=[dict(type="region_pool", ffn=ffn, unit_values=unit_values, **scales)],
        comparison=dict(type="region_logits", scale=scale, bias=bias, **scales),
        direct=True,
    )
