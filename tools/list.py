"""Lists the registered methods, or the ops that they are made of.

Examples:
    python tools/list.py
    python tools/list.py naclip                 # one method with all its knobs
    python tools/list.py --ops
    python tools/list.py --ops --kind detector
    python tools/list.py --markdown             # the generated part of docs/methods.md
"""

from __future__ import annotations

import argparse
import inspect
import sys

from rich.console import Console
from rich.table import Table

from sfp import describe
from sfp.registry import METHODS, find, list_methods, list_ops


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", nargs="?", help="show this method with its documentation")
    parser.add_argument("--ops", action="store_true", help="list ops by kind, with their knobs")
    parser.add_argument("--kind", help="only ops of this kind")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    args = parser.parse_args()
    kinds = sorted({row[0] for row in describe.ops_rows()})
    if args.kind and not list_ops(args.kind):
        parser.error(f"no ops of kind {args.kind!r}; kinds: {', '.join(kinds)}")

    if args.method:
        try:
            preset = find(METHODS, args.method)
        except ValueError as error:
            parser.error(str(error))
        card = describe.method_card(args.method)
        print(card.title, inspect.getdoc(preset), sep="\n\n")
        print("\nDefaults: " + ", ".join(f"{k}={v!r}" for k, v in card.knobs.items()))
        return 0

    if args.ops or args.kind:
        header = ["kind", "op", "knobs", "what it does"]
        rows = [list(row) for row in describe.ops_rows() if args.kind in (None, row[0])]
    elif args.markdown:
        print(describe.methods_markdown(), end="")
        return 0
    else:
        header = ["method", "attention", "residual", "FFN", "edits", "refiners", "paper"]
        cards = map(describe.method_card, list_methods())
        rows = [
            [c.name, c.attention, c.residual, c.ffn, c.edits, c.refiners, c.title] for c in cards
        ]
    if args.markdown:
        print(describe.markdown(header, rows), end="")
        return 0
    table = Table(show_lines=True)
    for column in header:
        table.add_column(column, overflow="fold", no_wrap=column in ("method", "op"))
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width to fit
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
