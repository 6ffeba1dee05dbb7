"""SAM 3 in the place of CLIP: each query's instances become its map (Carion et al., 2025*).

The reader that tables of 2026 call "SAM 3": by our reading, instances alone, since no source says how
they are made one map. `sfp/methods/segearth_ov3.py` and `activesam.py` are more careful readers of the
same outputs. SAM 3 has no features to compare with words, it asks for the words themselves: that is a
comparison here, which looks at the image and not at CLIP's tokens. `weights="none"` spares a CLIP.

SAM 3 sees the whole image, squeezed to a square, at whatever size it comes: give it the image as it is,
which `sfp.load` does unless `short_side` is set. What comes out are scores in 0..1, no
probabilities: `prob_thd` is a threshold of those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sfp.functional.clusters import resize
from sfp.functional.room import check_room
from sfp.registry import METHODS, Op, op
from sfp.tokens import Tokens
from sfp.trace import GuideError, Trace

BUDGET = 2**24  # numbers of resized masks that are held at once
Fuse = Literal["instances", "once", "twice"]
Look = Callable[["int | None"], "tuple[Tensor, ...]"]
"""(side of the square) -> what SAM 3 sees of an image at it; None for that of its training."""


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
    """How much each pixel shows a query, (H, W) in 0..1.

    With o_i = sigmoid(score_i) sigmoid(presence) of the instances whose o_i is larger than `score`,
    and all maps at the size of the image before their sigmoid:

    * "instances": max_i o_i sigmoid(mask_i);
    * "once": the maximum of that and sigmoid(presence) sigmoid(semantic) (ConceptBank);
    * "twice": sigmoid(presence) times the maximum of that and sigmoid(semantic), so that the presence
      counts twice in the instances (SegEarth-OV3, ActiveSAM).

    Args:
        scores: logits of I instances, (I,).
        masks: their logits, (I, h, w).
        presence: logit, ().
        semantic: logits, (h, w).
        size: rows and columns of the result.
        score, fuse: as above.
        most: instances of best scores that count; None for all.
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
    """The guide of a name, which has to be a SAM 3.

    Raises:
        LookupError: if none was given.
    """
    found = trace.guides.get(guide)
    if not hasattr(found, "detect"):
        raise GuideError(
            f"the method asks for a SAM 3 as the guide {guide!r}: pass guides=dict({guide}=dict("
            "type='sam3', model='facebook/sam3')), and pip install 'sfp[guides]' (see docs/methods.md)"
        )
    return found


def embedded(trace: Trace, *, guide: str, side: int | None = None) -> tuple[Tensor, ...]:
    """What SAM 3 sees in the whole image (`Sam3Guide.embed`); for `trace.once`."""
    assert trace.whole is not None
    return sam3_of(trace, guide).embed(trace.whole.pixels[None], side)


def images_of(trace: Trace, guide: str, windows: bool) -> Iterator[tuple[Look, tuple[int, int]]]:
    """What SAM 3 looks at: the whole image, or each window.

    Yields:
        A function from a side (see `Sam3Guide.embed`) to what it sees, and rows and columns.
    """
    whole, sam = trace.whole, sam3_of(trace, guide)
    assert whole is not None
    height, width = (trace.image if windows else whole.pixels).shape[-2:]
    if windows:
        for image in trace.image.split(1):
            yield partial(sam.embed, image), (height, width)
    else:
        # kept with the trace: other words for the same image cost no second look
        yield (
            lambda side: trace.once(Op(embedded, (("guide", guide), ("side", side)))),
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
        trace: of all windows of an image.
        prompts: what SAM 3 is asked, Q queries (`sfp.guides.sam3.Prompts`).
        guide: the SAM 3.
        score, fuse, most: as in `fused_map`.
        windows: whether each window is looked at, instead of the whole image.
        choose: the queries to ask for, by number, from a function as `images_of` yields it; all by
            default. The maps of the others are 0.
    """
    sam, found = sam3_of(trace, guide), []
    for look, size in images_of(trace, guide, windows):
        asked = torch.arange(len(prompts), device=trace.image.device)
        if choose is not None:
            asked = choose(look)
        check_room(
            2 * len(prompts) * size[0] * size[1],  # and once more as a sheet
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
    """Scores of SAM 3's instances and maps at every pixel of the image, (1, Q, H, W) in 0..1.

    For the decision `as_scores`.

    Args:
        guide: name of the SAM 3 (`sfp.guides.Sam3Guide`).
        score, fuse, most: as in `fused_map`.
        windows: whether it looks at each window instead of the whole image: (B, Q, H, W).
    """
    prompts = sam3_of(trace, guide).encode(trace.known_words().queries)
    return query_maps(
        trace, prompts, guide=guide, score=score, fuse=fuse, most=most, windows=windows
    )


@METHODS.register_module()
def sam3(
    *, guide: str = "sam3", score: float = 0.5, most: int | None = None, windows: bool = False
) -> dict[str, Any]:
    """SAM 3's instances alone, the best one at each pixel; needs the words and no CLIP.

    Args:
        guide: name of the SAM 3, which the caller provides (`guides=dict(sam3=dict(type="sam3",
            model="facebook/sam3"))`).
        score: instances of no larger score are left out.
        most: instances of best scores that count for a query; None for all.
        windows: whether it looks at each window instead of the whole image.
    """
    return reader(
        dict(
            type="sam3_maps", guide=guide, score=score, fuse="instances", most=most, windows=windows
        )
    )


def reader(comparison: dict[str, Any], decision: str = "as_scores") -> dict[str, Any]:
    """The fields of a method whose maps are SAM 3's.

    Args:
        comparison: the node that makes the maps.
        decision: what makes class scores of them.
    """
    return dict(
        readouts=[dict(type="embedded_patches")],
        comparison=comparison,
        decision=dict(type=decision),
    )
