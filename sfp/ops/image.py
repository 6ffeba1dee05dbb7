"""Image stages, `(trace of all windows of an image, *, knobs) -> the trace for readouts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sfp.functional.windows import WindowGrid
from sfp.registry import op
from sfp.tokens import Tokens
from sfp.trace import GuideError, Trace
from sfp.whole import WholeImage

# what guides offer that look at images as they are: SAM, CLIPSeg, SAM 3
OF_PIXELS = (
    "last_attention",
    "scores",
    "encode",
    "encode_in_context",
    "embed",
    "presence",
    "detect",
)


def window_grid(trace: Trace) -> WindowGrid:
    """The positions of a trace's windows in their image.

    Raises:
        LookupError: if the trace does not hold all windows of one image.
    """
    if trace.whole is None:
        raise LookupError(
            "all windows of an image are needed in one trace: pass whole=WholeImage(...)"
        )
    return trace.whole.grid


@op("image", whole=True)
def canvas(trace: Trace, *, floor: bool = False) -> Trace:
    """Stitches the windows' tokens into one grid of the whole image, which is read like a window.

    In every layer, each cell is the mean of the windows' patches that cover it, weighted by area;
    prefix tokens are averaged over windows. A method's last block then attends across windows. This
    generalises what OV-Stitcher (CVPR 2026 Findings) does for one method. Guides still see windows, and
    their outputs are stitched too. No effect with a single window.

    Args:
        floor: move windows back to whole cells of the grid, as in the releases of OV-Stitcher and
            Trident, instead of using their exact positions.
    """
    whole = trace.whole
    assert whole is not None

    def on_canvas(marks: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches that most of the windows covering them mark, (B, N) -> (1, N')."""
        return stitched(marks.unflatten(1, grid)[:, None].float()).flatten(1) > 0.5

    def stitched(maps: Tensor) -> Tensor:
        return whole.grid.stitch(maps, floor=floor)

    def tokens(x: Tokens) -> Tokens:
        maps = stitched(x.as_map())  # (1, D, h, w)
        prefix = x.data[:, : x.prefix].mean(0, keepdim=True)
        hidden = None if x.hidden is None else on_canvas(x.hidden, x.grid)
        data = torch.cat([prefix, maps.flatten(2).mT], dim=1)
        return replace(x, data=data, grid=(maps.shape[2], maps.shape[3]), hidden=hidden)

    def guide(name: str) -> Callable[..., Tokens]:
        def look(image: Tensor, output: str | None = None) -> Tokens:
            if output != "stitched":
                return tokens(trace.guide(name, output))
            across: Callable[..., Tokens] | None = getattr(trace.guides[name], "across", None)
            if across is None:
                raise GuideError(f"the guide {name!r} has no last block to stitch: `across`")
            return across(trace.guide(name, "entering"), tokens)

        for of_pixels in OF_PIXELS:
            if hasattr(trace.guides[name], of_pixels):
                setattr(look, of_pixels, getattr(trace.guides[name], of_pixels))
        return look

    layers = [trace.entering(i) for i in range(trace.depth_run)]
    other = trace.like(
        whole.pixels[None],
        [tokens(x) for x in layers],
        {i: on_canvas(mask, trace.embedded.grid) for i, mask in trace.masks.items()},
        regions=None if whole.ids is None else whole.ids[None],
        whole=WholeImage(whole.grid.whole, whole.source, whole.prepare, whole.regions),
    )
    other.windows = trace
    other.guides = {name: guide(name) for name in trace.guides}
    return other
