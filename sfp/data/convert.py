"""Converts published labels of datasets into label maps, by jobs.

A job is a file to write and a function that returns its contents. Existing files are kept, a file
appears only when it is complete, and a failure does not stop the other jobs, so an interrupted or
failed conversion resumes when started again.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from sfp.data import ids
from sfp.data.benchmarks import BENCHMARKS, Benchmark, absent
from sfp.data.images import DataError, read_bytes, read_labels
from sfp.files import atomic_write

Labels = NDArray[np.integer]
WORKERS = min(os.cpu_count() or 1, 8)
IGNORED = 255
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """A file to write.

    Attributes:
        target: its path, a PNG or text file.
        make: returns labels (H, W) or text. Raises DataError if its source is invalid.
        source: the file it reads, if it has one of its own.
    """

    target: Path
    make: Callable[[], Labels | str]
    source: Path | None = None


def run(
    jobs: Sequence[Job], what: str, *, workers: int = WORKERS, force: bool = False
) -> tuple[int, int]:
    """Writes the files that do not exist yet.

    Args:
        jobs: the jobs.
        what: name of the progress bar, on stderr.
        workers: number of threads; NumPy and OpenCV release the interpreter's lock.
        force: whether to overwrite existing files.

    Returns:
        The numbers of files written and of files that already existed.

    Raises:
        FileNotFoundError: if sources are missing, before anything is written.
        DataError: if some could not be converted; all others are written.
    """
    missing = set(absent(job.target for job in jobs))
    todo = [job for job in jobs if force or str(job.target) in missing]
    sources = [job.source for job in todo if job.source is not None]
    if lost := absent(sources):
        raise FileNotFoundError(
            f"{what}: {len(lost)} of {len(sources)} files to convert are missing, the first is "
            f"{lost[0]}"
        )
    failures = [error for error in parallel(_make, todo, what, workers) if error]
    if failures:
        raise DataError(
            f"{what}: {len(failures)} of {len(todo)} files could not be converted (all others were); "
            f"the first: {failures[0]}"
        )
    return len(todo), len(jobs) - len(todo)


def _make(job: Job) -> str:
    """Runs a job; returns an error message, or "" if there is none."""
    try:
        content = job.make()
    except DataError as error:
        return str(error)
    if isinstance(content, str):
        data = content.encode()
    else:
        done, png = cv2.imencode(".png", np.ascontiguousarray(content))
        assert done, job.target
        data = png.tobytes()
    with atomic_write(job.target) as path:
        path.write_bytes(data)
    return ""


def parallel(fn: Callable[[T], R], items: Sequence[T], what: str, workers: int) -> Iterator[R]:
    """`map(fn, items)` in threads, in order, with a progress bar on stderr."""
    if not items:
        return
    with ThreadPoolExecutor(workers) as pool, closing(_cancelling(pool, fn, items)) as results:
        yield from track(results, what, total=len(items), console=Console(stderr=True))


def _cancelling(
    pool: ThreadPoolExecutor, fn: Callable[[T], R], items: Iterable[T]
) -> Generator[R, None, None]:
    """`pool.map` that cancels the rest if iteration stops early, e.g. by Ctrl-C."""
    try:
        yield from pool.map(fn, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# -- jobs ----------------------------------------------------------------------------------------


def per_image(
    benchmark: Benchmark, root: Path, source: Path | str, convert: Callable[[Path], Labels]
) -> list[Job]:
    """Jobs for the label maps of a benchmark, each from the image's own source file.

    Args:
        benchmark: the benchmark.
        root: the data root.
        source: path with `{}` for the image's name, its path relative to the image folder without
            suffix.
        convert: from such a file to labels, (H, W).

    Raises:
        FileNotFoundError: if there are no images.
    """
    jobs = []
    for stem in benchmark.stems(root):
        path = Path(str(source).replace("{}", stem))
        jobs.append(Job(benchmark.paths(root, stem)[1], partial(convert, path), path))
    return jobs


def translate(path: Path, table: Mapping[int, int]) -> NDArray[np.uint8]:
    """Reads a label map and replaces its numbers.

    Args:
        path: image file with one number per pixel.
        table: new number for each number that may occur.

    Raises:
        DataError: if other numbers occur.
    """
    return _looked_up(read_labels(path), table, str(path)).astype(np.uint8)


def _looked_up(numbers: Labels, table: Mapping[int, int], name: str) -> NDArray[np.int32]:
    if numbers.ndim != 2 or not numbers.size or numbers.min() < 0:
        raise DataError(f"{name} has shape {numbers.shape}: expected one number per pixel")
    row = np.full(max(*table, int(numbers.max())) + 1, -1, np.int32)
    row[list(table)] = list(table.values())
    result = row[numbers]
    if (wrong := numbers[result < 0]).size:
        raise DataError(
            f"{name}: {int((wrong == wrong[0]).sum())} pixels have the number {int(wrong[0])}, which "
            f"this dataset does not use ({min(table)} to {max(table)}); is it from another dataset?"
        )
    return result


def stuff_labels(path: Path) -> NDArray[np.uint8]:
    """A map of stuffthingmaps as labels of 171 classes, 255 where unlabelled."""
    table = {pixel: label for label, pixel in enumerate(ids.COCO_STUFF_PIXELS)}
    return translate(path, table | {IGNORED: IGNORED})


def coarse_labels(path: Path) -> NDArray[np.uint8]:
    """A label map of COCO-Stuff's 171 classes as labels of its 27 supercategories."""
    coarse = {
        member: label for label, group in enumerate(ids.COCO_COARSE.values()) for member in group
    }
    fine = BENCHMARKS["coco_stuff164k"].class_names
    return translate(path, {k: coarse[name] for k, name in enumerate(fine)} | {IGNORED: IGNORED})


