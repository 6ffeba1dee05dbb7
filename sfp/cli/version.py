"""`sfp version`: which versions of what are at work."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from sfp.cli.options import add_command
from sfp.version import __version__

TEXT = """\
Prints the versions of sfp, Python and the libraries that numbers depend on, and which GPU there is.

Example:
    sfp version
"""
LIBRARIES = ("torch", "onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv", "numpy")


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    add_command(commands, "version", run, help="print all versions, for a bug report", text=TEXT)


def run(args: argparse.Namespace) -> int:
    """Prints them."""
    import torch

    print(f"sfp {__version__}")
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in LIBRARIES:
        print(f"{name} {metadata.version(name)}")
    cuda = torch.cuda.is_available()
    print(f"GPU: {torch.cuda.get_device_name() if cuda else 'none'}")
    return 0
