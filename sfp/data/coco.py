"""Label maps as COCO annotations: run-length encoded masks that every COCO tool reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from sfp.vocabulary import BACKGROUND


class Segmented(Protocol):
    """A segmented image, as `sfp.Result` is one: labels and confidence (H, W), and class names."""

    @property
    def labels(self) -> NDArray[np.int32]:  # noqa: D102
        ...

    @property
    def confidence(self) -> NDArray[np.float32]:  # noqa: D102
        ...

    @property
    def names(self) -> Sequence[str]:  # noqa: D102
        ...


def rle(mask: NDArray[Any]) -> dict[str, Any]:
    """COCO's uncompressed run-length code of a mask (H, W).

    Returns:
        "size", [H, W], and "counts", the lengths of runs of 0, 1, 0, ... down the columns.

    Example:
        >>> rle(np.array([[0, 1], [1, 1]]))
        {'size': [2, 2], 'counts': [1, 3]}
    """
    pixels = np.asarray(mask, bool).ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff(np.concatenate([[0], ends, [pixels.size]])).tolist()
    return dict(size=list(mask.shape), counts=[0, *counts] if pixels[0] else counts)


def coco_document(
    results: Mapping[str, Segmented] | Iterable[tuple[str, Segmented]], *, parts: bool = False
) -> dict[str, Any]:
    """Segmented images as one COCO document, ready for `json.dump`.

    There is one annotation per class and image, as in COCO-Stuff, because the pixels of a class do not
    tell how many objects they show. With `parts` there is one per connected region (including diagonal
    neighbours). The class "background" has none. Category ids are labels plus 1, since COCO's start at
    1; "score" is the mean confidence.

    Args:
        results: results by the file names of their images, a mapping or pairs; all with the same
            classes.
        parts: whether connected regions are separate annotations.

    Raises:
        ValueError: if their classes differ.
    """
    names: Sequence[str] | None = None
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pairs = results.items() if isinstance(results, Mapping) else results
    for number, (file, result) in enumerate(pairs, 1):
        names = result.names if names is None else names
        if result.names != names:
            raise ValueError(
                f"{file} has other classes than the first image: a COCO document needs the same "
                "classes for all images"
            )
        height, width = result.labels.shape
        images.append(dict(id=number, file_name=file, height=height, width=width))
        for label in np.unique(result.labels).tolist():
            if names[label] == BACKGROUND:
                continue
            for mask in _masks(result.labels == label, parts):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=number,
                        category_id=label + 1,
                        segmentation=rle(mask),
                        area=int(mask.sum()),
                        bbox=_box(mask),
                        iscrowd=0,
                        score=round(float(result.confidence[mask].mean()), 4),
                    )
                )
    categories = [
        dict(id=label + 1, name=name)
        for label, name in enumerate(names or ())
        if name != BACKGROUND
    ]
    return dict(images=images, annotations=annotations, categories=categories)


def _masks(mask: NDArray[np.bool_], parts: bool) -> list[NDArray[np.bool_]]:
    if not parts:
        return [mask]
    count, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return [regions == i for i in range(1, count)]


def _box(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's [x, y, width, height]."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left = int(rows[0]), int(columns[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
