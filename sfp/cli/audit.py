"""`sfp audit`: whether two results are comparable."""

from __future__ import annotations

import argparse

from sfp.cli.options import add_command, add_import

TEXT = """\
Lists the settings in which two results differ, and says whether their numbers are comparable.

Each side is a card.json, a work folder of `sfp eval` that contains one, or a config. Numbers are
comparable if protocol, vocabulary and data are equal; method and weights may differ. Also listed
are each side's constants that are not the defaults, for example because they were tuned for its
dataset, what its models were trained on besides images and captions, and published numbers for its
method, benchmark and weights, with what their protocol differs in.

Examples:
    sfp audit work/voc21 work/voc21_sclip
    sfp audit work/voc21/card.json voc20

Exit codes: 0 comparable; 1 not comparable; 2 a side is missing or cannot be read.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "audit", run, help="say whether two results are comparable", text=TEXT
    )
    parser.add_argument("a", help="card.json, work folder or config")
    parser.add_argument("b", help="likewise")
    add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Compares the two sides; returns 1 if they are not comparable."""
    from rich.table import Table

    from sfp.evaluation import card
    from sfp.evaluation.choices import constants, seen
    from sfp.evaluation.notices import quiet
    from sfp.evaluation.published import beside_run
    from sfp.evaluation.scores import COLUMNS, cell
    from sfp.evaluation.settings import FREE, STRICT
    from sfp.terminal import console

    with quiet():
        a, b = card.read_side(args.a), card.read_side(args.b)
    found = card.differences(a, b)
    if found:
        table = Table("group", "setting", "A", "B")
        for row in found:
            table.add_row(row.group, row.name, row.a, row.b)
        console().print(table)
    open_questions = card.unknown(a, b)
    if open_questions:
        print(f"Known on one side only: {', '.join(open_questions)}.")
    for side, given in (("A", a), ("B", b)):
        changed = [
            f"{name} {value} (default {default})" for name, value, default in constants(given)
        ]
        print(f"{side}: non-default constants: {'; '.join(changed) or 'none'}.")
        for model, data in seen(given):
            print(f"{side}: {model} was trained on {data}.")
        with quiet():
            lines = beside_run(given)
        for line in lines:
            print(f"{side}: {line.removesuffix('.')}.")
    different = [group for group in STRICT if any(row.group == group for row in found)]
    if different:
        print(
            f"NOT COMPARABLE: they differ in {_and(different)}, so a difference between their "
            "numbers says nothing about method or weights."
        )
        return 1
    if "scores" in a and "scores" in b:
        for name in COLUMNS:
            one, two = a["scores"][name], b["scores"][name]
            gain = "" if one is None or two is None else f"{two - one:+.2f}"
            print(f"{name:6} {cell(one):>8} {cell(two):>8}   {gain}")
    compared = [group for group in FREE if any(row.group == group for row in found)]
    verdict = "Comparable, as far as is known" if open_questions else "Comparable"
    if compared:
        print(f"{verdict}: they differ only in {_and(compared)}.")
    else:
        print(f"{verdict}: the same method and weights.")
    return 0


def _and(words: list[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
