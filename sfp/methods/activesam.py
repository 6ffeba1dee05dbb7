"""ActiveSAM: prompts SAM 3 with the classes that are present, in the context of related words.

Four additions to SegEarth-OV3's maps: only the queries with the highest presence, determined at a lower
resolution, are used; the text tokens of a query are followed by those of its most similar other queries
and of more general words; names are converted to a form that SAM 3 knows; and a pixel where two classes
are nearly equal becomes background more easily. This is our interpretation, not compared with numbers
of the official code. Thresholds are settings of the segmentor, as for `segearth_ov3`.

The release takes general words from WordNet, which is not included: `hypernyms` names a file with them,
and without one that part is left out. Where the source only gives examples, names are split by our own
rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfp.files import read_once
from sfp.functional.labels import best_of_class
from sfp.functional.windows import LogitSheet
from sfp.kinds import Rows
from sfp.methods.sam3 import Look, query_maps, reader, sam3_of
from sfp.registry import METHODS, Count, op
from sfp.tokens import Tokens
from sfp.trace import Trace

HYPERNYMS = 2  # largest number of general words after a query
HOMONYMS = dict(
    ashcan="trash can",
    buffet="sideboard",
    monitor="computer monitor",
    mouse="computer mouse",
    plaything="toy",
    remote="remote control",
    tie="necktie",
)
COMPOUNDS = (
    dict(  # first parts of names that benchmarks write as one word, and what may follow them
        traffic="light|sign",
        dining="table",
        potted="plant",
        swimming="pool",
        coffee="table",
        pool="table",
        cell="phone",
        stop="sign",
        fire="hydrant",
        parking="meter",
        baseball="bat|glove",
        tennis="racket",
        wine="glass",
        sports="ball",
        hot="dog",
        teddy="bear",
        hair="drier",
        kitchen="island",
        swivel="chair",
        arcade="machine",
        television="receiver",
        conveyer="belt",
        bulletin="board",
        dirt="track",
        crt="screen",
        screen="door",
        street="light",
        playing="field",
        water="drops",
    )
)
SPLIT = re.compile("|".join(f"({a})({b})" for a, b in COMPOUNDS.items()))
SURFACE = re.compile(r"(wall|floor|ceiling)-(?!other)(\w+)")  # COCO-Stuff: "wall-brick"
REST = re.compile(r"([\w ]+)-(?:other|stuff)")  # "food-other"


def canonical(name: str) -> str:
    """A class name in the form that SAM 3 knows.

    Examples:
        >>> [canonical(name) for name in ("trafficlight", "tie", "wall-brick", "floor-other", "dog")]
        ['traffic light', 'necktie', 'brick wall', 'floor', 'dog']
    """
    if name in HOMONYMS:
        return HOMONYMS[name]
    if match := SPLIT.fullmatch(name):
        return " ".join(part for part in match.groups() if part)
    if match := SURFACE.fullmatch(name):
        return f"{match[2]} {match[1]}"
    if match := REST.fullmatch(name):
        return match[1]
    return name


@read_once(8)
def _general(path: str) -> Mapping[str, Sequence[str]]:
    """The contents of a file of general words."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        right = all(isinstance(word, str) for words in found.values() for word in words)
    except (AttributeError, TypeError, ValueError) as error:
        raise _wrong(path) from error
    if not right or any(isinstance(words, str) for words in found.values()):
        raise _wrong(path)
    return found


def _wrong(path: str) -> ValueError:
    return ValueError(
        f'hypernyms={path!r}: expected a JSON file like {{"dog": ["canine", "domestic animal"]}}'
    )


def active(presence: Tensor, quantile: float, most: int) -> Tensor:
    """The indices of the queries used for an image, in order: (n,), at least one.

    Args:
        presence: presence of all queries, (Q,).
        quantile: queries with a presence below this quantile are left out.
        most: largest number of queries.
    """
    best = presence.sort(descending=True, stable=True).indices[:most]
    kept = best[presence[best] >= presence.quantile(quantile)]
    return kept.sort().values


