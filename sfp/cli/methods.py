"""`sfp methods`: lists registered methods and ops."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sfp.cli.options import add_command, add_import

TEXT = """\
Lists the registered methods, or the ops they are made of.

Examples:
    sfp methods
    sfp methods naclip                 # one method with all its knobs, and what it does
    sfp methods mine --import mine.py  # your own method
    sfp methods --ops
    sfp methods --kind detector
    sfp methods --markdown             # the generated part of docs/methods.md
"""
PRESETS = Path(__file__).parents[1] / "methods"


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "methods", run, help="list methods and the parts they are made of", text=TEXT
    )
    parser.add_argument("method", nargs="?", help="show this method with its documentation")
    parser.add_argument("--ops", action="store_true", help="list ops by kind, with their knobs")
    parser.add_argument("--kind", help="only ops of this kind")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the list."""
    header = ["method", "knobs", "what it does", "paper"]
    if not (args.method or args.ops or args.kind or args.markdown or args.modules):
        _print(header, shipped_methods())
        return 0
    from sfp.cli import method_table
    from sfp.registry import suggest
    from sfp.tables import markdown

    if args.method:
        print(method_table.documentation(args.method))
    elif args.ops or args.kind:
        ops = method_table.ops_rows()
        kinds = {row[0] for row in ops}
        if args.kind and args.kind not in kinds:
            raise ValueError(f"no ops of kind {args.kind!r}{suggest(args.kind, kinds)}")
        header = ["kind", "op", "knobs", "what it does"]
        rows = [row for row in ops if args.kind in (None, row[0])]
        if args.markdown:
            print(markdown(header, rows), end="")
        else:
            _print(header, rows)
    elif args.markdown:
        print(method_table.methods_markdown(), end="")
    else:
        _print(header, method_table.methods_rows())
    return 0


def shipped_methods() -> Iterator[tuple[str, str, str, str]]:
    """(name, knobs, summary, paper) of every preset, parsed from the sources without PyTorch."""
    for path in sorted(PRESETS.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            if not any("METHODS" in ast.unparse(line) for line in node.decorator_list):
                continue
            knobs = [
                word.arg if default is None else f"{word.arg}={ast.unparse(default)}"
                for word, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            ]
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ")
            title = (ast.get_docstring(module) or "").split("\n")[0]
            yield node.name, ", ".join(knobs), summary, title


def _print(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    from sfp.terminal import console

    table = Table(show_lines=True)
    for column in header:
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "op"))
    for row in rows:
        table.add_row(*row)
    console().print(table)
