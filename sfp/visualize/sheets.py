"""Picture sheets: a row per image, a column per result, one legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sfp.files import atomic_write
from sfp.overlay import Panel, overlay


def at_size(image: Tensor, size: Sequence[int]) -> np.ndarray:
    """A BGR image tensor (3, h, w) in 0..255 as an RGB array (H, W, 3) of a label map's size."""
    array = image.flip(0).permute(1, 2, 0).byte().numpy()
    return cv2.resize(array, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def picture_sheet(
    columns: Mapping[str, Sequence[Panel]],
    names: Sequence[str],
    palette: Sequence[Sequence[int]],
    path: str | Path,
) -> None:
    """Writes a PNG with a titled column per entry, and a legend of the classes that occur.

    Args:
        columns: title -> panels, equally many in each; a row shows one image.
        names, palette: names and colours of the classes.
        path: path of the PNG.
    """
    first = next(iter(columns.values()))
    ratios = [panel.image.shape[0] / panel.image.shape[1] for panel in first]
    panels = [panel for column in columns.values() for panel in column]
    found = set().union(*(np.unique(p.labels).tolist() for p in panels if p.labels is not None))
    present = sorted(i for i in found if i < len(names))
    longest = max((len(names[i]) for i in present), default=0)
    entry = 0.45 + 0.085 * longest  # inches that a colour and its name take, as all below
    width = max(2.6 * len(columns), entry)
    per_line = max(min(int(width / entry), len(present)), 1)
    legend = 0.2 * -(-len(present) // per_line) + 0.2
    gap, title_height = 0.05, 0.3
    side = (width - gap) / len(columns) - gap  # of a panel: all are as wide, rows as tall as theirs
    heights = [side * ratio for ratio in ratios]
    height = title_height + sum(heights) + gap * (len(heights) - 1) + legend
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(heights),
        len(columns),
        squeeze=False,
        gridspec_kw=dict(
            height_ratios=heights,
            left=gap / width,
            right=1 - gap / width,
            top=1 - title_height / height,
            bottom=legend / height,
            wspace=gap / side,
            hspace=gap / float(np.mean(heights)),
        ),
    )
    for column, (title, items) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=13)
        for row, panel in enumerate(items):
            axes[row, column].imshow(overlay(panel, palette))
            axes[row, column].set_axis_off()
    patches = [Patch(color=tuple(c / 255 for c in palette[i]), label=names[i]) for i in present]
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=per_line,
        fontsize=9,
        frameon=False,
        handlelength=1,
    )
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:])