@op("comparison", words=True, whole=True)
def active_maps(
    features: Tokens,
    trace: Trace,
    *,
    guide: str = "sam3",
    score: float = 0.3,
    prune_above: int | None = 40,
    prune_side: int | None = 672,
    prune_quantile: float = 0.8,
    prune_most: Count = 40,
    neighbours: int = 2,
    hypernyms: str | None = None,
    names: bool = True,
    windows: bool = False,
) -> Tensor:
    """Scores of SAM 3 for the queries that are present, in context, (1, Q, H, W) from 0 to 1.

    For the decision `margin_scores`.

    Args:
        guide: name of the SAM 3 (`sfp.guides.Sam3Guide`).
        score: instances are kept if their score is larger.
        prune_above: queries are pruned if there are more than this number; None for never.
        prune_side: side in pixels of the square image for determining presence; None for that of
            training.
        prune_quantile: queries with a presence below this quantile are left out.
        prune_most: largest number of queries used, those of highest presence.
        neighbours: number of other queries whose tokens follow those of each query.
        hypernyms: JSON file of more general words by (canonical) name, of which up to two follow as
            well; None for none.
        names: whether names are converted to the form that SAM 3 knows (`canonical`).
        windows: whether SAM 3 sees each window instead of the whole image: (B, Q, H, W).
    """
    sam, queries = sam3_of(trace, guide), trace.known_words().queries
    if names:
        queries = tuple(canonical(query) for query in queries)
    related = {} if hypernyms is None else _general(hypernyms)
    prompts = sam.encode_in_context(queries, neighbours, related, HYPERNYMS)

    def choose(look: Look) -> Tensor:
        presence = sam.presence(look(prune_side), prompts).sigmoid()
        return active(presence, prune_quantile, prune_most)

    return query_maps(
        trace,
        prompts,
        guide=guide,
        score=score,
        fuse="twice",
        windows=windows,
        choose=choose if prune_above is not None and len(queries) > prune_above else None,
    )


@op("decision")
def margin_scores(sheet: LogitSheet, rows: Rows, index: Sequence[int]) -> Rows:
    """Lowers scores where two classes are nearly equal (ActiveSAM).

    A pixel's best score s_1 becomes (s_1 sqrt(s_1 - s_2))^(4/5), and the others are scaled by the same
    factor. It is below a threshold t if s_1 sqrt(s_1 - s_2) is below t^(5/4); the best class stays the
    best.
    """

    def scores(start: int, stop: int) -> Tensor:
        best = best_of_class(rows(start, stop), index)  # (K, stop - start, W)
        if len(best) < 2:
            return best
        first, second = best.topk(2, dim=0).values
        certain = (first.clamp_min(0) * (first - second).sqrt()) ** 0.8
        tiny = torch.finfo(best.dtype).tiny
        # never quite 0, so that the first of equal classes is the same as without a margin
        return best * (certain / first.clamp_min(tiny)).clamp_min(1e-6)

    return scores


@METHODS.register_module()
def activesam(
    *,
    guide: str = "sam3",
    score: float = 0.3,
    prune_above: int | None = 40,
    prune_side: int | None = 672,
    prune_quantile: float = 0.8,
    prune_most: Count = 40,
    neighbours: int = 2,
    hypernyms: str | None = None,
    names: bool = True,
    windows: bool = False,
) -> dict[str, Any]:
    """SAM 3 prompted with the classes that are present, in context. Needs the words and no CLIP.

    Args:
        guide: name of the SAM 3, which the caller provides (`guides=dict(sam3=dict(type="sam3",
            model="facebook/sam3"))`).
        score, prune_above, prune_side, prune_quantile, prune_most: as in `active_maps`.
        neighbours, hypernyms, names, windows: as in `active_maps`.
    """
    return reader(
        dict(
            type="active_maps",
            guide=guide,
            score=score,
            prune_above=prune_above,
            prune_side=prune_side,
            prune_quantile=prune_quantile,
            prune_most=prune_most,
            neighbours=neighbours,
            hypernyms=hypernyms,
            names=names,
            windows=windows,
        ),
        decision="margin_scores",
    )
