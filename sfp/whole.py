"""What windows were cut from: their image, where they lie in it, and its regions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfp.functional.windows import WindowGrid

UNSEGMENTED = 0  # the id of pixels in no region
PADDING = torch.iinfo(torch.int32).max  # the id of pixels around an image


@dataclass(frozen=True)
class WholeImage:
    """The image of all windows of a `Trace`.

    Attributes:
        grid: where the windows lie, in their order.
        source: the image, (3, H, W).
        prepare: makes it ready for the network, as a window is made.
        regions: ids of its pixels, (H, W) int64, or None.
    """

    grid: WindowGrid
    source: Tensor
    prepare: Callable[[Tensor], Tensor] = lambda image: image
    regions: Tensor | None = None

    def cut(self, place: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
        """The window at a place, ready for the network, and its ids; both padded."""
        window = self.grid.cut(self.source, place, self.prepare)
        if self.regions is None:
            return window, None
        (y, x), (height, width) = place, self.grid.window
        return window, self.grid.pad(self.regions[y : y + height, x : x + width], PADDING)

    @property
    def pixels(self) -> Tensor:
        """The normalised image with the padding that its windows have, (3, H', W')."""
        return self.grid.pad(self.prepare(self.source))

    @property
    def ids(self) -> Tensor | None:
        """The ids with that padding, (H', W')."""
        return None if self.regions is None else self.grid.pad(self.regions, PADDING)
