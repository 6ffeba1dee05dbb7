"""Sliding windows, and their logits merged and upsampled by two small matrix products.

Every step from a window's patch logits to the final image is linear, and acts on rows and columns
separately: upsample to the window, place it, divide by how many windows cover a pixel (a product of a
row count and a column count, because the windows form a grid), resize to the original image. So the
whole chain is `rows @ tiles @ columns.T` with two matrices that depend on sizes only. No
full-resolution window, no accumulator, and any slab of the result can be had alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # pixels of a side above which the merging matrices are used in parts


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows begin along one side; the last is shifted inside, as mmseg does.

    Raises:
        ValueError: if the stride would leave pixels uncovered.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"stride {stride} must be between 1 and the crop, {crop} pixels")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def interpolation(source: int, target: int) -> Tensor:
    """Bilinear resampling along one side (`align_corners=False`) as a matrix, (target, source)."""
    eye = torch.eye(source, dtype=torch.float64)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].T


def merge_matrix(
    starts: list[int], window: int, cells: int, length: int, target: int, padding: int = 0
) -> Tensor:
    """One side of the chain from patch logits to the final image, (target, len(starts) * cells).

    Args:
        starts: first pixel of each window.
        window: pixels of a window.
        cells: patches of a window.
        length: pixels of the network's input.
        target: pixels of the final image.
        padding: pixels that each window was padded by, half of them (rounded down) in front.
    """
    up = interpolation(cells, window + padding)[padding // 2 :][:window]
    placed = torch.zeros(length, len(starts), cells, dtype=torch.float64)
    covered = torch.zeros(length, 1, dtype=torch.float64)
    for i, start in enumerate(starts):
        placed[start : start + window, i] = up
        covered[start : start + window] += 1
    merged = placed.flatten(1) / covered  # (length, windows * cells)
    # resampled column by column: `interpolation` as a matrix would have length x target numbers
    return F.interpolate(merged.T[None], target, mode="linear", align_corners=False)[0].T


def _padding(side: int, multiple: int, least: int) -> int:
    return max(-side % multiple, least - side)


@dataclass(frozen=True)
class WindowGrid:
    """Where the windows of one image lie.

    Attributes:
        size: rows and columns of the image, in pixels.
        window: rows and columns of every window.
        ys, xs: first rows and first columns; each row start meets each column start.
        padding: rows and columns of zeros around each window, half of them in front.
        direct: logits go from patches straight to the output size, not through the image's own.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    ys: list[int]
    xs: list[int]
    padding: tuple[int, int] = (0, 0)
    direct: bool = False

    @classmethod
    def over(
        cls,
        size: Sequence[int],
        crop: int,
        stride: int,
        *,
        multiple: int = 1,
        least: int = 1,
        via_input: bool = False,
    ) -> WindowGrid:
        """Windows of side `crop`, `stride` apart; smaller images are their own window.

        Args:
            size: of the image.
            crop: 0 takes the whole image at once; its logits then go straight to the output size, as
                in the official codes.
            stride: pixels between windows.
            multiple: windows are padded to multiples of it (ClearCLIP: of the patch).
            least: smaller windows are padded to it (one patch: less has no token).
            via_input: whole images go through their own size too (NACLIP).
        """
        height, width = int(size[0]), int(size[1])
        window = (min(crop, height), min(crop, width)) if crop else (height, width)
        ys, xs = ([0], [0])
        if crop:
            ys, xs = (window_starts(length, crop, stride) for length in (height, width))
        padding = (_padding(window[0], multiple, least), _padding(window[1], multiple, least))
        direct = not (crop or via_input or any(padding))
        return cls((height, width), window, ys, xs, padding, direct)

    @property
    def places(self) -> list[tuple[int, int]]:
        """First row and column of every window, in the order that `sheet` expects."""
        return list(product(self.ys, self.xs))

    def cut(
        self,
        image: Tensor,
        place: tuple[int, int],
        prepare: Callable[[Tensor], Tensor] = lambda window: window,
    ) -> Tensor:
        """The window of an image (C, H, W) at a place, prepared and then padded with zeros."""
        y, x = place
        window = prepare(image[:, y : y + self.window[0], x : x + self.window[1]])
        if any(self.padding):
            front = [side // 2 for side in self.padding]
            back = [side - side // 2 for side in self.padding]
            window = F.pad(window, (front[1], back[1], front[0], back[0]))
        return window

    def sheet(self, logits: Tensor, target: tuple[int, int]) -> LogitSheet:
        """Patch logits of all windows, (windows, Q, h, w), merged for an output size."""
        tiles = logits.unflatten(0, (len(self.ys), len(self.xs)))
        tiles = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (ys * h, xs * w, Q)
        via, window = (target, target) if self.direct else (self.size, self.window)
        cells = logits.shape[2:]
        rows, columns = (
            merge_matrix(starts, window[i], cells[i], via[i], target[i], self.padding[i]).to(tiles)
            for i, starts in enumerate((self.ys, self.xs))
        )
        return LogitSheet(tiles, rows, columns)


def _band(matrix: Tensor) -> tuple[slice, Tensor]:
    """The range of columns that hold something else than zero, and the matrix cut to it."""
    used = matrix.any(0).nonzero()
    own = slice(int(used[0]), int(used[-1]) + 1)
    return own, matrix[:, own]


@dataclass(frozen=True)
class LogitSheet:
    """An image's query logits, kept at patch resolution; any slab of rows is rendered on demand.

    Attributes:
        tiles: (R, S, Q), the patches of all windows side by side.
        row_matrix: (H, R).
        column_matrix: (W, S).
    """

    tiles: Tensor
    row_matrix: Tensor
    column_matrix: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return len(self.row_matrix), len(self.column_matrix)

    def cpu(self) -> LogitSheet:
        """The same in the host's memory."""
        return LogitSheet(self.tiles.cpu(), self.row_matrix.cpu(), self.column_matrix.cpu())

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of output rows start to stop, (Q, stop - start, W), a pixel's adjacent in memory."""
        if max(self.size) <= BLOCK:
            own, rows = slice(None), self.row_matrix[start:stop]
            blocks = [(slice(None), self.column_matrix)]
        else:  # almost every product is with zero: only the windows around take part
            own, rows = _band(self.row_matrix[start:stop])
            blocks = [_band(block) for block in self.column_matrix.split(BLOCK)]
        part = rows @ self.tiles[own].flatten(1)  # one product for all columns and queries
        part = part.unflatten(1, self.tiles.shape[1:])  # (stop - start, S, Q)
        parts = [columns @ part[:, own] for own, columns in blocks]  # (stop - start, block, Q)
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).permute(2, 0, 1)
