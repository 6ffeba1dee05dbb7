"""CLIPtrase: correlated patches cluster, and their pixels vote (Shao et al., ECCV 2024).

Explore the Potential of CLIP for Training-Free Open Vocabulary Semantic Segmentation,
arXiv:2407.08268. The defaults are the release (224 pixels); its setting for 336 pixels is `eps=1.1,
min_samples=7`. The paper describes `correlation="cosine", layer=-1, unit_rows=True, denoise="paper"`.

| | release | paper |
| --- | --- | --- |
| last block's attention | softmax(qq) + softmax(kk) + softmax(vv) | mean of the cosines, over heads |
| clustered | rows of the last but one block's cosines | unit rows of the last block's |
| denoising | CLS row subtracted, cut at 0 | patches with mean_j w_ij > w_ii left out (Eq. 7) |

Eq. 7 cannot hold for cosines (w_ii = 1 is the largest); it is evaluated on the block's attention.

Background prompts are words of the vocabulary: synonyms of class 0. The release centre-crops images
to a square and counts void pixels as background: its numbers do not compare with sliding windows.
"""

from __future__ import annotations

from typing import Any, Literal

from sfp.registry import METHODS, pick

RULES: dict[str, dict[str, Any] | None] = dict(
    softmax=dict(type="self_self", pairs=("qq", "kk", "vv")),
    cosine=dict(type="head_cosines"),
    none=None,
)
VOTES = dict(mode="mode", mean="mean")
DENOISE = dict(release=None, paper=dict(type="overshadowed"), none=None)


@METHODS.register_module()
def cliptrase(
    *,
    correlation: Literal["softmax", "cosine", "none"] = "softmax",
    cluster: bool = True,
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
        correlation: the last block's attention: "softmax" (release), "cosine" (paper), or "none",
            which leaves it as CLIP has it (the paper's ablation without SCR).
        cluster: False leaves the features alone, without clusters and votes.
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
    rule = pick("correlation", correlation, RULES)
    noise = pick("denoise", denoise, DENOISE)
    affinity: dict[str, Any] = dict(
        type="head_cosine", layer=layer, subtract_cls=denoise == "release", unit_rows=unit_rows
    )
    if guide is not None:
        affinity, noise = dict(type="guide_similarity", guide=guide), None
    refiners: list[dict[str, Any]] = []
    if cls_logits:
        source = dict(type="read_last", attention=rule, reduced=False)
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
                vote=pick("vote", vote, VOTES),
                cells=cells,
            )
        )
    return dict(readouts=[dict(attention=rule)], refiners=refiners)
