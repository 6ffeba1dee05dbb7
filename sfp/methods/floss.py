"""FLOSS: for each class, the templates with the most confident pixels (Benigmim et al., ICCV 2025).

FLOSS: Free Lunch in Open-vocabulary Semantic Segmentation, arXiv:2504.10487. A pass over unlabelled
images of the target dataset (`sfp fit templates`) ranks templates by the entropy of the pixels that
they assign to a class; a small file keeps the best four for each class. An expert is a bank of text
features in which all classes use the templates of one class; it decides where it predicts that class.

It needs the words themselves, to encode the banks (once), and a fit on unlabelled images beforehand.
Features are compared with K + 1 banks, at every pixel as in the release; `cells=1` compares patches,
which is much faster. The fit ranks templates by patches, the release by pixels. The fusion has been
compared with the released code; the rest follows the paper.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.text import prompt_templates
from sfp.files import atomic_write, read_once
from sfp.functional.kept import constant
from sfp.functional.precision import upcast
from sfp.functional.windows import interpolation
from sfp.registry import METHODS, Count, composition, op
from sfp.tokens import Tokens
from sfp.trace import Trace

BUDGET = 2**23  # probabilities in memory at once


def fuse_experts(logits: Tensor, default: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the most confident expert that predicts its own class, else the default bank's.

    Args:
        logits: scaled logits of each class's expert, (K, Q, P).
        default: scaled logits of the default bank, (Q, P).
        index: class of each query, (Q,).

    Returns:
        (Q, P) probabilities, and the number of experts that predict their own class for each pixel,
        (P,). Of equally confident experts the first is used.
    """
    probs = logits.softmax(1)  # (K, Q, P)
    best, query = probs.max(1)  # (K, P)
    own = index[query] == torch.arange(len(logits), device=index.device)[:, None]
    surest, expert = best.masked_fill(~own, -1).max(0)  # (P,)
    spoken = probs.gather(0, expert.expand(1, probs.shape[1], -1))[0]  # (Q, P)
    return torch.where(surest < 0, default.softmax(0), spoken), own.sum(0)


@read_once(8)
def _experts(path: str) -> dict[str, Any]:
    """The contents of a file of experts."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        prompt_templates(found["templates"])
        assert all(found["experts"].values())
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"experts={path!r}: expected a file that `sfp fit templates` wrote ({type(error).__name__})"
        ) from None
    return found


def expert_banks(path: str, trace: Trace) -> Tensor:
    """Unit text features of each class's expert for the words of a trace, (K, Q, C).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a file of experts, or has no templates for a class, which is named.
        LookupError: if the trace has only text features, no words.
    """
    found = _experts(path)
    words = trace.known_words()
    index = trace.index or range(len(words.queries))
    names = [words.queries[list(index).index(k)] for k in range(index[-1] + 1)]
    missing = [name for name in names if name not in found["experts"]]
    if missing:
        raise ValueError(
            f"experts={path!r} has no templates for {missing[0]!r}: it was fitted for "
            f"{', '.join(list(found['experts'])[:5])}, ...; fit it again with these classes"
        )
    single = words.banks(found["templates"])  # (T, Q, C)
    chosen = [single[found["experts"][name]].mean(0) for name in names]
    return F.normalize(torch.stack(chosen), dim=-1)


@op("comparison", words=True)
def expert_probabilities(
    features: Tokens,
    trace: Trace,
    *,
    experts: str,
    logit_scale: float = 100.0,
    cells: Count | None = None,
) -> Tensor:
    """Probabilities from several text banks, fused by the confidence of class experts (FLOSS).

    Args:
        experts: file that `sfp fit templates` wrote.
        logit_scale: inverse temperature of the softmax over queries.
        cells: cells per patch at which banks are fused; None for one per pixel of the window, as in
            the release.

    Returns:
        (B, Q, h', w'), for the decision `as_scores`.
    """
    banks = expert_banks(experts, trace).to(upcast(features.data))
    text = trace.query_features().to(banks)
    index = constant(trace.index or range(len(text)), banks)
    height, width = trace.image.shape[-2:]
    size = (height, width) if cells is None else tuple(cells * side for side in features.grid)
    unit = F.normalize(upcast(features.patches), dim=-1).mT  # (B, C, N)
    every = torch.cat([banks, text[None]])  # (K + 1, Q, C)
    out = []
    for own in unit:
        maps = (logit_scale * (every @ own)).unflatten(2, features.grid)  # (K + 1, Q, h, w)
        rows = max(BUDGET // (len(every) * len(text) * size[1]), 1)
        up = [resize_rows(maps, size, i, min(i + rows, size[0])) for i in range(0, size[0], rows)]
        parts = [fuse_experts(x[:-1], x[-1], index)[0] for x in up]
        out.append(torch.cat(parts, dim=1).unflatten(1, size))
    return torch.stack(out)


def resize_rows(maps: Tensor, size: tuple[int, ...], start: int, stop: int) -> Tensor:
    """Rows from start to stop of maps (..., h, w) resampled to a size, (..., rows * W)."""
    rows, columns = (
        interpolation(cells, pixels, maps)
        for cells, pixels in zip(maps.shape[-2:], size, strict=True)
    )
    return (rows[start:stop] @ maps @ columns.T).flatten(-2)


def entropies(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Summed entropy of the pixels that a bank assigns to each class, and their number: (K,) each.

    Args:
        logits: scaled logits, (Q, P).
        index: class of each query, (Q,).
    """
    probs = logits.softmax(0)
    entropy = -(probs * (probs + 1e-10).log()).sum(0).double()  # (P,)
    label = index[probs.argmax(0)]
    total = entropy.new_zeros(int(index.max()) + 1)
    return total.index_add(0, label, entropy), torch.bincount(label, minlength=len(total))


