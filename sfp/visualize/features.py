"""Pictures of features before and after an edit."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from sfp.ops.mitigators import rings
from sfp.tokens import Tokens, upcast
from sfp.trace import Trace
from sfp.visualize.canvas import draw_image, draw_map, label_patches, mark, numbers, panels


def neighbour_cosine(tokens: Tokens) -> Tensor:
    """Mean cosine similarity of each patch with its up to eight neighbours, (B, N)."""
    unit = F.normalize(upcast(tokens.patches), dim=-1)
    beside = (rings(tokens.grid, unit.device) == 1).to(unit)  # (N, N)
    return (unit @ unit.mT * beside).sum(-1) / beside.sum(-1).clamp_min(1)


def reference_cosine(tokens: Tokens, patch: tuple[int, int]) -> Tensor:
    """Cosine similarity of each patch with the one at (row, column), (B, N)."""
    unit = F.normalize(upcast(tokens.patches), dim=-1)
    n = patch[0] * tokens.grid[1] + patch[1]
    return (unit @ unit[:, n, :, None])[..., 0]


def principal_colours(features: list[Tensor], basis: Tensor) -> list[np.ndarray]:
    """The three main directions of unit patches as red, green and blue.

    Args:
        features: (N, D) each.
        basis: (N, D), patches that determine directions and scales; the same for all, so that equal
            colours mean equal features.

    Returns:
        (N, 3) in 0..1 each.
    """
    unit = F.normalize(upcast(basis), dim=-1)
    centre = unit.mean(0)
    _, _, directions = torch.linalg.svd(unit - centre, full_matrices=False)
    shown = (unit - centre) @ directions[:3].T  # (N, 3)
    low, high = shown.quantile(0.02, dim=0), shown.quantile(0.98, dim=0)
    return [
        numbers(
            (((F.normalize(upcast(x), dim=-1) - centre) @ directions[:3].T - low) / (high - low))
            .nan_to_num()
            .clamp(0, 1)
        )
        for x in features
    ]


def purification(
    image: np.ndarray,
    before: Trace,
    after: Trace,
    layer: int,
    *,
    patch: tuple[int, int] | None = None,
    names: tuple[str, str] = ("before", "after"),
    sample: int = 0,
) -> Figure:
    """The effect of replacing outliers: features as colours, and similarities of patches.

    Args:
        image: the picture, (H, W, 3) uint8.
        before, after: two runs on it, the second with a method that replaces outliers.
        layer: method layer after which outliers were replaced.
        patch: (row, column) of the patch whose similarity to all others is shown; by default the
            middle.
        names: names of the two runs.
        sample: index of the image in the batch.

    Raises:
        LookupError: if the second run replaced nothing there.
    """
    i = after.layer(layer)
    if i not in after.masks:
        raise LookupError(
            f"no outliers were replaced after layer {i}, only after {list(after.masks)}: pass "
            "one of these as layer="
        )
    runs = (before.outputs[i], after.outputs[i])
    grid = runs[0].grid
    patch = patch or (grid[0] // 2, grid[1] // 2)
    chosen = np.zeros(grid, bool)
    chosen[patch] = True
    marked = after.masks[i][sample].unflatten(-1, grid).cpu().numpy()

    title = f"Before and after purification, layer {i}"
    figure, axes = panels(3, 3, image.shape[0] / image.shape[1], title)
    draw_image(axes[0, 2], image, after.vit.patch)
    mark(axes[0, 2], marked)
    axes[0, 2].set_title(f"replaced: {int(marked.sum())} of {marked.size} patches", fontsize=9)
    # the directions come from the purified run, because outliers would dominate one of them
    colours = principal_colours([x.patches[sample] for x in runs], runs[1].patches[sample])
    for ax, values, name in zip(axes[0], colours, names, strict=False):
        ax.imshow(values.reshape(*grid, 3), interpolation="nearest")
        label_patches(ax)
        ax.set_title(f"features as colours, {name}", fontsize=9)

    rows = (
        (axes[1], "cosine with the neighbours", [neighbour_cosine(x) for x in runs], marked),
        (
            axes[2],
            f"cosine with the patch at {patch[0]}, {patch[1]}",
            [reference_cosine(x, patch) for x in runs],
            chosen,
        ),
    )
    for row, unit, pair, framed in rows:
        maps = [numbers(values[sample].unflatten(-1, grid)) for values in pair]
        # the same scale for both, so that they can be compared
        scale = Normalize(min(m.min() for m in maps), max(m.max() for m in maps))
        for ax, values, name in zip(row, maps, names, strict=False):
            draw_map(ax, values, unit, norm=scale)
            ax.set_title(name, fontsize=9)
        change = maps[1] - maps[0]
        most = max(float(abs(change).max()), 1e-6)
        draw_map(row[2], change, "change of the cosine", cmap="PuOr", norm=Normalize(-most, most))
        row[2].set_title(f"{names[1]} minus {names[0]}", fontsize=9)
        for ax in row:
            mark(ax, framed, filled=False)
    return figure
