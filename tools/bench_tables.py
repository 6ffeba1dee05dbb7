#!/usr/bin/env python
"""Prints records of `bench.py --out` as Markdown tables: what docs/cpu.md is made of.

Every time is a ratio to what ran in the same process: machines differ, and so does one machine from
hour to hour.

Examples:
    python tools/bench_tables.py docs/measured/cpu_*.json
    python tools/bench.py --out mine.json && python tools/bench_tables.py mine.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfp.tables import markdown

TIMES = (
    *("case", "method", "floor ms", "ms", "x floor", "x PyTorch's floor", "peak MiB"),
    *("sequential / method", "sequential's peak MiB", "labels as sequential", "feature error"),
)


def cell(value: float | None, form: str = ".2f", scale: float = 1) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{scale * value:{form}}"


def times(cases: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Rows of `TIMES`."""
    for case in cases:
        floor, slow = case["floor_seconds"], case.get("sequential", {})
        theirs = case["pytorch_floor_seconds"]
        for row in case["rows"]:
            seconds, known = row["seconds"], "equal_labels" in row
            yield [
                name(case),
                label(row),
                cell(floor, ".0f", 1e3),
                cell(seconds, ".0f", 1e3),
                cell(seconds / floor),
                cell(seconds / theirs if theirs else None),
                cell(row["peak_mib"], ".0f"),
                cell(slow["seconds"] / seconds if known else None),
                cell(slow.get("peak_mib") if known else None, ".0f"),
                cell(row.get("equal_labels"), ".3%"),
                cell(row.get("feature_error"), ".2%"),
            ]


def stages(cases: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Where the time of each method goes."""
    for case in cases:
        for row in case["rows"]:
            whole = sum(row["stages"].values())
            yield [name(case), label(row), *(f"{s / whole:.1%}" for s in row["stages"].values())]


def name(case: dict[str, Any]) -> str:
    """Model, image, windows and classes."""
    size = "x".join(map(str, case["size"]))
    batch = "" if case["batch"] == 1 else f", batch of {case['batch']}"
    return f"{case['arch']}, {size}, {case['windows']} windows, {case['classes']} classes{batch}"


def label(row: dict[str, Any]) -> str:
    """The method, and its variant if it has one."""
    variant = "" if row["variant"] == "auto" else f", {row['variant']}"
    return f"`{row['method']}`{variant}"


def without_empty(header: tuple[str, ...], rows: Iterator[list[str]]) -> str:
    """A table without the columns that hold dashes only."""
    columns = [c for c in zip(header, *rows, strict=True) if set(c[1:]) != {"-"}]
    head, *rest = zip(*columns, strict=True)
    return markdown(head, rest)


def tables(record: dict[str, Any]) -> str:
    """All tables of one run of the bench."""
    about = f"{record['processor']}, {record['threads']} threads, torch {record['torch']}"
    lines = [f"## `python tools/bench.py {record['command']}`\n", f"On {about}.\n"]
    if bank := record.get("text"):
        slow = bank["class_by_class"]
        lines.append(
            f"{bank['prompts']} prompts of {bank['classes']} ADE20K classes: text bank "
            f"{bank['bank']:.2f} s, 77 tokens class by class {slow:.2f} s "
            f"({slow / bank['bank']:.1f}x), from the cache {1e3 * bank['second_start']:.1f} ms; "
            f"largest difference of unit features {bank['max_difference']:.1e}.\n"
        )
    if cases := record["cases"]:
        lines.append(without_empty(TIMES, times(cases)))
        header = ("case", "method", *cases[0]["rows"][0]["stages"])
        lines.append(without_empty(header, stages(cases)))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="JSON files, in this order")
    args = parser.parse_args()
    print("\n".join(tables(json.loads(path.read_text())) for path in args.records), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
