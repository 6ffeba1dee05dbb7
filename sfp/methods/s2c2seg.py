"""S2C2Seg: restricts each window to the classes that a global and a local scorer find; for any preset.

Written from its description, without official code or numbers to compare with. The global scorer is
CLIP's class token (or the window's mean logits), the local one CLIPSeg, an external model. Its decoder
was trained on the masks of PhraseCut, more supervision than image-text pairs; say so beside results.
Logits of the selected classes are fused with the local maps; classes suggested by confident parts of
the window are added in one round of repair.

| | here | description |
| --- | --- | --- |
| resolution | `cells` per side of a patch, 4 by default | pixels of the window |
| post-processing of the journal's version | settings of the engine, off | PAMR, Otsu's threshold |
| windows | each selects; `stitched=True` selects for the whole image | each selects |

CLIPSeg encodes each window once, and its decoder runs once for each query. Published on ProxyCLIP
(DINO ViT-B/8), windows of 336 pixels, stride 112: `share=0.3` (VOC21 and Context60 0.4), `local=0.15`
(VOC20 and ADE20K 0.10, COCO-Stuff 0.12).

The journal's post-processing: `pamr_steps=3, pamr_dilations=(1, 2, 4, 8, 12, 24), pamr_unit="mean"`,
and on datasets with a background `prob_thd=(THD, 0.5)`, Otsu's threshold between the two (Context60
from 0.35). Measuring colour differences channel by channel is our interpretation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.clusters import resize
from sfp.functional.precision import upcast
from sfp.registry import METHODS, Count, composition, op
from sfp.trace import GuideError, Trace

DROPPED = -1e9  # logit of a query that is not selected in a window
ADMITTED = 3  # largest number of queries added by repair, and of candidates by their local maps
LEAST = 6  # number of queries always ranked above the largest gap


def shares(scores: Tensor) -> Tensor:
    """Scores (Q,) with negative ones set to 0 and sum 1; all equal if none is positive."""
    positive = scores.clamp_min(0)
    total = positive.sum()
    return torch.where(total > 0, positive / total, torch.full_like(positive, 1 / len(positive)))


def certainty(overall: Tensor, local: Tensor) -> Tensor:
    """How much each query stands out in a mixture of two scores, (Q,).

    pi = alpha G + (1 - alpha) L of the shares G and L, with alpha the sum of sqrt(G L), times one minus
    the normalised entropy of the other queries' shares.

    Args:
        overall: global scores, (Q,).
        local: local scores, (Q,).
    """
    a, b = shares(overall), shares(local)
    alpha = (a * b).sqrt().sum().clamp(0, 1)
    mixed = alpha * a + (1 - alpha) * b
    count = len(mixed)
    if count < 3:
        return mixed
    rest = (1 - mixed).clamp_min(torch.finfo(mixed.dtype).tiny)
    others = mixed.expand(count, -1) / rest[:, None]  # row q: shares without q
    others = others.masked_fill(torch.eye(count, dtype=torch.bool, device=mixed.device), 0)
    entropy = torch.special.entr(others).sum(1)
    return mixed * (1 - (entropy / math.log(count - 1)).clamp(0, 1))


def scaled(x: Tensor) -> Tensor:
    """Scales the minimum to 0 and the maximum to 1; 0 if all are equal."""
    span = x.max() - x.min()
    return torch.where(span > 0, (x - x.min()) / span, torch.zeros_like(x))


@dataclass(frozen=True)
class Selection:
    """Scores of the queries in a window, and the weights for selecting among them.

    Attributes:
        dense: logits of P cells, (Q, P).
        maps: maps of the local scorer, (Q, P), from 0 to 1.
        overall: global scores, (Q,).
        local: weight of the local scorer.
        guided: weight of the guided maps.
        certain: weight of `certainty` in `composite`.
    """

    dense: Tensor
    maps: Tensor
    overall: Tensor
    local: float
    guided: float
    certain: float = 0.2

    def first(self, share: float, most: int | None) -> Tensor:
        """The queries that are among the best by at least one of three scores, in order, (n,).

        Args:
            share: share of all queries that each score selects.
            most: largest number of queries; of more, those with the best `composite` are kept.
        """
        count = max(int(share * len(self.dense)), 1)
        sure = certainty(self.overall, self.maps.mean(1))
        ranked = (self.overall, self.maps.mean(1), sure)
        chosen = torch.cat([x.topk(count).indices for x in ranked]).unique()
        if most is not None and len(chosen) > most:
            chosen = chosen[self.composite(chosen, self.overall).topk(most).indices]
        return chosen.sort().values

    def composite(self, among: Tensor, overall: Tensor) -> Tensor:
        """Weighted sum of global score, local score and `certainty`, scaled over the queries, (n,).

        Args:
            among: queries, (n,).
            overall: global scores of all queries, (Q,).
        """
        area = self.maps.mean(1)
        sure = certainty(self.overall, area)
        return (
            (1 - self.local - self.certain) * scaled(overall[among])
            + self.local * scaled(area[among])
            + self.certain * scaled(sure[among])
        )

    def fused(self, chosen: Tensor) -> Tensor:
        """Logits of the chosen queries, fused with their local maps, (n, P)."""
        dense, maps = self.dense[chosen], self.maps[chosen]
        main = (1 - self.local) * dense + self.local * maps
        return (1 - self.guided) * main + self.guided * maps * dense.mean(1).softmax(0)[:, None]

    def repaired(self, chosen: Tensor, scale: float, sure: float) -> Tensor:
        """The chosen queries, and those added by repair, in order.

        Args:
            chosen: queries, (n,).
            scale: inverse temperature of the probabilities.
            sure: cells of a larger probability are confident.
        """
        others = torch.ones(len(self.dense), dtype=torch.bool, device=chosen.device)
        others[chosen] = False
        rest = others.nonzero()[:, 0]
        if not len(rest):
            return chosen
        confidence, winner = (scale * self.fused(chosen)).softmax(0).max(0)
        high = confidence > sure
        low = self.maps[:, ~high].sum(1) / (~high).sum().clamp_min(1)  # (Q,)
        overall = self.overall + 0.5 * torch.where(others, low, 0)
        won = winner[high].bincount(minlength=len(chosen)) / high.sum().clamp_min(1)
        overall = overall.index_add(0, chosen, 0.5 * won.to(overall))
        everything = torch.arange(len(self.dense), device=chosen.device)
        old = self.composite(everything, self.overall)
        pool = torch.cat(
            [
                rest[old[rest].topk(min(len(chosen), len(rest))).indices],
                rest[low[rest].topk(min(ADMITTED, len(rest))).indices],
            ]
        ).unique()
        among = torch.cat([chosen, pool])
        values, order = self.composite(among, overall).sort(descending=True)
        if len(among) <= LEAST:
            return chosen
        drops = (
            values[LEAST - 1 : -1] - values[LEAST:]
        )  # between positions k and k + 1, from LEAST on
        wanted = LEAST + int(drops.argmax())
        count = min(ADMITTED, wanted - len(chosen))
        if count <= 0:
            return chosen
        ranked = among[order]
        admitted = ranked[others[ranked]][:count]
        larger = torch.cat([chosen, admitted]).sort().values
        wins = larger[self.fused(larger).argmax(0)[~high]]
        kept = admitted[torch.isin(admitted, wins)]
        return torch.cat([chosen, kept]).sort().values


@op("refiner", words=True)
def selected_classes(
    logits: Tensor,
    trace: Trace,
    *,
    guide: str = "clipseg",
    share: float = 0.3,
    local: float = 0.15,
    guided: float = 0.07,
    overall: Literal["class_token", "mean_logit"] = "class_token",
    most: Count | None = None,
    repair: bool = True,
    scale: float = 40.0,
    sure: float = 0.8,
    cells: Count = 4,
) -> Tensor:
    """Logits of the queries selected in a window, fused with a local scorer's maps, (B, Q, H', W').

    All other queries get -1e9, so that a class is possible at a pixel only if every window that covers
    it selected the class.

    Args:
        guide: guide that scores queries at each pixel (`sfp.guides.ClipSegGuide`).
        share: share of all queries that each of three scores selects (tau).
        local: weight of the local scorer (lambda).
        guided: weight of its maps times the softmax of the selected queries' mean logits.
        overall: global score: cosine with the class token (journal) or mean logit (conference).
        most: largest number of selected queries; None for no limit.
        repair: whether classes suggested by confident cells are added.
        scale: inverse temperature of the probabilities by which cells are confident.
        sure: cells of a larger probability are confident.
        cells: cells of the result per side of a patch.
    """
    scorer: Any = trace.guides.get(guide)
    if not hasattr(scorer, "scores"):
        raise GuideError(
            f"the method needs a scorer {guide!r}: pass guides=dict({guide}=dict(type='clipseg', "
            "model='CIDAS/clipseg-rd64-refined')), and pip install 'sfp[guides]'"
        )
    trace.one_by_one(logits, "selected_classes")
    queries = trace.known_words().queries
    size = (logits.shape[2] * cells, logits.shape[3] * cells)
    dense = resize(upcast(logits), size)
    maps = scorer.scores(trace.image, queries, size).to(dense)
    if overall == "class_token":
        image = F.normalize(upcast(trace.global_embedding()), dim=-1)
        whole = image @ trace.query_features().to(image).T  # (B, Q)
    else:
        whole = dense.mean((2, 3))
    out = torch.full_like(dense, DROPPED)
    for own, into, scores, found in zip(dense, out, whole.to(dense), maps, strict=True):
        window = Selection(own.flatten(1), found.flatten(1), scores, local, guided)
        chosen = window.first(share, most)
        if repair:
            chosen = window.repaired(chosen, scale, sure)
        into[chosen] = window.fused(chosen).unflatten(1, size)
    return out


@METHODS.register_module()
def s2c2seg(
    *,
    base: str | Mapping[str, Any] = "proxyclip",
    guide: str = "clipseg",
    share: float = 0.3,
    local: float = 0.15,
    guided: float = 0.07,
    overall: Literal["class_token", "mean_logit"] = "class_token",
    most: Count | None = None,
    repair: bool = True,
    sure: float = 0.8,
    cells: Count = 4,
) -> dict[str, Any]:
    """Another preset, with the classes of each window selected by two scorers; needs words and CLIPSeg.

    Args:
        base: the preset, by name or with knobs; ProxyCLIP needs its own guide.
        guide: name of the local scorer, which the caller provides (`guides=dict(clipseg=dict(
            type="clipseg", model="CIDAS/clipseg-rd64-refined"))`).
        share, local, guided, overall, most, repair, sure, cells: as in `selected_classes`.
    """
    refiner = dict(
        type="selected_classes",
        guide=guide,
        share=share,
        local=local,
        guided=guided,
        overall=overall,
        most=most,
        repair=repair,
        sure=sure,
        cells=cells,
    )
    return composition(base, refiners=[refiner])
