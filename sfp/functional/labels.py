"""From query logits to labels: softmax over queries, best synonym, thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.dispatch import intercepted
from sfp.functional.kept import constant
from sfp.functional.room import check_room
from sfp.functional.windows import LogitSheet

Threshold: TypeAlias = "float | Sequence[float]"
BUDGET = {"cpu": 2**19, "cuda": 2**26}  # probabilities at once; on a CPU they fit into its cache
THREADS = 8  # up to which NumPy's argmax, with vector instructions on one thread, is the faster one


@dataclass(frozen=True)
class Labels:
    """A labelled image.

    Attributes:
        labels: (H, W) int64.
        confidence: (H, W), the winning class's probability before `prob_thd` is applied.
        scores: (K, H, W) class probabilities, or None if not requested.
    """

    labels: Tensor
    confidence: Tensor
    scores: Tensor | None


def within(confidence: Tensor, threshold: Threshold) -> Tensor | float:
    """The threshold of an image: a number as it is, of two the image's own, kept between them.

    Args:
        confidence: probability of each pixel's class.
        threshold: a number; or the least and the largest of Otsu's threshold (S2C2Seg).
    """
    if isinstance(threshold, Sequence):
        return otsu(confidence).clamp(threshold[0], threshold[1])
    return threshold


def otsu(values: Tensor) -> Tensor:
    """What divides values in 0..1 best into two groups, as Otsu (1979) has it; one number.

    Of the borders between 256 equal levels, the first with the largest variance between the means of
    the values on its two sides.

    Args:
        values: any shape.
    """
    levels = (255 * values.detach().flatten()).round().clamp(0, 255).long()
    share = torch.bincount(levels, minlength=256).to(torch.float64) / levels.numel()
    below = share.cumsum(0)
    level = torch.arange(256, dtype=torch.float64, device=share.device)
    mass = (share * level).cumsum(0)
    apart = (mass[-1] * below - mass).square() / (below * (1 - below)).clamp_min(1e-12)
    return ((apart.argmax() + 0.5) / 255).to(values)


def class_scores(logits: Tensor, index: Sequence[int], scale: float) -> Tensor:
    """Class probabilities, (Q, ...) -> (K, ...).

    Softmax of `scale * logits` over all queries, so that synonyms compete, then the best query of each
    class.

    Args:
        logits: cosine similarities, queries first.
        index: class of each query; classes 0..K-1 all have one, and are in order.
        scale: inverse temperature.
    """
    return best_of_class((logits * scale).softmax(0), index)


def decided(
    sheet: LogitSheet,
    refine: Callable[[LogitSheet], Callable[[int, int], Tensor]] | None,
    index: Sequence[int],
    scale: float,
    decision: Callable[..., Callable[[int, int], Tensor]] | None,
) -> dict[str, Any]:
    """Arguments of `assign` for a method that may have its own decision.

    Args:
        sheet: the merged logits.
        refine: makes refined logits of it, by rows of the image; a linear map, or None.
        index: as in `assign`.
        scale: inverse temperature of the softmax.
        decision: an op of that kind (`sfp.kinds.Decision`), or None for the softmax.
    """
    if decision is None:  # scaled at patch resolution, where it costs least
        sheet = replace(sheet, tiles=sheet.tiles * scale)
    rows = sheet.rows if refine is None else refine(sheet)
    given = dict(size=sheet.size, like=sheet.tiles)
    if decision is None:
        return dict(given, rows=rows, index=index)
    scores = decision(sheet, rows, index)
    return dict(given, rows=scores, index=range(index[-1] + 1), softmax=False)


def below(labels: Labels, threshold: float, background: int) -> Labels:
    """Gives pixels of a smaller confidence to the class `background`, which may be a new one, K.

    A new class has no scores: they are 0.
    """
    new = labels.labels.masked_fill(labels.confidence < threshold, background)
    scores = labels.scores
    if scores is not None and len(scores) == background:
        scores = F.pad(scores, (0, 0, 0, 0, 0, 1))
    return replace(labels, labels=new, scores=scores)


def best_of_class(probs: Tensor, index: Sequence[int]) -> Tensor:
    """The best query of each class, (Q, ...) -> (K, ...)."""
    if len(index) == index[-1] + 1:  # one query per class
        return probs
    sizes = [len(list(own)) for _, own in groupby(index)]
    return torch.stack([part.amax(0) for part in probs.split(sizes)])


def argmax(values: Tensor) -> Tensor:
    """Where the last dimension is largest, the first of equals: (..., C) -> (...) int64."""
    known = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    if known and torch.get_num_threads() <= THREADS and not intercepted():
        return torch.from_numpy(values.detach().numpy().argmax(-1))
    return values.argmax(-1)


def assign(
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    index: Sequence[int],
    *,
    like: Tensor,
    softmax: bool = True,
    prob_thd: Threshold = 0.0,
    area_thd: float | None = None,
    background: int | None = 0,
    keep_scores: bool = False,
) -> Labels:
    """Labels every pixel, one slab of rows at a time, so that memory does not grow with the classes.

    Args:
        rows: returns the scaled logits (Q, stop - start, W) of rows start to stop.
        size: size of the image, (H, W).
        index: as in `class_scores`.
        like: type and device of the rows.
        softmax: whether scores are the softmax of `rows` over queries, or `rows` themselves.
        prob_thd: pixels whose best probability is below this become class 0 (`within`).
        area_thd: a class that wins at most this share of the pixels not won by the background is
            removed (SCLIP's protocol for VOC21).
        background: the class that is not removed; None for the largest.
        keep_scores: whether to return the class probabilities as well, (K, H, W).

    Raises:
        RoomError: if these do not fit into memory.
    """
    height, width = size
    if keep_scores:
        what = f"probabilities of {height} x {width} pixels and {index[-1] + 1} classes"
        numbers = height * width * (index[-1] + 1)
        check_room(numbers, like.device, what, "use a smaller image, or do without scores")
    step = max(BUDGET.get(like.device.type, BUDGET["cuda"]) // (len(index) * width), 1)
    classes = constant(index, like)
    confidence = like.new_empty(size)
    query = like.new_empty(size, dtype=torch.long)
    scores = like.new_empty(index[-1] + 1, *size) if keep_scores else None

    def sweep(dropped: Tensor | None = None) -> Tensor:
        for start in range(0, height, step):
            own = slice(start, min(start + step, height))
            # queries last, so that a pixel's softmax and maximum run over adjacent memory
            probs = rows(own.start, own.stop).permute(1, 2, 0)
            if softmax:
                probs = probs.softmax(-1)
            if dropped is not None:
                probs = probs.masked_fill(dropped, 0)
            query[own] = best = argmax(probs)
            confidence[own] = probs.gather(-1, best[..., None])[..., 0]
            if scores is not None:
                scores[:, own] = best_of_class(probs.permute(2, 0, 1), index)
        return classes[query]

    labels = sweep()
    if area_thd is not None:
        won = labels.flatten().bincount(minlength=index[-1] + 1)
        rest = 0 if background is None else won[background]
        dropped = won <= area_thd * (won.sum() - rest)
        dropped[won.argmax() if background is None else background] = False
        if bool((dropped & (won > 0)).any()):
            labels = sweep(dropped[classes])
        elif scores is not None:
            scores[dropped] = 0
    labels.masked_fill_(confidence < within(confidence, prob_thd), 0)
    return Labels(labels, confidence, scores)
