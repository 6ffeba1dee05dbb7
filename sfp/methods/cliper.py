"""CLIPer: a readout for every layer, merged after the softmax, and spread along fused attention.

The code is github.com/linsun449/cliper.code (Sun et al., arXiv:2411.13836). Not included is its
diffusion model, whose attention adds 2.1 points to the published mean. For each readout, the sum of all
blocks' attention is normalised one step closer to a doubly stochastic matrix; with the result as
attention, the last block is applied to each layer's input.

| | here | release |
| --- | --- | --- |
| cut of the selected readout | before the mean | the same: the cut is in place |
| position embedding | bilinear | bilinear, rounded to half precision |
| windows | at any place, by area | at multiples of the patch |
| datasets without background | every pixel becomes one of the classes | may predict background |

Published: short side 336 (Cityscapes 560), windows of 224, stride 112 (336 on VOC); its evaluation is
not mmsegmentation's, and COCO-Object is COCO 2014's validation set.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.kept import constant
from sfp.functional.labels import best_of_class
from sfp.functional.precision import upcast
from sfp.functional.windows import LogitSheet
from sfp.kinds import Rows
from sfp.registry import METHODS, op, tuned
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

# cut, score_thd, background_thd, whether class 0 is a background, whether maps are scaled by min-max
DATASETS = dict(
    ade20k=(0.2, 0.3, 0.3, False, False),
    city_scapes=(0.35, 0.0, 1e-4, False, False),
    coco_object=(0.2, 0.3, 0.3, True, False),
    coco_stuff164k=(0.2, 0.1, 0.1, False, False),
    context59=(0.2, 0.3, 0.3, False, False),
    context60=(0.2, 0.45, 0.45, True, False),
    voc20=(0.1, 0.0, 0.001, False, False),
    voc21=(0.1, 0.7, 0.6, True, True),
)


def fused_attention(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Normalises columns, then rows, to sum 1, and computes an attention from the result.

    Args:
        weights: M, (B, H, T, T); overwritten.

    Returns:
        M for the next round, the same tensor; and (M + M^T) / 2 minus its column means, clamped at 0,
        with rows of sum 1.
    """
    weights /= weights.sum(-2, keepdim=True)  # in place: these are the largest maps of all
    weights /= weights.sum(-1, keepdim=True)
    fused = weights + weights.mT
    fused /= 2
    fused -= fused.mean(-2, keepdim=True)
    fused.clamp_min_(0)
    fused /= fused.sum(-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)
    return weights, fused


def _given(weights: Tensor, heads: Heads, trace: Trace) -> Tensor:
    """An attention rule with given weights."""
    return weights


def attention(trace: Trace, i: int) -> Tensor:
    """Attention weights of block `i`, (B, H, T, T), without keeping its projections.

    The projections of all blocks, for all windows of an image, take more memory than the tokens.
    """
    return trace.vit.blocks[i].heads(trace.entering(i)).logits("q", "k").softmax(-1)


def readouts(trace: Trace) -> tuple[list[Tokens], Tensor]:
    """The last block's readouts of every layer's input, and the last fused attention of the patches.

    Returns:
        One `Tokens` of width D for each block, in order, reduced (no residual, no FFN); and (B, N, N),
        the heads' mean.
    """
    vit, last = trace.vit, len(trace.vit.blocks) - 1
    total = attention(trace, 0)
    for i in range(1, last):
        total += attention(trace, i)
    read = []
    for i in range(last + 1):
        total, fused = fused_attention(total)
        tokens = trace.entering(i)
        if i < last:
            tokens = tokens.with_data(vit.blocks[i].ln_1(tokens.data))
        read.append(
            vit.blocks[last].read(
                tokens,
                residual=None,
                attention=partial(_given, fused),
                ffn=False,
                trace=trace,
            )
        )
    prefix = trace.embedded.prefix
    return read, fused.mean(1)[:, prefix:, prefix:]


@op("reader")
def last_of_layers(trace: Trace) -> Tokens:
    """The last block's input read with the last fused attention (CLIPer), (B, T, D)."""
    return trace.once(readouts)[0][-1]


@op("comparison", words=True, whole=True)
def layer_probabilities(
    features: Tokens,
    trace: Trace,
    *,
    cut: float = 0.2,
    select: int = -1,
    background: bool = False,
    logit_scale: float = 100.0,
) -> Tensor:
    """Probabilities of every layer's readout, averaged, and the selected one's spread (CLIPer).

    E = mean_k E_k + E_sel B, where values of E_sel below `cut` times its maximum are 0 (in the mean as
    well), and B is the fused attention of the patches. The softmax is over all queries and the mean of
    the classes' words. With windows, E_k is the average for the whole image and the windows, after the
    windows' logits are spread along their attention.

    Args:
        cut: share of a query's maximum.
        select: index of the readout that is spread.
        background: whether class 0 consists of background words, which take part in the softmax only
            and score 0.
        logit_scale: inverse temperature.

    Returns:
        Scores of the whole image, (1, Q, h, w).
    """
    text = trace.query_features().to(upcast(features.data))
    index = constant(trace.index or range(len(text)), text)
    shown = (index > 0) if background else (index >= 0)
    mean = F.normalize((text * shown[:, None]).sum(0, keepdim=True), dim=-1)  # unit length
    text = torch.cat([text, mean])  # (Q + 1, C)

    def logits(of: Trace) -> Tensor:
        """(L, W, Q + 1, N), scaled."""
        each = [of.vit.project(x, of.pool_mlp).patches for x in of.once(readouts)[0]]
        unit = F.normalize(upcast(torch.stack(each)), dim=-1)
        return logit_scale * (unit @ text.T).mT

    image = trace.of_image()
    attention = image.once(readouts)[1][0]  # (N, N)
    probs = logits(image)[:, 0].softmax(1)  # (L, Q + 1, N)
    if image is not trace:
        probs = (probs + windowed(trace, logits(trace), image.embedded.grid).softmax(1)) / 2
    probs = probs[:, :-1]
    if not -len(probs) <= select < len(probs):
        raise ValueError(f"select={select} of {len(probs)} readouts, one for each layer")
    chosen = probs[select]  # a view: the cut also changes the mean
    chosen.masked_fill_(chosen < cut * chosen.amax(1, keepdim=True), 0)
    scores = probs.mean(0) + chosen @ attention
    return (scores * shown[:, None]).unflatten(1, image.embedded.grid)[None]


