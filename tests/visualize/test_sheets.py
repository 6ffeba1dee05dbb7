from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
import pytest

from sfp.overlay import Panel
from sfp.visualize.sheets import picture_sheet


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 2, 4])
def test_rows_of_any_aspects_leave_no_bands(tmp_path, columns):
    """A wide, a tall and a square image, each of one grey: as wide as their column, undistorted."""
    shapes = {60: (40, 120), 120: (120, 40), 180: (50, 50)}
    panels = [Panel(np.full((*shape, 3), grey, np.uint8)) for grey, shape in shapes.items()]
    labelled = Panel(np.full((40, 120, 3), 60, np.uint8), np.full((40, 120), 9))  # drawn nowhere
    sheet = {"image": panels} | {f"{n}": [labelled, *panels[1:]] for n in range(1, columns)}
    picture_sheet(sheet, ["a class"], [(255, 0, 0)], tmp_path / "sheet.png")
    picture = cv2.imread(str(tmp_path / "sheet.png"))
    boxes = [
        (*rows, *cells)
        for grey in shapes
        for rows in runs((picture == grey).all(-1).sum(1) > 100)
        for cells in runs((picture[sum(rows) // 2] == grey).all(-1))
    ]
    assert len(boxes) == 3 * columns
    for box, shape in zip(boxes, np.repeat(list(shapes.values()), columns, axis=0), strict=True):
        height, width = box[1] - box[0], box[3] - box[2]
        assert abs(width * columns / picture.shape[1] - 1) < 0.05
        assert abs(height - width * shape[0] / shape[1]) <= 1 + shape[0] / shape[1]  # a pixel each
    tops = sorted({box[:2] for box in boxes})
    assert all(0 < b[0] - a[1] < 12 for a, b in pairwise(tops))


def runs(inside: np.ndarray) -> list[tuple[int, int]]:
    """Where True begins and ends."""
    edges = np.flatnonzero(np.diff(np.r_[0, inside.astype(int), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
