"""Pictures of one run of the trunk: outliers, attention, norms.

All take a `Trace`, e.g. from `vit.trace(image)`, and method layers as in `Trace.layer`; panels show the
absolute block number. `image` is the traced picture, (H, W, 3) uint8, and `sample` its index in the
batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from sfp.method import Detector
from sfp.palette import BLUE, OKABE_ITO, VERMILLION
from sfp.registry import bind
from sfp.trace import Trace
from sfp.visualize.canvas import (
    SIDE,
    Picture,
    draw_image,
    draw_map,
    mark,
    numbers,
    panels,
)

DETECTORS = ("som", "l2_norm", "lof")
TOP = 0.05  # share of the patches that count as strongest


def named_detectors(
    detectors: Mapping[str, Detector] | Sequence[str | Mapping[str, Any]],
) -> dict[str, Detector]:
    """Detectors by their names in pictures.

    Args:
        detectors: functions by name, or names and config nodes of registered ones.

    Raises:
        ValueError: for an unknown one; the message suggests the closest.
    """
    if isinstance(detectors, Mapping):
        return dict(detectors)
    nodes = [dict(type=d) if isinstance(d, str) else dict(d) for d in detectors]
    # knobs distinguish two entries of the same detector
    return {
        ", ".join([n["type"], *(f"{k}={v}" for k, v in n.items() if k != "type")]): bind(
            n, "detector"
        )
        for n in nodes
    }


def absolute(trace: Trace, layers: Sequence[int]) -> list[int]:
    """Absolute numbers of layers whose outputs are in the trace.

    Raises:
        LookupError: if the output of one is not.
    """
    for layer in layers:
        trace.output(layer)
    return [trace.layer(layer) for layer in layers]


def as_map(trace: Trace, values: Tensor) -> np.ndarray:
    """A value per patch, (N,), on the grid, (h, w)."""
    return numbers(values.unflatten(-1, trace.embedded.grid))


def outliers(
    image: np.ndarray,
    trace: Trace,
    layers: Sequence[int],
    detectors: Mapping[str, Detector] | Sequence[str | Mapping[str, Any]] = DETECTORS,
    *,
    planted: Tensor | None = None,
    sample: int = 0,
) -> Figure:
    """The picture with the patches that each detector marks as outliers, for each layer.

    Detectors are rows and layers columns, or the other way round if there are more detectors.

    Args:
        image, trace, layers, sample: as for all pictures here.
        detectors: as for `named_detectors`.
        planted: (B, N) bool, planted outliers, framed in blue.
    """
    named = named_detectors(detectors)
    numbered = absolute(trace, layers)
    title = "Outliers (orange)" + (
        " and planted patches (blue frames)" if planted is not None else ""
    )
    ratio = image.shape[0] / image.shape[1]
    rows, columns = sorted((len(named), len(numbered)))
    figure, grid = panels(rows, columns, ratio, title)
    by_detector = grid if rows == len(named) else grid.T
    for row, (name, detector) in zip(by_detector, named.items(), strict=True):
        for axes, i in zip(row, numbered, strict=True):
            found = detector(trace, i)[sample]
            draw_image(axes, image, trace.vit.patch, pale=True)
            mark(axes, as_map(trace, found) > 0)
            count = f"{int(found.sum())} of {len(found)} patches"
            if planted is not None:
                mark(axes, as_map(trace, planted[sample]) > 0, BLUE, filled=False)
                count += f", {int((found & planted[sample]).sum())} planted"
            axes.set_title(f"{name}, layer {i}\n{count}", fontsize=9)
    return figure


def class_attention(
    image: np.ndarray, trace: Trace, layers: Sequence[int], *, sample: int = 0
) -> Figure:
    """The class token's attention to the patches in each layer, averaged over heads."""
    figure, row = _with_image(image, trace, layers, "Class-token attention")
    for axes, i in zip(row[1:], absolute(trace, layers), strict=True):
        share = trace.cls_row(i)[sample].mean(0)
        draw_map(axes, as_map(trace, share), "share of attention", ticks=PercentFormatter(1))
        axes.set_title(f"layer {i}\npatches get {float(share.sum()):.0%}", fontsize=9)
    return figure


def patch_attention(
    image: np.ndarray,
    trace: Trace,
    layers: Sequence[int],
    patch: tuple[int, int],
    *,
    sample: int = 0,
) -> Figure:
    """The attention of one patch in each layer, averaged over heads.

    Args:
        image, trace, layers, sample: as for all pictures here.
        patch: its (row, column).
    """
    n = patch_index(trace, patch)
    chosen = np.zeros(trace.embedded.grid, bool)
    chosen[patch] = True
    title = f"Attention of the patch at row {patch[0]}, column {patch[1]}"
    figure, row = _with_image(image, trace, layers, title)
    mark(row[0], chosen, filled=False)
    for axes, i in zip(row[1:], absolute(trace, layers), strict=True):
        share = trace.attention(i)[sample].mean(0)[trace.embedded.prefix + n]  # (T,)
        values = as_map(trace, share[trace.embedded.prefix :])
        draw_map(axes, values, "share of attention", ticks=PercentFormatter(1))
        mark(axes, chosen, filled=False)
        axes.set_title(f"layer {i}\nitself {values[patch]:.1%}", fontsize=9)
    return figure


