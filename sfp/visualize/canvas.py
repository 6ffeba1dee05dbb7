"""Shared by all pictures: figures without pyplot, panels in patch units, accessible colours."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import Formatter, MaxNLocator
from PIL import Image
from torch import Tensor

from sfp.palette import VERMILLION
from sfp.tokens import upcast

SIDE = 2.3  # inches of a panel


class Picture(Figure):
    """A figure outside of pyplot that notebooks can display."""

    def __init__(self, width: float, height: float, title: str) -> None:
        # "compress" removes gaps between panels with a fixed aspect ratio
        layout = ConstrainedLayoutEngine(compress=True, h_pad=0.08)
        super().__init__(figsize=(width, height), dpi=90, layout=layout)
        FigureCanvasAgg(self)
        lines = textwrap.fill(title, int(width / 0.11))  # width of a letter in inches
        self.suptitle(lines, fontsize=12, fontweight="bold")

    def _repr_png_(self) -> bytes:
        # notebooks store their pictures: 256 colours take a third of the space
        file = io.BytesIO()
        Image.fromarray(rendered(self)).quantize(256).save(file, "png", optimize=True)
        return file.getvalue()


def panels(
    rows: int, columns: int, ratio: float, title: str, *, extra: float = 0.85
) -> tuple[Picture, np.ndarray]:
    """A figure with a grid of panels.

    Args:
        rows, columns: numbers of rows and columns of panels.
        ratio: height of a panel's image over its width.
        title: title of the figure.
        extra: inches above and below each picture, for its title, axis and colour bar.

    Returns:
        The figure, and its axes as an array (rows, columns).
    """
    width = panel_width(ratio)
    size = columns * (width + 0.25) + 0.4, rows * (width * ratio + extra) + 0.4
    figure = Picture(*size, title)
    return figure, figure.subplots(rows, columns, squeeze=False)


def panel_width(ratio: float) -> float:
    """Inches of a panel whose image is `ratio` times as high as it is wide.

    Panels of tall pictures are narrower and those of panoramas wider, so that their areas stay about
    the same.
    """
    return SIDE / max(ratio, min(2 * ratio, 1)) ** 0.5


def numbers(x: Tensor) -> np.ndarray:
    """A tensor as a float array."""
    return upcast(x.detach()).cpu().numpy()


def draw_image(axes: Axes, image: np.ndarray, patch: int, *, pale: bool = False) -> AxesImage:
    """A picture (H, W, 3), in patch units, so that patch (row, column) is centred at its numbers.

    Args:
        axes: where to draw.
        image: uint8 RGB.
        patch: side of a patch in pixels.
        pale: draw it light, grey and smooth, as a background for marks.
    """
    height, width = (length / patch - 0.5 for length in image.shape[:2])
    if pale:
        grey = cv2.cvtColor(cv2.medianBlur(image, 5), cv2.COLOR_RGB2GRAY)
        image = 115 + (0.55 * grey).astype(np.uint8)
    artist = axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(-0.5, width, height, -0.5))
    label_patches(axes)
    return artist


def draw_map(
    axes: Axes,
    values: np.ndarray,
    unit: str,
    *,
    cmap: str = "viridis",
    norm: Normalize | None = None,
    ticks: Formatter | None = None,
) -> AxesImage:
    """A value per patch (h, w), with a colour bar in its unit."""
    artist = axes.imshow(values, cmap=cmap, norm=norm, interpolation="nearest")
    label_patches(axes)
    figure = axes.get_figure()
    wide = max(1.0, values.shape[1] / values.shape[0] / 3)  # low panels get long thin bars
    bar = figure.colorbar(  # type: ignore[union-attr]
        artist, ax=axes, location="bottom", shrink=0.9, aspect=18 * wide, pad=0.02, format=ticks
    )
    if norm is None or type(norm) is Normalize:
        bar.ax.xaxis.set_major_locator(MaxNLocator(3))
    bar.ax.tick_params(labelsize=8)
    bar.set_label(unit, fontsize=8)
    return artist


def label_patches(axes: Axes) -> None:
    """Sets few integer ticks, and axis labels on the outer panels of a grid."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True))
    axes.tick_params(labelsize=7, length=2)
    place = axes.get_subplotspec()
    if place is None or place.is_first_col():
        axes.set_ylabel("patch row", fontsize=8)
    axes.set_xlabel("patch column", fontsize=8)


def mark(axes: Axes, mask: np.ndarray, colour: str = VERMILLION, *, filled: bool = True) -> None:
    """Frames the patches of a mask (h, w), and tints them if `filled`."""
    if not mask.any():
        return
    cells = [Rectangle((x - 0.5, y - 0.5), 1, 1) for y, x in np.argwhere(mask)]
    face = (*to_rgb(colour), 0.75) if filled else "none"
    thin = min(1.0, 16 / max(mask.shape))  # lines must not hide small patches
    # a dark line under the coloured one is visible on any background
    for line, edge in ((2.4 * thin, "black"), (1.2 * thin, "white" if filled else colour)):
        axes.add_collection(
            PatchCollection(cells, facecolor=face, edgecolor=edge, linewidth=line, zorder=3)
        )
        face = "none"


def contact_sheet(figures: Sequence[Figure], columns: int = 2) -> np.ndarray:
    """All figures on one white sheet, each below the shortest column so far: (H, W, 3) uint8."""
    stacks: list[list[np.ndarray]] = [[] for _ in range(columns)]
    for figure in figures:
        shortest = min(stacks, key=lambda stack: sum(map(len, stack)))
        shortest.append(rendered(figure))
    width = max(picture.shape[1] for stack in stacks for picture in stack)
    height = max(sum(map(len, stack)) for stack in stacks)
    sheet = np.full((height, width * columns, 3), 255, np.uint8)
    for column, stack in enumerate(stacks):
        y = 0
        for picture in stack:
            x = column * width + (width - picture.shape[1]) // 2
            sheet[y : y + len(picture), x : x + picture.shape[1]] = picture
            y += len(picture)
    return sheet


def rendered(figure: Figure) -> np.ndarray:
    """The figure's pixels, (H, W, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2RGB)
