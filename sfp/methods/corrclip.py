"""CorrCLIP: patches attend within regions (Zhang et al., ICCV 2025, arXiv:2411.10086).

An id map of class-agnostic masks says which patches may look at each other, a guide (DINO ViT-B/8) how
much. Three streams are normalised, projected and then summed: the values of the last block, those of
the mean of late layers, and a token of each region, which the trunk's own blocks make out of the class
token and the region's patches. In the end the pixels of a region take their most frequent label.

The release takes the smallest id that a window (or, in the vote, an image) has for the unsegmented one,
so that without unsegmented pixels a region is taken for none: `unsegmented="smallest"` does the same.
It gives several names to class 0 only; here every class may have some. It runs windows of 336 pixels
(stride 112) padded to multiples of 56 (`pad_windows=56`), MetaCLIP's weights and 80 templates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.functional.regions import merge_regions
from sfp.functional.windows import nearest
from sfp.methods.proxyclip import to_guide
from sfp.registry import METHODS, Op, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace

CHUNK = 2**24  # similarities in memory at once
LATE = {12: 5, 24: 12, 32: 28}  # blocks -> how many layers the second stream averages

Unsegmented = Literal["zero", "smallest"]


def unit_guide(trace: Trace, *, guide: str, output: str | None) -> Tensor:
    """A guide's patches as unit rows, (B, M, D)."""
    return F.normalize(upcast(trace.guide(guide, output).patches), dim=-1)


def known_regions(ids: Tensor, unsegmented: Unsegmented) -> Tensor:
    """Ids (..., N) in which 0 is what counts as unsegmented."""
    if unsegmented == "zero":
        return ids
    return torch.where(ids == ids.amin(-1, keepdim=True), 0, ids + 1)


def merged_regions(
    trace: Trace, *, guide: str, output: str | None, eps: float | None, unsegmented: Unsegmented
) -> Tensor:
    """The region of each of a guide's patches, alike ones merged, (B, M): 0, or from 1.

    Args:
        guide, output: of the features that are compared (`Trace.guide`).
        eps: as in `merge_regions`; None merges nothing.
        unsegmented: the ids that count as no region.
    """
    features = once(trace, unit_guide, guide=guide, output=output)
    ids = nearest(trace.regions, trace.guide(guide, output).grid).flatten(1)
    ids = known_regions(ids.to(features.device), unsegmented)
    eps = -1.0 if eps is None else eps
    return torch.stack([merge_regions(f, i, eps) for f, i in zip(features, ids, strict=True)])


