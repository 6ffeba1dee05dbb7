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
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Registry:
    """Functions or classes by name.

    A name that is registered again stands for the new one from then on, so that a notebook cell can
    be edited and run again. A warning says so if the two come from different places.

    Args:
        name: what is registered here, for messages.
        homes: packages of `sfp` that register something here, imported at the first look-up.
    """

    def __init__(self, name: str, *homes: str) -> None:
        self.name = name
        self._homes = homes
        self._modules: dict[str, Callable[..., Any]] = {}

    def __repr__(self) -> str:
        return f"Registry({self.name!r}: {', '.join(self._modules) or 'empty'})"

    @property
    def module_dict(self) -> dict[str, Callable[..., Any]]:
        """All that is registered, by name."""
        self._load()
        return self._modules

    def get(self, name: str) -> Callable[..., Any] | None:
        """What is registered under a name, or None."""
        return self.module_dict.get(name)

    def register_module(
        self,
        name: str | Callable[..., Any] | None = None,
        force: bool = False,
        module: Callable[..., Any] | None = None,
    ) -> Any:
        """Registers a function or class: `@r.register_module()` or `r.register_module(module=fn)`.

        Args:
            name: by default the function's own.
            force: True replaces what has that name without a warning.
            module: the function or class; without it, the call returns a decorator.
        """
        if name is not None and not isinstance(name, str):  # @r.register_module, without brackets
            name, module = None, name
        if module is None:
            return lambda fn: self.register_module(name, force, fn)
        if not _is_ours(module):
            self._load()  # what is ours comes first, whoever asks first
        name = name or module.__name__
        old = self._modules.get(name)
        if old is not None and not force and not _same_place(old, module):
            warnings.warn(
                f"{self.name} {name!r} of {old.__module__} is replaced by that of {module.__module__}",
                stacklevel=3,
            )
        self._modules[name] = module
        return module

    def _load(self) -> None:
        for home in self._homes:
            importlib.import_module(home)


def _is_ours(fn: Any) -> bool:
    """Whether a function, class or instance of a class is defined in this package."""
    return str(getattr(fn, "__module__", None)).partition(".")[0] == __name__.partition(".")[0]


def _same_place(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    """Whether `b` is a new version of `a`: a notebook cell run again, a module imported again."""
    files = [getattr(getattr(fn, "__code__", None), "co_filename", None) for fn in (a, b)]
    same_file = files[0] is not None and files[0] == files[1]
    return a.__qualname__ == b.__qualname__ and (a.__module__ == b.__module__ or same_file)


OPS = Registry("op", "sfp.ops", "sfp.methods")
METHODS = Registry("method", "sfp.methods")
GUIDES = Registry("guide", "sfp.guides")
MASKS = Registry("mask proposer", "sfp.masks")

NESTED = dict(
    affinity="affinity", fill="mitigator", rule="attention", rules="attention", source="source"
)


def op(kind: str, *, words: bool | None = None) -> Callable[[F], F]:
    """Registers a function as an op.

    Args:
        kind: "detector", "mitigator", "attention", ... (see docs/design.md).
        words: whether its result depends on the text features or the classes of a `Trace`. What does
            not is kept when only the words change. By default False for ops of this package and True
            for others, which is always right, but may be slower.
    """

    def register(fn: F) -> F:
        fn.kind = kind  # type: ignore[attr-defined]
        fn.words = not _is_ours(fn) if words is None else words  # type: ignore[attr-defined]
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


def needs_words(part: Any) -> bool:
    """Whether what a part of a method gives may depend on the words that an image is compared with.

    It may if its function says so (see `op`), or if something nested in its knobs or fields may. A
    function outside this package that says nothing counts as one that needs them.
    """
    if isinstance(part, (list, tuple)):
        return any(map(needs_words, part))
    if isinstance(part, Op):
        return needs_words(part.fn) or any(needs_words(value) for _, value in part.knobs)
    nested = is_dataclass(part) and not isinstance(part, type)
    if nested and any(needs_words(getattr(part, f.name)) for f in fields(part)):
        return True
    return callable(part) and bool(getattr(part, "words", not _is_ours(part)))


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
    return sorted(
        n for n, f in list(OPS.module_dict.items()) if kind in (None, getattr(f, "kind", None))
    )


def list_methods() -> list[str]:
    """Names of the registered methods."""
    return sorted(METHODS.module_dict)
