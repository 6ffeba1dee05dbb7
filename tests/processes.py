"""Forked processes for tests, since importing in new ones would take longer than the tests."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

NEW_MOUNTS = 0x20000  # CLONE_NEWNS
CAPABILITIES = 0x20080522  # _LINUX_CAPABILITY_VERSION_3


def forked(work: Callable, *arguments) -> int | None:
    """Runs `work(*arguments)` in a forked process; its exit code, which is what `work` returns."""

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP threads do not survive a fork
        raise SystemExit(work(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


def killed(work: Callable, *arguments, at: str, call: int, before: Callable = lambda *_: None):
    """As `forked`, but SIGKILL ends the process instead of a call of `os.<at>`, counted from 1.

    A kill from outside would come at a moment that depends on how busy the machine is.

    Args:
        before: is called first, with the function and the arguments that it was called with.
    """
    real, calls = getattr(os, at), itertools.count(1)

    def deadly(*given, **named):
        if next(calls) == call:
            before(real, *given)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)

    def run() -> int:
        setattr(os, at, deadly)
        return work(*arguments)

    assert forked(run) == -signal.SIGKILL


def drop_privileges() -> None:
    """From here on root, too, may open only what its permissions say."""
    if not os.geteuid():
        header, none = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0


def own_mounts() -> bool:
    """Whether this process may mount, and from here on does so unseen by others."""
    private = ["mount", "--make-rprivate", "/"]
    return (
        ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
        and subprocess.run(private, capture_output=True, check=False).returncode == 0
    )


def mount(folder: Path | str, options: str) -> bool:
    """A small disk of its own at `folder`, if mounting is permitted here."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """As `mount`, for a while; skips where it is not permitted."""
    folder.mkdir(exist_ok=True)
    if not mount(folder, options):
        pytest.skip("mounting is not permitted here")
    try:
        yield folder
    finally:
        ctypes.CDLL(None).sync()
        subprocess.run(["umount", "-l", str(folder)], check=True)
