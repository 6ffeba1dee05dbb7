"""Decisions, from merged logits to class scores: `(sheet, rows, index, *, knobs) -> rows`.

`sheet` holds the logits at patch resolution. `rows(start, stop)` returns the logits of some output
rows, (Q, stop - start, W), after the engine's refinement if any, so that the full maps of all queries
are never in memory. A decision returns a function of the same form for class scores, (K, stop - start,
W). The largest score of a pixel is its confidence, to which thresholds apply.
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
    """Uses the maps as scores, without a softmax; a class gets the best of its queries.

    Args:
        rest: give class 0 the remainder, 1 - the largest score of the others.
    """

    def scores(start: int, stop: int) -> Tensor:
        best = best_of_class(rows(start, stop), index)  # (K, stop - start, W)
        if rest and len(best) > 1:
            best = best.clone()
            best[0] = 1 - best[1:].amax(0)
        return best

    return scores
