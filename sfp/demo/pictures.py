"""The pictures of the page, as pure functions from arrays to pixels and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, MaxNLocator
from numpy.typing import NDArray

from sfp.palette import SKY
from sfp.result import Result
from sfp.visualize.canvas import draw_image, mark, rendered
from sfp.visualize.labels import write_names

LONGEST = 1600  # pixels; photos with a longer side are scaled down when uploaded
SHOWN = 900  # pixels of a picture's long side
DPI = 220  # determines the size of text
BAR = 0.36  # height in inches of a colour bar with its numbers

Pixels = NDArray[np.uint8]


def bounded(image: Pixels, longest: int = LONGEST) -> Pixels:
    """The picture (H, W, 3), scaled down if its long side is more than `longest` pixels."""
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(round(length * scale), 1) for length in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def patch_at(
    point: Sequence[float], size: Sequence[int], shape: Sequence[int], patch: int
) -> tuple[int, int]:
    """The patch (row, column) under a click.

    Args:
        point: (x, y) of the click, in the shown picture.
        size: (height, width) of the shown picture.
        shape: (height, width) of the pixels that the network saw.
        patch: side of a patch in those pixels.

    Returns:
        The patch; beyond the last whole patch, the nearest one.
    """
    x, y = point
    row, column = (
        min(max(int(at * real / shown / patch), 0), real // patch - 1)
        for at, real, shown in zip((y, x), shape, size, strict=True)
    )
    return row, column


def labelled(result: Result) -> Pixels:
    """The classes' colours over the picture, with names inside the regions, (h, w, 3)."""
    height, width = result.labels.shape
    scale = SHOWN / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    image = cv2.resize(result.image, size, interpolation=kind).astype(np.uint8, copy=False)
    labels = cv2.resize(result.labels, size, interpolation=cv2.INTER_NEAREST)
    shown = replace(result, image=image, labels=labels.astype(np.int32, copy=False))
    figure, axes = _whole(image)
    axes.imshow(shown.overlay())
    axes.set_axis_off()
    write_names(axes, shown.labels, shown.names)
    return rendered(figure)


def marked(image: Pixels, mask: NDArray[np.bool_], patch: int) -> Pixels:
    """The patches of a mask (h, w) over a pale picture."""
    figure, axes = _whole(image, below=BAR)  # the same size as the neighbouring picture with a bar
    draw_image(axes, image, patch, pale=True)
    mark(axes, mask)
    axes.set_axis_off()
    return rendered(figure)


def framed(image: Pixels, chosen: tuple[int, int], patch: int) -> Pixels:
    """The picture with one patch (row, column) framed."""
    figure, axes = _whole(image, below=BAR)
    draw_image(axes, image, patch)
    _frame(axes, chosen, image, patch)
    axes.set_axis_off()
    return rendered(figure)


def heat(
    image: Pixels,
    values: NDArray[np.floating],
    patch: int,
    unit: str,
    *,
    chosen: tuple[int, int] | None = None,
    cmap: str = "inferno",
    ticks: Formatter | None = None,
) -> Pixels:
    """A value per patch (h, w) over the pale picture, with a colour bar below in its unit."""
    figure, axes = _whole(image, below=BAR)
    draw_image(axes, image, patch, pale=True)
    norm = Normalize(float(values.min()), float(values.max()))
    drawn = axes.imshow(values, cmap=cmap, norm=norm, alpha=0.8, interpolation="nearest")
    axes.set(xlim=(-0.5, image.shape[1] / patch - 0.5), ylim=(image.shape[0] / patch - 0.5, -0.5))
    if chosen is not None:
        _frame(axes, chosen, image, patch)
    axes.set_axis_off()
    width, height = figure.get_size_inches()
    bar = figure.colorbar(
        drawn,
        cax=figure.add_axes((0.03, (BAR - 0.14) / height, 0.5, 0.1 / height)),
        orientation="horizontal",
        format=ticks,
    )
    bar.ax.xaxis.set_major_locator(MaxNLocator(4))
    bar.ax.tick_params(labelsize=7.5, length=2, pad=1)
    fitting = 0.42 * width * 72 / (0.6 * len(unit))  # points, if a letter is 0.6 times as wide
    figure.text(0.56, (BAR - 0.16) / height, unit, fontsize=min(8, fitting), va="bottom")
    return rendered(figure)


def _frame(axes: Axes, chosen: tuple[int, int], image: Pixels, patch: int) -> None:
    grid = [length // patch for length in image.shape[:2]]
    cell = np.zeros(grid, bool)
    cell[chosen] = True
    mark(axes, cell, SKY, filled=False)


def _whole(image: Pixels, below: float = 0) -> tuple[Figure, Axes]:
    """A figure filled by a picture, with some inches left below."""
    height, width = (length / max(image.shape[:2]) * SHOWN / DPI for length in image.shape[:2])
    figure = Figure(figsize=(width, height + below), dpi=DPI, facecolor="white")
    share = below / (height + below)
    return figure, figure.add_axes((0, share, 1, 1 - share))


# -- HTML ----------------------------------------------------------------------------------------


def legend(results: Sequence[Result]) -> str:
    """A legend of the classes that occur, with their colours and shares of each picture."""
    names = [n for n in results[0].names if any(n in each.shares for each in results)]
    names.sort(key=lambda name: -sum(each.shares.get(name, 0) for each in results))
    items = []
    for name in names:
        red, green, blue = results[0].palette[results[0].names.index(name)]
        shares = " | ".join(f"{each.shares.get(name, 0):.0%}" for each in results)
        items.append(
            f'<li><span class="swatch" style="background:rgb({red},{green},{blue})"></span>'
            f"{escape(name)} <small>{shares}</small></li>"
        )
    missing = [n for n in results[0].names if n not in names]
    none = f'<p class="faint">not found: {escape(", ".join(missing))}</p>' if missing else ""
    return f'<ul class="legend" aria-label="Classes">{"".join(items)}</ul>{none}'


def status(text: str, *, error: bool = False, warning: str = "") -> str:
    """The status line, announced by screen readers, with an optional warning."""
    role, kind = ("alert", "error") if error else ("status", "fine")
    line = f'<p class="told {kind}" role="{role}">{escape(text)}</p>'
    return line + (f'<p class="told warning" role="alert">{escape(warning)}</p>' if warning else "")


def caption(text: str) -> str:
    """A line below a picture."""
    return f'<p class="caption">{escape(text)}</p>'
