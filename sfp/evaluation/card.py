"""Reproduction cards: everything that determines a result, its scores, and comparisons of cards.

A card holds the groups of `settings` and the scores: `card.json`, and `card.md` for reading.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfp.evaluation.configs import ConfigError, find_config, read_config
from sfp.evaluation.scores import COLUMNS, cell, cells
from sfp.evaluation.settings import GROUPS, NOTED, STRICT, settings
from sfp.files import atomic_write

_ABSENT = object()  # a key that one side lacks


def write_card(folder: Path, groups: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Writes card.json and card.md.

    Args:
        folder: output folder.
        groups: from `settings`.
        result: the scores of `COLUMNS`, and "classes" with "IoU" and "Acc" of each.
    """
    card = dict(groups)
    card["scores"] = {k: result[k] for k in (*COLUMNS, "classes")}
    card["command"] = shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])
    for name, text in (("card.json", json.dumps(card, indent=1) + "\n"), ("card.md", _page(card))):
        with atomic_write(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def _page(card: Mapping[str, Any]) -> str:
    scores = card["scores"]
    lines = ["# Reproduction card", "", f"    {card['command']}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + " ---: |" * len(COLUMNS)]
    lines += [f"| {' | '.join(cells(scores))} |"]
    for group in GROUPS:
        lines += ["", f"## {group.capitalize()}", "", "| setting | value |", "| --- | --- |"]
        for key, value in card[group].items():
            if (group, key) == ("vocabulary", "classes"):
                value = f"{len(value)}, {sum(map(len, value))} queries"
            lines.append(f"| {key} | `{json.dumps(value, ensure_ascii=False)}` |")
    lines += ["", "## Classes", "", "| class | IoU | Acc |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {cell(row['IoU'])} | {cell(row['Acc'])} |"
        for name, row in scores["classes"].items()
    ]
    return "\n".join(lines) + "\n"


def read_side(path: str | Path) -> dict[str, Any]:
    """Reads one side of a comparison: a card (.json), a work folder with a card, or a config.

    Raises:
        ConfigError: if there is no such file.
        ValueError: if it is neither.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "card.json"
    if path.suffix != ".json":
        path = find_config(path)
    elif not path.is_file():
        raise ConfigError(
            f"there is no card {path}: give a card.json, a work folder of `sfp eval` that contains "
            "one, or a config"
        )
    if path.suffix == ".py":
        config = read_config(path, "model.type", "model.classes", "test_dataloader.dataset.type")
        groups = settings(config)
        return {k: v for k, v in groups.items() if k not in NOTED}  # those describe runs
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a card: {error}") from None
    if not isinstance(card, dict) or not all(isinstance(card.get(k), dict) for k in GROUPS):
        raise ValueError(f"{path} is not a card: expected the groups {', '.join(GROUPS)}")
    return card


@dataclass(frozen=True)
class Difference:
    """A setting that differs: its group, its dotted name, and its two values as text."""

    group: str
    name: str
    a: str
    b: str


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """The settings known on both sides in which they differ, key by key.

    Weights with equal hashes are equal whatever their names; words are compared class by class.
    """
    found: list[Difference] = []
    for group in GROUPS:
        left, right = dict(a.get(group, {})), dict(b.get(group, {}))
        if group == "weights" and left.get("sha256", 0) == right.get("sha256", 1):
            left.pop("name", None)
        if group == "vocabulary" and left and right:
            found += _words(left["classes"], right["classes"])
            continue
        if left.get("type") != right.get("type"):  # different methods have different knobs
            left, right = ({"type": side.get("type")} for side in (left, right))
        for name in left:
            if name in right:
                found += _values(group, name, left[name], right[name])
    return found


def _values(group: str, name: str, a: Any, b: Any) -> Iterator[Difference]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in {**a, **b}:
            one, two = a.get(key, _ABSENT), b.get(key, _ABSENT)
            yield from _values(group, f"{name}.{key}", one, two)
    elif a != b:
        texts = ("-" if x is _ABSENT else json.dumps(x, ensure_ascii=False) for x in (a, b))
        yield Difference(group, name, *texts)


def _words(a: Sequence[Sequence[str]], b: Sequence[Sequence[str]]) -> Iterator[Difference]:
    if len(a) != len(b):
        yield Difference("vocabulary", "number of classes", str(len(a)), str(len(b)))
        return
    for i, (left, right) in enumerate(zip(a, b, strict=True)):
        if left != right:
            yield Difference("vocabulary", f"class {i}", ", ".join(left), ", ".join(right))


def unknown(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings that decide comparability but are known on one side only."""
    return [
        f"{group} {key}"
        for group in STRICT
        for key in sorted(set(a.get(group, {})) ^ set(b.get(group, {})))
    ]
