"""Tables of towers by methods: `sfp compare` on several weights, with their training data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from sfp.clip.checkpoints.loading import split_activation
from sfp.clip.checkpoints.published import MINI, NONE, find
from sfp.data.images import DataError
from sfp.evaluation.compare import measure, part_of
from sfp.evaluation.scores import cells, columns_of
from sfp.files import atomic_write
from sfp.method import Method, build_method
from sfp.registry import guides_of
from sfp.tables import markdown

# training data of towers other than captions written by people, where a source states it
TOWERS = {"TIPSv2": "synthetic captions"}
DRAWN = "captions and patch labels of drawn scenes"  # all that the mini CLIP was trained on
# training data of other models, by a word in their settings
OTHERS = {
    "sam3": "masks with words",  # before "sam", which is in its name
    "sam": "masks",
    "dino": "unlabelled images",
    "clipseg": "masks",
}


def matrix(
    configs: Mapping[str, Config],
    methods: Mapping[str, str | Mapping[str, Any] | Method],
    folder: Path,
    *,
    resume: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates methods on several weights; writes matrix.json and matrix.md into `folder`.

    Each tower has its own folder inside it, whose journals a later run resumes. If a method does not
    run on a tower (for lack of a class token, say), its row gives the reason.

    Args:
        configs: by the name of weights, from `evaluate.load_config`.
        methods: as in `measure`.
        folder: output folder.
        resume, progress: as in `measure`.

    Returns:
        "rows": for all weights and methods "weights", "method", "supervision", "extra", and either
        "scores", as in `measure`, or "refused", the reason.

    Raises:
        ValueError: for an unknown method, before anything runs.
        DataError: as in `measure`.
    """
    for method in methods.values():
        build_method(method)
    rows: list[dict[str, Any]] = []
    for n, (weights, config) in enumerate(configs.items()):
        config.work_dir = str(folder / re.sub(r"[^\w.+=-]+", "_", weights))
        found = _measured(config, methods, resume, partial(part_of, progress, n, len(configs)))
        for name, scores in found:
            extra = extra_models(config, methods[name])
            kind = "refused" if isinstance(scores, str) else "scores"
            learnt = supervision(weights, extra)
            row = dict(weights=weights, method=name, supervision=learnt, extra=list(extra))
            rows.append(row | {kind: scores})
    record = dict(rows=rows)
    with atomic_write(folder / "matrix.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    with atomic_write(folder / "matrix.md") as path:
        path.write_text(markdown(*matrix_sheet(record)))
    return record


def _measured(
    config: Config,
    methods: Mapping[str, Any],
    resume: bool,
    progress: Callable[[int, int], None],
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Scores by method: of all together, or separately if some cannot run on this tower."""
    try:
        scores = measure(config, methods, resume=resume, progress=progress)["methods"]
        yield from scores.items()
        return
    except DataError:  # which says nothing of methods
        raise
    except ValueError as error:
        if len(methods) == 1:
            yield next(iter(methods)), str(error)
            return
    for name, method in methods.items():
        yield from _measured(config, {name: method}, resume, progress)


def extra_models(config: Config, method: str | Mapping[str, Any] | Method) -> dict[str, str]:
    """The other models that a method uses besides the tower, and their training data.

    These are the guides it needs, and the mask and region proposers of the config.
    """
    model, named = config.model, guides_of(build_method(method))
    nodes = {k: v for k, v in (model.get("guides") or {}).items() if k in named}
    nodes |= {kind: model.get(kind) for kind in ("masks", "regions") if model.get(kind)}
    found = {}
    for name, node in nodes.items():
        settings = f"{name} {node}".lower()
        learnt = [what for word, what in OTHERS.items() if word in settings]
        found[name] = learnt[0] if learnt else "see its page"
    return found


def supervision(weights: str, extra: Mapping[str, str]) -> str:
    """The training data of a tower and of other models, in words."""
    name, _ = split_activation(weights)
    row = find(name)
    own = [DRAWN] if name == MINI else [] if name == NONE else ["captions"]
    tower = TOWERS.get(row.family, "") if row else ""
    return ", ".join(dict.fromkeys(word for word in (*own, tower, *extra.values()) if word))


def matrix_sheet(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    columns = columns_of(row["scores"] for row in record["rows"] if "scores" in row)
    header = ["weights", "method", *columns, "supervision", "extra models"]
    rows = []
    for row in record["rows"]:
        if "scores" in row:
            numbers: Sequence[str] = cells(row["scores"], 1, columns)
        else:
            numbers = ["refused", *[""] * (len(columns) - 1)]
        extra = ", ".join(row["extra"]) or "none"
        rows.append([row["weights"], row["method"], *numbers, row["supervision"], extra])
    return header, rows
