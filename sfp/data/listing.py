"""Finds the images in folders, lists and archives, and names their results.

* Folders are searched recursively, including links. A folder reached by several links, or one that
  contains itself, is searched once. Hidden files and folders are skipped: they are usually incomplete
  files, thumbnails or metadata.
* Lists are text files (`.txt`) with one path per line, relative to the list; blank lines and lines that
  start with "#" are skipped.
* Archives are `.zip` and `.tar`, also compressed by gzip, bzip2 or xz; their images are read one by one
  from the file. Archives inside archives are not opened.

Suffixes may be in upper or lower case. A warning lists the files that are skipped.
"""

from __future__ import annotations

import os
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from sfp.data.images import MAX_BYTES

IMAGES = re.compile(
    r"\.(jpe?g|jpe|jfif|png|bmp|dib|gif|webp|tiff?|p[bgpn]m)$", re.IGNORECASE
)  # formats of `read_image`
ARCHIVES = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
LIST = ".txt"
_DAMAGE = (  # archives that are damaged, encrypted, or packed by a rare method
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
)


@dataclass(frozen=True)
class Unit:
    """A file to process, an image or an archive, and its name: a relative path without suffix."""

    path: str
    name: str

    @property
    def is_archive(self) -> bool:
        """Whether it is an archive, which may hold many images."""
        return bool(ARCHIVES.search(self.path))


@dataclass(frozen=True)
class Item:
    """An image: its name, and its bytes or its path."""

    name: str
    path: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """The outcome for an image: "done", "skipped" (already done) or "failed", with the reason."""

    name: str
    status: str
    error: str = ""


def list_units(inputs: Sequence[str | os.PathLike[str]]) -> list[Unit]:
    """The files in folders (searched), lists (.txt), archives and single images.

    Names keep the folders inside an input folder, or relative to a list. A file that appears twice with
    the same name is used once. Other files in folders cause a warning.

    Raises:
        FileNotFoundError: if an input does not exist or has no images.
        ValueError: if a list is not text, or two files would be written to the same label map.
    """
    if isinstance(inputs, (str, os.PathLike)):
        raise ValueError(f"inputs={str(inputs)!r}: expected a list of paths")
    units = list(dict.fromkeys(unit for entry in inputs for unit in _units(Path(entry))))
    _check_names(units)
    return units


def _check_names(units: Sequence[Unit]) -> None:
    """Raises a ValueError if two images would have one name."""
    taken: dict[tuple[str, bool], str] = {}
    for unit in units:
        first = taken.setdefault((unit.name, unit.is_archive), unit.path)
        if first != unit.path:
            raise ValueError(
                f"{first} and {unit.path} would both be written to {unit.name}"
                f"{'/' if unit.is_archive else '.png'}: rename one, or process the folders separately"
            )
    archives = {name: path for (name, is_archive), path in taken.items() if is_archive}
    for unit in units if archives else ():
        for parent in map(str, PurePosixPath(unit.name).parents):
            if parent in archives:
                raise ValueError(
                    f"{unit.path} would be written among the images of {archives[parent]}, as "
                    f"{unit.name}: rename one, or process them separately"
                )


def _units(path: Path) -> list[Unit]:
    """The files of one input."""
    if path.is_dir():
        units = _in_folder(path)
        if not units:
            raise FileNotFoundError(
                f"no image or archive in {path}: expected files with the suffixes of JPEG, PNG, BMP, "
                "GIF, TIFF, WebP, PPM, zip or tar"
            )
        return units
    if not path.is_file():
        broken = ", a broken link," if path.is_symlink() else ""
        raise FileNotFoundError(
            f"{path}{broken} does not exist: give a folder, a list, an archive or an image"
        )
    if path.suffix.lower() == LIST:
        return _in_list(path)
    return [Unit(str(path), _stem(path.name))]


def _stem(name: str) -> str:
    """A path without the suffix of an image or archive; other dots are kept."""
    return (ARCHIVES if ARCHIVES.search(name) else IMAGES).sub("", name)


# -- folders -------------------------------------------------------------------------------------


def _in_folder(root: Path) -> list[Unit]:
    """Images and archives in a folder, recursively, sorted; warns about everything else."""
    found: list[Path] = []
    others: Counter[str] = Counter()
    hidden: list[Path] = []
    again: list[Path] = []
    unreadable: list[str] = []
    seen: set[tuple[int, int]] = set()
    # folders before links to folders, so that names do not depend on links
    waiting = [root]
    while waiting:
        start, links = waiting.pop(0), []
        if not _first_visit(start, seen):
            again.append(start)
            continue
        for folder, folders, files in os.walk(start, onerror=lambda e: unreadable.append(str(e))):
            for name in sorted(folders):
                path = Path(folder, name)
                if name.startswith("."):
                    hidden.append(path)
                elif path.is_symlink():
                    links.append(path)
                elif _first_visit(path, seen):
                    continue  # os.walk visits it
                else:
                    again.append(path)
                folders.remove(name)
            for name in files:
                path = Path(folder, name)
                if name.startswith("."):
                    hidden.append(path)
                elif IMAGES.search(name) or ARCHIVES.search(name):
                    found.append(path)
                else:
                    others[path.suffix.lower() or "no ending"] += 1
        waiting += links
    _say_what_is_left_out(root, others, hidden, again, unreadable)
    return [Unit(str(p), _stem(p.relative_to(root).as_posix())) for p in sorted(found)]


def _first_visit(folder: Path, seen: set[tuple[int, int]]) -> bool:
    try:
        status = folder.stat()
    except OSError:
        return True  # the error is raised where it is listed
    key = (status.st_dev, status.st_ino)
    new = key not in seen
    seen.add(key)
    return new


