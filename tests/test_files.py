"""The cache folder and atomic writes, for any working directory and user."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from sfp import files
from sfp.files import atomic_write, cache_dir, home_dir, read_once


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user id without a name, no $HOME and no $SFP_CACHE; a temporary folder of its own."""
    for name in ("HOME", "SFP_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files._temporary_cache.cache_clear()
    yield tmp_path
    files._temporary_cache.cache_clear()


def test_no_home_and_no_name(nobody):
    assert home_dir() is None
    folder = cache_dir("weights")
    assert folder == nobody / f"sfp-{os.getuid()}" / "weights"
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    files._temporary_cache.cache_clear()
    assert cache_dir("weights") == folder  # the next process finds it again


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def link(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("trap", [open_to_all, link, Path.touch])
def test_a_name_that_another_user_has_taken(nobody, trap):
    taken = nobody / f"sfp-{os.getuid()}"
    trap(taken)
    folder = cache_dir()
    assert folder != taken
    assert folder == cache_dir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_folder_of_another_user(nobody, monkeypatch):
    (nobody / "sfp-12345").mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    if (nobody / "sfp-12345").stat().st_uid != 12345:
        assert cache_dir() != nobody / "sfp-12345"


@pytest.mark.parametrize("home", ["missing", "relative", ""])
def test_a_home_that_is_none(tmp_path, monkeypatch, home):
    monkeypatch.delenv("SFP_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "relative").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / home) if home == "missing" else home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(str(tmp_path)))
    files._temporary_cache.cache_clear()
    try:
        assert cache_dir() == tmp_path / f"sfp-{os.getuid()}"
    finally:
        files._temporary_cache.cache_clear()


def test_a_home_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SFP_CACHE", raising=False)
    assert cache_dir("text") == tmp_path / ".cache" / "sfp" / "text"
    assert not (tmp_path / ".cache").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / ".cache" / "sfp").mkdir(parents=True)
    assert cache_dir() == tmp_path / ".cache" / "sfp"  # to be read, though nothing can be written
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "elsewhere"))
    assert cache_dir("text") == tmp_path / "elsewhere" / "text"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_of_the_moment_decides(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "a.txt") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~mask


def test_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / ("n" * 251 + ".txt")  # 255 bytes, the longest there is
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".part"
        assert not path.exists()
        temporary.write_text("first")

    def fail() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("second")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_named(tmp_path):
    """Not the temporary file, of which a user knows nothing."""
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()

    def write(path: Path, error: Exception | None = None) -> None:
        with atomic_write(path):
            if error:
                raise error

    full = OSError(errno.ENOSPC, "No space left on device")
    other = FileNotFoundError(errno.ENOENT, "No such file", "elsewhere")
    for path, error, message in (
        ("file/deep/a.txt", None, r"cannot be written \(Not a directory\): .*/file/deep/a\.txt'"),
        ("folder", None, r"cannot be written \(Is a directory\): .*/folder'"),
        ("a.txt", full, r"cannot be written \(No space left on device\): .*/a\.txt'"),
        ("a.txt", other, r"No such file: 'elsewhere'"),
    ):
        with pytest.raises(OSError, match=message):
            write(tmp_path / path, error)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_is_read_once_until_it_changes(tmp_path, replaced):
    """Also if size and modification time stay the same, as after cp -p or rsync -t."""
    path, reads = tmp_path / "a", []

    @read_once(2)
    def read(path: str, more: int) -> str:
        reads.append(path)
        return Path(path).read_text() + str(more)

    path.write_text("old")
    assert [read(str(path), 1), read(str(path), 1), read(str(path), 2)] == ["old1", "old1", "old2"]
    assert len(reads) == 2
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # ticks every few milliseconds
        other = tmp_path / "b" if replaced else path
        other.write_text("new")
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert read(str(path), 1) == "new1"
