"""Trident: ProxyCLIP's windows on one grid, mixed by SAM's own attention (Shi et al., ICCV 2025).

Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary Segmentation,
arXiv:2411.09219. DINO ViT-B/16 guides the windows; the attention of SAM's last global block, kept
between positions of similar values, then mixes the whole image on SAM's grid. The last stage, which
refines labels by SAM's decoder, is a setting of the engine for any method: `masks=dict(
type="sam_refine", model="facebook/sam-vit-base")` (`sfp.masks.refine`). Nothing is trained, but SAM was
trained on masks.

| | here | release |
| --- | --- | --- |
| mean similarity | of all windows of the image | the same |
| windows that are not square | as they are | token sides swapped |
| size of the input | the caller's | 16 | side, at least 336, unless both sides are multiples of 16 |

Published: short side 336 to 688 by dataset, windows of 336, stride 224 (VOC20 112), factor 1.2
(Cityscapes 3.0, in two halves; VOC20 0), thresholds 0.15 to 0.25.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import centred_softmax
from sfp.functional.clusters import resize
from sfp.functional.precision import upcast
from sfp.registry import METHODS, op, tuned
from sfp.tokens import Tokens
from sfp.trace import Trace, no_guide


def agreeing_attention(
    attention: Tensor, values: Tensor, *, factor: float, negative: float | None = None
) -> Tensor:
    """Attention between positions of similar values, averaged over heads, with rows of sum 1: (M, M).

    Head h counts from i to j if the cosine of its values at i and j exceeds min(0.9, factor * the mean
    of such cosines from i over heads and keys). Every position keeps its attention to itself.

    Args:
        attention: softmax weights, (H, M, M).
        values: values of the heads, (H, M, d).
        factor: phi; 0 keeps pairs with a positive cosine.
        negative: replacement for negative thresholds; None keeps them.
    """
    unit = F.normalize(values, dim=-1)
    mean = (unit @ unit.mean(1)[..., None])[..., 0].mean(0)  # (M,): mean of the cosines
    threshold = (factor * mean).clamp_max(0.9)
    if negative is not None:
        threshold = torch.where(threshold < 0, negative, threshold)
    kept = torch.zeros_like(attention[0])
    for weights, rows in zip(attention, unit, strict=True):  # a head's map of 64 x 64: 67 MB
        agree = rows @ rows.T > threshold[:, None]
        agree.fill_diagonal_(True)  # values of length 0 have no cosine, not even with themselves
        kept += weights * agree
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)


@op("reader", whole=True)
def sam_correlation(
    trace: Trace,
    *,
    guide: str = "dino",
    sam: str | None = "sam",
    gain: float = 3.0,
    centre: float = 1.2,
    factor: float = 1.2,
    negative: float | None = None,
    halves: bool = False,
    floor: bool = False,
) -> Tokens:
    """Reads windows with a guide's similarity, joins them, and mixes them by SAM (Trident), (1, M, D).

    Args:
        guide: external encoder; the cosines of its patches are the windows' attention, as in ProxyCLIP,
            but centred by the mean over all windows.
        sam: guide with SAM's attention (`sfp.guides.SamGuide`); None stops at the joined grid.
        gain, centre: parameters of the windows' attention, as in `proxy_attention`.
        factor, negative: as in `agreeing_attention`.
        halves: whether SAM runs on the left and the right half of the image separately.
        floor: as in `WindowGrid.stitch`.
    """
    whole, last = trace.whole, trace.vit.blocks[-1]
    assert whole is not None
    features = trace.guide(guide)
    unit = F.normalize(upcast(features.patches), dim=-1)
    similarity = (unit @ unit.mT).flatten(0, 1)  # (W N, N), for one mean of all windows
    weights = centred_softmax(similarity, gain, centre).view(*unit.shape[:2], -1)  # (W, N, N)
    tokens = trace.entering(len(trace.outputs)).only_patches()
    (values,) = last.attn.project(last.ln_1(tokens.data), "v")  # (W, H, N, d)
    maps = values.transpose(1, 2).flatten(2).mT.unflatten(2, tokens.grid)  # (W, D, h, w)
    rows = resize(upcast(maps), features.grid).flatten(2).mT  # (W, N', D)
    read = upcast(last.attn.join((weights.to(rows) @ rows).to(values.dtype)))
    joined = whole.grid.stitch(read.mT.unflatten(2, features.grid), floor=floor)  # (1, D, h, w)
    if sam is not None:
        if sam not in trace.guides:
            raise no_guide(sam, trace.guides)
        image = whole.pixels[None]
        parts = [(image, joined)]
        if halves and joined.shape[-1] > 1:
            middle, cells = image.shape[-1] // 2, joined.shape[-1] // 2
            parts = [
                (image[..., :middle], joined[..., :cells]),
                (image[..., middle:], joined[..., cells:]),
            ]
        mixed = []
        for pixels, part in parts:
            attention, own = trace.guides[sam].last_attention(pixels)  # type: ignore[attr-defined]
            grid = (own.shape[1], own.shape[2])
            mixing = agreeing_attention(
                attention.to(part), own.flatten(1, 2).to(part), factor=factor, negative=negative
            )
            rows = resize(part, grid)[0].flatten(1).T  # (M, D)
            mixed.append((mixing @ rows).T.unflatten(1, grid)[None])
        joined = torch.cat(mixed, dim=-1)
    size = (joined.shape[2], joined.shape[3])
    return Tokens(joined.flatten(2).mT.to(tokens.data.dtype), size, prefix=0)


# factor, negative (replacement for negative thresholds), halves
DATASETS: dict[str, tuple[float, float | None, bool]] = dict(
    ade20k=(1.2, 0.6, False),
    city_scapes=(3.0, 0.6, True),
    coco_object=(1.2, None, False),
    coco_stuff164k=(1.2, None, False),
    context59=(1.2, None, False),
    context60=(1.2, None, False),
    voc20=(0.0, None, False),
    voc21=(1.2, None, False),
)


@METHODS.register_module()
def trident(
    *,
    guide: str = "dino",
    sam: str | None = "sam",
    dataset: str = "context59",
    beta: float = 1.2,
    gamma: float = 3.0,
    factor: float | None = None,
    negative: float | None = None,
    halves: bool | None = None,
    floor: bool = False,
) -> dict[str, Any]:
    """Attention output of the last block alone, of the whole image: no residual, no FFN.

    Args:
        guide: name of the guide of the windows, which the caller provides.
        sam: name of the guide with SAM's attention (`guides=dict(sam=dict(type="sam", model=...))`);
            None leaves that step out.
        dataset: dataset whose constants replace those of `factor`, `negative` and `halves` that are
            None; see `DATASETS`.
        beta, gamma: parameters of the windows' attention, as in `proxyclip`.
        factor, negative, halves: as in `sam_correlation`.
        floor: whether windows are moved back to whole cells, as in the release.
    """
    reader = dict(
        type="sam_correlation",
        guide=guide,
        sam=sam,
        gain=gamma,
        centre=beta,
        floor=floor,
        **tuned(dataset, DATASETS, factor=factor, negative=negative, halves=halves),
    )
    return dict(readouts=[reader], direct=True)
