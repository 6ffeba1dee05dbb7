"""Where downloaded, generated and computed files live, and how they get there whole."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UMASK = os.umask(0)  # asking sets it: once, before there are threads, which share it
os.umask(UMASK)


def cache_dir(*parts: str) -> Path:
    """`$SFP_CACHE` or ~/.cache/sfp, and a folder inside it; not created."""
    root = os.environ.get("SFP_CACHE") or Path.home() / ".cache" / "sfp"
    return Path(root, *parts)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~UMASK)  # mkstemp's 0600 would shut other users of a cache out
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def sha256_file(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
