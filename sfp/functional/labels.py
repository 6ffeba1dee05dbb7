"""From query logits to labels: softmax over queries, best synonym, thresholds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGET = 2**24  # probabilities held at once


@dataclass(frozen=True)
class Labels:
    """A labelled image.

    Attributes:
        labels: (H, W) int64.
        confidence: (H, W), the winning class's probability before `prob_thd` acts.
        scores: (K, H, W) class probabilities, or None if they were not asked for.
    """

    labels: Tensor
    confidence: Tensor
    scores: Tensor | None


def class_scores(logits: Tensor, index: Sequence[int], scale: float) -> Tensor:
    """Class probabilities, (Q, ...) -> (K, ...).

    Softmax of `scale * logits` over all queries, so that synonyms compete, then the best query of each
    class.

    Args:
        logits: cosine similarities, queries first.
        index: class of each query; classes 0..K-1 all have one, and are in order.
        scale: inverse temperature.
    """
    probs = (logits * scale).softmax(0)
    if len(index) == index[-1] + 1:  # one query each
        return probs
    sizes = torch.tensor(index).bincount().tolist()
    return torch.stack([part.amax(0) for part in probs.split(sizes)])


def assign(
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    index: Sequence[int],
    *,
    scale: float = 40.0,
    prob_thd: float = 0.0,
    area_thd: float | None = None,
    keep_scores: bool = False,
) -> Labels:
    """Labels every pixel, a slab of rows at a time, so that memory does not grow with the classes.

    Args:
        rows: gives the logits (Q, stop - start, W) of rows start to stop.
        size: of the image, (H, W).
        index, scale: as in `class_scores`.
        prob_thd: pixels whose best class is less probable become class 0.
        area_thd: a class other than 0 that wins no more than this share of the pixels that classes
            other than 0 win is left out (SCLIP's protocol for VOC21).
        keep_scores: whether to return the class probabilities too, (K, H, W).
    """
    height, width = size
    step = max(BUDGET // (len(index) * width), 1)
    classes = index[-1] + 1

    def sweep(dropped: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        labels = confidence = None  # made once the device is known, then filled slab by slab
        kept = []
        for start in range(0, height, step):
            stop = min(start + step, height)
            scores = class_scores(rows(start, stop), index, scale)
            if dropped is not None:
                scores = scores.masked_fill(dropped[:, None, None], 0)
            if labels is None or confidence is None:
                labels = scores.new_empty(size, dtype=torch.long)
                confidence = scores.new_empty(size)
            torch.max(scores, 0, out=(confidence[start:stop], labels[start:stop]))
            if keep_scores:
                kept.append(scores)
        assert labels is not None
        assert confidence is not None
        return labels, confidence, torch.cat(kept, 1) if kept else None

    labels, confidence, scores = sweep(None)
    if area_thd is not None:
        won = labels.flatten().bincount(minlength=classes)
        dropped = won <= area_thd * won[1:].sum()
        dropped[0] = False
        if bool((dropped & (won > 0)).any()) or (keep_scores and bool(dropped.any())):
            labels, confidence, scores = sweep(dropped)
    labels.masked_fill_(confidence < prob_thd, 0)
    return Labels(labels, confidence, scores)
