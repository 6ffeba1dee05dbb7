"""The command `sfp`: one module per subcommand, one place that turns errors into exit codes.

A module `sfp.cli.<command>` has `register(commands)`, which adds its parser and says with
`set_defaults(run=...)` which function does the work, from the parsed arguments to an exit code. That
function imports what it needs, so that a help or a list does not wait for PyTorch; errors are raised,
not printed.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
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
`sfp COMMAND --help` has options and examples.

Exit codes: 0 done; 1 finished with failures, or unexpected; 2 wrong command line or config; 3 data or
weights are missing or damaged.
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
        argv: words after `sfp`; by default those that the process was started with.

    Returns:
        The exit code. Errors that have none, bugs that is, are raised.
    """
    before = sys.stdout, sys.stderr
    out, err = (_Output(stream) if stream else stream for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        args = build_parser().parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)
        return guarded(args.run, args) or int(isinstance(out, _Output) and out.reader_left)
    finally:
        sys.stdout, sys.stderr = before


class _Output:
    """Standard output or error of a command whose work is more than what it prints.

    Characters that the terminal cannot show appear as escapes, and when the reader of a pipe has left
    (`sfp segment ... | head`), the rest goes nowhere; the work goes on.
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
            sys.stdout.flush()  # a reader that has left shows up here, not in the interpreter's end
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # what shells say of a program that Ctrl-C ended
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            error = _host.explained(error)
        code = exit_code(error)
        if code == 1:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
    return code


def exit_code(error: Exception) -> int:
    """2 for a wrong command line or config, 3 for data or weights, 1 for anything else."""
    from sfp.clip.checkpoints.published import WeightsError
    from sfp.data.images import DataError

    if isinstance(error, ModuleNotFoundError) and error.name in _host.PACKAGES:
        return 2
    # a DataError is a ValueError too; a module that is missing is of an extra that is not installed
    missing = (OSError, WeightsError, DataError, FloatingPointError, ModuleNotFoundError)
    if isinstance(error, missing):
        return 3
    # a plain LookupError says that a method needs what its run does not have; a KeyError is a bug
    return 2 if isinstance(error, ValueError) or type(error) is LookupError else 1


def _message(error: Exception) -> str:
    """What an error says; from a data loader's process comes a traceback that ends with it."""
    text = str(error).strip()
    return text.splitlines()[-1] if "Traceback (most recent call last)" in text else text