def patch_index(trace: Trace, patch: tuple[int, int]) -> int:
    """The number of the patch at (row, column).

    Raises:
        ValueError: if it lies outside the grid.
    """
    rows, columns = trace.embedded.grid
    row, column = patch
    if not (0 <= row < rows and 0 <= column < columns):
        raise ValueError(f"no patch at row {row}, column {column}: the grid is {rows} x {columns}")
    return row * columns + column


def attention_matrices(trace: Trace, layers: Sequence[int], *, sample: int = 0) -> Figure:
    """Which patch (row) attends to which (column) in each layer, heads averaged, log scale.

    A bright vertical line is a patch to which many others attend.
    """
    numbered = absolute(trace, layers)
    figure, grid = panels(1, len(numbered), 1.0, "Attention between patches", extra=1.0)
    prefix = trace.embedded.prefix
    for axes, i in zip(grid[0], numbered, strict=True):
        weights = numbers(trace.attention(i)[sample].mean(0)[prefix:, prefix:])  # (N, N)
        # four decades below the peak: what is darker has no visible share
        scale = LogNorm(weights.max() / 1e4, weights.max(), clip=True)
        draw_map(axes, weights, "attention weight", norm=scale)
        axes.set_xlabel("attended patch", fontsize=8)
        axes.set_ylabel("attending patch" if axes is grid[0, 0] else "", fontsize=8)
        axes.set_title(f"layer {i}", fontsize=9)
    return figure


def norm_maps(image: np.ndarray, trace: Trace, layers: Sequence[int], *, sample: int = 0) -> Figure:
    """The length of each patch token that leaves each layer."""
    figure, row = _with_image(image, trace, layers, "Feature norms")
    for axes, i in zip(row[1:], absolute(trace, layers), strict=True):
        norms = as_map(trace, trace.outputs[i].patches[sample].norm(dim=-1))
        draw_map(axes, norms, "L2 norm", cmap="cividis")
        ratio = norms.max() / np.median(norms)
        axes.set_title(f"layer {i}\nlargest {ratio:.1f} x median", fontsize=9)
    return figure


def layer_profile(traces: Trace | Mapping[str, Trace], *, sample: int = 0) -> Figure:
    """Norms of the patch tokens, and the concentration of the class token's attention, by layer.

    Args:
        traces: one run, or several by name to compare.
        sample: as for all pictures here.
    """
    named = traces if isinstance(traces, Mapping) else {"": traces}
    figure = Picture(4.2 * SIDE, 1.7 * SIDE, "From layer to layer")
    left, right = figure.subplots(1, 2)
    for (name, trace), colour in zip(named.items(), (BLUE, VERMILLION, *OKABE_ITO), strict=False):
        layers = range(len(trace.outputs))
        norms = np.stack([numbers(t.patches[sample].norm(dim=-1)) for t in trace.outputs])
        lines = {
            "max": ("-", norms.max(1)),
            "99th percentile": ("--", np.quantile(norms, 0.99, 1)),
            "median": (":", np.median(norms, 1)),
        }
        tail = f", {name}" if name else ""
        for statistic, (style, values) in lines.items():
            left.plot(layers, values, style, color=colour, label=statistic + tail, marker=".")
        shares = [trace.cls_row(i)[sample].mean(0) for i in layers]  # (N,) each
        few = math.ceil(TOP * norms.shape[1])
        peaks = [float(share.topk(few).values.sum()) for share in shares]
        label = f"{TOP:.0%} most attended patches{tail}"
        right.plot(layers, peaks, "-", color=colour, label=label, marker=".")
    right.axhline(TOP, color="black", linestyle=":", linewidth=1, label="if all were equal")
    left.set(yscale="log", xlabel="layer (output of block)", ylabel="L2 norm of patch tokens")
    right.set(ylim=(0, 1.02), xlabel="layer (block)", ylabel="share of class-token attention")
    for set_formatter in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        set_formatter(LogFormatter())  # 200, not 2 x 10^2
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, edgecolor="none")
    return figure


def _with_image(
    image: np.ndarray, trace: Trace, layers: Sequence[int], title: str
) -> tuple[Figure, np.ndarray]:
    """A row of panels: the picture, and one per layer."""
    ratio = image.shape[0] / image.shape[1]
    figure, grid = panels(1, len(layers) + 1, ratio, title, extra=1.2)
    draw_image(grid[0, 0], image, trace.vit.patch)
    grid[0, 0].set_title("image", fontsize=9)
    return figure, grid[0]
