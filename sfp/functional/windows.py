"""Sliding windows, and their logits merged and upsampled by two sparse matrices.

Every step from a window's patch logits to the final image is linear and acts separately on rows and
columns: upsampling to the window, placing it, dividing by the number of windows that cover a pixel (the
product of a row count and a column count, because the windows form a grid), and resizing to the
original image. So the whole chain is `rows @ tiles @ columns.T` with two matrices that depend only on
sizes. It needs no full-resolution windows and no accumulator, and any slab of the result can be
computed separately.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.kept import kept

T = TypeVar("T")
PIXELS = 2**20  # merged at once; each takes about 50 bytes of indices and weights


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Starts of windows along one side; the last is shifted inside, as in mmseg.

    Raises:
        ValueError: if the stride would leave pixels uncovered.
    """
    if not 0 < stride <= crop:
        raise ValueError(f"stride {stride} must be between 1 and the crop, {crop} pixels")
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def interpolation(source: int, target: int, like: Tensor) -> Tensor:
    """Bilinear resampling along one side (`align_corners=False`) as a matrix, (target, source).

    It has the dtype and device of `like`. It may be cached, so do not modify it.
    """
    return kept(source * target, _interpolation, like, source, target)


def _interpolation(like: Tensor, source: int, target: int) -> Tensor:
    eye = torch.eye(source, dtype=torch.float64, device="cpu")[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].T.to(like)


def from_square(cells: int, side: int, inner: int, target: int, like: Tensor) -> Tensor:
    """The matrix that resamples one side of maps of a padded square to an image, (target, cells).

    Maps are resampled to the square, cropped to remove the padding, and resampled to the image, both
    bilinearly.

    Args:
        cells: cells of the maps along this side.
        side: side of the square in pixels.
        inner: pixels of the square that the image takes; the rest is padding.
        target: pixels of the image along this side.
        like: type and device of the result.
    """
    padded = interpolation(cells, side, like.new_empty(0, dtype=torch.float64))[:inner]
    return F.interpolate(padded.T[None], target, mode="linear", align_corners=False)[0].T.to(like)


def nearest(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes a map of integers (..., h, w) by nearest neighbour: (..., H, W).

    Row i comes from row floor(i * h / H), and so do columns.
    """
    rows, columns = (
        torch.arange(size[i], device=ids.device) * ids.shape[i - 2] // size[i] for i in range(2)
    )
    return ids[..., rows[:, None], columns]


def squeezed(
    image: Tensor,
    size: tuple[int, int],
    resample: Literal["bicubic", "bilinear"] = "bicubic",
) -> Tensor:
    """Resizes images (B, C, H, W), ignoring their aspect ratio: (B, C, h, w).

    Args:
        image: floats.
        size: rows and columns.
        resample: "bicubic" with antialiasing, or "bilinear" without.
    """
    if image.shape[-2:] == size:
        return image
    smooth = resample == "bicubic"
    return F.interpolate(image, size, mode=resample, align_corners=False, antialias=smooth)


def merge_matrix(
    starts: Sequence[int], window: int, cells: int, length: int, target: int, padding: int = 0
) -> Tensor:
    """The chain from patch logits to the final image along one side, as a matrix.

    Args:
        starts: first pixel of each window.
        window: pixels of a window.
        cells: patches of a window.
        length: pixels of the network's input.
        target: pixels of the final image.
        padding: pixels by which each window was padded, half of them (rounded down) in front.

    Returns:
        (target, len(starts) * cells) float64, on the host.
    """
    placed = torch.zeros(length, len(starts), cells, dtype=torch.float64, device="cpu")
    covered = torch.zeros(length, 1, dtype=torch.float64, device="cpu")
    up = _interpolation(placed, cells, window + padding)[padding // 2 :][:window]
    for i, start in enumerate(starts):
        placed[start : start + window, i] = up
        covered[start : start + window] += 1
    merged = placed.flatten(1) / covered  # (length, windows * cells)
    # resampled column by column, since `interpolation` would need a matrix of length x target
    return F.interpolate(merged.T[None], target, mode="linear", align_corners=False)[0].T


@dataclass(frozen=True)
class Side:
    """The matrix for one side of an image, from the cells of all windows along it to its pixels.

    Nearly all of it is zero: a pixel depends on two cells of each window that covers it. So only the
    nonzero weights are kept, in the order of the pixels.

    Attributes:
        cells: the cell of each weight, int32.
        weights: the weights.
        first: for each pixel, which weight is its first, int32.
        bounds: the same and the number of weights, on the host.
    """

    cells: Tensor
    weights: Tensor
    first: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, like: Tensor, *merged: Any) -> Side:
        """From `merge_matrix` with these arguments, with the dtype and device of `like`."""
        matrix = merge_matrix(*merged)
        used = matrix != 0
        bounds = F.pad(used.sum(1).cumsum(0), (1, 0))
        cells, first = (x.to(like.device, torch.int32) for x in (used.nonzero()[:, 1], bounds[:-1]))
        return cls(cells, matrix[used].to(like), first, tuple(bounds.tolist()))

    def __len__(self) -> int:
        return len(self.first)

    def resample(self, maps: Tensor, start: int, stop: int) -> Tensor:
        """Pixels start to stop of many maps.

        Args:
            maps: the cells of this side, another side, and channels: (cells, M, C), contiguous.

        Returns:
            (M, stop - start, C), contiguous.
        """
        many = maps.shape[1]
        begin, end = self.bounds[start], self.bounds[stop]
        each = torch.arange(many, dtype=torch.int32, device=maps.device)[:, None]
        cells = self.cells[begin:end] * many + each  # (M, weights)
        first = self.first[start:stop] - begin + each * (end - begin)  # (M, stop - start)
        pixels = F.embedding_bag(
            cells.flatten(),
            maps.flatten(0, 1),
            first.flatten(),
            per_sample_weights=self.weights[begin:end].repeat(many),
            mode="sum",
        )
        return pixels.unflatten(0, (many, stop - start))

    def cpu(self) -> Side:
        """A copy in the host's memory."""
        return Side(self.cells.cpu(), self.weights.cpu(), self.first.cpu(), self.bounds)


def overlaps(
    starts: Sequence[int], window: int, cells: int, length: int, canvas: int, *, floor: bool = False
) -> Tensor:
    """The overlap in pixels of each canvas cell with each window's cells, along one side.

    Args:
        starts: first pixel of each window.
        window: pixels of a window, which its cells divide evenly.
        cells: number of cells of a window.
        length: pixels of the canvas, which its cells divide evenly.
        canvas: number of cells of the canvas.
        floor: move a window's cells back to whole cells of the canvas, as in the releases; this shifts
            them by up to one cell if origins are not multiples of it.

    Returns:
        (canvas, windows, cells) float64.
    """
    if floor:
        first = torch.tensor([start // (window // cells) for start in starts], device="cpu")
        at = first[:, None] + torch.arange(cells, device="cpu")  # (windows, cells)
        return (torch.arange(canvas, device="cpu")[:, None, None] == at).double()
    edges = torch.arange(cells + 1, dtype=torch.float64, device="cpu") * (window / cells)
    own = (
        edges + torch.tensor(starts, dtype=torch.float64, device="cpu")[:, None]
    )  # (windows, cells + 1)
    whole = torch.arange(canvas + 1, dtype=torch.float64, device="cpu")[:, None, None] * (
        length / canvas
    )
    ends, begins = (torch.minimum(whole[1:], own[:, 1:]), torch.maximum(whole[:-1], own[:, :-1]))
    return (ends - begins).clamp_min(0)


def _overlaps(like: Tensor, *args: Any) -> Tensor:
    *where, floor = args
    return overlaps(*where, floor=floor)


def _stitching(like: Tensor, *args: Any) -> Tensor:
    """Matrix from all windows' cells to canvas cells along one side, (canvas, windows * cells)."""
    return F.normalize(_overlaps(like, *args).flatten(1), p=1, dim=1).to(like)


def _unstitching(like: Tensor, *args: Any) -> Tensor:
    """Matrix from canvas cells to all windows' cells along one side, (windows * cells, canvas)."""
    return F.normalize(_overlaps(like, *args).movedim(0, -1), p=1, dim=-1).flatten(0, 1).to(like)


def _padding(side: int, multiple: int, least: int) -> int:
    return max(-side % multiple, least - side)


@dataclass(frozen=True)
class WindowGrid:
    """The positions of the windows of one image.

    Attributes:
        size: rows and columns of the image, in pixels.
        window: rows and columns of every window.
        ys, xs: first rows and first columns; windows are all combinations of both.
        padding: rows and columns of zeros around each window, half of them in front.
        direct: resize logits from patches directly to the output size, not via the image's own size.
        shape: rows and columns to which windows are resized; None does not resize them.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    ys: list[int]
    xs: list[int]
    padding: tuple[int, int] = (0, 0)
    direct: bool = False
    shape: tuple[int, int] | None = None

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
            size: rows and columns of the image.
            crop: side of windows; 0 for the whole image, whose logits are resized directly to the
                output size, as in the official code.
            stride: pixels between windows.
            multiple: windows are padded to multiples of this (ClearCLIP: of the patch).
            least: smaller windows are padded to this side (one patch, as less has no token).
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

    @classmethod
    def tiles(cls, size: Sequence[int], crop: int, shape: Sequence[int]) -> WindowGrid:
        """Equal windows that cover an image and overlap by less than a pixel each.

        As many as windows of side `crop` fit into each side of the image, at least one.

        Args:
            size: rows and columns of the image.
            crop: approximate side of a window in pixels.
            shape: rows and columns to which each window is resized.
        """
        height, width = int(size[0]), int(size[1])
        counts = [max(length // crop, 1) for length in (height, width)]
        window = [-(-length // n) for length, n in zip((height, width), counts, strict=True)]
        ys, xs = (
            [i * (length - part) // max(n - 1, 1) for i in range(n)]
            for length, part, n in zip((height, width), window, counts, strict=True)
        )
        return cls(
            (height, width), (window[0], window[1]), ys, xs, shape=(int(shape[0]), int(shape[1]))
        )

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
        """The window of an image (C, H, W) at a place, prepared, resized, and padded with zeros."""
        y, x = place
        window = prepare(image[:, y : y + self.window[0], x : x + self.window[1]])
        if self.shape is not None:
            window = squeezed(window[None], self.shape)[0]
        return self.pad(window) if any(self.padding) else window

    @property
    def key(self) -> Hashable:
        """Equal for grids with the same windows."""
        return self.size, self.window, tuple(self.ys), tuple(self.xs), self.padding, self.shape

    @property
    def whole(self) -> WindowGrid:
        """The image as one window, with the padding that its windows have."""
        return replace(self, window=self.size, ys=[0], xs=[0], shape=None)

    def canvas(self, cells: tuple[int, int], *, floor: bool = False) -> tuple[int, int]:
        """Rows and columns of the whole image in cells about as large as those of its windows.

        Args:
            cells: rows and columns of a window.
            floor: as in `overlaps`.
        """
        sides = []
        for i in range(2):
            window, length = (x[i] + self.padding[i] for x in (self.window, self.size))
            cell = window // cells[i] if floor else window / cells[i]
            sides.append(int(length / cell + 1e-9))
        return sides[0], sides[1]

    def stitch(self, maps: Tensor, *, floor: bool = False) -> Tensor:
        """Maps of all windows as one map of the whole image, padding included.

        Each cell is the mean of the windows' cells that cover it, weighted by area.

        Args:
            maps: (windows, D, h, w), in the order of `places`.
            floor: as in `overlaps`.

        Returns:
            (1, D, rows, columns) on the grid that `canvas` says.
        """
        tiles = maps.unflatten(0, (len(self.ys), len(self.xs)))
        tiles = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (ys * h, xs * w, D)
        rows, columns = self._sides(_stitching, maps.shape[-2:], floor, tiles)
        narrow = rows @ tiles.flatten(1)  # (rows, xs * w * D)
        return (columns @ narrow.unflatten(1, tiles.shape[1:])).permute(2, 0, 1)[None]

    def unstitch(self, canvas: Tensor, cells: tuple[int, int], *, floor: bool = False) -> Tensor:
        """The windows' cells cut out of a map of the whole image, the inverse of `stitch`.

        Each is the mean of the canvas' cells that it covers, weighted by area.

        Args:
            canvas: (1, D, rows, columns).
            cells: rows and columns of a window.
            floor: as in `overlaps`.

        Returns:
            (windows, D, h, w).
        """
        rows, columns = self._sides(_unstitching, cells, floor, canvas)
        cut = rows @ canvas[0] @ columns.T  # (D, ys * h, xs * w)
        cut = cut.unflatten(2, (len(self.xs), cells[1])).unflatten(1, (len(self.ys), cells[0]))
        return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)

    def _sides(
        self, make: Callable[..., T], cells: Sequence[int], floor: bool, like: Tensor
    ) -> list[T]:
        """The results of `make` for the arguments of `overlaps`, for both sides."""
        canvas = self.canvas((cells[0], cells[1]), floor=floor)
        made = []
        for i, starts in enumerate((self.ys, self.xs)):
            window, length = (x[i] + self.padding[i] for x in (self.window, self.size))
            numbers = canvas[i] * len(starts) * cells[i]
            where = (tuple(starts), window, cells[i], length, canvas[i], floor)
            made.append(kept(numbers, make, like, *where))
        return made

    def placements(self, cells: tuple[int, int]) -> Iterator[Tensor]:
        """How much of each canvas cell each window's cells cover, 0 to 1: (M, N) float64 of each.

        Args:
            cells: rows and columns of a window.
        """
        rows, columns = self._sides(
            _overlaps, cells, False, torch.empty(0, device="cpu")
        )  # (canvas, windows, cells)
        cell = [
            (self.size[i] + self.padding[i]) / len(part) for i, part in enumerate((rows, columns))
        ]
        for y, x in product(range(len(self.ys)), range(len(self.xs))):
            yield torch.kron(rows[:, y] / cell[0], columns[:, x] / cell[1])

    def positions(self, cells: tuple[int, int]) -> Tensor:
        """Where the centres of all windows' cells lie in the image.

        Args:
            cells: rows and columns of a window.

        Returns:
            Rows and columns in pixels, (windows * cells, 2) float64, on the host.
        """
        sides = []
        for i, starts in enumerate((self.ys, self.xs)):
            cell = (self.window[i] + self.padding[i]) / cells[i]
            centres = (torch.arange(cells[i], dtype=torch.float64, device="cpu") + 0.5) * cell
            first = torch.tensor(starts, dtype=torch.float64, device="cpu") - self.padding[i] // 2
            sides.append(first[:, None] + centres)  # (windows, cells)
        rows = sides[0][:, None, :, None].expand(-1, len(self.xs), -1, cells[1])
        columns = sides[1][None, :, None, :].expand(len(self.ys), -1, cells[0], -1)
        return torch.stack([rows, columns], -1).flatten(0, -2)

    def pad(self, maps: Tensor, value: float = 0) -> Tensor:
        """Maps (..., h, w) in pixels with the padding of a window around them."""
        front = [side // 2 for side in self.padding]
        back = [side - side // 2 for side in self.padding]
        return F.pad(maps, (front[1], back[1], front[0], back[0]), value=value)

    def sheet(self, logits: Tensor, target: tuple[int, int]) -> LogitSheet:
        """Patch logits of all windows, (windows, Q, h, w), merged for an output size."""
        tiles = logits.unflatten(0, (len(self.ys), len(self.xs)))
        tiles = tiles.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # (ys * h, xs * w, Q)
        via, window = (target, target) if self.direct else (self.size, self.window)
        cells = logits.shape[2:]
        rows, columns = (
            kept(
                4 * target[i],
                Side.of,
                tiles,
                *(tuple(starts), window[i], cells[i], via[i], target[i], self.padding[i]),
            )
            for i, starts in enumerate((self.ys, self.xs))
        )
        return LogitSheet(tiles, rows, columns)


@dataclass(frozen=True)
class LogitSheet:
    """An image's query logits, kept at patch resolution; any slab of rows is rendered on demand.

    Attributes:
        tiles: (R, S, Q), the patches of all windows side by side.
        vertical: resampling from R cells to H pixels.
        horizontal: resampling from S cells to W pixels.
        regions: ids (H, W) of regions whose pixels finally take their most frequent label, or None.
    """

    tiles: Tensor
    vertical: Side
    horizontal: Side
    regions: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return len(self.vertical), len(self.horizontal)

    def cpu(self) -> LogitSheet:
        """A copy in the host's memory."""
        regions = None if self.regions is None else self.regions.cpu()
        return LogitSheet(self.tiles.cpu(), self.vertical.cpu(), self.horizontal.cpu(), regions)

    def rows(self, start: int, stop: int) -> Tensor:
        """Logits of output rows start to stop, (Q, stop - start, W), a pixel's adjacent in memory."""
        width, queries = len(self.horizontal), self.tiles.shape[2]
        step = max(PIXELS // width, 1)
        if stop - start <= step:
            return self._rows(start, stop).permute(2, 0, 1)
        merged = self.tiles.new_empty(stop - start, width, queries)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            merged[at - start : end - start] = self._rows(at, end)
        return merged.permute(2, 0, 1)

    def _rows(self, start: int, stop: int) -> Tensor:
        part = self.vertical.resample(self.tiles, start, stop)  # (S, stop - start, Q)
        return self.horizontal.resample(part, 0, len(self.horizontal))  # (stop - start, W, Q)
