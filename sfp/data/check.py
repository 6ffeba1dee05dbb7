"""Checks a dataset: reads every image and label map and reports every problem.

The rules are those of an evaluation (`datasets.LocalFiles`), which stops at the first problem; here all
are collected. A manifest, with hashes of a sample of the files, tells whether two machines have the
same data. It hashes the bytes of images but the values of label maps, since equal label maps may be
compressed differently.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sfp.data.benchmarks import Benchmark, absent
from sfp.data.convert import WORKERS, parallel
from sfp.data.datasets import FILES, LabelSizeError, LabelValueError, LocalFiles, image_name
from sfp.data.images import DataError, read_labels
from sfp.evaluation.journal import fingerprint
from sfp.files import atomic_write, sha256_file

SAMPLE = 100  # number of images in a manifest


@dataclass
class Report:
    """The result of a check.

    Attributes:
        images: number of images in the list or folder.
        occurring: number of classes that occur in the label maps.
        ignored: share of ignored pixels.
        problems: by kind, one line for each file affected.
    """

    images: int
    occurring: int = 0
    ignored: float = 0.0
    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def check(benchmark: Benchmark, root: Path, *, workers: int = WORKERS) -> Report:
    """Reads every file of a dataset.

    Args:
        benchmark: the benchmark.
        root: the data root.
        workers: number of threads.

    Raises:
        FileNotFoundError: if there are no images at all, or the list or class names are missing.
    """
    dataset = benchmark.build(root)
    records = dataset.records()
    report = Report(len(records))
    problems = report.problems
    classes = len(dataset.metainfo["classes"])
    expected = " or ".join(map(str, benchmark.images))
    if len(records) not in benchmark.images:
        problems["number of images"].append(f"{len(records)}, expected {expected}")
    if classes != benchmark.classes:
        problems["number of classes"].append(f"{classes}, expected {benchmark.classes}")
    missing: set[str] = set()
    for key, what in FILES.items():
        lost = absent(record[key] for record in records)
        problems[f"{what} missing"] += lost
        missing |= set(lost)
    problems["label map without an image"] += _orphans(dataset, records)

    there = [r for r in records if missing.isdisjoint(r[key] for key in FILES)]
    pixels = np.zeros(classes, np.int64)
    total = 0
    look = partial(_look, dataset, classes)
    for found in parallel(look, there, f"checking {benchmark.title}", workers):
        if isinstance(found, DataError):
            problems[_kind(found)].append(str(found))
        else:
            pixels += found[:-1]
            total += int(found.sum())
    report.occurring = int((pixels > 0).sum())
    report.ignored = 1 - int(pixels.sum()) / max(total, 1)
    report.problems = {kind: lines for kind, lines in problems.items() if lines}
    return report


def _look(dataset: LocalFiles, classes: int, record: dict) -> np.ndarray | DataError:
    """Pixels of each class and, last, ignored pixels; or the problem."""
    try:
        labels = dataset.load(record)["data_samples"].gt_sem_seg.data.numpy()
    except DataError as error:
        return error
    return np.bincount(np.minimum(labels, classes).ravel(), minlength=classes + 1)


def _kind(error: DataError) -> str:
    if isinstance(error, LabelSizeError):
        return "label map of another size"
    return "label that is no class" if isinstance(error, LabelValueError) else "damaged file"


def _orphans(dataset: LocalFiles, records: list[dict]) -> list[str]:
    """Label maps without an image; if a list names the images, further label maps are fine."""
    if dataset.ann_file:
        return []
    known = {os.path.normpath(record["seg_map_path"]) for record in records}
    found = (
        os.path.join(folder, name)
        for folder, _, names in os.walk(dataset.data_prefix["seg_map_path"], followlinks=True)
        for name in names
        if name.endswith(dataset.seg_map_suffix) and not name.startswith(".")
    )
    return sorted(path for path in found if os.path.normpath(path) not in known)


def manifest(benchmark: Benchmark, root: Path, *, workers: int = WORKERS) -> dict[str, Any]:
    """Hashes of evenly spaced images and their label maps, and of the list of all images.

    Raises:
        FileNotFoundError: if files are missing.
        DataError: if a label map cannot be read.
    """
    dataset = benchmark.build(root)
    records = dataset.load_data_list()
    count = min(SAMPLE, len(records))
    chosen = [records[i * len(records) // count] for i in range(count)]
    files = [(key, record[key]) for record in chosen for key in FILES]
    hashes = list(parallel(_hash, files, f"hashing {benchmark.title}", workers))
    paths = [Path(os.path.relpath(path, root)).as_posix() for _, path in files]
    names = [image_name(dataset, record) + dataset.img_suffix for record in records]
    return dict(
        images=len(records),
        list_sha256=fingerprint(dict(images=names)),
        sha256=dict(zip(paths, hashes, strict=True)),
    )


def _hash(file: tuple[str, str]) -> str:
    key, path = file
    if key == "img_path":
        return sha256_file(path)
    labels = read_labels(path)
    return hashlib.sha256(f"{labels.shape}".encode() + labels.astype("<u4").tobytes()).hexdigest()


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a manifest, as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def compare(path: Path, ours: Mapping[str, Any]) -> list[str]:
    """The differences between a manifest and ours, one line each.

    Raises:
        FileNotFoundError: if there is no such file.
        DataError: if it is not a manifest.
    """
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        number, names, hashes = (theirs[key] for key in ("images", "list_sha256", "sha256"))
        hashes = dict(hashes)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a manifest ({type(error).__name__}: {error})") from None
    if names != ours["list_sha256"]:  # a different list has a different sample
        return [f"the list of images differs: {ours['images']} here, {number} in {path}"]
    return [name for name, digest in ours["sha256"].items() if hashes.get(name) != digest]
