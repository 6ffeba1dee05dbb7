"""Draws COCO's instances into label maps, for the COCO-Object benchmark.

0 is background, 1 to 80 are the object classes in the order of their category ids. Where instances
overlap, the smaller one is on top (by the "area" of the annotation, so that a spoon on a plate stays
visible), and crowd regions are below everything else. A polygon covers the pixels whose centre is
inside it; pycocotools first rounds corners to a fifth of a pixel, so single border pixels can differ
from its maps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfp.data.convert import Job
from sfp.data.images import DataError

THINGS = 80
SUFFIX = "_instanceTrainIds.png"


def object_jobs(root: Path, split: str = "val2017") -> list[Job]:
    """Jobs for the label maps of all images in COCO's instances file.

    Args:
        root: folder of COCO-Object, with annotations/instances_<split>.json; the maps go to
            annotations/<split>.
        split: "val2017" or "train2017".

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is not COCO's instances file.
    """
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: unpack COCO's 2017 annotations there, or give the folder of "
            "COCO-Object (see docs/data.md)"
        )
    folder = root / "annotations" / split
    return [
        Job(folder / f"{Path(image['file_name']).stem}{SUFFIX}", partial(image_labels, image))
        for image in _images(path)
    ]


def _images(path: Path) -> list[dict[str, Any]]:
    """The images of an annotation file, each with its "instances" and their labels."""
    try:
        data = json.loads(path.read_bytes())
        labels = {
            category: label
            for label, category in enumerate(sorted(c["id"] for c in data["categories"]), start=1)
        }
        images = {image["id"]: dict(image, instances=[]) for image in data["images"]}
        for one in data["annotations"]:
            images[one["image_id"]]["instances"].append(
                dict(
                    label=labels[one["category_id"]],
                    segmentation=one["segmentation"],
                    area=one["area"],
                    iscrowd=one.get("iscrowd", 0),
                )
            )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path} is not COCO's instances file ({type(error).__name__}: {error}), or truncated"
        ) from error
    if len(labels) != THINGS:
        raise DataError(f"{path} has {len(labels)} categories: expected {THINGS}, those of COCO")
    return list(images.values())


def image_labels(image: dict[str, Any]) -> NDArray[np.uint8]:
    """The label map of an image of an annotation file.

    Args:
        image: with "height", "width", "file_name" and "instances" as in `label_map`.

    Raises:
        DataError: if its annotations are invalid; the message names the image.
    """
    try:
        return label_map(image["height"], image["width"], image["instances"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"annotations of {image.get('file_name')}: {error}") from error


def label_map(height: int, width: int, instances: Sequence[dict[str, Any]]) -> NDArray[np.uint8]:
    """Draws the instances of one image.

    Args:
        height: Rows of the image.
        width: Its columns.
        instances: COCO annotations, each with its "label" (1 to 80) added.

    Returns:
        Labels, (height, width) uint8.
    """
    labels = np.zeros((height, width), np.uint8)
    for one in sorted(instances, key=lambda one: (not one.get("iscrowd", 0), -one["area"])):
        labels[mask(one["segmentation"], height, width)] = one["label"]
    return labels


def mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels of a COCO segmentation.

    Args:
        segmentation: A list of polygons [x0, y0, x1, y1, ...], whose union counts, or a run-length
            code {"size": [height, width], "counts": a list or COCO's text form}.
        height: Rows of the image.
        width: Its columns.

    Returns:
        (height, width) bool.

    Raises:
        ValueError: If the code is of another size.
    """
    if isinstance(segmentation, list):
        union = np.zeros((height, width), bool)
        for polygon in segmentation:
            union |= polygon_mask(np.reshape(np.asarray(polygon, float), (-1, 2)), height, width)
        return union
    counts = segmentation["counts"]
    runs = counts if isinstance(counts, list) else decode_counts(counts)
    if tuple(segmentation["size"]) != (height, width) or sum(runs) != height * width:
        raise ValueError(f"run-length code of {sum(runs)} pixels in an image of {height} x {width}")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)  # runs of 0 and 1 in turn, 0 first
    return flat.reshape(width, height).T  # column by column


def polygon_mask(points: np.ndarray, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside a polygon, by the even-odd rule.

    Args:
        points: (n, 2) corners x, y; the first pixel spans 0 to 1.
        height: Rows of the image.
        width: Its columns.

    Returns:
        (height, width) bool.
    """
    result = np.zeros((height, width), bool)
    if not len(points):
        return result
    # only inside the bounding box: most instances are small
    (left, top), (right, bottom) = np.floor(points.min(0)), np.ceil(points.max(0))
    left, right = (int(np.clip(x, 0, width)) for x in (left, right))
    top, bottom = (int(np.clip(y, 0, height)) for y in (top, bottom))

    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    centres = np.arange(top, bottom) + 0.5
    edge, row = np.nonzero((y0[:, None] <= centres) != (y1[:, None] <= centres))
    x = x0[edge] + (centres[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    # first centre right of the crossing
    column = np.clip(np.ceil(x - 0.5), left, right).astype(int) - left
    crossings = np.zeros((bottom - top, right - left + 1), np.int32)
    np.add.at(crossings, (row, column), 1)
    result[top:bottom, left:right] = crossings.cumsum(1)[:, :-1] % 2 == 1
    return result


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's text form.

    A number is written in digits of five bits, lowest first, each as a character from "0" upwards; the
    bit of value 32 means that another digit follows, and the highest bit of the last digit is the sign.
    From the fourth number on, the difference to the run two before is stored.

    Args:
        text: Such as "52203".

    Returns:
        The lengths of the runs.

    Example:
        >>> decode_counts("52203")
        [5, 2, 2, 2, 5]
    """
    runs: list[int] = []
    value = shift = 0
    for char in text:
        digit = ord(char) - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
