"""What windows were cut from: their image, where they lie in it, and its regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.windows import WindowGrid, nearest

UNSEGMENTED = 0  # the id of pixels in no region
PADDING = torch.iinfo(torch.int32).max  # the id of pixels around an image
MASK_PIXELS = 2**18  # that masks which are made of ids have at most


@dataclass(frozen=True)
class WholeImage:
    """The image of all windows of a `Trace`.

    Attributes:
        grid: where the windows lie, in their order.
        source: the image, (3, H, W).
        prepare: makes it ready for the network, as a window is made.
        regions: ids of its pixels, (H, W) int64; or masks that may overlap, (R, h, w) of any size,
            floats whose values above 0 are inside; or None.
    """

    grid: WindowGrid
    source: Tensor
    prepare: Callable[[Tensor], Tensor] = lambda image: image
    regions: Tensor | None = None

    def cut(self, place: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The window at a place, ready for the network, and its ids; both padded."""
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
        """The normalised image with the padding that its windows have, (3, H', W')."""
        return self.grid.pad(self.prepare(self.source))

    @property
    def ids(self) -> Tensor | None:
        """The ids with that padding, (H', W'); None without regions, and for masks."""
        if self.regions is None or self.regions.ndim == 3:
            return None
        return self.grid.pad(self.regions, PADDING)

    @property
    def masks(self) -> Tensor | None:
        """The regions as masks with that padding, (R, h, w) float32 of any size; of ids in order."""
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
