"""`sfp methods`: what is registered."""

from __future__ import annotations

import argparse

from sfp.cli.options import add_command

TEXT = """\
Lists the registered methods, or the ops that they are made of.

Examples:
    sfp methods
    sfp methods naclip                 # one method with all its knobs
    sfp methods --ops
    sfp methods --kind detector
    sfp methods --markdown             # the generated part of docs/methods.md
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "methods", run, help="list methods and the parts they are made of", text=TEXT
    )
    parser.add_argument("method", nargs="?", help="show this method with its documentation")
    parser.add_argument("--ops", action="store_true", help="list ops by kind, with their knobs")
    parser.add_argument("--kind", help="only ops of this kind")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")


def run(args: argparse.Namespace) -> int:
    """Lists."""
    from rich.table import Table

    from sfp.cli import method_table as describe
    from sfp.cli.terminal import console
    from sfp.registry import list_methods, suggest

    if args.method:
        _show(args.method)
        return 0
    if args.ops or args.kind:
        header = ["kind", "op", "knobs", "what it does"]
        ops = describe.ops_rows()
        kinds = {row[0] for row in ops}
        if args.kind and args.kind not in kinds:
            raise ValueError(f"no ops of kind {args.kind!r}{suggest(args.kind, kinds)}")
        rows = [list(row) for row in ops if args.kind in (None, row[0])]
        if args.markdown:
            print(describe.markdown(header, rows), end="")
            return 0
    elif args.markdown:
        print(describe.methods_markdown(), end="")
        return 0
    else:
        header = ["method", "attention", "residual", "FFN", "edits", "refiners", "paper"]
        cards = map(describe.method_card, list_methods())
        rows = [
            [c.name, c.attention, c.residual, c.ffn, c.edits, c.refiners, c.title] for c in cards
        ]
    table = Table(show_lines=True)
    for column in header:
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "op"))
    for row in rows:
        table.add_row(*row)
    console().print(table)
    return 0


def _show(name: str) -> None:
    """A method with its documentation."""
    import inspect

    from sfp.cli import method_table as describe
    from sfp.registry import METHODS, find

    preset = find(METHODS, name)
    card = describe.method_card(name)
    print(card.title, inspect.getdoc(preset), sep="\n\n")
    print("\nDefaults: " + ", ".join(f"{k}={v!r}" for k, v in card.knobs.items()))
