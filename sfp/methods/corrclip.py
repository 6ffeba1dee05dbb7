"""CorrCLIP: patches attend within regions (Zhang et al., ICCV 2025, arXiv:2411.10086).

A map of class-agnostic masks determines which patches may attend to each other, and the similarities
of a guide (DINO ViT-B/8) how much. Three streams are normalised, projected and then summed: the values
of the last block, those of the mean of late layers, and one token per region, computed by CLIP's own
blocks from the class token and the region's patches. Finally all pixels of a region take the region's
most frequent label.

The release treats the smallest id in a window (or, in the vote, in an image) as unsegmented, so that
without unsegmented pixels a real region is lost; `unsegmented="smallest"` does the same. It supports
several names for class 0 only; here every class may have several. It runs windows of 336 pixels
(stride 112) padded to multiples of 56 (`pad_windows=56`), MetaCLIP's weights and 80 templates.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.functional.regions import merge_regions
from sfp.functional.windows import nearest
from sfp.methods.proxyclip import to_guide
from sfp.registry import METHODS, Count, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

CHUNK = 2**24  # similarities in memory at once
LATE = {12: 5, 24: 12, 32: 28}  # blocks -> number of layers that the second stream averages

Unsegmented = Literal["zero", "smallest"]


def unit_guide(trace: Trace, *, guide: str, output: str | None) -> Tensor:
    """A guide's patches as unit rows, (B, M, D)."""
    return F.normalize(upcast(trace.guide(guide, output).patches), dim=-1)


def known_regions(ids: Tensor, unsegmented: Unsegmented) -> Tensor:
    """Region ids (..., N) with 0 for pixels that count as unsegmented."""
    if unsegmented == "zero":
        return ids
    return torch.where(ids == ids.amin(-1, keepdim=True), 0, ids + 1)


def merged_regions(
    trace: Trace, *, guide: str, output: str | None, eps: float | None, unsegmented: Unsegmented
) -> Tensor:
    """The region of each patch of a guide after merging similar regions, (B, M): from 1, or 0 for none.

    Args:
        guide, output: external encoder and its output, by which regions are compared (`Trace.guide`).
        eps: as in `merge_regions`; None merges nothing.
        unsegmented: id of pixels without a region, as in `region_scope`.
    """
    features = trace.once(unit_guide, guide=guide, output=output)
    ids = nearest(trace.regions, trace.guide(guide, output).grid).flatten(1)
    ids = known_regions(ids.to(features.device), unsegmented)
    eps = -1.0 if eps is None else eps
    return torch.stack([merge_regions(f, i, eps) for f, i in zip(features, ids, strict=True)])


def scoped_rows(features: Tensor, ids: Tensor, rows: slice, gain: float) -> Tensor:
    """Some rows of the attention within regions of one image, (m, M).

    softmax(gain * S) over the pairs in the same region, and over the pairs with S above its mean in
    which one or both patches have no region.

    Args:
        features: unit rows, (M, D); S holds their products.
        ids: region of each patch, (M,), 0 for none.
        rows: rows to compute.
        gain: inverse temperature.
    """
    total = features.sum(0, dtype=torch.float64)
    mean = total.dot(total) / len(features) ** 2  # of all pairs
    similarity = features[rows] @ features.T
    none = ids == 0
    loose = none[rows, None] | none
    allowed = torch.where(loose, similarity > mean, ids[rows, None] == ids)
    # if all patches are the same, rounding may leave a row's own entry below the mean
    allowed.diagonal(rows.start or 0).fill_(True)
    return (gain * similarity).masked_fill(~allowed, -torch.inf).softmax(-1)


