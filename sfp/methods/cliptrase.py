"""CLIPtrase: a class for each cluster of correlated patches, by a vote (Shao et al., ECCV 2024).

Explore the Potential of CLIP for Training-Free Open Vocabulary Semantic Segmentation,
arXiv:2407.08268. The defaults are those of the release (224 pixels); its setting for 336 pixels is
`eps=1.1, min_samples=7`. The paper describes `correlation="cosine", layer=-1, unit_rows=True,
denoise="paper"`.

| | release | paper |
| --- | --- | --- |
| last block's attention | softmax(qq) + softmax(kk) + softmax(vv) | mean of the cosines, over heads |
| clustered | rows of the last but one block's cosines | unit rows of the last block's |
| denoising | CLS row subtracted, clamped at 0 | patches with mean_j w_ij > w_ii left out (Eq. 7) |

Its ablations are `correlation`, `concat`, `product`, `restore` and `features`. The paper does not print
the formulas of "inner product", of clustered features and of other layers; these are interpretations.

Eq. 7 cannot hold for cosines (w_ii = 1 is the largest); it is evaluated on the block's attention.

Background prompts are words of the vocabulary, synonyms of class 0. The release centre-crops images
to a square and counts void pixels as background, so its numbers are not comparable with those of
sliding windows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import mean_cosine, mean_product
from sfp.functional.clusters import (
    cluster_peaks,
    dbscan,
    mask_means,
    resize,
    segments,
    vote_shares,
)
from sfp.functional.kept import constant
from sfp.functional.precision import upcast
from sfp.kinds import Affinity, Detector, Rule, Source
from sfp.ops.attention import Pair, self_self
from sfp.registry import METHODS, Count, Some, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

RULES: dict[str, dict[str, Any] | None] = dict(
    softmax=dict(type="self_self", pairs=("qq", "kk", "vv")),
    cosine=dict(type="cosine_attention"),
    identity=dict(type="identity"),
    none=None,
)
DENOISE: dict[str, dict[str, Any] | None] = dict(
    release=None, paper=dict(type="overshadowed"), none=None
)


@op("attention")
def cosine_attention(heads: Heads, trace: Trace, *, concat: bool = False) -> Tensor:
    """Mean over heads of (cos qq + cos kk + cos vv) / 3, one map for all heads, (B, 1, T, T).

    CLIPtrase's weights as printed in its paper. They are not normalised: a row sums to the number of
    tokens times their mean correlation.

    Args:
        concat: cosines of the concatenated heads (Eq. 14) instead of the mean over heads (Eq. 3).
    """
    return mean_cosine(heads.q, heads.k, heads.v, concat=concat)[:, None]


@op("affinity")
def head_cosine(
    trace: Trace,
    *,
    layer: int = -2,
    subtract_cls: bool = False,
    unit_rows: bool = False,
    concat: bool = False,
    product: bool = False,
) -> Tensor:
    """Mean over heads of (cos qq + cos kk + cos vv) / 3 of the patches in a block.

    Args:
        layer: method layer of the block whose projections are compared.
        subtract_cls: subtracts from each column its correlation with the class token and clamps at 0.
        unit_rows: scales rows to unit length.
        concat: concatenates the heads, as in `cosine_attention`.
        product: inner products over sqrt(d) instead of cosines.
    """
    i = trace.layer(layer)
    heads = trace.heads(i)
    if subtract_cls and not heads.prefix:
        heads = trace.vit.blocks[i].heads(trace.entering(i).with_cls())
    if product:
        full = mean_product(heads.q, heads.k, heads.v)  # (B, T, T)
    else:
        full = mean_cosine(heads.q, heads.k, heads.v, concat=concat)
    patches = full[:, heads.prefix :, heads.prefix :]
    if subtract_cls:
        patches = (patches - full[:, :1, heads.prefix :]).clamp_min(0)
    return F.normalize(patches, dim=-1) if unit_rows else patches


@op("detector")
def overshadowed(trace: Trace, layer: int, *, pairs: Some[Pair] = ("qk",)) -> Tensor:
    """Patches that attend to themselves less than to the average patch: mean_j w_ij - w_ii > 0.

    CLIPtrase's Eq. 7. With the correlations that its paper clusters as w, it holds for no patch: the
    cosine of a patch with itself, 1, is its largest. Here w is an attention, averaged over heads.

    Args:
        pairs: pairs of projections, as in `self_self`; ("qk",) is the block's own attention.
    """
    heads = trace.heads(layer)
    weights = self_self(heads, trace, pairs=pairs).mean(1)  # (B, T, T)
    weights = weights[:, heads.prefix :, heads.prefix :]
    return weights.mean(-1) > weights.diagonal(dim1=-2, dim2=-1)


@op("edit")
def reread(trace: Trace, layer: int, *, block: int, attention: Rule | None) -> Tokens:
    """The output tokens of a layer, where one block uses another attention rule.

    Args:
        block: method layer of that block.
        attention: the rule; None for the block's own.
    """
    if layer != trace.layer(block):
        return trace.outputs[layer]
    x = trace.entering(layer)
    return trace.vit.blocks[layer].read(x, residual=x.data, attention=attention, trace=trace)


@op("refiner", words=True)
def cls_product(logits: Tensor, trace: Trace, *, source: Source) -> Tensor:
    """Logits times those of the class token, which lowers queries that do not describe the image.

    Args:
        source: tokens with the class token that is compared, e.g. `read_last`.
    """
    tokens = source(trace)
    cls = trace.project(tokens).cls[:, 0] if tokens.prefix else trace.vit.embedding(tokens)
    cls = F.normalize(upcast(cls), dim=-1)  # (B, C)
    weights = cls @ trace.query_features().to(cls).T  # (B, Q)
    return logits * weights[..., None, None]


@op("refiner", words=True)
def cluster_vote(
    logits: Tensor,
    trace: Trace,
    *,
    affinity: Affinity,
    eps: float = 0.7,
    min_samples: Count = 3,
    noise: Detector | None = None,
    noise_layer: int = -1,
    guide: str | None = None,
    source: Source | None = None,
    vote: Literal["mode", "mean"] = "mode",
    cells: Count | None = None,
) -> Tensor:
    """Clusters patches, turns the clusters into masks, and gives all pixels of a mask one class.

    Args:
        affinity: its rows are clustered (DBSCAN) and averaged to the masks' prototypes.
        eps, min_samples: parameters of DBSCAN.
        noise: detector of patches that are left out of the clusters.
        noise_layer: method layer on which that detector runs.
        guide: external encoder that the affinities come from; None for CLIP. With a guide, `noise`,
            which detects among CLIP's patches, must be None.
        source: tokens, e.g. `read_last`, that are clustered by their features instead of the rows of
            `affinity`; prototypes are then averages of their cosines.
        vote: "mode": the logit of a pixel is the share of its mask's pixels with the query's class;
            "mean": the mean logit of its mask.
        cells: output cells per patch; None for one per pixel.

    Returns:
        (B, Q, H, W). An image without any cluster keeps its logits ("mean"), or each pixel's best
        class ("mode").
    """
    rows, clusters, grid = _clusters(
        trace, affinity, eps, min_samples, noise, noise_layer, guide, source
    )
    height, width = trace.image.shape[-2:]
    size = (height, width) if cells is None else (cells * grid[0], cells * grid[1])
    index = constant(trace.index or range(logits.shape[1]), logits)
    refined = []
    for coarse, own, labels in zip(logits, rows, clusters, strict=True):
        fine = resize(coarse, size)
        alone = bool((labels < 0).all())
        masks = None if alone else segments(own, labels, grid, size)
        refined.append(_agree(fine, masks, index, vote))
    return torch.stack(refined)


def _agree(logits: Tensor, masks: Tensor | None, index: Tensor, vote: str) -> Tensor:
    """Pixel logits (Q, H, W) of one image after the vote within its masks (H, W)."""
    if vote == "mean":
        return logits if masks is None else mask_means(masks, logits)
    choice = index[logits.max(0).indices]  # (H, W)
    classes = int(index.max()) + 1
    if masks is None:
        return F.one_hot(choice, classes).permute(2, 0, 1)[index].to(logits)
    return vote_shares(masks, choice, classes)[index].to(logits)


@op("points")
def cluster_points(
    trace: Trace,
    *,
    affinity: Affinity,
    eps: float = 0.7,
    min_samples: Count = 3,
    noise: Detector | None = None,
    noise_layer: int = -1,
    guide: str | None = None,
    count: Count = 1,
) -> list[Tensor]:
    """Point prompts at the peaks of the prototypes of patch clusters, (K, count, 2) for each image.

    Args:
        affinity, eps, min_samples, noise, noise_layer, guide: as in `cluster_vote`.
        count: number of points per cluster.
    """
    rows, labels, grid = _clusters(trace, affinity, eps, min_samples, noise, noise_layer, guide)
    return [cluster_peaks(own, found, grid, count) for own, found in zip(rows, labels, strict=True)]


def _clusters(
    trace: Trace,
    affinity: Affinity,
    eps: float,
    min_samples: int,
    noise: Detector | None,
    noise_layer: int,
    guide: str | None,
    source: Source | None = None,
) -> tuple[Tensor, list[Tensor], tuple[int, int]]:
    """Affinities (B, N, N), the cluster of each patch (N,) for every image, and the patch grid."""
    if guide is not None and noise is not None:
        raise ValueError(
            f"clusters on the grid of the guide {guide!r} cannot leave out noise: detectors judge "
            "CLIP's patches; set noise=None"
        )
    if source is None:
        rows = points = trace.once(affinity)
    else:
        points = F.normalize(upcast(trace.vit.project(source(trace)).patches), dim=-1)  # (B, N, C)
        rows = points @ points.mT
    grid = trace.embedded.grid if guide is None else trace.guide(guide).grid
    kept = None if noise is None else ~noise(trace, trace.layer(noise_layer))  # (B, N)
    labels = [
        dbscan(
            own,
            eps=eps,
            min_samples=min_samples,
            keep=None if kept is None else kept[i],
            affinities=source is None,
        )
        for i, own in enumerate(points)
    ]
    return rows, labels, grid


@METHODS.register_module()
def cliptrase(
    *,
    correlation: Literal["softmax", "cosine", "identity", "none"] = "softmax",
    concat: bool = False,
    restore: int = -1,
    cluster: bool = True,
    features: bool = False,
    product: bool = False,
    layer: int = -2,
    unit_rows: bool = False,
    denoise: Literal["release", "paper", "none"] = "release",
    guide: str | None = None,
    eps: float = 0.7,
    min_samples: Count = 3,
    vote: Literal["mode", "mean"] = "mode",
    cls_logits: bool = False,
    cells: Count | None = None,
) -> dict[str, Any]:
    """Correlation attention with residual and FFN, and a vote in clusters at pixel resolution.

    Args:
        correlation: attention of the last block: "softmax" (release), "cosine" (paper), "identity"
            (each patch attends only to itself), or "none", CLIP's own (the paper's ablation without
            SCR).
        concat: cosines of the concatenated heads (Eq. 14) instead of their mean over heads.
        restore: layer in which `correlation` replaces the attention; later blocks are CLIP's own.
        cluster: False turns clustering and voting off.
        features: whether patch features are clustered instead of the rows of their correlations.
        product: whether inner products are clustered instead of cosines.
        layer: layer from which the clustered correlations are taken.
        unit_rows: whether rows are scaled to unit length before clustering.
        denoise: "release", "paper" or "none".
        guide: external encoder, e.g. "dino", to cluster by the cosines of its patches instead of CLIP's
            correlations; `layer`, `unit_rows` and `denoise`, which concern those, are then ignored.
        eps, min_samples: parameters of DBSCAN; the defaults are for CLIP's correlations.
        vote: "mode" of the pixels' classes, or "mean" of their logits (the detectron2 release, which
            uses dot products with features that are not normalised; here they are cosines).
        cls_logits: whether logits are multiplied by those of the class token (the release on VOC20).
        cells: cells per patch that vote; None for every pixel, as in the release.
    """
    rule, noise = RULES[correlation], DENOISE[denoise]
    if concat and correlation == "cosine":
        rule = dict(type="cosine_attention", concat=True)
    affinity: dict[str, Any] = dict(
        type="head_cosine",
        layer=layer,
        subtract_cls=denoise == "release",
        unit_rows=unit_rows,
        concat=concat,
        product=product,
    )
    if guide is not None:
        affinity, noise = dict(type="guide_similarity", guide=guide), None
    edits: list[dict[str, Any]] = []
    refiners: list[dict[str, Any]] = []
    if restore != -1:
        edits.append(dict(type="reread", block=restore, attention=rule))
        rule = None
    source = dict(type="read_last", attention=rule, reduced=False)
    if cls_logits:
        refiners.append(dict(type="cls_product", source=source))
    if cluster:
        refiners.append(
            dict(
                type="cluster_vote",
                affinity=affinity,
                eps=eps,
                min_samples=min_samples,
                noise=noise,
                noise_layer=layer,
                guide=guide,
                source=source if features else None,
                vote=vote,
                cells=cells,
            )
        )
    return dict(edits=edits, readouts=[dict(attention=rule)], refiners=refiners)
