"""Draws COCO's instances into label maps for the COCO-Object benchmark.

Reads ROOT/annotations/instances_val2017.json and writes, for each image listed there,
ROOT/annotations/val2017/<image>_instanceTrainIds.png: 0 is background, 1 to 80 are the things in
the order of their category ids. Maps that exist already are kept, so an interrupted run goes on
where it stopped; --force draws them again.

Where instances overlap, the smaller one is drawn on top (by the "area" of the annotation; a spoon on
a plate stays visible), and crowd regions lie below everything else. A polygon covers the pixels
whose centre is inside; pycocotools rounds corners to a fifth of a pixel first, so single pixels of
a border can differ from maps made with it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.progress import track

THINGS = 80


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the converter.

    Args:
        argv: Command line without the program's name; that of the process by default.

    Returns:
        Exit status: 0, or 1 after an error that is printed.
    """
    args = _parser().parse_args(argv)
    try:
        written, kept = convert(args.root, args.split, nproc=args.nproc, force=args.force)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{written} label maps written, {kept} were there, in {_labels(args.root, args.split)}")
    return 0


def convert(root: Path, split: str, *, nproc: int = 1, force: bool = False) -> tuple[int, int]:
    """Writes the label maps of a split.

    Args:
        root: Folder of COCO-Object.
        split: Such as "val2017".
        nproc: Processes that draw.
        force: Whether maps that exist are drawn again.

    Returns:
        How many maps were written, and how many kept.

    Raises:
        FileNotFoundError: If the annotations are missing.
        ValueError: If they are not COCO's instances.
    """
    jobs = _jobs(root / "annotations" / f"instances_{split}.json")
    folder = _labels(root, split)
    folder.mkdir(parents=True, exist_ok=True)
    names = set() if force else set(os.listdir(folder))
    todo = [job for job in jobs if label_name(job["file_name"]) not in names]
    draw = partial(_write, folder)
    with ExitStack() as stack:
        run: Callable[..., Iterator[None]] = map
        if nproc > 1:
            run = partial(stack.enter_context(ProcessPoolExecutor(nproc)).map, chunksize=8)
        for _ in track(run(draw, todo), description=f"COCO-Object {split}", total=len(todo)):
            pass
    return len(todo), len(jobs) - len(todo)


def label_name(image: str) -> str:
    """File name of the label map of an image."""
    return f"{Path(image).stem}_instanceTrainIds.png"


def label_map(height: int, width: int, instances: Sequence[dict[str, Any]]) -> np.ndarray:
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


def mask(segmentation: Any, height: int, width: int) -> np.ndarray:
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


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centre lies inside a polygon, by the even-odd rule.

    Args:
        points: (n, 2) corners x, y; the first pixel spans 0 to 1.
        height: Rows of the image.
        width: Its columns.

    Returns:
        (height, width) bool.
    """
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    centres = np.arange(height) + 0.5
    edge, row = np.nonzero((y0[:, None] <= centres) != (y1[:, None] <= centres))
    x = x0[edge] + (centres[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)  # first centre right of the crossing
    crossings = np.zeros((height, width + 1), int)
    np.add.at(crossings, (row, column), 1)
    return crossings.cumsum(1)[:, :width] % 2 == 1


def decode_counts(text: str) -> list[int]:
    """Run lengths from COCO's text form.

    A number is written as digits of five bits, lowest first, each in a character from "0" on; the
    bit of value 32 says that another digit follows, and the highest bit of the last digit is the
    sign. From the fourth number on it is the difference to the last but one run.

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


def _jobs(path: Path) -> list[dict[str, Any]]:
    """The images of an annotation file, each with its "instances" and their labels."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}. Unpack COCO's 2017 annotations so that it exists, or name the "
            "folder of COCO-Object (see docs/data.md)"
        )
    try:
        data = json.loads(path.read_bytes())
        labels = {
            category: label
            for label, category in enumerate(sorted(c["id"] for c in data["categories"]), start=1)
        }
        jobs = {image["id"]: dict(image, instances=[]) for image in data["images"]}
        for one in data["annotations"]:
            jobs[one["image_id"]]["instances"].append(
                dict(
                    label=labels[one["category_id"]],
                    segmentation=one["segmentation"],
                    area=one["area"],
                    iscrowd=one.get("iscrowd", 0),
                )
            )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not COCO's instances file ({type(error).__name__}: {error}); it may be cut off"
        ) from error
    if len(labels) != THINGS:
        raise ValueError(f"{path} has {len(labels)} categories, COCO's instances have {THINGS}")
    return list(jobs.values())


def _write(folder: Path, job: dict[str, Any]) -> None:
    """Draws and saves the label map of one image; it appears under its name when it is whole."""
    try:
        labels = label_map(job["height"], job["width"], job["instances"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"annotations of {job.get('file_name')}: {error}") from error
    path = folder / label_name(job["file_name"])
    part = folder / f".{path.stem}.{os.getpid()}.part"
    part.write_bytes(cv2.imencode(".png", labels)[1].tobytes())
    os.replace(part, path)


def _labels(root: Path, split: str) -> Path:
    return root / "annotations" / split


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root", type=Path, metavar="ROOT", help="folder of COCO-Object, such as data/coco_object"
    )
    parser.add_argument("--split", default="val2017", help="val2017 (default) or train2017")
    parser.add_argument(
        "--nproc",
        type=_positive,
        default=os.cpu_count() or 1,
        help="processes (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="draw maps that exist already again")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