def scope(
    trace: Trace,
    *,
    guide: str,
    output: str | None,
    gain: float,
    grid: tuple[int, int],
    **merging: Any,
) -> Tensor:
    """`scoped_rows` of all images, times the matrix that resamples CLIP's grid, (B, M, N)."""
    features = trace.once(unit_guide, guide=guide, output=output)
    ids = trace.once(merged_regions, guide=guide, output=output, **merging)
    target = trace.guide(guide, output).grid
    step = max(CHUNK // features.shape[1], 1)
    chunks = [slice(i, i + step) for i in range(0, features.shape[1], step)]
    return torch.stack(
        [
            torch.cat([to_guide(scoped_rows(f, i, c, gain), grid, target) for c in chunks])
            for f, i in zip(features, ids, strict=True)
        ]
    )


@op("attention", regions=True)
def region_scope(
    heads: Heads,
    trace: Trace,
    *,
    guide: str = "dino",
    output: str | None = "q+k",
    gain: float = 4.0,
    eps: float | None = 0.2,
    unsegmented: Unsegmented = "zero",
) -> Tensor:
    """Attention of a guide's patches to CLIP's within regions, one map for all heads, (B, 1, M, T).

    softmax(gain * S) of the guide's cosines S within each region, times the matrix that resamples
    CLIP's patches to the guide's grid. A patch without a region attends to, and is attended by, all
    patches with S above its mean. Prefix tokens get no attention. The readout needs `layout=guide`.

    Args:
        guide, output: external encoder and its output (`Trace.guide`).
        gain: inverse temperature.
        eps: distance of mean features up to which regions are merged; None merges nothing.
        unsegmented: id of pixels without a region: "zero", or the "smallest" one (the release).
    """
    weights = trace.once(
        scope,
        guide=guide,
        output=output,
        gain=gain,
        grid=heads.grid,
        eps=eps,
        unsegmented=unsegmented,
    )
    return F.pad(weights, (heads.prefix, 0))[:, None]


def on_patches(trace: Trace, ids: Tensor, grid: tuple[int, int]) -> Tensor:
    """The regions of a guide's patches resampled to CLIP's grid, (B, M) -> (B, N)."""
    return nearest(ids.unflatten(1, grid), trace.embedded.grid).flatten(1)


def on_guide(ids: Tensor, tokens: Tensor, grid: tuple[int, int], guide: tuple[int, int]) -> Tensor:
    """The token of the region of each patch of a guide, (B, M, D).

    Args:
        ids: regions of CLIP's patches, (B, N) in 0..R-1.
        tokens: tokens of the regions, (B, R, D).
        grid: rows and columns of CLIP's patches.
        guide: rows and columns of the guide's patches.
    """
    back = nearest(ids.unflatten(1, grid), guide).flatten(1)  # (B, M)
    return tokens.gather(1, back[..., None].expand(-1, -1, tokens.shape[2]))


def tokens_of_regions(trace: Trace, ids: Tensor, count: int | None = None) -> Tensor:
    """One token per region, in the order of the ids, after all blocks: (B, R, D).

    A region's token starts as the class token. In every block it attends to the class token and to the
    patches of its region, as they enter the block. No other token attends to it, so the image's own
    tokens stay the same and are not computed again.

    Args:
        ids: regions of the patches, (B, N) in 0..R-1.
        count: R; by default the largest id plus 1.
    """
    count = int(ids.max()) + 1 if count is None else count
    member = ids[:, None] == torch.arange(count, device=ids.device)[:, None]  # (B, R, N)
    prefix = trace.embedded.prefix
    seen = F.pad(member, (prefix, 0))[:, None]  # (B, 1, R, T)
    seen[..., : min(prefix, 1)] = True  # the class token, where there is one
    x = trace.embedded.cls.expand(-1, count, -1)
    for i, block in enumerate(trace.vit.blocks):
        x = block.look(x, trace.entering(i), seen)
    return x


@op("reader", regions=True)
def region_tokens(
    trace: Trace,
    *,
    guide: str = "dino",
    output: str | None = "q+k",
    eps: float | None = 0.2,
    unsegmented: Unsegmented = "zero",
) -> Tokens:
    """Region tokens, placed on the patches of a guide's grid, (B, M, D).

    A region's token starts as the class token, and in every block, FFN included, attends to the class
    token and to the patches of the region.

    Args:
        guide, output, eps, unsegmented: as in `region_scope`.
    """
    ids = trace.once(merged_regions, guide=guide, output=output, eps=eps, unsegmented=unsegmented)
    layout = trace.guide(guide, output)
    own = on_patches(trace, ids, layout.grid)  # from the guide's grid and back, as in the release
    tokens = tokens_of_regions(trace, own)
    return layout.with_data(on_guide(own, tokens, trace.embedded.grid, layout.grid))


@op("source")
def late_layers(trace: Trace, *, count: Count | None = None) -> Tokens:
    """Mean of the last layers before the input of the last block, (B, T, D).

    Args:
        count: number of layers; by default 5 of 12 blocks, 12 of 24, 28 of 32, else all but four.

    Raises:
        ValueError: if the model has fewer layers.
    """
    layers = [trace.outputs[i].data for i in late_range(len(trace.vit.blocks), count)]
    return trace.outputs[-1].with_data(torch.stack(layers).mean(0))


def late_range(depth: int, count: int | None) -> range:
    """The numbers of the `count` late blocks of a model with `depth` blocks (see `late_layers`).

    Raises:
        ValueError: if the model has fewer.
    """
    count = LATE.get(depth, depth - 4) if count is None else count
    if not 1 <= count <= depth - 2:
        raise ValueError(
            f"count={count} late layers of a model with {depth} blocks: expected 1 to {depth - 2}"
        )
    return range(depth - 2 - count, depth - 2)


@METHODS.register_module()
def corrclip(
    *,
    guide: str = "dino",
    output: str | None = "q+k",
    gain: float = 4.0,
    eps: float | None = 0.2,
    late: Count | None = None,
    spatial: float = 1.0,
    semantic: float = 0.5,
    correct: bool = True,
    unsegmented: Literal["zero", "smallest"] = "zero",
) -> dict[str, Any]:
    """Attention output of the last block alone, within regions, and one token per region.

    Needs a guide (`guides=dict(dino=dict(type="transformers", model="facebook/dino-vitb8"))`) and
    regions (`regions=`).

    Args:
        guide: name of the guide, which the caller provides.
        output: output of the guide: "q+k" of its last block, or None for its final tokens.
        gain: inverse temperature of the attention.
        eps: distance of mean features up to which regions are merged; None merges nothing (as v2).
        late: number of late layers that the spatial stream averages; None as in `late_layers`.
        spatial, semantic: weights of the second and the third stream; 0 leaves one out.
        correct: whether all pixels of a region finally take the region's most frequent label.
        unsegmented: id of pixels without a region: "zero", or the "smallest" one (the release).
    """
    regions = dict(guide=guide, output=output, eps=eps, unsegmented=unsegmented)
    rule = dict(type="region_scope", gain=gain, **regions)
    reduced = dict(keep_cls=False, residual=None, ffn=False)
    main = dict(reduced, attention=rule, layout=guide, layout_output=output)
    streams = [
        (1.0, main),
        (spatial, dict(main, source=dict(type="late_layers", count=late))),
        (semantic, dict(type="region_tokens", **regions)),
    ]
    used = [(weight, stream) for weight, stream in streams if weight]
    vote = {"zero": "regions", "smallest": "all_but_smallest"}[unsegmented] if correct else "no"
    return dict(
        readouts=[stream for _, stream in used],
        weights=[weight for weight, _ in used],
        vote=vote,
    )
