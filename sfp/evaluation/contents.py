"""Hashes of a test set's files, so that results of different files are never mixed.

Reading tens of thousands of files takes a while, so hashes are cached as long as the size, modification
time, change time and inode of a file stay the same. Programs can restore the modification time
(`cp -p`, `rsync -t` and archives do) but cannot set the change time, so a file with new contents is
always noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sfp.data.images import orientation
from sfp.evaluation.scores import note
from sfp.files import atomic_write, cache_dir

TIFF = (b"II*\0", b"MM\0*")  # can have an orientation without EXIF
TAGGED = (b"Exif", b"eXIf", b"EXIF", b"Orientation")  # EXIF in JPEG, PNG and WebP; XMP
READERS = 16  # threads: network drives spend most of the time waiting
SETTLED = 2.0  # seconds after a change in which a coarse file clock may hide another change
LARGE = 2**30  # bytes to read above which the user gets a message


@dataclass(frozen=True)
class Content:
    """The SHA-256 of a file, and the orientation tag of a picture (1: upright)."""

    sha256: str
    orientation: int = 1


def contents(paths: Sequence[str]) -> list[Content]:
    """The contents of many files, read or cached.

    Raises:
        OSError: if one cannot be read.
    """
    if not paths:
        return []
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    memory = cache_dir("contents", f"{hashlib.sha256(root.encode()).hexdigest()[:32]}.json")
    known = _recall(memory)
    with ThreadPoolExecutor(READERS) as threads:
        states = list(threads.map(_state, paths))
        unread = {
            path: state
            for path, state in zip(paths, states, strict=True)
            if known.get(path, [None])[0] != state
        }
        if (size := sum(state[0] for state in unread.values())) > LARGE:
            note(f"hashing {len(unread)} files of {root} ({size / 2**30:.1f} GiB)")
        read = dict(zip(unread, threads.map(_read, unread), strict=True))
    now = time.time_ns()
    found = [read.get(path) or Content(*known[path][1:]) for path in paths]
    settled = {
        path: [state, read[path].sha256, read[path].orientation]
        for path, state in unread.items()
        if now - max(state[1:3]) > SETTLED * 1e9 and _state(path) == state
    }
    if settled:
        _remember(memory, {**known, **settled})
    return found


def _state(path: str) -> list[int]:
    """Size, modification time, change time and inode."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read(path: str) -> Content:
    data = Path(path).read_bytes()
    return Content(hashlib.sha256(data).hexdigest(), _orientation(data))


def _orientation(data: bytes) -> int:
    """The orientation tag of a picture, 1 if it has none."""
    if not data.startswith(TIFF) and not any(mark in data for mark in TAGGED):
        return 1  # spares Pillow nearly all files
    try:
        with Image.open(io.BytesIO(data)) as image:
            return orientation(image)
    except Exception:  # damaged or not a picture: the loader raises later
        return 1


def _recall(memory: Path) -> dict[str, list]:
    try:
        found = json.loads(memory.read_text(encoding="utf-8"))
        return {path: row for path, row in found.items() if len(row) == 3}
    except (OSError, ValueError, AttributeError, TypeError):  # none yet, or damaged: read again
        return {}


def _remember(memory: Path, rows: dict[str, list]) -> None:
    try:
        with atomic_write(memory) as path:
            path.write_text(json.dumps(rows, separators=(",", ":")), encoding="utf-8")
    except OSError:
        pass  # the next run reads the files again