def fit(
    windows: Iterable[Tensor], banks: Tensor, index: Sequence[int], *, logit_scale: float = 100.0
) -> Tensor:
    """Mean entropy of the pixels that each template assigns to each class, (T, K); inf without pixels.

    Args:
        windows: unit features of the patches or pixels of unlabelled images, (P, C) each.
        banks: text features of each single template, (T, Q, C).
        index: class of each query.
        logit_scale: inverse temperature.
    """
    classes = constant(index, banks)
    total = torch.zeros(len(banks), index[-1] + 1, dtype=torch.float64, device=banks.device)
    count = torch.zeros_like(total)
    for features in windows:
        for own, bank in enumerate(banks):
            entropy, pixels = entropies(logit_scale * (bank @ features.to(bank).T), classes)
            total[own] += entropy
            count[own] += pixels
    return torch.where(count > 0, total / count.clamp_min(1), torch.inf)


def write_experts(
    path: Path, mean_entropy: Tensor, names: Sequence[str], templates: Sequence[str], count: int = 4
) -> dict[str, list[int]]:
    """Writes the `count` templates of lowest mean entropy of each class, or all if it has no pixels.

    Args:
        path: file to write.
        mean_entropy: (T, K), from `fit`.
        names: first word of each class.
        templates: texts of the templates.
        count: number of templates of an expert.

    Returns:
        Indices of the templates by class.
    """
    experts = {}
    for name, column in zip(names, mean_entropy.T, strict=True):
        order = column.argsort(stable=True)[:count].tolist()
        seen = [i for i in order if column[i].isfinite()]
        experts[name] = seen or list(range(len(templates)))
    with atomic_write(path) as temporary:
        text = json.dumps(dict(templates=list(templates), experts=experts), indent=1)
        temporary.write_text(text + "\n", encoding="utf-8")
    return experts


@METHODS.register_module()
def floss(
    *,
    base: str | Mapping[str, Any] = "naclip",
    experts: str | None = None,
    logit_scale: float = 100.0,
    cells: Count | None = None,
) -> dict[str, Any]:
    """Another preset, compared with a bank of text features for each class. Needs the words.

    Args:
        base: the preset, by name or with knobs.
        experts: file that `sfp fit templates` wrote; without one, the base itself.
        logit_scale, cells: as in `expert_probabilities`.
    """
    fields = composition(base)
    if experts is None:
        return fields
    compare = dict(
        type="expert_probabilities", experts=experts, logit_scale=logit_scale, cells=cells
    )
    return dict(fields, comparison=compare, decision=dict(type="as_scores"))
