"""SAM 3 instead of CLIP: the instances of each query become its map (Carion et al., 2025).

This is the baseline that papers of 2026 call "SAM 3". No source says how instances are combined into a
map; using only instances, by their maximum, is our interpretation. `sfp/methods/segearth_ov3.py` and
`activesam.py` use more of the same outputs. SAM 3 is prompted with words instead of giving features to
compare with them; here it is a comparison, which uses the image and not CLIP's tokens. With
`weights="none"` no CLIP is loaded.

SAM 3 sees the whole image, resized to a square, so it needs the image at its original size, which
`sfp.load` uses unless `short_side` is set. The results are scores from 0 to 1, not probabilities;
`prob_thd` is a threshold for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.room import check_room
from sfp.registry import METHODS, op
from sfp.tokens import Tokens
from sfp.trace import GuideError, Trace

BUDGET = 2**24  # pixels of resized masks in memory at once
Fuse = Literal["instances", "once", "twice"]
Look = Callable[["int | None"], "tuple[Tensor, ...]"]
"""Side of the square (None for that of training) -> SAM 3's features of an image at that size."""


def fused_map(
    scores: Tensor,
    masks: Tensor,
    presence: Tensor,
    semantic: Tensor,
    size: tuple[int, int],
    *,
    score: float,
    fuse: Fuse,
    most: int | None = None,
) -> Tensor:
    """Score of a query at each pixel, (H, W), from 0 to 1.

    For the instances with o_i = sigmoid(score_i) sigmoid(presence) larger than `score`, and all maps
    resized to the image before the sigmoid:

    * "instances": max_i o_i sigmoid(mask_i);
    * "once": the maximum of that and sigmoid(presence) sigmoid(semantic) (ConceptBank);
    * "twice": sigmoid(presence) times the maximum of that and sigmoid(semantic), so that the presence
      counts twice in the instances (SegEarth-OV3, ActiveSAM).

    Args:
        scores: logits of I instances, (I,).
        masks: mask logits of the instances, (I, h, w).
        presence: logit of the query's presence, ().
        semantic: logits of the query's map, (h, w).
        size: rows and columns of the result.
        score, fuse: as above.
        most: largest number of instances, those of best scores; None for all.
    """
    present = presence.sigmoid()
    own = scores.sigmoid() * present
    kept = (own > score).nonzero()[:, 0]
    if most is not None and len(kept) > most:
        kept = kept[own[kept].topk(most).indices]
    best = semantic.new_zeros(size)
    for part in kept.split(max(BUDGET // (size[0] * size[1]), 1)) if len(kept) else ():
        maps = resize(masks[part][None], size)[0].sigmoid() * own[part, None, None]
        best = torch.maximum(best, maps.amax(0))
    if fuse == "instances":
        return best
    whole = resize(semantic[None, None], size)[0, 0].sigmoid()
    if fuse == "once":
        return torch.maximum(best, whole * present)
    return torch.maximum(best, whole) * present


def sam3_of(trace: Trace, guide: str) -> Any:
    """The guide of a name, which must be a SAM 3.

    Raises:
        LookupError: if there is none.
    """
    found = trace.guides.get(guide)
    if not hasattr(found, "detect"):
        raise GuideError(
            f"the method needs a SAM 3 as the guide {guide!r}: pass guides=dict({guide}=dict("
            "type='sam3', model='facebook/sam3')), and pip install 'sfp[guides]' (see docs/methods.md)"
        )
    return found


def embedded(trace: Trace, *, guide: str, side: int | None = None) -> tuple[Tensor, ...]:
    """SAM 3's features of the whole image (`Sam3Guide.embed`); for `trace.once`."""
    assert trace.whole is not None
    return sam3_of(trace, guide).embed(trace.whole.pixels[None], side)


def images_of(trace: Trace, guide: str, windows: bool) -> Iterator[tuple[Look, tuple[int, int]]]:
    """The images for SAM 3: the whole image, or each window.

    Yields:
        A function from the side of a square (see `Sam3Guide.embed`) to SAM 3's features of the image,
        and the image's rows and columns.
    """
    whole, sam = trace.whole, sam3_of(trace, guide)
    assert whole is not None
    height, width = (trace.image if windows else whole.pixels).shape[-2:]
    if windows:
        for image in trace.image.split(1):
            yield partial(sam.embed, image), (height, width)
    else:
        # cached in the trace: other words for the same image need no second encoding
        yield (
            lambda side: trace.once(embedded, guide=guide, side=side),
            (height, width),
        )


def query_maps(
    trace: Trace,
    prompts: Any,
    *,
    guide: str,
    score: float,
    fuse: Fuse,
    most: int | None = None,
    windows: bool = False,
    choose: Callable[[Look], Tensor] | None = None,
) -> Tensor:
    """The maps of all queries, (1 or B, Q, H, W) float32 in 0..1.

    Args:
        trace: trace of all windows of an image.
        prompts: prompts of Q queries (`sfp.guides.sam3.Prompts`).
        guide: name of the SAM 3.
        score, fuse, most: as in `fused_map`.
        windows: whether SAM 3 sees each window instead of the whole image.
        choose: function that selects the indices of queries to use, given a function as yielded by
            `images_of`; all by default. The maps of the other queries are 0.
    """
    sam, found = sam3_of(trace, guide), []
    for look, size in images_of(trace, guide, windows):
        asked = torch.arange(len(prompts), device=trace.image.device)
        if choose is not None:
            asked = choose(look)
        check_room(
            2 * len(prompts) * size[0] * size[1],  # the maps, and a copy in the sheet
            trace.image.device,
            f"{len(prompts)} maps of {size[0]} x {size[1]} pixels",
            "make the image smaller (short_side=), or name fewer words",
        )
        maps = torch.zeros(len(prompts), *size, dtype=torch.float32, device=trace.image.device)
        numbers = iter(asked.tolist())
        for batch in sam.detect(look(None), prompts[asked]):
            for parts in zip(
                batch.scores, batch.masks, batch.presence, batch.semantic, strict=True
            ):
                maps[next(numbers)] = fused_map(*parts, size, score=score, fuse=fuse, most=most)
        found.append(maps)
    return torch.stack(found)


@op("comparison", words=True, whole=True)
def sam3_maps(
    features: Tokens,
    trace: Trace,
    *,
    guide: str = "sam3",
    score: float = 0.5,
    fuse: Fuse = "instances",
    most: int | None = None,
    windows: bool = False,
) -> Tensor:
    """Scores of SAM 3's instances and maps at every pixel of the image, (1, Q, H, W), from 0 to 1.

    For the decision `as_scores`.

    Args:
        guide: name of the SAM 3 (`sfp.guides.Sam3Guide`).
        score, fuse, most: as in `fused_map`.
        windows: whether SAM 3 sees each window instead of the whole image: (B, Q, H, W).
    """
    prompts = sam3_of(trace, guide).encode(trace.known_words().queries)
    return query_maps(
        trace, prompts, guide=guide, score=score, fuse=fuse, most=most, windows=windows
    )


@METHODS.register_module()
def sam3(
    *, guide: str = "sam3", score: float = 0.5, most: int | None = None, windows: bool = False
) -> dict[str, Any]:
    """Only SAM 3's instances, the best one at each pixel; needs the words and no CLIP.

    Args:
        guide: name of the SAM 3, which the caller provides (`guides=dict(sam3=dict(type="sam3",
            model="facebook/sam3"))`).
        score: instances are kept if their score is larger.
        most: largest number of instances per query, those of best scores; None for all.
        windows: whether SAM 3 sees each window instead of the whole image.
    """
    return reader(
        dict(
            type="sam3_maps", guide=guide, score=score, fuse="instances", most=most, windows=windows
        )
    )


def reader(comparison: dict[str, Any], decision: str = "as_scores") -> dict[str, Any]:
    """The fields of a method with maps from SAM 3.

    Args:
        comparison: node of the op that computes the maps.
        decision: name of the op that turns them into class scores.
    """
    return dict(
        readouts=[dict(type="embedded_patches")],
        comparison=comparison,
        decision=dict(type=decision),
    )
