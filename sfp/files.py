"""Where downloaded, generated and computed files live, and how they get there whole."""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """`$SFP_CACHE` or ~/.cache/sfp, and a folder inside it; not created.

    Where there is no home folder, or nothing can be made in it (containers with an arbitrary user id),
    a folder of this user's under the system's temporary one.
    """
    if root := os.environ.get("SFP_CACHE"):
        return Path(root, *parts)
    home = home_dir()
    if home and _usable(home / ".cache" / "sfp"):
        return home.joinpath(".cache", "sfp", *parts)
    return _temporary_cache().joinpath(*parts)


def home_dir() -> Path | None:
    """The user's home folder, or None if there is none."""
    home = os.path.expanduser("~")  # stays "~" where neither $HOME nor a user name is known
    return Path(home) if os.path.isabs(home) and os.path.isdir(home) else None


def _usable(folder: Path) -> bool:
    """Whether a folder is there, if only to be read, or can be made."""
    if os.path.isdir(folder):
        return True
    there = next(parent for parent in folder.parents if os.path.isdir(parent))
    return os.access(there, os.W_OK | os.X_OK)


@functools.cache
def _temporary_cache() -> Path:
    """A folder that nobody else can write to; a new one if another user has taken its name."""
    user = os.getuid() if hasattr(os, "getuid") else "cache"
    folder = Path(tempfile.gettempdir(), f"sfp-{user}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # no link: where it leads, another user decides
        ours = stat.S_ISDIR(found.st_mode) and found.st_uid == user
        if ours and not found.st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="sfp-"))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a short name: beside one of 255 bytes there is no room for a longer one
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{path.suffix}")
    # not mkstemp, whose mode 0600 would shut other users of a cache out: here the umask decides
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = temporary.stat().st_mode & 0o777
    try:
        yield temporary
        os.chmod(
            temporary, mode
        )  # safetensors puts a file of its own, mode 0600, in the place of this
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
