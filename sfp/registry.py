"""Names for parts and methods, and the one function that turns config nodes into callables.

An op is a plain function; a config binds its keyword-only knobs::

    @op("detector")
    def loud(trace, layer, *, above=2.0): ...

    dict(type="loud", above=3.0)        # in a config

A preset is a function from knobs to such a config, registered in `METHODS`.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mmengine.registry import Registry

OPS = Registry("op")
METHODS = Registry("method")
GUIDES = Registry("guide")
MASKS = Registry("mask proposer")

NESTED = dict(
    affinity="affinity", fill="mitigator", rule="attention", rules="attention", source="source"
)

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def op(kind: str) -> Callable[[F], F]:
    """Registers a function as an op of a kind ("detector", "mitigator", "attention", ...)."""

    def register(fn: F) -> F:
        fn.kind = kind  # type: ignore[attr-defined]
        OPS.register_module(module=fn)
        return fn

    return register


@dataclass(frozen=True)
class Op:
    """A function with its knobs bound. Equal functions with equal knobs are equal ops."""

    fn: Callable[..., Any]
    knobs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Calls the function with its knobs bound."""
        return self.fn(*args, **dict(self.knobs))

    def __repr__(self) -> str:
        return f"{self.fn.__name__}({', '.join(f'{k}={v!r}' for k, v in self.knobs)})"


def bind(node: Any, kind: str | None = None) -> Any:
    """Builds a config node, nested nodes first.

    Args:
        node: `dict(type=name, knob=value, ...)` becomes an `Op`; lists become tuples; anything else,
            callables among them, is returned as it is.
        kind: what the op must be registered as.

    Raises:
        ValueError: for an unknown op or knob, a missing knob, or an op of another kind; the message
            names the closest valid ones.
    """
    if isinstance(node, (list, tuple, range)):
        return tuple(bind(item, kind) for item in node)
    if not (isinstance(node, Mapping) and "type" in node):
        return node
    fn = find(OPS, node["type"], kind)
    if kind is not None and getattr(fn, "kind", kind) != kind:
        raise ValueError(
            f"op {node['type']!r} is of kind {getattr(fn, 'kind', None)!r} where {kind!r} is needed; "
            f"of that kind are: {', '.join(list_ops(kind))}"
        )
    # a knob that takes an op is named after the kind it takes
    knobs = {k: bind(v, NESTED.get(k)) for k, v in node.items() if k != "type"}
    check_knobs(fn, knobs, f"op {fn.__name__!r}")
    return Op(fn, tuple(sorted(knobs.items(), key=lambda item: item[0])))


def find(
    registry: Registry, name: str | Callable[..., Any], kind: str | None = None
) -> Callable[..., Any]:
    """The registered function of a name; callables pass.

    Args:
        registry: where to look.
        name: of the function.
        kind: of the ops that the message of an error names; None for all.

    Raises:
        ValueError: if there is none; the message names the closest ones.
    """
    if callable(name):
        return name
    known = registry.module_dict
    if name not in known:
        valid = list_ops(kind) if kind else known
        raise ValueError(f"unknown {kind or registry.name} {name!r}{suggest(name, valid)}")
    return known[name]


def check_knobs(fn: Callable[..., Any], knobs: Mapping[str, Any], what: str) -> None:
    """Raises a ValueError unless `knobs` are keyword-only parameters of `fn` and none is missing."""
    valid = {
        name: p
        for name, p in inspect.signature(fn).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in knobs:
        if name not in valid:
            raise ValueError(f"{what} has no knob {name!r}{suggest(name, valid)}")
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in knobs]
    if missing:
        raise ValueError(f"{what} needs the knob(s) {', '.join(missing)}")
    for name, value in knobs.items():
        choices = _choices(fn, name)
        if choices and isinstance(value, (str, type(None))) and value not in choices:
            raise ValueError(f"{what}: unknown {name}={value!r}{suggest(value, choices)}")


def _choices(fn: Callable[..., Any], name: str) -> tuple[str, ...]:
    """What a knob annotated as `Literal[...]` may be, if strings are all it takes."""
    annotation = str(inspect.signature(fn).parameters[name].annotation)  # a string, unevaluated
    match = re.fullmatch(r"Literal\[(.*)\]", annotation)
    return ast.literal_eval(f"({match[1]},)") if match else ()


def pick(what: str, name: str, options: Mapping[str, T]) -> T:
    """`options[name]`.

    Raises:
        ValueError: if there is no such option; the message names the closest one.
    """
    if name not in options:
        raise ValueError(f"unknown {what} {name!r}{suggest(name, options)}")
    return options[name]


def suggest(name: object, valid: Iterable[str]) -> str:
    """The tail of an error message: the closest valid name, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(names) or 'none'}"


def list_ops(kind: str | None = None) -> list[str]:
    """Names of the registered ops, of one kind or all."""
    return sorted(n for n, f in OPS.module_dict.items() if kind in (None, f.kind))


def list_methods() -> list[str]:
    """Names of the registered methods."""
    return sorted(METHODS.module_dict)
