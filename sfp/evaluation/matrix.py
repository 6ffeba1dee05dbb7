"""Tables of towers by methods: `sfp compare` on several weights, with their training data."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from sfp.evaluation.choices import seen
from sfp.evaluation.compare import MethodError, build_segmentor, measure, part_of
from sfp.evaluation.notices import quiet
from sfp.evaluation.scores import cells, columns_of
from sfp.files import atomic_write
from sfp.method import Method, build_method
from sfp.registry import guides_of
from sfp.tables import markdown


@quiet()
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
    run on a tower (for lack of an attention pool, say), its row gives the reason.

    Args:
        configs: by the name of weights, from `evaluate.load_config`.
        methods: as in `measure`.
        folder: output folder.
        resume, progress: as in `measure`.

    Returns:
        "rows": for all weights and methods "weights", "method", "seen", the training data of models by
        name (`choices.seen`), and either "scores", as in `measure`, or "refused", the reason.

    Raises:
        ValueError: for an unknown method, before anything runs; and as in `measure`.
        WeightsError: if weights cannot be read.
        DataError: as in `measure`.
    """
    built = {name: build_method(method) for name, method in methods.items()}
    rows: list[dict[str, Any]] = []
    for n, (weights, config) in enumerate(configs.items()):
        own = copy.deepcopy(config)
        own.work_dir = str(folder / re.sub(r"[^\w.+=-]+", "_", weights))
        run = partial(
            measure,
            own,
            segmentor=build_segmentor(own, next(iter(built.values()))),
            resume=resume,
            progress=partial(part_of, progress, n, len(configs)),
        )
        for name, found in _measured(run, methods):
            rows.append(dict(weights=weights, method=name, seen=_seen(own, built[name]), **found))
    record = dict(rows=rows)
    with atomic_write(folder / "matrix.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    with atomic_write(folder / "matrix.md") as path:
        lines = [f"* {line}\n" for line in matrix_lines(record)]
        path.write_text(markdown(*matrix_sheet(record)) + "\n" * bool(lines) + "".join(lines))
    return record


def _measured(
    run: Callable[..., dict[str, Any]], methods: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results by method: of all together, or separately if some cannot run on this tower."""
    try:
        for name, scores in run(methods)["methods"].items():
            yield name, dict(scores=scores)
    except MethodError as error:
        if len(methods) == 1:
            yield next(iter(methods)), dict(refused=str(error))
            return
        for name, method in methods.items():
            yield from _measured(run, {name: method})


def _seen(config: Config, method: Method) -> dict[str, str]:
    """The training data of the models that a method uses, by name."""
    model, needed = dict(config.model), guides_of(method)
    model["guides"] = {k: v for k, v in (model.get("guides") or {}).items() if k in needed}
    if not method.needs_regions:
        model["regions"] = None
    return dict(seen(dict(weights=dict(name=model["weights"]), protocol=model)))


def matrix_sheet(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table."""
    columns = columns_of(row["scores"] for row in record["rows"] if "scores" in row)
    refused = ["refused", *[""] * (len(columns) - 1)]
    rows = []
    for row in record["rows"]:
        numbers = cells(row["scores"], 1, columns) if "scores" in row else refused
        others = [model for model in row["seen"] if model != row["weights"]]
        rows.append([row["weights"], row["method"], *numbers, ", ".join(others) or "-"])
    return ["weights", "method", *columns, "other models"], rows


def matrix_lines(record: Mapping[str, Any]) -> list[str]:
    """Below the table: why methods were refused, and training data besides images and captions."""
    reasons, sources = [], []
    for row in record["rows"]:
        if "refused" in row:
            reasons.append(f"{row['method']} is refused on {row['weights']}: {row['refused']}")
        sources += [f"{model} was trained on {data}" for model, data in row["seen"].items()]
    return [*reasons, *dict.fromkeys(sources)]
