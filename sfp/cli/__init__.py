"""The command `sfp`: one module per subcommand, and one place that turns errors into exit codes.

Each module `sfp.cli.<command>` has a function `register(commands)`, which adds its parser and sets,
by `set_defaults(run=...)`, the function that takes the parsed arguments and returns an exit code.
That function does its own imports, so that help texts and lists do not wait for PyTorch. It raises
errors instead of printing them.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TextIO, cast

from sfp import _host
from sfp.plugins import import_modules
from sfp.version import __version__

COMMANDS = (  # in the order of the help
    "segment",
    "demo",
    "eval",
    "compare",
    "ablate",
    "audit",
    "label",
    "visualize",
    "plant",
    "fit",
    "hubs",
    "export",
    "data",
    "methods",
    "weights",
    "completion",
    "version",
)

DESCRIPTION = "Training-free open-vocabulary segmentation with frozen CLIP."
EPILOG = """\
`sfp COMMAND --help` shows options and examples.

Exit codes: 0 done; 1 finished with failures, or unexpected error; 2 wrong command line or config; 3
data or weights missing or damaged.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="sfp",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sfp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        import_module(f"sfp.cli.{name}").register(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
        argv: arguments after `sfp`; by default those of the process.

    Returns:
        The exit code. Errors without an exit code, that is bugs, are raised.
    """
    before = sys.stdout, sys.stderr, warnings.formatwarning
    out, err = (_Output(stream) if stream else stream for stream in before[:2])
    warnings.formatwarning = _plain_warnings()
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        args = build_parser().parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)
        return guarded(args.run, args) or int(isinstance(out, _Output) and out.reader_left)
    finally:
        sys.stdout, sys.stderr, warnings.formatwarning = before


def _plain_warnings() -> Callable[..., str]:
    """A `warnings.formatwarning` without file and line of the code; each message is shown once."""
    seen: set[str] = set()

    def format_warning(message: Warning | str, *args: Any, **kwargs: Any) -> str:
        text = str(message).strip()
        if text in seen:
            return ""
        seen.add(text)
        return f"warning: {text}\n"

    return format_warning


class _Output:
    """Standard output or error that never stops a command's work.

    Characters that the terminal cannot show are escaped. When the reader of a pipe has closed it
    (`sfp segment ... | head`), further output is discarded and the work continues.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.reader_left = False
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes, as files do."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        """Flushes, as files do."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        self.reader_left = True
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), self.stream.fileno())
        self.stream.flush()  # what is still buffered


def guarded(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Runs a command and turns its errors into a line on stderr and an exit code."""
    try:
        if getattr(args, "modules", None):
            import_modules(args.modules)
        code = run(args)
        if sys.stdout is not None:
            sys.stdout.flush()  # notices a closed pipe here, not at interpreter shutdown
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # the shell's code for a program stopped by Ctrl-C
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            error = _host.explained(error)
        code = exit_code(error)
        if code == 1:
            raise
        print(f"error: {message(error)}", file=sys.stderr)
    return code


def exit_code(error: Exception) -> int:
    """2 for a wrong command line or config, 3 for data or weights, 1 for anything else."""
    from sfp.clip.checkpoints.published import WeightsError
    from sfp.data.images import DataError

    if isinstance(error, ModuleNotFoundError) and error.name in _host.PACKAGES:
        return 2
    # DataError is also a ValueError; a missing module belongs to an extra that is not installed
    missing = (OSError, WeightsError, DataError, FloatingPointError, ModuleNotFoundError)
    if isinstance(error, missing):
        return 3
    # a plain LookupError means that a method needs something this run lacks; a KeyError is a bug
    return 2 if isinstance(error, ValueError) or type(error) is LookupError else 1


def message(error: Exception) -> str:
    """An error's message."""
    if isinstance(error, OSError) and error.strerror:
        if error.filename:
            return f"{os.fsdecode(error.filename)}: {error.strerror}"
        if error.errno == errno.ENOSPC:
            return f"{error.strerror}: free some, or choose another folder for the results"
    return str(error).strip()
