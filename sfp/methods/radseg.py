"""RADSeg's two aggregations, for any tower (code by RADSeg-OVSS; the original runs C-RADIOv3).

SCRA, in the last block: values are mixed by the similarity of the block's own attention outputs, head
by head. SCGA, on the final features of the whole image: each patch becomes a mean of the patches whose
similarity to it exceeds the average over all pairs.

The release runs windows of 336 pixels (stride 224) on images whose sides are multiples of the stride
(`stride_size`), denoises prompts on probabilities at the output's size, and does not merge the names of
a class; here a class takes the score of its best name. It is for vocabularies without a background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import CHUNK, anchored_softmax
from sfp.functional.labels import best_of_class
from sfp.functional.precision import upcast
from sfp.functional.windows import LogitSheet
from sfp.kinds import Rows
from sfp.ops.image import window_grid
from sfp.registry import METHODS, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace


def recursive_attention(out: Tensor, gain: float) -> Tensor:
    """softmax(gain * S) over the cosines S of each head's outputs that are not negative.

    Args:
        out: outputs of the heads, (B, H, T, d).
        gain: inverse temperature.

    Returns:
        (B, H, T, T).
    """
    unit = F.normalize(upcast(out), dim=-1)
    similarity = unit @ unit.mT
    return (gain * similarity).masked_fill(similarity < 0, -torch.inf).softmax(-1)


@op("attention")
def self_correlating(heads: Heads, trace: Trace, *, gain: float = 10.0) -> Tensor:
    """RADSeg's SCRA: attention by the cosines of the last block's own attention output, (B, H, T, T).

    The output of the block's ordinary attention, after its projection, is split into heads again.

    Args:
        gain: inverse temperature.
    """
    mixed = heads.logits("q", "k").softmax(-1).to(heads.v.dtype) @ heads.v  # (B, H, T, d)
    out = heads.join(mixed.transpose(1, 2).flatten(2))
    return recursive_attention(out.unflatten(2, (heads.v.shape[1], -1)).transpose(1, 2), gain)


def global_rows(unit: Tensor, rows: slice, mean: Tensor, gain: float) -> Tensor:
    """Some rows of softmax(gain * (S - mean)) over the pairs that are not below the mean.

    Args:
        unit: unit rows of one image, (N, D); S holds their products.
        rows: rows to compute.
        mean: mean of S over all pairs.
        gain: inverse temperature.
    """
    # if all patches are the same, rounding may leave all of a row below the mean
    return anchored_softmax(unit[rows] @ unit.T, mean, 1.0, gain)


@op("smoother")
def global_aggregation(tokens: Tokens, trace: Trace, *, gain: float = 10.0) -> Tokens:
    """RADSeg's SCGA: averages each patch with those more similar to it than the average pair.

    The class token stays. Rows are processed in chunks, so that no large map is kept in memory.

    Args:
        gain: inverse temperature.
    """
    step = max(CHUNK // tokens.patches.shape[1], 1)
    mixed = []
    for patches in tokens.patches:
        unit = F.normalize(upcast(patches), dim=-1)
        total = unit.sum(0, dtype=torch.float64)
        mean = (total.dot(total) / len(unit) ** 2).to(unit)
        starts = range(0, len(unit), step)
        rows = [global_rows(unit, slice(i, i + step), mean, gain) @ upcast(patches) for i in starts]
        mixed.append(torch.cat(rows))
    return tokens.with_patches(torch.stack(mixed).to(tokens.data))


@op("smoother", whole=True)
def stitch(tokens: Tokens, trace: Trace, *, floor: bool = False) -> Tokens:
    """Patches of all windows on one grid of the whole image, after the mean prefix, (1, P + N, D).

    Args:
        floor: as in `canvas`.
    """
    maps = window_grid(trace).stitch(tokens.as_map(), floor=floor)
    prefix = tokens.data[:, : tokens.prefix].mean(0, keepdim=True)
    data = torch.cat([prefix, maps.flatten(2).mT], dim=1)
    return replace(tokens, data=data, grid=(maps.shape[2], maps.shape[3]), hidden=None)


@op("refiner")
def query_probabilities(logits: Tensor, trace: Trace, *, scale: float = 100.0) -> Tensor:
    """Probabilities of the queries on the patches' grid, softmax(scale * logits).

    Args:
        scale: inverse temperature.
    """
    return (scale * logits).softmax(1)


@op("decision")
def denoised_scores(
    sheet: LogitSheet, rows: Rows, index: Sequence[int], *, least: float = 0.5
) -> Rows:
    """Probabilities as scores, without the queries that are not probable anywhere in the image.

    Args:
        least: queries with a smaller largest probability get 0 everywhere.
    """
    height, width = sheet.size
    step = max(CHUNK // (len(index) * width), 1)
    slabs = (rows(i, min(i + step, height)).amax((1, 2)) for i in range(0, height, step))
    sure = torch.stack(list(slabs)).amax(0) >= least  # (Q,)

    def scores(start: int, stop: int) -> Tensor:
        return best_of_class(rows(start, stop) * sure[:, None, None], index)

    return scores


def stride_size(size: tuple[int, int], window: int, stride: int) -> tuple[int, int]:
    """The size to which RADSeg's release resizes an image.

    If both sides are multiples of the stride, they stay. Otherwise the longer side is rounded up to the
    next multiple and the other scaled in proportion (rounded down); then each is rounded up to the next
    multiple, and to at least the window.
    """
    if all(side % stride == 0 for side in size):
        return size
    longer = max(size)
    target = -(-longer // stride) * stride
    sides = [target if side == longer else side * target // longer for side in size]
    rows, columns = (max(-(-side // stride) * stride, window) for side in sides)
    return rows, columns


@METHODS.register_module()
def radseg(
    *,
    recursive: float | None = 10.0,
    aggregate: float | None = 10.0,
    scale: float = 100.0,
    least: float = 0.5,
) -> dict[str, Any]:
    """The last block with attention by its own output, and an aggregation over the whole image.

    Args:
        recursive: inverse temperature of the attention; None for the block's own.
        aggregate: inverse temperature of the aggregation; None for none.
        scale: inverse temperature of the softmax over queries.
        least: queries that are less probable than this everywhere in the image are left out.
    """
    rule = None if recursive is None else dict(type="self_correlating", gain=recursive)
    after: list[dict[str, Any]] = [dict(type="stitch")]
    if aggregate is not None:
        after.append(dict(type="global_aggregation", gain=aggregate))
    return dict(
        readouts=[dict(attention=rule, after=after)],
        refiners=[dict(type="query_probabilities", scale=scale)],
        decision=dict(type="denoised_scores", least=least),
    )
