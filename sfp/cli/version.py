"""`sfp version`: which versions of what are at work."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata

from sfp.version import __version__

LIBRARIES = ("torch", "onedl-mmsegmentation", "onedl-mmengine", "onedl-mmcv", "numpy")


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "version",
        help="versions of sfp, Python and the libraries, and the GPU, for a bug report",
        description="Prints versions of sfp, Python and the libraries, and which GPU there is.",
    )
    parser.set_defaults(run=run)


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
