"""Published numbers, with their sources and the protocols under which they were measured.

They are stored in `published.json`, table by table as in the sources; none of them was measured here.
Numbers are comparable only under the same protocol, `Number.protocol`; tables that mix protocols must
show it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfp.clip.checkpoints.published import PUBLISHED
from sfp.data.benchmarks import by_dataset
from sfp.evaluation.card import Difference, differences
from sfp.evaluation.configs import find_config, read_config
from sfp.evaluation.settings import STRICT, method_settings, plain, settings
from sfp.registry import METHODS, suggest

FILE = Path(__file__).with_name("published.json")
METRICS = ("mIoU", "mAcc", "aAcc", "fwIoU")
# names in papers' tables -> those of `sfp.data.benchmarks`
CONFIGS = {
    "VOC21": "voc21",
    "Context60": "context60",
    "COCO-Object": "coco_object",
    "VOC20": "voc20",
    "Context59": "context59",
    "COCO-Stuff": "coco_stuff164k",
    "ADE20K": "ade20k",
    "Cityscapes": "city_scapes",
    "ADE20K-847": "ade847",
    "Context459": "context459",
    "COCO-27": "coco27",
    "Cityscapes-27": "city_scapes27",
}
EIGHT = tuple(CONFIGS)[:8]  # the usual benchmarks of this field
SEEN = ("text", "transcript", "second-hand")


@dataclass(frozen=True)
class Source:
    """A source of numbers.

    Attributes:
        text: its name, to display.
        seen: "text": checked against the source's text; "transcript": copied from a picture or page
            that is no longer available; "second-hand": quoted by another source.
        note: remarks.
    """

    text: str
    seen: str
    note: str = ""


@dataclass(frozen=True)
class Protocol:
    """How numbers were measured.

    Attributes:
        name: its name in tables.
        text: its description.
        options: differences from the shipped configs, by benchmark, "*" for all: dotted names as in
            `--cfg-options`; "short_side" in pixels; "centre_crop", its side in pixels and the class of
            ignored pixels (null: none), see `CentreCrop`; and "words", a pair whose first word is
            replaced by the second in every query, or null if the words are unknown. None if the
            settings are unknown or cannot be expressed so.
    """

    name: str
    text: str
    options: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Table:
    """A table of a source.

    Attributes:
        title: its subject.
        note: remarks.
    """

    title: str
    note: str = ""


@dataclass(frozen=True)
class Number:
    """A published number.

    Attributes:
        value: in percent; text such as "62.x" where our copy of the source cuts a digit off.
        benchmark: one of `CONFIGS`, or an average by name.
        metric: one of `METRICS`.
        backbone: name of CLIP's weights as in `sfp weights list`, or another name if there is none.
        protocol: key of `Published.protocols`.
        source: key of `Published.sources`.
        table: key of `Published.tables`.
        row: name in that table: a method, or a variant of one.
        method: the corresponding preset of this package; None if there is none.
        by: who ran the method if not its authors; "" for its authors, or if unknown.
        extra: models used besides CLIP.
        trained: whether the method involves training.
        ablation: whether the row is a variant in a table of variants.
        note: remarks on the row, e.g. in what the run differed from the preset's defaults.
    """

    value: float | str
    benchmark: str
    metric: str
    backbone: str
    protocol: str
    source: str
    table: str
    row: str
    method: str | None = None
    by: str = ""
    extra: str = ""
    trained: bool = False
    ablation: bool = False
    note: str = ""


@dataclass(frozen=True)
class Published:
    """All published numbers.

    Attributes:
        sources, protocols, tables: by the keys that numbers use.
        numbers: in the order of the file.
    """

    sources: Mapping[str, Source]
    protocols: Mapping[str, Protocol]
    tables: Mapping[str, Table]
    numbers: Sequence[Number]

    def find(self, **where: Any) -> list[Number]:
        """Numbers with these values of their attributes, e.g. `find(method="sclip", metric="mIoU")`."""
        return [n for n in self.numbers if all(getattr(n, k) == v for k, v in where.items())]

    def of_method(self, method: str, benchmark: str, backbone: str) -> list[Number]:
        """A preset's mIoU on a benchmark, without ablations."""
        return self.find(
            method=method, benchmark=benchmark, backbone=backbone, metric="mIoU", ablation=False
        )

    def row(self, table: str, row: str) -> dict[str, Number]:
        """A row's numbers by benchmark.

        Raises:
            ValueError: if there is none; the message suggests the closest.
        """
        rows: dict[str, dict[str, Number]] = {}
        for number in self.find(table=table):
            rows.setdefault(number.row, {})[number.benchmark] = number
        if table not in self.tables:
            raise ValueError(f"no published table {table!r}{suggest(table, self.tables)}")
        if row not in rows:
            raise ValueError(f"no row {row!r} in the published table {table!r}{suggest(row, rows)}")
        return rows[row]


