"""The results of `sfp.outliers.planted.benchmark` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sfp.files import atomic_write
from sfp.outliers.planted import TRUTH
from sfp.palette import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION
from sfp.tables import cell, markdown

BEGIN, END = "<!-- plant: begin -->", "<!-- plant: end -->"

PARTS = {"planted": "planted patches", "others": "all other patches"}

Result = Mapping[str, Any]
Sheet = tuple[list[str], list[list[str]]]  # header and rows

STYLES = tuple(
    zip(("#000000", ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE), "os^DvPX", strict=True)
)


def ranking(result: Result) -> list[str]:
    """Detectors by falling mean F1, over patterns and strengths."""
    patterns = result["patterns"].values()
    score = {
        d: np.mean([row["f1"] for p in patterns for row in p["detection"][d]])
        for d in result["undisturbed"]
    }
    return sorted(score, key=lambda d: -score[d])


def disturbance_sheet(result: Result, pattern: str) -> Sheet:
    """Norms and attention of the planted patches, by strength."""
    rows = result["patterns"][pattern]["disturbance"]
    header = ["", *(f"strength {row['strength']:g}" for row in rows)]
    lines = [
        ["norm, in medians of the others", *(cell(row["norm"]) for row in rows)],
        ["share of the class token's attention", *(cell(row["drawn"]) for row in rows)],
    ]
    return header, lines


def detection_sheet(result: Result, pattern: str) -> Sheet:
    """F1 by strength; precision and recall at one; share marked in undisturbed images."""
    at, strengths = result["setting"]["at"], result["setting"]["strengths"]
    header = ["detector", *(f"F1 at {s:g}" for s in strengths)]
    header += [f"precision at {at:g}", f"recall at {at:g}", "marked, undisturbed"]
    lines = []
    for d in ranking(result):
        rows = result["patterns"][pattern]["detection"][d]
        (chosen,) = (row for row in rows if row["strength"] == at)
        cells = [*(row["f1"] for row in rows), chosen["precision"], chosen["recall"]]
        lines.append([d, *map(cell, cells), f"{result['undisturbed'][d]:.1%}"])
    return header, lines


def restoration_sheet(result: Result, pattern: str) -> Sheet:
    """Cosine with the undisturbed features, given the true mask: planted patches / the others."""
    table = result["patterns"][pattern]["restoration"]
    header = ["mitigator", *(f"strength {s:g}" for s in result["setting"]["strengths"])]
    return header, [[m, *map(_both, rows)] for m, rows in table.items()]


def pairs_sheet(result: Result, pattern: str) -> Sheet:
    """The same at one strength, with the masks of every detector."""
    table = result["patterns"][pattern]["pairs"]
    header = ["detector", *table[TRUTH]]
    return header, [[d, *map(_both, table[d].values())] for d in (TRUTH, *ranking(result))]


def _both(row: Mapping[str, float]) -> str:
    return " / ".join(f"{row[part]:.3f}" for part in PARTS)


def report(result: Result, source: str, command: str, picture: str) -> str:
    """All tables and the picture as Markdown.

    Args:
        result: result of `benchmark`.
        source: model and images, for the first line, e.g. "mini, 16 drawn scenes".
        command: the command that reproduces this.
        picture: file name of the plot.
    """
    setting = result["setting"]
    at = f"{setting['at']:g}"
    rows, cols = result["grid"]
    parts = [
        f"Printed by `{command}`: {source}, {rows}x{cols} patches, "
        f"{result['outliers_per_image']:.1f} outliers per image on average, planted behind block "
        f"{setting['layer']}, detected and mitigated at block {setting['detect']}, seed "
        f"{setting['seed']}.",
        f"![F1 of each detector and what each mitigator restores, by strength]({picture})",
    ]
    for pattern in setting["patterns"]:
        sheets = {
            f"#### {pattern.capitalize()}: what is planted": disturbance_sheet(result, pattern),
            f"#### {pattern.capitalize()}: detection": detection_sheet(result, pattern),
            f"#### {pattern.capitalize()}: restoration, given the true mask (cosine of planted "
            "patches / others)": restoration_sheet(result, pattern),
            f"#### {pattern.capitalize()}: detector and mitigator together, strength {at} (cosine "
            "of planted patches / others)": pairs_sheet(result, pattern),
        }
        for title, (header, lines) in sheets.items():
            parts += [title, markdown(header, lines).rstrip()]
    return "\n\n".join(parts) + "\n"


def frame(path: Path) -> tuple[str, str]:
    """The parts of a page before and after the results; empty if there is no page.

    Raises:
        ValueError: if the page lacks the two markers, so that it is not overwritten.
    """
    if not path.is_file():
        return "", "\n"
    page = path.read_text()
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(
            f"{path} exists without {BEGIN} and {END}: add them or choose another --out"
        )
    before, rest = page.split(BEGIN)
    return before, rest.split(END)[1]


def write_page(path: Path, text: str) -> None:
    """Writes `text` between the markers of a page (see `frame`), which is created if missing."""
    before, after = frame(path)
    with atomic_write(path) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def plot(result: Result, path: Path) -> None:
    """Writes a PNG: a column per pattern; F1 as a heat map, restored features as lines."""
    patterns = result["patterns"]
    names = ranking(result)
    figure = Figure(figsize=(6.2 * len(patterns), 2.4 + 0.27 * len(names) + 6), dpi=90)
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        3, len(patterns), squeeze=False, height_ratios=[0.27 * len(names) + 1, 3, 3]
    )
    for column, (pattern, table) in enumerate(patterns.items()):
        top, *below = axes[:, column]
        f1 = [[row["f1"] for row in table["detection"][d]] for d in names]
        _heat_map(top, np.array(f1), names, result["setting"]["strengths"])
        top.set_title(f"{pattern}: F1 of the detectors")
        for axis, (part, title) in zip(below, PARTS.items(), strict=True):
            _lines(axis, table["restoration"], part)
            axis.set_title(f"{pattern}: {title}, given the true mask")
    axes[1, 0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def _heat_map(
    axis: Any, values: np.ndarray, names: Sequence[str], strengths: Sequence[float]
) -> None:
    axis.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.5 else "white"
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths])
    axis.set_xlabel("strength (added norm, in median patch norms)")


def _lines(axis: Any, table: Mapping[str, Sequence[Mapping[str, float]]], part: str) -> None:
    for i, (mitigator, rows) in enumerate(table.items()):
        colour, marker = STYLES[i % len(STYLES)]
        x, y = [row["strength"] for row in rows], [row[part] for row in rows]
        style = "--" if i == 0 else "-"  # no mitigation
        axis.plot(x, y, style, color=colour, marker=marker, label=mitigator, markersize=5)
    axis.set_xscale("log", base=2)
    axis.set_xticks([row["strength"] for row in rows], [f"{row['strength']:g}" for row in rows])
    axis.set_xlabel("strength (added norm, in median patch norms)")
    axis.set_ylabel("cosine with the undisturbed run")
    axis.grid(alpha=0.3)
