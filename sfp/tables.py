"""Tables as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(value: float | None, decimals: int = 2) -> str:
    """A number as a table cell; a dash for None."""
    return "-" if value is None else f"{value:.{decimals}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
