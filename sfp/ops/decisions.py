"""Decisions: how merged logits become class scores. `(sheet, rows, index, *, knobs) -> rows`.

`sheet` holds the logits at patch resolution. `rows(start, stop)` gives the maps of some output rows,
(Q, stop - start, W), refined if the engine refines them, so that no image is held with all its queries;
what a decision returns gives class scores, (K, stop - start, W), the same way. The largest score of a
pixel is its confidence, to which thresholds apply.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sfp.functional.labels import best_of_class
from sfp.functional.windows import LogitSheet
from sfp.kinds import Rows
from sfp.registry import op


@op("decision")
def as_scores(sheet: LogitSheet, rows: Rows, index: Sequence[int], *, rest: bool = False) -> Rows:
    """The maps are scores already, of which each class has its best: no softmax.

    Args:
        rest: whether class 0 is what the others leave: 1 - the largest of their scores.
    """

    def scores(start: int, stop: int) -> Tensor:
        best = best_of_class(rows(start, stop), index)  # (K, stop - start, W)
        if rest and len(best) > 1:
            best = best.clone()
            best[0] = 1 - best[1:].amax(0)
        return best

    return scores
