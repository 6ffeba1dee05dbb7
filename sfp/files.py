"""The cache folder, atomic writing of files, and reading them once."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cache_dir(*parts: str) -> Path:
    """`$SFP_CACHE` or ~/.cache/sfp, or a folder inside it; not created.

    If there is no home folder or it is not writable (containers with an arbitrary user id), a folder of
    this user inside the system's temporary folder is used.
    """
    if root := os.environ.get("SFP_CACHE"):
        return Path(root, *parts)
    home = home_dir()
    if home and _usable(home / ".cache" / "sfp"):
        return home.joinpath(".cache", "sfp", *parts)
    return _temporary_cache().joinpath(*parts)


def home_dir() -> Path | None:
    """The user's home folder, or None if there is none."""
    home = os.path.expanduser("~")  # stays "~" if neither $HOME nor a user name is known
    return Path(home) if os.path.isabs(home) and os.path.isdir(home) else None


def _usable(folder: Path) -> bool:
    """Whether a folder exists, even if read-only, or can be created."""
    if os.path.isdir(folder):
        return True
    there = next(parent for parent in folder.parents if os.path.isdir(parent))
    return os.access(there, os.W_OK | os.X_OK)


@functools.cache
def _temporary_cache() -> Path:
    """A folder that only this user can write to; a new one if another user has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else "cache"
    folder = Path(tempfile.gettempdir(), f"sfp-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # does not follow links, which another user may have made
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user
        if ours and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="sfp-"))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    It ends with .part, whatever the suffix of `path` is: a process that is killed leaves it behind, and
    nobody who looks for *.png shall find half of a picture.

    Raises:
        OSError: if the file cannot be written; it names `path`, not the temporary file.
    """
    path = Path(path)
    # a short name, since that of `path` may have the maximal length of 255 bytes
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not mkstemp, whose mode 0600 would lock other users out of a cache: the umask applies
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except OSError as error:
        raise _about(path, error) from error
    try:
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        os.chmod(temporary, mode)  # because safetensors replaces this file with one of mode 0600
        os.replace(temporary, path)
    except OSError as error:
        # an error of writing has no file name (a full disk) or the temporary one
        if error.errno and error.filename in (None, str(temporary)):
            raise _about(path, error) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _about(path: Path, error: OSError) -> OSError:
    """The same error, about the file that the caller wants to write."""
    return OSError(error.errno, f"cannot be written ({error.strerror})", str(path))


def read_once(keep: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorates a function that reads a file, `(path, ...)`: its results are kept in memory.

    A file is read again if its size, modification time, change time or inode differ. The change time
    cannot be set, so a copy that keeps the times of another file (cp -p, rsync -t) is noticed too.

    Args:
        keep: number of results that are kept, the most recent ones.
    """

    def decorate(read: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize=keep)
        def known(path: str, state: tuple[int, ...], *rest: Any) -> T:
            return read(path, *rest)

        @functools.wraps(read)
        def reading(path: str, *rest: Any) -> T:
            at = os.stat(path)
            return known(path, (at.st_size, at.st_mtime_ns, at.st_ctime_ns, at.st_ino), *rest)

        return reading

    return decorate


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
