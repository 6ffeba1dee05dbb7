"""Forked processes for tests, since importing in new ones would take longer than the tests."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import subprocess
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

NEW_MOUNTS = 0x20000  # CLONE_NEWNS


def started(work: Callable, *arguments) -> BaseProcess:
    """`work(*arguments)` in a forked process that runs by now; its exit code is what `work` returns."""

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP threads do not survive a fork
        raise SystemExit(work(*arguments))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def forked(work: Callable, *arguments) -> int | None:
    """The exit code of `started`, after its end."""
    process = started(work, *arguments)
    process.join()
    return process.exitcode


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