def benchmark_of(dataset: str) -> str | None:
    """The name in papers' tables of the benchmark that a dataset type reads; None for others."""
    found = by_dataset(dataset)
    names = {config_name: name for name, config_name in CONFIGS.items()}
    return names.get(found.name) if found else None


def backbone_of(weights: Mapping[str, Any]) -> str:
    """The name under which weights are published, else the given one.

    OpenAI's files are recognised by their hash, wherever they are.

    Args:
        weights: the group "weights" of `settings`.
    """
    names = {row.sha256: name for name, row in PUBLISHED.items() if row.sha256}
    return names.get(str(weights.get("sha256")), str(weights["name"]))


def settings_of(protocol: str, benchmark: str) -> dict[str, Any] | None:
    """The settings of a protocol on a benchmark, in those groups of `settings` that decide.

    Args:
        protocol: key of `Published.protocols`.
        benchmark: one of `CONFIGS`.

    Returns:
        "protocol", "vocabulary" (unless the words are unknown) and "data"; None if they are unknown or
        cannot be expressed as options of a shipped config.
    """
    options = published().protocols[protocol].options
    if options is None:
        return None
    own = {**options.get("*", {}), **options.get(benchmark, {})}
    unknown = "words" in own and own["words"] is None
    words, side, crop = (own.pop(key, None) for key in ("words", "short_side", "centre_crop"))
    config = read_config(find_config(CONFIGS[benchmark]))
    config.merge_from_dict(own)
    steps = config.test_dataloader.dataset.pipeline
    (i,) = (i for i, step in enumerate(steps) if step["type"] == "Resize")
    if side:
        steps[i]["scale"] = (steps[i]["scale"][0], side)
    if crop:  # of labels too, which are therefore loaded first
        steps[i : i + 2] = [steps[i + 1], dict(type="CentreCrop", size=crop[0], void=crop[1])]
    groups = settings(config)
    if words:
        classes = groups["vocabulary"]["classes"]
        renamed = [[query.replace(*words) for query in queries] for queries in classes]
        groups["vocabulary"] = dict(classes=renamed)
    return {group: groups[group] for group in STRICT if not (unknown and group == "vocabulary")}


def reservation(number: Number, groups: Mapping[str, Any]) -> str:
    """Why a number is not comparable with a run on the same benchmark; "" if no reason is known.

    Args:
        number: a published number.
        groups: the run's settings, from `settings`.
    """
    own = settings_of(number.protocol, number.benchmark)
    if own is None:
        return published().protocols[number.protocol].name
    found = differences(own, {group: groups.get(group, {}) for group in STRICT})
    if not found:
        return "" if "vocabulary" in own else "same settings, but its words are not known"
    words = [row for row in found if row.group == "vocabulary"]
    parts = [_short(row) for row in found if row.group != "vocabulary" or len(words) == 1]
    if len(words) > 1:
        parts.append(f"the words of {len(words)} classes")
    name = published().protocols[number.protocol].name
    return f"protocol ({name}) differs in {', '.join(parts)}"


def beside_run(groups: Mapping[str, Any]) -> list[str]:
    """The published numbers of a run's preset, benchmark and weights, in words.

    Each says whether the protocol is the same, and which knobs of the run are not the preset's
    defaults.

    Args:
        groups: settings of the run, from `settings`, or its card.
    """
    method = plain(groups["method"])
    name = method.get("type") if isinstance(method, Mapping) else None
    benchmark = benchmark_of(groups["data"].get("dataset", ""))
    if name not in METHODS.module_dict or benchmark is None:
        return []
    knobs = differences(dict(method=plain(method_settings(name))), dict(method=method))
    lines = []
    for number in published().of_method(name, benchmark, backbone_of(groups["weights"])):
        by = f"; run by {number.by}" if number.by else ""
        source = published().sources[number.source].text
        line = f"published {number.value} ({source}{by}), "
        line += reservation(number, groups) or "same protocol, as far as known"
        line += "".join(f"; here {knob.name} {knob.b}, by default {knob.a}" for knob in knobs)
        lines.append(f"{line}. {number.note}" if number.note else line)
    return list(dict.fromkeys(lines))