def scoped_rows(features: Tensor, ids: Tensor, rows: slice, gain: float) -> Tensor:
    """Some rows of the attention within regions of one image, (m, M).

    softmax(gain * S) over the pairs of equal region; and over the pairs of which one patch or both are
    in none, where S lies above its mean.

    Args:
        features: unit rows whose products are S, (M, D).
        ids: (M,), 0 for none.
        rows: which.
        gain: inverse temperature.
    """
    total = features.sum(0, dtype=torch.float64)
    mean = total.dot(total) / len(features) ** 2  # of all pairs
    similarity = features[rows] @ features.T
    none = ids == 0
    loose = none[rows, None] | none
    allowed = torch.where(loose, similarity > mean, ids[rows, None] == ids)
    # where all patches are alike, rounding may leave a row's own entry below the mean
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
    features = once(trace, unit_guide, guide=guide, output=output)
    ids = once(trace, merged_regions, guide=guide, output=output, **merging)
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

    softmax(gain * S) of the guide's cosines S within each region; patches in no region see, and are
    seen by, all whose S lies above the mean. Times the matrix that resamples CLIP's patches to the
    guide's grid. Prefix tokens are attended by nobody. The readout needs `layout=guide`.

    Args:
        guide, output: of an external encoder (`Trace.guide`).
        gain: inverse temperature.
        eps: regions whose mean features are no further apart are one; None keeps all apart.
        unsegmented: pixels of no region: those of id "zero", or of the "smallest" id (the release).
    """
    weights = once(
        trace,
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
    """Regions of a guide's patches on CLIP's grid, (B, M) -> (B, N)."""
    return nearest(ids.unflatten(1, grid), trace.embedded.grid).flatten(1)


def on_guide(ids: Tensor, tokens: Tensor, grid: tuple[int, int], guide: tuple[int, int]) -> Tensor:
    """Each patch of a guide is the token of its region, (B, M, D).

    Args:
        ids: regions of CLIP's patches, (B, N) in 0..R-1.
        tokens: (B, R, D).
        grid: rows and columns of CLIP's patches.
        guide: of the guide's.
    """
    back = nearest(ids.unflatten(1, grid), guide).flatten(1)  # (B, M)
    return tokens.gather(1, back[..., None].expand(-1, -1, tokens.shape[2]))


def tokens_of_regions(trace: Trace, ids: Tensor, count: int | None = None) -> Tensor:
    """A token of each region, numbered as the ids, after all blocks: (B, R, D).

    It starts as the class token. In every block it attends to the class token and to the patches of its
    region, as they enter the block; nobody attends to it, so the trunk need not run again. One product
    for all regions of all images.

    Args:
        ids: regions of the patches, (B, N) in 0..R-1.
        count: R; by default up to the largest id.
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
    """Each patch of a guide's grid is the token of its region, (B, M, D).

    A region's token starts as the class token, and in every block, FFN included, attends to the class
    token and to the patches of the region.

    Args:
        guide, output, eps, unsegmented: as in `region_scope`.
    """
    ids = once(trace, merged_regions, guide=guide, output=output, eps=eps, unsegmented=unsegmented)
    layout = trace.guide(guide, output)
    own = on_patches(trace, ids, layout.grid)  # from the guide's grid and back, as in the release
    tokens = tokens_of_regions(trace, own)
    return layout.with_data(on_guide(own, tokens, trace.embedded.grid, layout.grid))


@op("source")
def late_layers(trace: Trace, *, count: int | None = None) -> Tokens:
    """Mean of the last layers before the one that the last block reads, (B, T, D).

    Args:
        count: how many; by default 5 of 12 blocks, 12 of 24, 28 of 32, else all but four.

    Raises:
        ValueError: if the model has fewer.
    """
    depth = len(trace.vit.blocks)
    count = LATE.get(depth, depth - 4) if count is None else count
    if not 1 <= count <= depth - 2:
        raise ValueError(f"late_layers: count={count} of a model with {depth} blocks")
    layers = [trace.outputs[i].data for i in range(depth - 2 - count, depth - 2)]
    return trace.outputs[-1].with_data(torch.stack(layers).mean(0))


def once(trace: Trace, compute: Callable[..., Tensor], **knobs: Any) -> Tensor:
    """`compute(trace, **knobs)`, the first time that it is asked for."""
    return trace.once(Op(compute, tuple(sorted(knobs.items()))))


@METHODS.register_module()
def corrclip(
    *,
    guide: str = "dino",
    output: str | None = "q+k",
    gain: float = 4.0,
    eps: float | None = 0.2,
    late: int | None = None,
    spatial: float = 1.0,
    semantic: float = 0.5,
    correct: bool = True,
    unsegmented: Literal["zero", "smallest"] = "zero",
) -> dict[str, Any]:
    """Attention output of the last block alone, within regions, and a token of each region.

    Needs a guide (`guides=dict(dino=dict(type="transformers", model="facebook/dino-vitb8"))`) and
    regions (`regions=`).

    Args:
        guide: name of the guide, which the caller provides.
        output: which of its outputs: "q+k" of its last block, or None for its final tokens.
        gain: inverse temperature of the attention.
        eps: regions whose mean features are no further apart are one; None keeps all apart (as v2).
        late: how many late layers the spatial stream averages; None as in `late_layers`.
        spatial, semantic: weights of the second and the third stream; 0 leaves one out.
        correct: whether the pixels of a region take their most frequent label in the end.
        unsegmented: pixels of no region: those of id "zero", or of the "smallest" id (the release).
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
