"""`sfp version`: versions of sfp and of the libraries it uses."""

from __future__ import annotations

import argparse
import contextlib
import platform
from importlib import metadata

from sfp.cli.options import add_command
from sfp.version import __version__

TEXT = """\
Prints the versions of sfp, Python and the libraries that affect results, and the GPU if there is
one.

Example:
    sfp version
"""
LIBRARIES = (  # from each line the first that is installed
    ("torch",),
    ("onedl-mmsegmentation", "mmsegmentation"),
    ("onedl-mmengine", "mmengine"),
    ("onedl-mmcv", "mmcv", "mmcv-lite"),
    ("numpy",),
)


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    add_command(commands, "version", run, help="print versions, for bug reports", text=TEXT)


def run(args: argparse.Namespace) -> int:
    """Prints the versions."""
    import torch

    print(f"sfp {__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for names in LIBRARIES:
        print(_version(names))
    cuda = torch.cuda.is_available()
    print(f"GPU: {torch.cuda.get_device_name() if cuda else 'none'}")
    return 0


def _version(names: tuple[str, ...]) -> str:
    """The first of several distributions that is installed, with its version."""
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return f"{names[-1]}: not installed"
