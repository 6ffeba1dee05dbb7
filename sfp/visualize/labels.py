"""Pictures of a segmentation: labels with their names, and confidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter

from sfp.overlay import Panel, overlay
from sfp.palette import class_colours
from sfp.visualize.canvas import panel_width, panels


class Segmented(Protocol):
    """A labelled picture, such as a `sfp.Result`.

    Attributes:
        labels: class of each pixel, (H, W).
        confidence: probability of that class, (H, W).
    """

    @property
    def labels(self) -> np.ndarray:  # noqa: D102
        ...

    @property
    def confidence(self) -> np.ndarray:  # noqa: D102
        ...


def segmentation(
    image: np.ndarray,
    results: Segmented | Mapping[str, Segmented],
    names: Sequence[str],
    *,
    colours: Sequence[Sequence[int]] | None = None,
) -> Figure:
    """Labels over the picture and confidence below, a column for each result, and one legend.

    Args:
        image: the picture, (H, W, 3) uint8.
        results: one result, or several by title, of the picture's size.
        names: names of the classes.
        colours: colours of the classes, RGB 0..255; by default those of `class_colours` for the classes
            that occur.
    """
    titled = results if isinstance(results, Mapping) else {"segmentation": results}
    share = np.mean(
        [np.bincount(r.labels.ravel(), minlength=len(names)) for r in titled.values()], 0
    )
    present = np.flatnonzero(share).tolist()
    if colours is None:  # use the most distinct colours for the classes that occur
        palette = np.zeros((len(names), 3), int)
        palette[present] = class_colours(len(present))
        colours = palette.tolist()
    ratio = image.shape[0] / image.shape[1]
    title = "Segmentation and its confidence"
    # beside the confidence there is room for the legend
    width = panel_width(ratio)
    columns = max(1 + (len(present) > 9), int(width / 1.6))
    legend = 0.35 + 0.17 * -(-len(present) // columns)  # inches
    extra = max(0.4, legend - width * ratio)
    figure, grid = panels(2, len(titled) + 1, ratio, title, extra=extra)
    grid[0, 0].imshow(image)
    grid[0, 0].set_title("image", fontsize=9)
    for column, (title, result) in zip(grid.T[1:], titled.items(), strict=True):
        column[0].imshow(overlay(Panel(image, result.labels), colours))
        column[0].set_title(title, fontsize=9)
        write_names(column[0], result.labels, names)
        shown = column[1].imshow(result.confidence, cmap="cividis", norm=Normalize(0, 1))
        column[1].set_title(f"confidence, mean {result.confidence.mean():.0%}", fontsize=9)
    bar = figure.colorbar(shown, ax=grid[1, 1:], location="right", format=PercentFormatter(1))
    bar.set_label("probability of the class", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    for axes in [*grid[0], *grid[1, 1:]]:
        axes.set(xticks=(), yticks=())

    handles = [
        Patch(
            color=tuple(c / 255 for c in colours[i]),
            label=f"{names[i]}, {share[i] / share.sum():.0%}",
        )
        for i in sorted(present, key=lambda i: -share[i])
    ]
    grid[1, 0].set_axis_off()
    grid[1, 0].legend(
        handles=handles,
        loc="upper left",
        alignment="left",
        title="class, share of the picture" + (" (mean)" if len(titled) > 1 else ""),
        fontsize=8,
        title_fontsize=8,
        frameon=False,
        ncols=columns,
    )
    return figure


def write_names(axes: Axes, labels: np.ndarray, names: Sequence[str]) -> None:
    """Writes each class's name inside its largest region, so that colours are not essential."""
    for i in np.unique(labels):
        region = (labels == i).astype(np.uint8)
        _, parts, stats, _ = cv2.connectedComponentsWithStats(region)
        largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
        if stats[largest, cv2.CC_STAT_AREA] < 0.01 * labels.size:
            continue
        inside = np.pad((parts == largest).astype(np.uint8), 1)  # the frame is an edge too
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        axes.text(
            int(x),
            int(y),
            names[i],
            fontsize=8,
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )
