"""The image from which windows were cut, their positions in it, and its regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.windows import WindowGrid, nearest

UNSEGMENTED = 0  # the id of pixels in no region
PADDING = torch.iinfo(torch.int32).max  # the id of pixels around an image
MASK_PIXELS = 2**18  # largest size of masks made from ids


@dataclass(frozen=True)
class WholeImage:
    """The image from which all windows of a `Trace` were cut.

    Attributes:
        grid: positions of the windows, in order.
        source: the image, (3, H, W).
        prepare: prepares an image or window for the network.
        regions: ids of its pixels, (H, W) int64; or masks that may overlap, (R, h, w) floats of any
            size, above 0 inside; or None.
    """

    grid: WindowGrid
    source: Tensor
    prepare: Callable[[Tensor], Tensor] = lambda image: image
    regions: Tensor | None = None

    def cut(self, place: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The window at a position, prepared for the network, and its ids; both padded."""
        window = self.grid.cut(self.source, place, self.prepare)
        if self.regions is None or self.regions.ndim == 3:
            return window, None
        (y, x), (height, width) = place, self.grid.window
        ids = self.regions[y : y + height, x : x + width]
        if self.grid.shape is not None:
            ids = nearest(ids, self.grid.shape)
        return window, self.grid.pad(ids, PADDING)

    @property
    def pixels(self) -> Tensor:
        """The normalised image with the padding of its windows, (3, H', W')."""
        return self.grid.pad(self.prepare(self.source))

    @property
    def ids(self) -> Tensor | None:
        """The ids with the same padding, (H', W'); None without regions, and for masks."""
        if self.regions is None or self.regions.ndim == 3:
            return None
        return self.grid.pad(self.regions, PADDING)

    @property
    def masks(self) -> Tensor | None:
        """The regions as masks with the same padding, (R, h, w) float32 of any size, ordered by id."""
        masks = self.regions
        if masks is None:
            return None
        if masks.ndim == 2:
            scale = min((MASK_PIXELS / masks.numel()) ** 0.5, 1)
            small = [max(int(side * scale), 1) for side in masks.shape]
            ids = nearest(masks, (small[0], small[1]))
            known = masks.unique()
            known = known[(known != UNSEGMENTED) & (known != PADDING)]
            masks = ids == known[:, None, None]
        masks = masks.float()
        if any(self.grid.padding):
            masks = self.grid.pad(resize(masks, self.grid.size))
        return masks
