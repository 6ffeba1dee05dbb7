"""OV-Stitcher: CorrCLIP over the whole image (CVPR 2026 Findings).

Three quantities are stitched from windows to grids of the whole image: the input of the guide's last
block, the values of CLIP's last block, and the input of its late blocks. The guide's last block, the
attention within regions and the late blocks then span all windows. Region tokens are computed window by
window, and are stitched after they are placed on the patches.

Three details of the release look like mistakes. The residual of the guide's last block is its input
after the guide's final norm (`TransformersGuide`, output "stitched"); the late blocks attend with one
head of full width and the scale of a small one (`one_head`); windows are moved to whole cells of each
grid (`floor`). The release supports only square windows, and images no smaller than a window. It runs
windows of 336 pixels (stride 112; Stuff 224), and adds to the 80 templates sentences of a language
model for each class.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.blocks import Block, weighted_values
from sfp.functional.windows import nearest
from sfp.kinds import Rule
from sfp.methods.corrclip import late_range, merged_regions, on_guide, tokens_of_regions
from sfp.ops.image import window_grid
from sfp.registry import METHODS, Count, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace


def stitched(trace: Trace, maps: Tensor, grid: tuple[int, int], *, floor: bool) -> Tokens:
    """Patches of all windows (W, N, D) on one grid of the image, (1, N', D)."""
    joined = window_grid(trace).stitch(maps.mT.unflatten(2, grid), floor=floor)
    return Tokens(joined.flatten(2).mT, (joined.shape[2], joined.shape[3]), prefix=0)


def stitched_heads(trace: Trace, block: Block, i: int, *, floor: bool) -> tuple[Tokens, Heads]:
    """The input tokens of a block and their projections, both stitched.

    As projections are linear, those of averaged normalised tokens are the averages of the windows'.

    Args:
        trace: trace of the windows.
        block: block number `i` of the model.
        i: absolute layer.
        floor: as in `canvas`.
    """
    entering = trace.entering(i).only_patches()
    x = stitched(trace, entering.data, entering.grid, floor=floor)
    normalised = stitched(trace, block.ln_1(entering.data), entering.grid, floor=floor)
    heads = block.heads(x)
    return x, Heads(
        heads.project, normalised.data, heads.scale, x.grid, x.prefix, rotate=heads.rotate
    )


@op("source", whole=True)
def stitched_blocks(
    trace: Trace, *, count: Count | None = None, one_head: bool = True, floor: bool = False
) -> Tokens:
    """Mean of the outputs of late blocks, run on their stitched input tokens, (1, N, D).

    Each block runs with its residual and FFN on the grid of the whole image, without class token.

    Args:
        count: number of blocks, as in `late_layers`.
        one_head: whether to use one head of full width with the scale of a small one (the release)
            instead of the block's own heads.
        floor: as in `canvas`.

    Raises:
        ValueError: as `late_layers`.
    """
    windows = trace.windows or trace
    outputs = []
    for i in late_range(len(trace.vit.blocks), count):
        block = trace.vit.blocks[i]
        x, heads = stitched_heads(windows, block, i, floor=floor)
        q, k, v = heads.all()  # (1, H, N, d)
        if one_head:
            q, k, v = (y.transpose(1, 2).flatten(2)[:, None] for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, scale=heads.scale)
        y = x.data + block.attn.join(mixed.transpose(1, 2).flatten(2))
        outputs.append(y + block.mlp(block.ln_2(y)))
    return x.with_data(torch.stack(outputs).mean(0))


@op("reader", whole=True)
def stitched_values(
    trace: Trace,
    *,
    attention: Rule,
    layout: str | None = None,
    layout_output: str | None = None,
    floor: bool = False,
) -> Tokens:
    """The windows' values of the last block, stitched and mixed on the whole grid, (1, M, D).

    Args:
        attention: attention rule for the weights.
        layout, layout_output: guide whose grid the weights' rows are on, as in `Readout`.
        floor: as in `canvas`.
    """
    block = trace.vit.blocks[-1]
    x, heads = stitched_heads(trace.windows or trace, block, len(trace.vit.blocks) - 1, floor=floor)
    out = x if layout is None else trace.guide(layout, layout_output)
    return out.with_data(block.attn.join(weighted_values(attention(heads, trace), heads.v)))


@op("reader", whole=True, regions=True)
def stitched_region_tokens(
    trace: Trace,
    *,
    guide: str = "dino",
    output: str | None = "stitched",
    eps: float | None = 0.2,
    unsegmented: Literal["zero", "smallest"] = "zero",
    floor: bool = False,
) -> Tokens:
    """Region tokens of each window, placed on the guide's grid and stitched, (1, M, D).

    Regions are merged over the whole image. In a window where a region has no patch, its token is
    computed from the class token alone and not used.

    Args:
        guide, output, eps, unsegmented: as in `region_tokens`.
        floor: as in `canvas`.
    """
    windows = trace.windows or trace
    layout = trace.guide(guide, output)  # of the whole image
    ids = trace.once(merged_regions, guide=guide, output=output, eps=eps, unsegmented=unsegmented)
    own = window_regions(windows, ids.unflatten(1, layout.grid)[0])
    tokens = tokens_of_regions(windows, own, count=int(ids.max()) + 1)
    cells = windows.guide(guide, "entering" if output == "stitched" else output).grid
    painted = on_guide(own, tokens, windows.embedded.grid, cells)
    return stitched(windows, painted, cells, floor=floor)


def window_regions(windows: Trace, ids: Tensor) -> Tensor:
    """Resamples regions on a grid of the whole image, (h, w), to the patches of each window, (W, N).

    They are resized to the image's pixels, cropped, and resized to the patches, by nearest neighbour.
    """
    grid = window_grid(windows)
    pixels = nearest(ids, (grid.size[0] + grid.padding[0], grid.size[1] + grid.padding[1]))
    rows, columns = (grid.window[i] + grid.padding[i] for i in range(2))
    cut = torch.stack([pixels[y : y + rows, x : x + columns] for y, x in grid.places])
    return nearest(cut, windows.embedded.grid).flatten(1)


@METHODS.register_module()
def ov_stitcher(
    *,
    guide: str = "dino",
    output: str | None = "stitched",
    gain: float = 4.0,
    eps: float | None = 0.2,
    late: Count | None = None,
    one_head: bool = True,
    spatial: float = 1.0,
    semantic: float = 0.5,
    correct: bool = True,
    floor: bool = True,
    unsegmented: Literal["zero", "smallest"] = "zero",
) -> dict[str, Any]:
    """CorrCLIP's streams on one grid of the whole image; needs a guide and regions, as `corrclip`.

    Args:
        guide: name of the guide, which the caller provides.
        output: output of the guide; "stitched" is its last block, run over all windows.
        gain, eps, spatial, semantic, correct, unsegmented: as in `corrclip`.
        late: number of late blocks for the spatial stream; None as in `late_layers`.
        one_head: whether these attend with one head of full width and the scale of a small one.
        floor: whether windows are moved to whole cells of each grid, as in the release; False places
            them by area.
    """
    regions = dict(guide=guide, output=output, eps=eps, unsegmented=unsegmented)
    layout = dict(layout=guide, layout_output=output)
    rule = dict(type="region_scope", gain=gain, **regions)
    blocks = dict(type="stitched_blocks", count=late, one_head=one_head, floor=floor)
    reduced = dict(keep_cls=False, attention=rule, residual=None, ffn=False, **layout)
    streams = [
        (1.0, dict(type="stitched_values", attention=rule, floor=floor, **layout)),
        (spatial, dict(reduced, source=blocks)),
        (semantic, dict(type="stitched_region_tokens", floor=floor, **regions)),
    ]
    used = [(weight, stream) for weight, stream in streams if weight]
    vote = {"zero": "regions", "smallest": "all_but_smallest"}[unsegmented] if correct else "no"
    return dict(
        image=dict(type="canvas", floor=floor),
        readouts=[stream for _, stream in used],
        weights=[weight for weight, _ in used],
        vote=vote,
    )
