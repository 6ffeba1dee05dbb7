"""Per-image confusion counts, written to disk during an evaluation so that it can be resumed.

A journal is a folder. Each process of each run appends to its own file, one line per image, and no file
is modified after its process has ended, so nothing has to be repaired, merged or locked. A line is a
checksum and a JSON record; a truncated or damaged line fails its checksum, and its image is evaluated
again. The first line of a file identifies the evaluation by a fingerprint of everything that determines
the results; files of other evaluations are ignored.

A record is passed to the operating system in a single write before the next image starts. `kill -9`
therefore loses only the images of the current batch, and only a crash of the machine can lose more.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfp.evaluation.scores import IGNORED


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-serialisable settings, independent of the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def count(predicted: Tensor, truth: Tensor, classes: int, ignored: int) -> Tensor:
    """The non-zero entries of an image's confusion matrix, (3, n) int64: truth, prediction, pixels.

    All scores can be computed from these; an image has only tens of them, whatever the number of
    classes. Ignored pixels, if there are any, are the last entry, with `IGNORED` as both labels.

    Args:
        predicted: labels, of any shape.
        truth: labels of the same shape.
        classes: K; labels are 0..K-1.
        ignored: label of ignored pixels in the truth.

    Raises:
        ValueError: if shapes differ, or a label that is not ignored is not one of the classes.
    """
    if predicted.shape != truth.shape:
        raise ValueError(
            f"prediction {tuple(predicted.shape)} and ground truth {tuple(truth.shape)} differ in "
            "size: the label file does not belong to the image"
        )
    counted = truth != ignored
    predicted, truth = predicted[counted].long(), truth[counted].long()
    for what, labels in (("prediction", predicted), ("ground truth", truth)):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"{what} has labels {int(labels.min())}..{int(labels.max())}, expected 0.."
                f"{classes - 1} (and {ignored}, ignored): the labels use another class list"
            )
    # cells only for classes that occur: the square of thousands of classes would not fit
    (used,) = torch.cat([truth, predicted]).bincount(minlength=classes).nonzero(as_tuple=True)
    number = used.new_zeros(classes)
    number[used] = torch.arange(len(used), device=used.device)
    cells = (number[truth] * len(used) + number[predicted]).bincount()
    (places,) = cells.nonzero(as_tuple=True)
    rows, columns = used[places // len(used)], used[places % len(used)]
    entries = torch.stack([rows, columns, cells[places]]).cpu()
    if rest := counted.numel() - len(truth):
        entries = torch.cat([entries, torch.tensor([[IGNORED], [IGNORED], [rest]])], dim=1)
    return entries


@dataclass
class Journal:
    """The records of one evaluation.

    Attributes:
        folder: folder of the files.
        settings: everything that determines the results, in groups of JSON values.
        rank: number of this process.
        damaged: number of lines that failed their checksum in the last `read`.
        others: settings of other evaluations that the last `read` found.
    """

    folder: Path
    settings: Mapping[str, Any]
    rank: int = 0
    damaged: int = 0
    others: list[dict[str, Any]] = field(default_factory=list)
    _file: int | None = None

    def __post_init__(self) -> None:
        self.fingerprint = fingerprint(self.settings)

    def read(self) -> dict[str, Tensor]:
        """Image name -> its entries as in `count`, from all files of this evaluation."""
        self.damaged, self.others = 0, []
        records: dict[str, Tensor] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = self._lines(path)
            header = next(lines, None)
            if not header or "fingerprint" not in header:
                continue  # interrupted in its first write, or damaged: its evaluation is unknown
            if header["fingerprint"] != self.fingerprint:
                self.others.append(header.get("settings") or {})
                continue
            for record in lines:
                records[record["image"]] = torch.tensor(record["counts"], dtype=torch.int64).view(
                    3, -1
                )
        return records

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        for line in path.read_bytes().split(b"\n"):
            digest, _, body = line.partition(b" ")
            if body and digest == _checksum(body):
                yield json.loads(body)
            elif line:
                self.damaged += 1

    def append(self, image: str, counts: Tensor) -> None:
        """Adds an image; the record is written when this returns.

        Raises:
            OSError: if the disk is full or the folder is not writable.
        """
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{self.fingerprint[:12]}.{time.time_ns()}.{self.rank}.jsonl"
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
            self._file = os.open(self.folder / name, flags, 0o666)
            self._write(dict(fingerprint=self.fingerprint, settings=self.settings))
        self._write(dict(image=image, counts=counts.tolist()))

    def _write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None
        body = json.dumps(record, separators=(",", ":")).encode()
        line = _checksum(body) + b" " + body + b"\n"
        if os.write(self._file, line) != len(line):
            raise OSError(f"could not write to the journal in {self.folder}: is the disk full?")

    def clear(self) -> None:
        """Removes the files of this evaluation only."""
        for path in self.folder.glob(f"{self.fingerprint[:12]}.*.jsonl"):
            path.unlink()

    def close(self) -> None:
        """Closes this process's file; a later `append` starts another one."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _checksum(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=8).hexdigest().encode()