def _say_what_is_left_out(
    root: Path,
    others: Counter[str],
    hidden: Sequence[Path],
    again: Sequence[Path],
    unreadable: Sequence[str],
) -> None:
    parts = [f"cannot be read: {each}" for each in unreadable]
    if hidden:
        parts.append(f"hidden: {_some(hidden)}")
    if again:
        parts.append(f"folders already searched under another name: {_some(again)}")
    if others:
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(8))
        parts.append(f"other files: {kinds}")
    if parts:
        warnings.warn(f"{root}: skipped: {'; '.join(parts)}", stacklevel=5)


def _some(paths: Sequence[Path], most: int = 3) -> str:
    shown = ", ".join(map(str, paths[:most]))
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")


# -- lists ---------------------------------------------------------------------------------------


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file in UTF-8, or UTF-16 with a byte-order mark; line ends become line feeds.

    Bytes that are not UTF-8 become surrogates, as in Python's file names.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not text.
    """
    data = Path(path).read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            text = data.decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-16 text ({error}): save it as UTF-8") from None
        warnings.warn(f"{path} is read as UTF-16; most tools expect UTF-8", stacklevel=3)
    else:
        text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(f"{path} is not UTF-8 text, it has null bytes: save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _in_list(path: Path) -> list[Unit]:
    """The files in a list; those that do not exist fail when they are read."""
    units = []
    for number, raw in enumerate(read_text(path).split("\n"), 1):
        line = raw.strip()
        file = Path(os.path.normpath(path.parent / line))
        if not line or (line.startswith("#") and not file.exists()):
            continue
        # a file name may contain bytes that are not UTF-8 if such a file exists
        if any("\ud800" <= letter <= "\udfff" for letter in line) and not os.path.lexists(file):
            raise ValueError(
                f"{path}, line {number}: {line!a} is not UTF-8 text, and there is no such file; "
                "save the list as UTF-8"
            )
        name = _below(file, path.parent)
        if file.is_dir():
            inside = [
                Unit(unit.path, (name / unit.name).as_posix().lstrip("/"))
                for unit in _in_folder(file)
            ]
            if not inside:
                raise FileNotFoundError(f"{path}, line {number}: no image or archive in {file}")
            units += inside
        else:
            units.append(Unit(str(file), _stem(name.as_posix())))
    if not units:
        raise FileNotFoundError(f"{path} lists no files: expected one path per line")
    return units


def _below(path: Path, root: Path) -> Path:
    """A path relative to `root` if it is inside, else relative to the file system's root."""
    path, root = path.absolute(), Path(os.path.normpath(root.absolute()))
    return path.relative_to(root if path.is_relative_to(root) else path.anchor)


# -- archives ------------------------------------------------------------------------------------


def items(unit: Unit, done: Callable[[str], bool]) -> Iterator[Item | Outcome]:  # noqa: C901 - a list of reasons
    """The images of a unit; outcomes for images that are done or cannot be read.

    Tar files are read as a stream. Archives and links inside archives are outcomes too; hidden files
    cause a warning.

    Args:
        unit: an image or an archive.
        done: whether the image with a name is already done.
    """
    if not unit.is_archive:
        yield (
            Outcome(unit.name, "skipped") if done(unit.name) else Item(unit.name, path=unit.path)
        )
        return
    seen: set[str] = set()
    hidden = []
    try:
        for member, size, read in _members(Path(unit.path)):
            place = PurePosixPath(member)
            is_image = IMAGES.search(place.name) is not None
            if not (is_image or ARCHIVES.search(place.name)):
                continue
            if any(part.startswith(".") and part != ".." for part in place.parts):
                hidden.append(Path(member))
                continue
            name = f"{unit.name}/{_stem(str(place))}"
            where = f"{unit.path}, {member}"
            if place.is_absolute() or ".." in place.parts:
                yield Outcome(
                    f"{unit.name}/{place}", "failed", f"{where}: its path leaves the archive"
                )
            elif not is_image:
                yield Outcome(name, "failed", f"{where}: an archive in an archive is not opened")
            elif name in seen:
                yield Outcome(name, "failed", f"{unit.path} has two images of this name")
            elif done(name):
                yield Outcome(name, "skipped")
            elif read is None:
                yield Outcome(name, "failed", f"{where}: a link; pack the files themselves")
            elif size > MAX_BYTES:
                yield Outcome(name, "failed", f"{where}: {size} bytes, more than {MAX_BYTES}")
            else:
                try:
                    item = Item(name, data=read())
                except _DAMAGE as error:  # the others may be intact
                    yield Outcome(name, "failed", f"{where}: {error}")
                else:
                    yield item
            seen.add(name)
    except _DAMAGE as error:
        yield Outcome(unit.name, "failed", f"{unit.path}: {error}; the rest of it is skipped")
    if hidden:
        warnings.warn(f"{unit.path}: skipped: hidden: {_some(hidden)}", stacklevel=2)


def _members(path: Path) -> Iterator[tuple[str, int, Callable[[], bytes] | None]]:
    """Name, size and reader of each file in an archive; links have no reader."""
    if path.suffix.lower() == ".zip":
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(archive.read, info)
        return
    with tarfile.open(path, "r|*") as shard:
        for member in shard:
            if member.isfile():
                stream = shard.extractfile(member)
                yield member.name, member.size, stream.read if stream else None
            elif member.islnk() or member.issym():
                yield member.name, 0, None
        # tarfile takes an incomplete header for the end, which is a block of zeros
        assert shard.fileobj is not None
        if shard.fileobj.tell() < shard.offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("unexpected end of data")
