"""S2C2Seg against its formulas, written as loops; there is no official number."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.methods.s2c2seg import DROPPED, Selection, certainty
from sfp.trace import GuideError

pytestmark = pytest.mark.usefixtures("no_grad")


def shared(x: list[float]) -> list[float]:
    x = [max(v, 0.0) for v in x]
    return [v / sum(x) for v in x] if sum(x) else [1 / len(x)] * len(x)


def sure_of(g: list[float], a: list[float]) -> list[float]:
    g, a = shared(g), shared(a)
    alpha = min(sum(math.sqrt(x * y) for x, y in zip(g, a, strict=True)), 1)
    pi = [alpha * x + (1 - alpha) * y for x, y in zip(g, a, strict=True)]
    found = []
    for q, own in enumerate(pi):
        rest = [p / (1 - own) for j, p in enumerate(pi) if j != q and own < 1]
        entropy = -sum(r * math.log(r) for r in rest if r > 0)
        spread = entropy / math.log(len(pi) - 1) if len(pi) > 2 else 0.0
        found.append(own * (1 - min(max(spread, 0.0), 1.0)))
    return found


def span(x: dict[int, float]) -> dict[int, float]:
    low, high = min(x.values()), max(x.values())
    return {q: (v - low) / (high - low) if high > low else 0.0 for q, v in x.items()}


class Loops:
    """Steps 1 to 4 of a window, one number at a time."""

    def __init__(self, dense, maps, g, share, lam, weight, most, tau=40.0, thd=0.8):
        self.dense, self.maps, self.g, self.lam, self.weight = dense, maps, g, lam, weight
        self.queries, self.cells = range(len(g)), range(len(dense[0]))
        self.a = [sum(row) / len(row) for row in maps]
        self.delta = [sum(row) / len(row) for row in dense]
        self.c = sure_of(g, self.a)
        count = max(int(share * len(g)), 1)
        chosen = set()
        for scores in (g, self.a, self.c):
            chosen |= set(sorted(self.queries, key=lambda q, s=scores: -s[q])[:count])
        if most is not None and len(chosen) > most:
            composite = self.composite(chosen, g)
            chosen = set(sorted(chosen, key=lambda q: -composite[q])[:most])
        self.first = chosen
        self.second = self.repaired(chosen, tau, thd)

    def composite(self, among, g):
        parts = [span({q: s[q] for q in among}) for s in (g, self.a, self.c)]
        weights = (1 - self.lam - 0.2, self.lam, 0.2)
        return {q: sum(w * p[q] for w, p in zip(weights, parts, strict=True)) for q in among}

    def fused(self, chosen):
        total = sum(math.exp(self.delta[q]) for q in chosen)
        out = {}
        for q in chosen:
            soft = math.exp(self.delta[q]) / total
            out[q] = [
                (1 - self.weight) * ((1 - self.lam) * d + self.lam * m) + self.weight * m * soft
                for d, m in zip(self.dense[q], self.maps[q], strict=True)
            ]
        return out

    def repaired(self, chosen, tau, thd):
        rest = [q for q in self.queries if q not in chosen]
        if not rest:
            return chosen
        out, high, won = self.fused(chosen), set(), dict.fromkeys(chosen, 0)
        for p in self.cells:
            total = sum(math.exp(tau * out[q][p]) for q in chosen)
            best = max(sorted(chosen), key=lambda q, p=p: out[q][p])
            if math.exp(tau * out[best][p]) / total > thd:
                high.add(p)
                won[best] += 1
        low = [p for p in self.cells if p not in high]
        f = [sum(self.maps[q][p] for p in low) / max(len(low), 1) for q in self.queries]
        new = [
            self.g[q] + 0.5 * (won[q] / max(len(high), 1) if q in chosen else f[q])
            for q in self.queries
        ]
        old = self.composite(set(self.queries), self.g)
        pool = set(sorted(rest, key=lambda q: -old[q])[: len(chosen)])
        pool |= set(sorted(rest, key=lambda q: -f[q])[:3])
        values = self.composite(chosen | pool, new)
        order = sorted(values, key=lambda q: -values[q])
        gaps = {k: values[order[k - 1]] - values[order[k]] for k in range(6, len(order))}
        if not gaps:
            return chosen
        wanted = max(gaps, key=gaps.get)
        admitted = [q for q in order if q in pool][: max(min(3, wanted - len(chosen)), 0)]
        out = self.fused(chosen | set(admitted))
        winners = {max(sorted(out), key=lambda q, p=p: out[q][p]) for p in low}
        return chosen | (winners & set(admitted))


def window(seed: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dense = 0.2 + 0.05 * torch.randn(queries, 30, generator=generator)
    maps = torch.rand(queries, 30, generator=generator) ** 3
    maps *= torch.rand(queries, 1, generator=generator)
    overall = 0.2 + 0.05 * torch.randn(queries, generator=generator)
    return dense.double(), maps.double(), overall.double()


@pytest.mark.parametrize("most", [None, 4])
@pytest.mark.parametrize("queries", [1, 2, 5, 20])
def test_windows_against_loops(queries, most):
    repaired = 0
    for seed in range(12):
        dense, maps, overall = window(seed, queries)
        expected = Loops(dense.tolist(), maps.tolist(), overall.tolist(), 0.1, 0.15, 0.07, most)
        own = Selection(dense, maps, overall, 0.15, 0.07)
        first = own.first(0.1, most)
        assert set(first.tolist()) == expected.first
        second = own.repaired(first, 40.0, 0.8)
        assert second.tolist() == sorted(expected.second)
        fused = expected.fused(expected.second)
        torch.testing.assert_close(
            own.fused(second), torch.tensor([fused[q] for q in second.tolist()]).double()
        )
        repaired += len(second) > len(first)
        torch.testing.assert_close(
            certainty(overall, maps.mean(1)), torch.tensor(expected.c).double()
        )
    assert (repaired > 0) == (queries == 20)


def test_nothing_selected_nothing_changes():
    """tau = 1, lambda = 0 and no guided maps leave the logits as they are."""
    knobs = dict(share=1.0, local=0.0, guided=0.0, cells=1)
    context = dict(guides=dict(clipseg=tiny.Scorer()), words=tiny.words(5))
    images, visual = tiny.images(2, 64, 96), tiny.clip().visual
    plain, _ = sfp.build_method("sclip").logits(visual, images, tiny.queries(5))
    same, _ = sfp.build_method("s2c2seg", base="sclip", **knobs).logits(
        visual, images, tiny.queries(5), **context
    )
    torch.testing.assert_close(same, plain)


def test_a_class_survives_where_every_window_selected_it():
    """And where none is left, the one that was selected most often."""
    model = sfp.load(
        tiny.clip(**tiny.WORDS),
        method=dict(type="s2c2seg", base="sclip", share=0.2),
        guides=dict(clipseg=_Scorer()),
        slide_crop=64,
        slide_stride=32,
        short_side=None,
    )
    picture = (torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0)) * 255).byte()
    names = [f"thing {i}" for i in range(6)]
    vocabulary = sfp.vocabulary.as_vocabulary(names)
    queries = model.queries(vocabulary)
    windows = torch.stack([picture[:, :, x : x + 64] for x in (0, 32)])
    context = dict(guides=dict(clipseg=_Scorer()), words=sfp.trace.Words(tuple(names), None))
    logits, _ = model.method.logits(
        model.clip.visual, model.engine.normalise(windows), queries.features, **context
    )
    kept = logits.flatten(2).amax(2) > DROPPED / 2  # (2, Q)
    assert (kept[0] != kept[1]).any()
    found = model.segment(picture.permute(1, 2, 0).numpy(), names)
    both = (kept.sum(0) == 2).nonzero()[:, 0].tolist()
    middle = set(found.labels[:, 34:62].ravel().tolist())
    assert middle <= set(both or kept.any(0).nonzero()[:, 0].tolist())
    left = set(found.labels[:, :30].ravel().tolist())
    assert left <= set(kept[0].nonzero()[:, 0].tolist())


class _Scorer(torch.nn.Module):
    def scores(self, image, queries, size):
        return tiny.Scorer().scores(image, queries, size)


def test_what_it_needs():
    visual, images = tiny.clip().visual, tiny.images(1)
    method = sfp.build_method("s2c2seg", base="sclip")
    with pytest.raises(GuideError, match=r"clipseg-rd64-refined.*sfp\[guides\]"):
        method.logits(visual, images, tiny.queries(5), words=tiny.words(5))
    with pytest.raises(LookupError, match="the words, not only"):
        method.logits(visual, images, tiny.queries(5), guides=dict(clipseg=tiny.Scorer()))
    method = sfp.build_method("s2c2seg", base="sclip", overall="mean_logit", cells=1, share=0.5)
    context = dict(guides=dict(clipseg=tiny.Scorer()), words=tiny.words(5))
    found, _ = method.logits(visual, images, tiny.queries(5), **context)
    mean = sfp.build_method("sclip").logits(visual, images, tiny.queries(5))[0].mean((2, 3))
    kept = found[0].flatten(1).amax(1) > DROPPED / 2
    assert kept[F.normalize(mean, dim=1)[0].topk(2).indices].all()
