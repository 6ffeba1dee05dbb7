"""What is registered, in words and tables: read off signatures, docstrings and built methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sfp.method import Method, Purify, Readout, build_method
from sfp.ops.integrators import own_tokens
from sfp.registry import METHODS, OPS, list_methods, list_ops

POSITIONAL = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)


def knobs(fn: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters and their defaults; `...` for those that have none."""
    parameters = inspect.signature(fn).parameters.values()
    return {
        p.name: ... if p.default is p.empty else p.default
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def summary(fn: Callable[..., Any]) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")


@dataclass(frozen=True)
class MethodCard:
    """A preset as a table shows it.

    Attributes:
        name: of the preset.
        title: first line of its file: the paper.
        summary: what it does.
        knobs: with their defaults.
        attention, residual, ffn, edits, refiners: of the method it builds, in the words of the ops.
    """

    name: str
    title: str
    summary: str
    knobs: dict[str, Any]
    attention: str
    residual: str
    ffn: str
    edits: str
    refiners: str


def method_card(name: str) -> MethodCard:
    """Builds a preset with its defaults and says what came out."""
    preset = METHODS.module_dict[name]
    method: Method = build_method(name)
    module = inspect.getmodule(preset)
    readouts = method.readouts
    return MethodCard(
        name=name,
        title=(inspect.getdoc(module) or "").split("\n")[0] if module else "",
        summary=summary(preset),
        knobs=knobs(preset),
        attention=_each(_rule(r) for r in readouts),
        residual=_each(_residual(r) for r in readouts),
        ffn=_each("yes" if r.ffn else "no" for r in readouts),
        edits=_each([*map(_edit, method.edits), *map(_name, method.surgery)]),
        refiners=_each(map(_name, method.refiners)),
    )


def _each(items: Iterable[str]) -> str:
    """Distinct words in order, or a dash."""
    return "; ".join(dict.fromkeys(items)) or "-"


def _rule(readout: Readout) -> str:
    where = "" if tuple(readout.blocks) == (-1,) else f" in blocks {_span(readout.blocks)}"
    return _rule_name(readout.attention) + where


def _span(blocks: Sequence[int]) -> str:
    return f"{blocks[0]}..{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def _rule_name(rule: Any) -> str:
    """An attention rule and the rules inside it, without the numbers."""
    if rule is None:
        return "qk"
    own = dict(getattr(rule, "knobs", ()))
    if _name(rule) == "self_self":
        return " + ".join(own.get("pairs", ("qq", "kk")))
    if _name(rule) == "average":
        return f"mean({', '.join(_rule_name(r) for r in own['rules'])})"
    if "rule" in own:
        return f"{_name(rule)}({_rule_name(own['rule'])})"
    return _name(rule)


def _residual(readout: Readout) -> str:
    if readout.residual is None:
        return "none"
    if readout.residual is own_tokens:
        return "tokens"
    return repr(readout.residual)


def _edit(edit: Any) -> str:
    if not isinstance(edit, Purify):
        return repr(edit)
    where = edit.layers if isinstance(edit.layers, str) else ", ".join(map(str, edit.layers))
    return f"{_name(edit.detector)} + {_name(edit.mitigator)} at {where}"


def _name(op: Any) -> str:
    """Of an op, or of a bare function in its place."""
    return getattr(op, "fn", op).__name__


def methods_markdown() -> str:
    """The generated table of docs/methods.md."""
    header = ["preset", "attention of the last block", "residual", "FFN", "edits", "refiners"]
    rows = [
        [f"`{c.name}`", c.attention, c.residual, c.ffn, c.edits, c.refiners]
        for c in map(method_card, list_methods())
    ]
    return markdown(header, rows)


def ops_rows() -> list[tuple[str, str, str, str]]:
    """(kind, name, knobs, summary) of every registered op, by kind."""
    rows = [
        (getattr(fn, "kind", ""), name, _knob_list(fn), summary(fn))
        for name, fn in ((name, OPS.module_dict[name]) for name in list_ops())
    ]
    return sorted(rows)


def _knob_list(fn: Callable[..., Any]) -> str:
    return ", ".join(k if v is ... else f"{k}={v!r}" for k, v in knobs(fn).items())


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
