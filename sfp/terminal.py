"""Tables on stdout, and progress on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def progress(*more: str, disable: bool = False) -> Progress:
    """A progress bar; `more` adds columns, e.g. "{task.fields[rate]}"; `disable` hides it."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *map(TextColumn, more),
        console=Console(stderr=True),
        disable=disable,
    )


def console(width: int = 160) -> Console:
    """Standard output. A file or pipe has no width of its own and gets at least `width` columns.

    The environment variable COLUMNS, which rich reads, can make it wider. Text is printed as it is:
    rich would otherwise take the "[names]" of "clip [names]" for a style, and remove it.
    """
    found = Console(markup=False, emoji=False)
    if not found.is_terminal:
        found.width = max(width, found.width)
    return found


def print_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    caption: str | None = None,
) -> None:
    """Prints a table whose first column is text and whose others are numbers."""
    table = Table(title=title, caption=caption)
    for column in header:
        table.add_column(column, justify="left" if column == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    console().print(table)
