"""CLIPtrase: clusters of correlated patches, in which pixels vote (Shao et al., ECCV 2024).

Explore the Potential of CLIP for Training-Free Open Vocabulary Semantic Segmentation,
arXiv:2407.08268. The defaults are the release (224 pixels); its setting for 336 pixels is `eps=1.1,
min_samples=7`. The paper describes `correlation="cosine", layer=-1, unit_rows=True, denoise="paper"`.

| | release | paper |
| --- | --- | --- |
| last block's attention | softmax(qq) + softmax(kk) + softmax(vv) | mean of the cosines, over heads |
| clustered | rows of the last but one block's cosines | unit rows of the last block's |
| denoising | CLS row subtracted, cut at 0 | patches with mean_j w_ij > w_ii left out (Eq. 7) |

Its ablations are `correlation`, `concat`, `product`, `restore` and `features`. The paper does not print
the formulas of "inner product", of clustered features and of other layers: these are our reading.

Eq. 7 cannot hold for cosines (w_ii = 1 is the largest); it is evaluated on the block's attention.

Background prompts are words of the vocabulary: synonyms of class 0. The release centre-crops images
to a square and counts void pixels as background: its numbers do not compare with sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from sfp.ops.attention import self_self
from sfp.registry import METHODS, op
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

    CLIPtrase's weights as its paper prints them: not normalised, so that a row sums to the number of
    tokens times their mean correlation.

    Args:
        concat: cosines of all heads side by side (Eq. 14) in place of the mean of each head's (Eq. 3).
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
        subtract_cls: each column minus its correlation with the class token, cut at 0.
        unit_rows: rows of unit length.
        concat: heads side by side, as in `cosine_attention`.
        product: inner products over sqrt(d) in place of cosines.
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
def overshadowed(trace: Trace, layer: int, *, pairs: Sequence[str] = ("qk",)) -> Tensor:
    """Patches that attend to themselves less than to the average patch: mean_j w_ij - w_ii > 0.

    CLIPtrase's Eq. 7. With w the correlations that its paper clusters, no patch ever is one: a patch's
    cosine with itself, 1, is its largest. So w is an attention here, averaged over heads.

    Args:
        pairs: of which projections, as in `self_self`; ("qk",) is what the block ran with.
    """
    heads = trace.heads(layer)
    weights = self_self(heads, trace, pairs=pairs).mean(1)  # (B, T, T)
    weights = weights[:, heads.prefix :, heads.prefix :]
    return weights.mean(-1) > weights.diagonal(dim1=-2, dim2=-1)


@op("edit")
def reread(trace: Trace, layer: int, *, block: int, attention: Rule | None) -> Tokens:
    """The tokens that leave a layer; one block mixes its own by another attention rule.

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
    """Logits times those of the class token: queries that the image is not about sink.

    Args:
        source: tokens whose class token is compared, e.g. `read_last`.
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
    min_samples: int = 3,
    noise: Detector | None = None,
    noise_layer: int = -1,
    guide: str | None = None,
    source: Source | None = None,
    vote: Literal["mode", "mean"] = "mode",
    cells: int | None = None,
) -> Tensor:
    """Patches cluster, clusters become masks, and the pixels of a mask agree on a class.

    Args:
        affinity: whose rows are clustered (DBSCAN) and averaged to the masks' prototypes.
        eps, min_samples: DBSCAN's.
        noise: detector of patches that are left out of the clusters.
        noise_layer: method layer that it judges.
        guide: external encoder on whose grid the affinities live; None for CLIP's own. Then noise,
            which judges CLIP's patches, must be None.
        source: tokens, e.g. `read_last`, whose features are clustered in place of the rows of
            `affinity`; their cosines then are the affinities that prototypes average.
        vote: "mode": a pixel's logit is the share of its mask that chooses the query's class;
            "mean": its mask's mean logit.
        cells: output cells per patch; None for one per pixel.

    Returns:
        (B, Q, H, W). An image in which no patch finds a cluster keeps its logits, or choices.
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
    """One image's pixel logits (Q, H, W) after the vote in its masks (H, W)."""
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
    min_samples: int = 3,
    noise: Detector | None = None,
    noise_layer: int = -1,
    guide: str | None = None,
    count: int = 1,
) -> list[Tensor]:
    """Point prompts from clusters of patches, the peaks of their prototypes: (K, count, 2) each.

    Args:
        affinity, eps, min_samples, noise, noise_layer, guide: as in `cluster_vote`.
        count: points of each cluster.
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
    """Affinities (B, N, N), the cluster of each patch (N,) by image, and the grid they live on."""
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
    min_samples: int = 3,
    vote: Literal["mode", "mean"] = "mode",
    cls_logits: bool = False,
    cells: int | None = None,
) -> dict[str, Any]:
    """Residual and FFN stay; the logits come at pixel resolution.

    Args:
        correlation: the last block's attention: "softmax" (release), "cosine" (paper), "identity" (of
            patches to themselves alone), or "none", which leaves it as CLIP has it (the paper's
            ablation without SCR).
        concat: cosines of all heads side by side (Eq. 14) in place of their mean.
        restore: layer whose attention `correlation` replaces; blocks after it run as CLIP has them.
        cluster: False leaves the features alone, without clusters and votes.
        features: whether patch features are clustered, in place of the rows of their correlations.
        product: whether inner products are clustered in place of cosines.
        layer: whose correlations are clustered.
        unit_rows: whether rows are scaled to unit length before.
        denoise: "release", "paper" or "none".
        guide: external encoder, e.g. "dino", whose patches' cosines are clustered instead of CLIP's
            correlations; `layer`, `unit_rows` and `denoise`, which are about those, then do nothing.
        eps, min_samples: DBSCAN's; the defaults are for CLIP's correlations.
        vote: "mode" of the pixels' classes, or "mean" of their logits (the detectron2 release, which
            takes dot products with features that are not normalised; here they are cosines).
        cls_logits: whether logits are multiplied by the class token's (the release on VOC20).
        cells: cells per patch in which pixels vote; None for every pixel, as the release.
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