def _short(row: Difference) -> str:
    """A setting and its two values; of pipelines, the steps that are not in both."""
    a, b = row.a, row.b
    if row.name == "pipeline":
        one, two = (json.loads(text).split(" > ") for text in (a, b))
        a = " > ".join(step for step in one if step not in two) or "nothing"
        b = " > ".join(step for step in two if step not in one) or "nothing"
    a, b = (text if len(text) <= 40 else text[:37] + "..." for text in (a, b))
    return f"{row.name} ({a}, here {b})"


@cache
def published() -> Published:
    """The published numbers that come with the package."""
    return parse(json.loads(FILE.read_text(encoding="utf-8")))


def parse(data: Mapping[str, Any]) -> Published:
    """Reads the contents of the file.

    Args:
        data: "sources" and "protocols" by key, and "tables": each with "table", "title", "columns",
            "rows" and attributes of `Number` that rows may override. A row has "row" and "values", one
            per column, null where the source has none.

    Raises:
        ValueError: naming the table and row, if a key is unknown or missing, a row does not have one
            value per column, a value is not a percentage, or a number appears twice.
    """
    sources = {k: _build(Source, v, f"source {k!r}") for k, v in data["sources"].items()}
    protocols = {k: _build(Protocol, v, f"protocol {k!r}") for k, v in data["protocols"].items()}
    for key, source in sources.items():
        _one_of("seen", source.seen, SEEN, f"source {key!r}")
    tables: dict[str, Table] = {}
    numbers: list[Number] = []
    for table in data["tables"]:
        shared = {k: v for k, v in table.items() if k not in ("title", "note", "columns", "rows")}
        tables[table["table"]] = Table(table["title"], table.get("note", ""))
        for row in table["rows"]:
            numbers += _row(shared, table["columns"], row)
    for number in numbers:
        where = f"table {number.table!r}, row {number.row!r}"
        _one_of("source", number.source, sources, where)
        _one_of("protocol", number.protocol, protocols, where)
        _one_of("metric", number.metric, METRICS, where)
        if not number.benchmark.startswith(("mean", "average")):
            _one_of("benchmark", number.benchmark, CONFIGS, where)
    keys = [(n.table, n.row, n.metric, n.benchmark) for n in numbers]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"published twice: {min(twice)}")
    frozen = MappingProxyType
    return Published(frozen(sources), frozen(protocols), frozen(tables), tuple(numbers))


def _row(
    shared: Mapping[str, Any], columns: Sequence[str], row: Mapping[str, Any]
) -> Iterator[Number]:
    where = f"table {shared.get('table')!r}, row {row.get('row')!r}"
    own = {k: v for k, v in row.items() if k != "values"}
    if len(row["values"]) != len(columns):
        raise ValueError(f"{where}: {len(row['values'])} values for {len(columns)} columns")
    for benchmark, value in zip(columns, row["values"], strict=True):
        if value is not None:
            _percentage(value, where)
            yield _build(Number, {**shared, **own, "benchmark": benchmark, "value": value}, where)


def _build(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    names = [field.name for field in fields(kind)]
    for name in values:
        _one_of("key", name, names, where)
    try:
        return kind(**values)
    except TypeError as error:  # names the missing attribute
        raise ValueError(f"{where}: {error}") from None


def _one_of(what: str, value: str, known: Any, where: str) -> None:
    if value not in known:
        raise ValueError(f"{where}: unknown {what} {value!r}{suggest(value, known)}")


def _percentage(value: Any, where: str) -> None:
    number = isinstance(value, float) and 0 <= value <= 100
    if not number and not (isinstance(value, str) and re.fullmatch(r"\d{1,2}\.x", value)):
        raise ValueError(
            f"{where}: {value!r} is neither a percentage nor one with an unreadable digit, like '62.x'"
        )
