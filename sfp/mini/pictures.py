"""The pictures of the mini world's outliers: `python -m sfp.mini.pictures --out docs/images`.

* mini_sheet.png: drawn scenes, their truth, and the labels of plain CLIP, SCLIP and SFP;
* mini_outliers.png: class-token attention, attention between patches and norms by block, before and
  after purification;
* mini_modules.png: the rows of the poster's ablation with and without SOM.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

import sfp
from sfp.files import atomic_write
from sfp.mini.acceptance import ROWS
from sfp.mini.scenes import CLASSES, PALETTE, scene
from sfp.overlay import Panel
from sfp.trace import Trace
from sfp.visualize.canvas import draw_image, draw_map, numbers, panels
from sfp.visualize.sheets import picture_sheet
from sfp.visualize.tokens import as_map

SHEET = (900_000, 900_004, 900_009, 900_010, 900_016, 900_021)
MODULES = SHEET[:4]
SCENE = 900_009
LAYERS = (5, 7, 9, 10)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "plain CLIP": dict(type="clip"),
    "SCLIP": dict(type="sclip"),
    "SFP": dict(type="sfp"),
}


def sheet(
    model: sfp.Model, seeds: Sequence[int], methods: Mapping[str, Mapping[str, Any]], path: Path
) -> None:
    """Writes scenes with their truth and the labels of some methods.

    Args:
        model: model that was trained on the scenes' names.
        seeds: seeds of the scenes.
        methods: arguments for `build_method`, by title.
        path: PNG file to write.
    """
    columns: dict[str, list[Panel]] = {title: [] for title in ("image", "truth", *methods)}
    for seed in seeds:
        image, labels = scene(seed)
        columns["image"].append(Panel(image))
        columns["truth"].append(Panel(image, labels))
        for title, method in methods.items():
            found = model.segment(image, CLASSES, method=method).labels
            columns[title].append(Panel(image, np.asarray(found)))
    picture_sheet(columns, CLASSES, PALETTE, path)


def modules() -> dict[str, dict[str, Any]]:
    """The poster's rows, each without SOM and with it, by title."""
    pairs = {
        "qk": ("none", "som"),
        "SAE": ("sae", "som_sae"),
        "SAE + HAI": ("sae_hai", "som_sae_hai"),
    }
    return {
        title + som: dict(type="sfp_paper", **ROWS[row])
        for title, rows in pairs.items()
        for som, row in zip(("", ", SOM"), rows, strict=True)
    }


def outliers(image: np.ndarray, before: Trace, after: Trace, layers: Sequence[int]) -> Figure:
    """The effect of outliers on attention and norms, before and after purification.

    Args:
        image: (H, W, 3) uint8.
        before, after: its runs, without and with purification.
        layers: blocks, from 0.
    """
    ratio = image.shape[0] / image.shape[1]
    figure, grid = panels(6, 1 + len(layers), ratio, "Outlier tokens of the mini CLIP", extra=0.75)
    for row, axes in enumerate(grid):
        what, trace = row // 2, (before, after)[row % 2]
        draw_image(axes[0], image, trace.vit.patch)
        name = ("class-token attention", "attention between patches", "norms")[what]
        axes[0].set_title(f"{name}\n{('before', 'after')[row % 2]} purification", fontsize=9)
        for panel, i in zip(axes[1:], layers, strict=True):
            (_class_map, _matrix, _norms)[what](panel, before, trace, i)
            panel.set_title(f"block {i}", fontsize=9)
    return figure


def _class_map(axes: Any, before: Trace, trace: Trace, i: int) -> None:
    scale = Normalize(0, float(before.cls_row(i)[0].mean(0).max()))
    share = as_map(trace, trace.cls_row(i)[0].mean(0))
    draw_map(axes, share, "share of attention", norm=scale, ticks=PercentFormatter(1))


def _matrix(axes: Any, before: Trace, trace: Trace, i: int) -> None:
    prefix = trace.embedded.prefix
    first, weights = (numbers(t.mean_attention(i)[0, prefix:, prefix:]) for t in (before, trace))
    draw_map(axes, weights, "weight", norm=LogNorm(first.max() / 1e3, first.max(), clip=True))
    axes.set_xlabel("attended patch", fontsize=8)


def _norms(axes: Any, before: Trace, trace: Trace, i: int) -> None:
    scale = Normalize(0, float(before.outputs[i].patches[0].norm(dim=-1).max()))
    norms = as_map(trace, trace.outputs[i].patches[0].norm(dim=-1))
    draw_map(axes, norms, "L2 norm", cmap="cividis", norm=scale)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="mini", help='a checkpoint, or "mini"')
    parser.add_argument("--out", type=Path, required=True, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        model = sfp.load(args.weights, short_side=224)
        sheet(model, SHEET, METHODS, args.out / "mini_sheet.png")
        sheet(model, MODULES, modules(), args.out / "mini_modules.png")
        image, _ = scene(SCENE)
        before, after = (model.trace(image, method=name) for name in ("clip", "sfp_paper"))
        with atomic_write(args.out / "mini_outliers.png") as path:
            outliers(image, before, after, LAYERS).savefig(path, format="png")
    for name in ("mini_sheet.png", "mini_modules.png"):
        with atomic_write(args.out / name) as path:  # 256 colours are a third of the bytes
            Image.open(args.out / name).convert("RGB").quantize(256).save(path, format="PNG")
    print(f"mini_sheet.png, mini_modules.png, mini_outliers.png in {args.out}")


if __name__ == "__main__":
    main()
