"""Writes the tables of published numbers into README.md and docs/methods.md.

Run it after changing sfp/evaluation/published.json. With `--check` it writes nothing and exits with 1
if a page is out of date.

Example:
    python tools/published_tables.py --check
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sfp.evaluation.published import CONFIGS, EIGHT, Number, published
from sfp.tables import markdown

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- published: begin -->\n", "<!-- published: end -->"
SLIDING = ["sfp_poster/main", "sfp_log", "pearl", "ov_stitcher", "later", "naclip", "gclip"]
SLIDING += ["clearclip", "floss"]
CENTRE_CROP = ("cliptrase_224", "cliptrase_336")

Row = list[Number]


def rows(*tables: str) -> list[Row]:
    """The rows with mIoU in some tables; rows with several protocols are split."""
    found: dict[tuple[str, str, str], Row] = {}
    for table in tables:
        for number in published().find(metric="mIoU", table=table):
            found.setdefault((table, number.row, number.protocol), []).append(number)
    return list(found.values())


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """One cell per benchmark, "-" where there is no number, with as many decimals as the row has."""
    values = {n.benchmark: n.value for n in row}
    digits = max(len(str(value).partition(".")[2]) for value in values.values())
    shown = {k: f"{v:.{digits}f}" if isinstance(v, float) else v for k, v in values.items()}
    return [shown.get(column, "-") for column in columns]


def mean(row: Row) -> str:
    """The mean over the eight benchmarks, or "-" if the row has fewer."""
    values = [n.value for n in row if n.benchmark in EIGHT and isinstance(n.value, float)]
    return f"{sum(values) / len(values):.1f}" if len(values) == len(EIGHT) else "-"


def method(row: Row) -> str:
    """A row's method, with the preset of this package, and its further models."""
    first = row[0]
    preset = f" (`{first.method}`)" if first.method else ""
    also = [first.extra] * bool(first.extra) + ["trained"] * first.trained
    return first.row + preset + "".join(f", {word}" for word in also)


def origin(row: Row) -> str:
    """A row's source, and who ran it if the source says so."""
    first = row[0]
    number = first.table.partition("/")[2]
    table = f", table {number}" if number.isdigit() else ""
    by = f"; run by {first.by}" if first.by else ""
    return published().sources[first.source].text + table + by


def protocol(row: Row) -> str:
    """The name of a row's protocol."""
    return published().protocols[row[0].protocol].name


def items(lines: Iterable[str]) -> str:
    """A Markdown list of distinct lines that are not empty."""
    return "".join(f"* {line}\n" for line in dict.fromkeys(filter(None, lines)))


def readme() -> str:
    """SFP on the eight benchmarks, by source, with a column that says nothing was measured here."""
    found = published()
    sources = ("sfp_poster/main", "sfp_log", "pearl")
    columns = [cells(found.find(table=table, row="SFP"), EIGHT) for table in sources]
    header = ["benchmark", "config", "poster", "log of the release", "run by PEARL's authors"]
    lines = [
        [name, f"`cfg_{CONFIGS[name]}.py`", *numbers, "not measured"]
        for name, *numbers in zip(EIGHT, *columns, strict=True)
    ]
    return markdown([*header, "this repository"], lines)


def methods() -> str:
    """Every method's numbers, with one table for each kind of protocol."""
    found = published()
    main = [row for row in rows(*SLIDING) if row[0].protocol not in CENTRE_CROP]
    table_1 = markdown(
        ["method", *EIGHT, "mean of the row", "protocol", "source"],
        ([method(r), *cells(r, EIGHT), mean(r), protocol(r), origin(r)] for r in main),
    )
    nine = [b for b in found.row("cliptrase/1", "CLIPtrase") if not b.startswith("average")]
    sam = [row for row in rows("cliptrase/3") if row[0].extra]
    crops = [*rows("cliptrase/6", "cliptrase/7", "sfp_poster/main"), *sam]
    crops = [row for own in CENTRE_CROP for row in crops if row[0].protocol == own]
    table_2 = markdown(
        ["method", *nine, "protocol", "source"],
        ([method(r), *cells(r, nine), protocol(r), origin(r)] for r in crops),
    )
    coarse = ("COCO-27", "Cityscapes-27")
    table_3 = markdown(
        ["method", *coarse, "source"],
        ([method(r), *cells(r, coarse), origin(r)] for r in rows("cliptrase/8")),
    )
    two = ("VOC21", "ADE20K")
    others = rows("sfp_poster/ViT-B/32", "sfp_poster/ViT-L/14", "tips_notebook", "tips_readme")
    table_4 = markdown(
        ["backbone", "method", *two, "protocol", "source"],
        ([r[0].backbone, method(r), *cells(r, two), protocol(r), origin(r)] for r in others),
    )
    shown = [row[0] for row in (*main, *crops, *others)]
    notes = [n.note for n in shown] + [found.tables[n.table].note for n in shown]
    return (
        "On the eight benchmarks. Numbers with different protocols (see the column) are not comparable:"
        f"\n\n{table_1}\n"
        f"With CLIPtrase's protocol:\n\n{table_2}\n"
        "Unsupervised segmentation, from CLIPtrase's paper, which gives no settings:"
        f"\n\n{table_3}\n"
        f"Other backbones:\n\n{table_4}\n"
        f"Protocols:\n\n{items(f'{p.name}: {p.text}.' for p in found.protocols.values())}\n"
        f"Notes:\n\n{items(notes)}"
    )


PAGES: dict[str, Callable[[], str]] = {"README.md": readme, "docs/methods.md": methods}


def written(page: str, table: str) -> str:
    """The page with the table between its markers."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    page, count = re.subn(pattern, lambda _: BEGIN + table + END, page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of markers {BEGIN.strip()} ... {END}, found {count}")
    return page


def main() -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    stale = 0
    for name, table in PAGES.items():
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        if (new := written(old, table())) == old:
            continue
        stale += 1
        if check:
            print(f"{name} is out of date: run tools/published_tables.py", file=sys.stderr)
        else:
            path.write_text(new, encoding="utf-8")
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
