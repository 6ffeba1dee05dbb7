"""Downloads checkpoints, continues broken downloads, and verifies files before renaming them."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sfp.clip.checkpoints.published import HUB_FILES, split_place
from sfp.clip.checkpoints.sources import is_index, weight_map
from sfp.files import sha256_file
from sfp.version import __version__

try:
    import fcntl
except ImportError:  # on Windows two processes may download the same file, and one of them fails
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30.0  # seconds without a byte, after which a connection counts as broken
BLOCK = 1 << 20
HUB = "https://huggingface.co"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space left


class HashError(OSError):
    """A downloaded file with the wrong hash."""


def fetch(url: str, path: Path, sha256: str, *, timeout: float = TIMEOUT) -> None:
    """Downloads a file with a progress bar on stderr, and renames it after its hash has been verified.

    Until then it is stored in `<path>.part`. Broken connections are resumed as long as each attempt
    adds to the file, and the next call continues where this one stopped. Other processes that need the
    same file wait for the first of them.

    Args:
        url: address of the file.
        path: where to store it; the folder is created.
        sha256: hash of the complete file.
        timeout: seconds without data until a connection counts as broken.

    Raises:
        HashError: if the hash is wrong even after a second attempt from the start; the file is removed.
        OSError: if it cannot be fetched or written; the part that was fetched is kept, unless the disk
            is full.
        http.client.HTTPException: if the server does not speak HTTP.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with _alone(part) as file:
        if path.is_file():  # another process fetched it while this one waited
            part.unlink()
            return
        try:
            continued = file.seek(0, os.SEEK_END) > 0
            _transfer(url, file, path.name, timeout)
            found = sha256_file(part)
            if found != sha256 and continued:  # the earlier part may be of another file
                file.truncate(0)
                _transfer(url, file, path.name, timeout)
                found = sha256_file(part)
        except (OSError, http.client.HTTPException) as error:
            if is_full(error) or not file.seek(0, os.SEEK_END):
                part.unlink()
            raise
        if found != sha256:
            part.unlink()
            raise HashError(f"{url} has the SHA-256 {found}, expected {sha256}")
        os.replace(part, path)


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[FileIO]:
    """The incomplete file, opened for this process only; others wait until it is closed."""
    while True:
        file = FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        with file:
            if fcntl:
                with contextlib.suppress(
                    OSError
                ):  # a file system without locks: the hash will tell
                    fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), part.stat())
            except FileNotFoundError:
                same = False
            if same:  # otherwise another process has renamed or removed it
                yield file
                return


def _transfer(url: str, file: FileIO, name: str, timeout: float) -> None:
    """Appends the rest of `file`; tries again as long as attempts make progress."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(name, total=None)
        while True:
            before = file.seek(0, os.SEEK_END)
            try:
                _attempt(url, file, timeout, bar, task)
                return
            except (OSError, http.client.HTTPException) as error:
                final = isinstance(error, urllib.error.HTTPError) or is_full(error)
                if final or file.seek(0, os.SEEK_END) <= before:
                    raise


def is_full(error: Exception) -> bool:
    """Whether an error means that there is no space left."""
    return isinstance(error, OSError) and error.errno in FULL


def _attempt(url: str, file: FileIO, timeout: float, bar: Progress, task: TaskID) -> None:
    """One connection; raises `ConnectionError` if it ends before the file does."""
    start = file.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"User-Agent": f"sfp/{__version__}"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if start and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is left to fetch: the hash decides
        raise
    with response:
        given = response.headers.get("Content-Range", "")
        if response.status != http.client.PARTIAL_CONTENT or not given.startswith(
            f"bytes {start}-"
        ):
            file.truncate(0)  # the server sends the whole file
            start = file.seek(0)
        length = response.headers.get("Content-Length")
        total = start + int(length) if length and length.isdigit() else None
        bar.update(task, completed=start, total=total)
        while block := response.read1(BLOCK):  # available data only: a timeout would lose a block
            _write(file, block)
            bar.advance(task, len(block))
    size = file.tell()
    if total is not None and size != total:
        raise ConnectionError(f"the connection ended after {size} of {total} bytes")


def _write(file: FileIO, block: bytes) -> None:
    """Writes a whole block: an unbuffered write may write only a part of it if the disk fills up."""
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]


def on_hub(place: str, names: Sequence[str] = HUB_FILES) -> Path | None:
    """A checkpoint in the local cache of the Hugging Face Hub, or None; arguments as in `from_hub`."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    repo, names = split_place(place, names)
    for name in names:
        path = try_to_load_from_cache(repo, name)
        if isinstance(path, str) and os.path.isfile(path):
            return Path(path)
    return None


def from_hub(place: str, names: Sequence[str] = HUB_FILES) -> Path:
    """Downloads a checkpoint from the Hugging Face Hub into the Hub's own cache.

    The Hub's library continues broken downloads, and supports mirrors (`HF_ENDPOINT`), tokens
    (`HF_TOKEN`) and `HF_HUB_OFFLINE`.

    Args:
        place: as in `Published.repo`.
        names: if `place` does not name a file, the first of these that exists is fetched; for an index,
            its shards as well.

    Raises:
        ImportError: if the package huggingface_hub is not installed.
        HashError: if the hash is not the one stated by the Hub; the file is removed.
        OSError: if it cannot be fetched.
    """
    repo, names = split_place(place, names)
    for name in names:
        if (path := _one_file(repo, name)) is None:
            continue
        for shard in sorted(set(weight_map(path).values())) if is_index(path) else []:
            if _one_file(repo, shard) is None:
                raise FileNotFoundError(f"{repo} has no {shard}, which its {name} lists")
        return path
    raise FileNotFoundError(f"{repo} has none of {', '.join(names)}")


def _check_network() -> None:
    """Raises an OSError if the Hub's name cannot be resolved, as on a machine without a network.

    The Hub's library would try again and again, for half a minute, before it says so.
    """
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", HUB)).hostname
    if host is None or urllib.request.getproxies() or os.environ.get("HF_HUB_OFFLINE"):
        return  # a proxy resolves names; offline, the library looks into its cache only
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise OSError(f"{host} cannot be found: {error.strerror}") from error


def companions(place: str, names: Sequence[str]) -> None:
    """Fetches small files that belong to a checkpoint, if they exist and can be fetched."""
    repo, _ = split_place(place)
    for name in names:
        with contextlib.suppress(
            OSError, ImportError
        ):  # missing files are reported when they are needed
            _one_file(repo, name)


def _one_file(repo: str, name: str) -> Path | None:
    """Downloads and verifies a file; None if the repository lacks it. Errors as in `from_hub`."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise ImportError(
            "the package huggingface_hub is missing: pip install 'sfp[hub]'"
        ) from error
    _check_network()
    try:
        path = Path(hf_hub_download(repo, name, endpoint=os.environ.get("HF_ENDPOINT")))
    except LocalEntryNotFoundError:  # no network: an OSError that says so
        raise
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise OSError(
            f"{repo} is gated: accept its terms at https://huggingface.co/{repo}, then log in "
            "(`hf auth login`, or HF_TOKEN=...)"
        ) from None
    except OSError:
        raise
    except Exception as error:  # its HTTP library's, which differs between versions
        raise OSError(f"{type(error).__name__}: {error}") from error
    expected = stated_hash(path)
    if expected and (found := sha256_file(path)) != expected:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HashError(f"{name} of {repo} has the SHA-256 {found}, the Hub states {expected}")
    return path


def stated_hash(path: Path) -> str | None:
    """The SHA-256 that the Hub states for a file in its cache: the name of the link's target."""
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else None