def windowed(trace: Trace, logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits of windows (L, W, Q, N) on the whole grid, spread along the windows' attention: (L, Q, M).

    Args:
        trace: trace of the windows.
        logits: logits of each readout.
        grid: rows and columns of patches of the whole image.
    """
    whole = trace.whole
    assert whole is not None
    cells = trace.embedded.grid
    maps = logits.transpose(0, 1).flatten(1, 2).unflatten(2, cells)  # (W, L * Q, h, w)
    merged = whole.grid.stitch(maps)[0].flatten(1).unflatten(0, logits.shape[::2][:2])
    attention = trace.once(readouts)[1]  # (W, N, N)
    total = attention.new_zeros(grid[0] * grid[1], grid[0] * grid[1])
    count = torch.zeros_like(total)
    for weights, place in zip(attention, whole.grid.placements(cells), strict=True):
        place = place.to(weights)  # (M, N)
        total += place @ weights @ place.T
        covered = place.sum(1)
        count += covered[:, None] * covered
    total = total / (count + 1e-5)
    return merged @ (total / total.sum(1, keepdim=True))


@op("decision")
def kept_classes(
    sheet: LogitSheet,
    rows: Rows,
    index: Sequence[int],
    *,
    score_thd: float = 0.3,
    background_thd: float = 0.3,
    background: bool = False,
    min_max: bool = False,
) -> Rows:
    """Scores of the classes with a high enough maximum, each scaled to its maximum (CLIPer).

    A query's score is its maximum at patch resolution; its map is divided by its maximum at the size of
    the output, and multiplied by that score. Queries with a score of at most `score_thd` are left out.
    Scores are not probabilities: the sum of a map and its spread is up to 2.

    Args:
        score_thd: as above.
        background_thd: score of the background, class 0; 0 for (1 - the largest of the others)^2.
        background: whether class 0 is a background.
        min_max: whether maps are scaled to 0..1 instead, and not multiplied (the release on VOC21).
    """
    score = sheet.tiles.amax((0, 1))  # (Q,)
    height = sheet.size[0]
    step = max(2**22 // (len(index) * sheet.size[1]), 1)
    slabs = (rows(i, min(i + step, height)) for i in range(0, height, step))
    ends = torch.stack([torch.stack(slab.flatten(1).aminmax(dim=1)) for slab in slabs])
    low, high = ends[:, 0].amin(0), ends[:, 1].amax(0)
    kept = score > score_thd
    shift = low if min_max else torch.zeros_like(low)
    gain = ((1 if min_max else score) / (high - shift + 1e-5) * kept)[:, None, None]

    def scores(start: int, stop: int) -> Tensor:
        best = best_of_class((rows(start, stop) - shift[:, None, None]) * gain, index)
        if background and len(best) > 1:
            others = best[1:].amax(0)
            rest = (1 - others).square() if background_thd == 0 else others * 0 + background_thd
            best = torch.cat([rest[None], best[1:]])
        return best

    return scores


@METHODS.register_module()
def cliper(
    *,
    dataset: str = "context59",
    cut: float | None = None,
    select: int = -1,
    logit_scale: float = 100.0,
    score_thd: float | None = None,
    background_thd: float | None = None,
    background: bool | None = None,
    min_max: bool | None = None,
) -> dict[str, Any]:
    """The last block reads the input of every block: no residual, no FFN. Needs the text features.

    Args:
        dataset: dataset whose constants replace those that are None; see `DATASETS`.
        cut, select: cut and index of the readout that is spread, as in `layer_probabilities`; the
            release selects the last but one of ViT-L/14 on many datasets.
        logit_scale: inverse temperature; 50 in the release on COCO-Object and COCO-Stuff.
        score_thd, background_thd, min_max: as in `kept_classes`.
        background: whether class 0 consists of background words.
    """
    values = tuned(
        dataset,
        DATASETS,
        cut=cut,
        score_thd=score_thd,
        background_thd=background_thd,
        background=background,
        min_max=min_max,
    )
    return dict(
        direct=True,
        positions=dict(type="resample_positions", offset=0.0, mode="bilinear"),
        readouts=[dict(type="last_of_layers")],
        comparison=dict(
            type="layer_probabilities",
            cut=values.pop("cut"),
            select=select,
            background=values["background"],
            logit_scale=logit_scale,
        ),
        decision=dict(type="kept_classes", **values),
    )