def cityscapes_labels(path: Path, classes: Sequence[str]) -> NDArray[np.uint8]:
    """A _labelIds map of Cityscapes as labels of some of its classes, 255 elsewhere.

    Args:
        path: path of the map.
        classes: names of these classes, in label order.
    """
    table = dict.fromkeys(range(ids.CITYSCAPES_FIRST), IGNORED)
    for number, name in enumerate(ids.CITYSCAPES_27, start=ids.CITYSCAPES_FIRST):
        table[number] = classes.index(name) if name in classes else IGNORED
    return translate(path, table)


# -- Pascal Context and the full ADE20K ----------------------------------------------------------


def read_names(path: Path, *, count: int, consecutive: bool = True) -> dict[int, str]:
    """Reads a list of classes with lines "<number>: <name>", like Pascal Context's labels.txt.

    Args:
        path: path of the list; a number 0 is skipped.
        count: expected number of classes.
        consecutive: whether numbers must be 1, 2, 3, ...

    Returns:
        The name of each number, in the order of the file.

    Raises:
        DataError: if the list does not have this form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error})") from None
    names: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\S.*?)\s*", line)
        if not match:
            raise DataError(f"{path}, line {number}: expected '<number>: <name>', found {line!r}")
        key, name = int(match[1]), match[2]
        if key == 0:
            continue
        if key in names or name in names.values():
            raise DataError(f"{path}, line {number}: {line!r} repeats an earlier number or name")
        names[key] = name
    if len(names) != count or (consecutive and list(names) != list(range(1, count + 1))):
        raise DataError(
            f"{path} has {len(names)} classes, expected {count}"
            + ", numbered from 1 without gaps" * consecutive
        )
    return names


def class_file(names: Iterable[str]) -> str:
    """Names as a class file, without synonyms that a class repeats."""
    lines = (", ".join(dict.fromkeys(name.split(", "))) for name in names)
    return "".join(f"{line}\n" for line in lines)


def context_map(path: Path) -> Labels:
    """The LabelMap of a .mat file of Pascal Context: (H, W), 1 to 459 and 0 for unlabelled."""
    from scipy.io import loadmat

    data = read_bytes(path)
    try:
        labels = loadmat(io.BytesIO(data))["LabelMap"].astype(np.int32)  # stored as floats
    except Exception as error:  # damaged files raise many kinds of errors
        raise DataError(
            f"{path}: cannot read its LabelMap ({type(error).__name__}: {error}); download it again"
        ) from error
    return labels


def context_all(path: Path) -> NDArray[np.uint16]:
    """All 459 classes as 1 to 459, 0 where unlabelled."""
    table = {number: number for number in range(460)}
    return _looked_up(context_map(path), table, str(path)).astype(np.uint16)


def context_frequent(path: Path) -> NDArray[np.uint8]:
    """The 59 frequent classes as 1 to 59, 0 for everything else."""
    table = dict.fromkeys(range(460), 0)
    table |= {number: label for label, number in enumerate(ids.CONTEXT_59, start=1)}
    return _looked_up(context_map(path), table, str(path)).astype(np.uint8)


def check_context_names(path: Path) -> None:
    """Checks that labels.txt has the 59 classes at the known numbers.

    Raises:
        DataError: if it does not.
    """
    number = {name: key for key, name in read_names(path, count=459).items()}
    for name, known in zip(BENCHMARKS["context59"].class_names, ids.CONTEXT_59, strict=True):
        if number.get(name, known) != known:
            raise DataError(
                f"{path}: {name!r} has the number {number[name]}, expected {known}: this is not the "
                "supported release of Pascal Context"
            )


def ade_objects(path: Path, labels: Mapping[int, int]) -> NDArray[np.uint16]:
    """The whole objects in a _seg.png of the full ADE20K.

    An object's number is 256 times the tens of red, plus green (ADE20K's development kit).

    Args:
        path: path of the file.
        labels: label of each object's number; others become 0.

    Raises:
        DataError: if it is not such a file.
    """
    pixels = read_labels(path)
    if pixels.ndim != 3 or pixels.shape[2] < 3:
        raise DataError(f"{path} has shape {pixels.shape}: expected the RGB image of an ADE20K map")
    row = np.zeros(max(26 * 256, *labels) + 1, np.uint16)
    row[list(labels)] = list(labels.values())
    return row[pixels[..., 0] // 10 * np.uint16(256) + pixels[..., 1]]
