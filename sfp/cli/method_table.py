"""Tables of registered methods and ops, from signatures, docstrings and built methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sfp.kinds import Reader
from sfp.method import Method, Purify, Readout, build_method
from sfp.ops.comparisons import cosines
from sfp.ops.integrators import own_tokens
from sfp.registry import METHODS, OPS, find, knobs, list_methods, list_ops
from sfp.tables import markdown


def summary(fn: Callable[..., Any]) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(fn) or "").split("\n\n")[0].replace("\n", " ")


def methods_rows() -> list[tuple[str, str, str, str]]:
    """(name, knobs, summary, paper) of every registered preset, including other packages'."""
    presets = METHODS.module_dict
    return [
        (name, _knob_list(presets[name]), summary(presets[name]), title(presets[name]))
        for name in list_methods()
    ]


def title(preset: Callable[..., Any]) -> str:
    """The first line of a preset's file: the paper."""
    module = inspect.getmodule(preset)
    return (inspect.getdoc(module) or "").split("\n")[0] if module else ""


def documentation(name: str) -> str:
    """The documentation of a preset: its paper, what it does, its knobs and their defaults.

    Raises:
        ValueError: if there is no such preset.
    """
    preset = find(METHODS, name)
    return f"{title(preset)}\n\n{inspect.getdoc(preset)}\n\nDefaults: {_knob_list(preset)}"


def _each(items: Iterable[str]) -> str:
    """The distinct items in order, or a dash."""
    return "; ".join(dict.fromkeys(items)) or "-"


def _rule(readout: Readout | Reader) -> str:
    if not isinstance(readout, Readout):
        return _name(readout)
    where = "" if tuple(readout.blocks) == (-1,) else f" in blocks {_span(readout.blocks)}"
    return _rule_name(readout.attention) + where


def _span(blocks: Sequence[int]) -> str:
    return f"{blocks[0]}..{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def _rule_name(rule: Any) -> str:
    """An attention rule and the rules inside it, without numeric knobs."""
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


def _residual(readout: Readout | Reader) -> str:
    if not isinstance(readout, Readout) or readout.residual is None:
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
    """The name of an op, or of a plain function used as one."""
    return getattr(op, "fn", op).__name__


def methods_markdown() -> str:
    """The generated table of docs/methods.md: what each preset builds with its defaults."""
    header = [
        "preset",
        "attention of the last block",
        "residual",
        "FFN",
        "edits",
        "words and logits",
    ]
    return markdown(header, map(_parts, list_methods()))


def _parts(name: str) -> list[str]:
    """The parts of a preset, by the names of its ops."""
    method: Method = build_method(name)
    readouts = method.readouts
    return [
        f"`{name}`",
        _each(_rule(r) for r in readouts),
        _each(_residual(r) for r in readouts),
        _each("yes" if getattr(r, "ffn", False) else "no" for r in readouts),
        _each([*map(_edit, method.edits), *map(_name, method.surgery)]),
        _each(map(_name, _of_logits(method))),
    ]


def _of_logits(method: Method) -> list[Any]:
    """The ops between features and labels, in order; the default comparison is left out."""
    comparison = [] if method.comparison is cosines else [method.comparison]
    return [*comparison, *method.refiners, *([method.decision] if method.decision else [])]


def ops_rows() -> list[tuple[str, str, str, str]]:
    """(kind, name, knobs, summary) of every registered op, by kind."""
    rows = [
        (getattr(fn, "kind", ""), name, _knob_list(fn), summary(fn))
        for name, fn in ((name, OPS.module_dict[name]) for name in list_ops())
    ]
    return sorted(rows)


def _knob_list(fn: Callable[..., Any]) -> str:
    return ", ".join(k if v is ... else f"{k}={v!r}" for k, v in knobs(fn).items())
