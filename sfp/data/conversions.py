"""The conversions from each benchmark's published labels to label maps; needs no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sfp.data import convert
from sfp.data.benchmarks import (
    ADE_CLASSES,
    ADE_LIST,
    BENCHMARKS,
    CONTEXT_CLASSES,
    CONTEXT_LIST,
    Benchmark,
)
from sfp.data.coco_object import object_jobs
from sfp.data.convert import Job


@dataclass(frozen=True)
class Step:
    """A conversion.

    Attributes:
        what: what it writes.
        jobs: from the benchmark and the data root to the jobs.
    """

    what: str
    jobs: Callable[[Benchmark, Path], Sequence[Job]]


def _per_image(
    source: str, function: Callable[[Path], convert.Labels]
) -> Callable[[Benchmark, Path], list[Job]]:
    """One label map per image, from the file matching a pattern in the benchmark's folder."""
    return lambda benchmark, root: convert.per_image(
        benchmark, root, root / benchmark.folder / source, function
    )


def _context_list(benchmark: Benchmark, root: Path) -> list[Job]:
    folder = root / benchmark.folder
    source = folder / "ImageSets" / "Main" / "val.txt"
    return [Job(folder / CONTEXT_LIST, source.read_text, source)]


def _context_names(benchmark: Benchmark, root: Path) -> list[Job]:
    source = root / benchmark.folder / "labels.txt"

    def make() -> str:
        convert.check_context_names(source)
        return convert.class_file(convert.read_names(source, count=459).values())

    return [Job(root / benchmark.folder / CONTEXT_CLASSES, make, source)]


def _object_jobs(benchmark: Benchmark, root: Path) -> list[Job]:
    return object_jobs(root / benchmark.folder)


def _stuff_jobs(benchmark: Benchmark, root: Path) -> Sequence[Job]:
    """The maps of 171 classes, from which those of 27 are made."""
    return _STUFF.jobs(BENCHMARKS["coco_stuff164k"], root)


def _ade_names(path: Path) -> dict[int, str]:
    return convert.read_names(path, count=847, consecutive=False)


def _ade_classes(benchmark: Benchmark, root: Path) -> list[Job]:
    source = root / benchmark.folder / ADE_LIST
    return [
        Job(
            root / benchmark.folder / ADE_CLASSES,
            lambda: convert.class_file(_ade_names(source).values()),
            source,
        )
    ]


def _ade_labels(benchmark: Benchmark, root: Path) -> list[Job]:
    numbers = _ade_names(root / benchmark.folder / ADE_LIST)
    labels = {number: label for label, number in enumerate(numbers, start=1)}
    function = partial(convert.ade_objects, labels=labels)
    return _per_image("images/ADE/validation/{}_seg.png", function)(benchmark, root)


def _cityscapes_labels(benchmark: Benchmark, root: Path) -> list[Job]:
    function = partial(convert.cityscapes_labels, classes=benchmark.class_names)
    return _per_image("gtFine/val/{}_gtFine_labelIds.png", function)(benchmark, root)


_LIST = Step("list of images", _context_list)
_FREQUENT = _per_image("trainval/{}.mat", convert.context_frequent)
_STUFF = Step("maps of 171 classes", _per_image("annotations/val2017/{}.png", convert.stuff_labels))
STEPS: dict[str, tuple[Step, ...]] = {
    "context60": (_LIST, Step("maps of 60 classes", _FREQUENT)),
    "context59": (_LIST, Step("maps of 59 classes", _FREQUENT)),
    "context459": (
        _LIST,
        Step("459 class names", _context_names),
        Step("maps of 459 classes", _per_image("trainval/{}.mat", convert.context_all)),
    ),
    "coco_object": (Step("maps of 81 classes", _object_jobs),),
    "coco_stuff164k": (_STUFF,),
    "coco27": (
        Step("maps of 171 classes", _stuff_jobs),
        Step(
            "maps of 27 classes",
            _per_image("annotations/val2017/{}_labelTrainIds.png", convert.coarse_labels),
        ),
    ),
    "ade847": (Step("847 class names", _ade_classes), Step("maps of 847 classes", _ade_labels)),
    "city_scapes": (Step("maps of 19 classes", _cityscapes_labels),),
    "city_scapes27": (Step("maps of 27 classes", _cityscapes_labels),),
}
