"""Registries of ops and methods, and `bind`, which turns config nodes into callables.

An op is a plain function; a config binds its keyword-only knobs::

    @op("detector")
    def loud(trace, layer, *, above=2.0): ...

    dict(type="loud", above=3.0)        # in a config

A preset is a function from knobs to such a config, registered in `METHODS`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class Registry:
    """Functions or classes by name.

    Registering a name again replaces the old entry, so that a notebook cell can be edited and run
    again; there is a warning if the two come from different places.

    Args:
        name: what is registered here, for messages.
        homes: packages of `sfp` that register something here, imported at the first look-up.
    """

    def __init__(self, name: str, *homes: str) -> None:
        self.name = name
        self._homes = homes
        self._modules: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"Registry({self.name!r}: {', '.join(self._modules) or 'empty'})"

    @property
    def module_dict(self) -> dict[str, Any]:
        """All entries by name."""
        self._load()
        return self._modules

    def get(self, name: str) -> Any:
        """The entry with a name, or None."""
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
            force: replace an entry with the same name without a warning.
            module: the function or class; without it, the call returns a decorator.
        """
        if name is not None and not isinstance(name, str):  # @r.register_module, without brackets
            name, module = None, name
        if module is None:
            return lambda fn: self.register_module(name, force, fn)
        if not is_ours(module):
            self._load()  # register this package's own entries first
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


def is_ours(fn: Any) -> bool:
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
STAGES = Registry("final stage", "sfp.masks")
COMMON = (
    "depth",
    "positions",
    "pool_mlp",
    "comparison",
    "refiners",
)  # fields of `Method` that presets take too
READOUT = ("block", "pool_keys")  # fields of `Readout` that presets take for all of theirs


@dataclass(frozen=True)
class Kind:
    """Marks a type, `Annotated[Callable[...], Kind(...)]`, as that of a kind of ops.

    Attributes:
        name: name of the kind.
        arguments: what its ops are called with, apart from knobs.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class AtLeast:
    """Marks the type of a number, or of a list by its length, that must not be smaller."""

    least: int


Count = Annotated[int, AtLeast(1)]
Some = Annotated[Sequence[T], AtLeast(1)]  # a list that must not be empty

# what a parameter takes, by its annotation
_NUMBERS = {int: numbers.Integral, float: numbers.Real, bool: bool}
_SEQUENCES = (Sequence, list, tuple)


def op(
    kind: str, *, words: bool | None = None, whole: bool = False, regions: bool = False
) -> Callable[[F], F]:
    """Registers a function as an op.

    Args:
        kind: "detector", "mitigator", "attention", ... (see `sfp.kinds`).
        words: whether its result depends on the text features or the classes of a `Trace`. What does
            not is kept when only the words change. By default False for ops of this package and True
            for others, which is always right, but may be slower.
        whole: whether it needs all windows of an image in one trace (`Trace.whole`); not possible in
            edits of the trunk.
        regions: whether it needs an id map of the image's regions (`Trace.regions`).

    Raises:
        ValueError: if a function from outside this package does not take the arguments of its kind.
    """

    def register(fn: F) -> F:
        if not is_ours(fn):
            from sfp.kinds import check_signature

            check_signature(fn, kind)
        fn.kind = kind  # type: ignore[attr-defined]
        fn.words = not is_ours(fn) if words is None else words  # type: ignore[attr-defined]
        fn.whole, fn.regions = whole, regions  # type: ignore[attr-defined]
        OPS.register_module(module=fn)
        return fn

    return register


@dataclass(frozen=True)
class Op:
    """A function with its knobs bound. Equal functions with equal knobs are equal ops."""

    fn: Callable[..., Any]
    knobs: tuple[tuple[str, Any], ...] = ()

    def __call__(self, *args: Any) -> Any:
        """Calls the function with its knobs bound.

        Raises:
            ValueError: if the function is not of this package and returns what its kind does not.
        """
        result = self.fn(*args, **dict(self.knobs))
        if not is_ours(self.fn) and hasattr(self.fn, "kind"):
            from sfp.kinds import check_result

            check_result(self.fn.__name__, self.fn.kind, args, result)
        return result

    def __repr__(self) -> str:
        return f"{self.fn.__name__}({', '.join(f'{k}={v!r}' for k, v in self.knobs)})"


def needs_words(part: Any) -> bool:
    """Whether the result of a part of a method may depend on the words to compare an image with.

    It may if its function declares it (see `op`), or if anything nested in its knobs or fields does.
    Functions from outside this package that declare nothing are assumed to need words.
    """
    return any(bool(getattr(x, "words", not is_ours(x))) for x in functions(part))


def needs(part: Any, what: Literal["whole", "regions"]) -> bool:
    """Whether any function in a part of a method declares that it needs `what` (see `op`)."""
    return any(getattr(x, what, False) for x in functions(part))


def guides_of(part: Any) -> set[str]:
    """The external encoders that a part of a method needs, from its knobs `guide` and `sam`."""
    if isinstance(part, (list, tuple)):
        return set().union(*map(guides_of, part))
    if isinstance(part, Op):
        own = {v for k, v in part.knobs if k in ("guide", "sam") and isinstance(v, str)}
        return own | guides_of(tuple(value for _, value in part.knobs))
    if is_dataclass(part) and not isinstance(part, type):
        layout = getattr(part, "layout", None)
        own = {layout} if isinstance(layout, str) else set()
        return own | guides_of(tuple(getattr(part, f.name) for f in fields(part)))
    return set()


def functions(part: Any) -> Iterator[Any]:
    """All callables in a part of a method: itself, its knobs, its fields."""
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from functions(item)
    elif isinstance(part, Op):
        yield from functions(part.fn)
        yield from functions(tuple(value for _, value in part.knobs))
    else:
        if is_dataclass(part) and not isinstance(part, type):
            yield from functions(tuple(getattr(part, f.name) for f in fields(part)))
        if callable(part):
            yield part


def bind(node: Any, kind: str | None = None) -> Any:
    """Builds a config node, nested nodes first.

    Args:
        node: `dict(type=name, knob=value, ...)` becomes an `Op`; lists become tuples; anything else,
            including callables, is returned unchanged.
        kind: the kind that the op must have.

    Raises:
        ValueError: for an unknown op or knob, a missing knob, an invalid value, or an op of another
            kind; the message lists the valid ones.
    """
    if isinstance(node, (list, tuple, range)):
        return tuple(bind(item, kind) for item in node)
    if not _is_node(node):
        _check_kind(node, kind)
        return node
    fn = find(OPS, node["type"], kind)
    _check_kind(fn, kind)
    given = {k: v for k, v in node.items() if k != "type"}
    knobs = check_knobs(fn, given, f"op {getattr(fn, '__name__', fn)!r}")
    return Op(fn, tuple(sorted(knobs.items(), key=lambda item: item[0])))


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "type" in value


def _check_kind(part: Any, kind: str | None) -> None:
    own = getattr(part.fn if isinstance(part, Op) else part, "kind", kind)
    if kind is not None and own != kind:
        name = getattr(part, "__name__", part)
        raise ValueError(
            f"op {name!r} is of kind {own!r}, but {kind!r} is needed here; "
            f"ops of that kind: {', '.join(list_ops(kind))}"
        )


def find(
    registry: Registry, name: str | Callable[..., Any], kind: str | None = None
) -> Callable[..., Any]:
    """The registered function with a name; callables are returned unchanged.

    Args:
        registry: the registry to search.
        name: name of the function.
        kind: the kind of ops that an error message lists; None for all.

    Raises:
        ValueError: if there is none; the message suggests the closest name.
    """
    if callable(name):
        return name
    known = registry.module_dict
    if name not in known:
        valid = list_ops(kind) if kind else known
        raise ValueError(f"unknown {kind or registry.name} {name!r}{suggest(name, valid)}")
    return known[name]


def build(registry: Registry, node: Any, what: str) -> Any:
    """Builds an instance of a registered class from a config node.

    Anything that is not a config node is assumed to be an instance and returned unchanged.

    Args:
        registry: the registry of the class.
        node: `dict(type=name, knob=value, ...)`.
        what: description of the node, for messages.

    Raises:
        ValueError: for a missing or unknown type, or a wrong knob; the message lists the valid ones.
    """
    if not isinstance(node, Mapping):
        return node
    knobs = dict(node)
    if "type" not in knobs:
        raise ValueError(f"{what} has no type; valid: {', '.join(registry.module_dict)}")
    cls = find(registry, knobs.pop("type"))
    return cls(**check_knobs(cls, knobs, what))


def check_knobs(fn: Callable[..., Any], knobs: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Checks and converts the knobs of a function, or the fields of a dataclass (see `fit`).

    Args:
        fn: a function or class whose knobs are keyword-only, or a dataclass.
        knobs: values by name.
        what: description of the function, for messages.

    Raises:
        ValueError: for an unknown knob, a missing knob without default, or a value that does not fit
            the annotation.
    """
    parameters = inspect.signature(fn).parameters
    noun, valid = "field", dict(parameters)
    if not is_dataclass(fn):
        noun = "knob"
        valid = {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name in knobs:
        if name in valid:
            continue
        if name in parameters:
            raise ValueError(
                f"{what}: {name!r} is a positional parameter, but knobs must be keyword-only: put "
                "`*,` before the knobs in the signature to make it keyword-only"
            )
        raise ValueError(f"{what} has no {noun} {name!r}{suggest(name, valid)}")
    missing = [n for n, p in valid.items() if p.default is p.empty and n not in knobs]
    if missing:
        raise ValueError(f"{what} needs the {noun}(s) {', '.join(missing)}")
    hints = parameter_types(fn)
    return {name: fit(value, hints[name], what, name) for name, value in knobs.items()}


@functools.lru_cache(maxsize=1024)
def parameter_types(fn: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated annotation of each parameter; Any if it has none or it cannot be evaluated.

    Annotations are evaluated one at a time, so that names that a module imports only for type checkers
    do not prevent the evaluation of the others.
    """
    module = sys.modules.get(fn.__module__)
    space = getattr(inspect.unwrap(fn), "__globals__", getattr(module, "__dict__", {}))
    evaluated = {}
    for name, parameter in inspect.signature(fn).parameters.items():
        hint = Any if parameter.annotation is parameter.empty else parameter.annotation
        try:
            evaluated[name] = eval(hint, space) if isinstance(hint, str) else hint
        except Exception:  # annotations can contain anything
            evaluated[name] = Any
    return evaluated


def fit(value: Any, hint: Any, what: str, name: str) -> Any:
    """Checks a value against an annotation; builds config nodes and turns lists into tuples.

    Kinds of ops, dataclasses, `Literal`, numbers, strings and other classes are checked, alone, in
    sequences and in unions; also numbers and lengths that must be `AtLeast` something. Anything beyond
    that is not checked.

    Args:
        value: the value of a knob.
        hint: its annotation, evaluated.
        what, name: the function and its knob, for messages.

    Raises:
        ValueError: if the value does not fit.
    """
    options = _options(hint)
    for option in options:
        if _admits(option, value):
            return _built(option, value, what, name)
    choices = [c for option in options if get_origin(option) is Literal for c in get_args(option)]
    if choices and all(get_origin(o) is Literal or o is type(None) for o in options):
        raise ValueError(f"{what}: unknown {name}={value!r}{suggest(value, map(str, choices))}")
    expected = " or ".join(map(_describe, options))
    raise ValueError(f"{what}: {name}={value!r}: expected {expected}")


def _options(hint: Any) -> list[Any]:
    """The members of a union, or just the hint; keeps `Annotated` only with a mark of ours."""
    if get_origin(hint) is Annotated and _kind(hint) is None and _least(hint) is None:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        return [option for member in get_args(hint) for option in _options(member)]
    return [hint]


def _kind(hint: Any) -> str | None:
    return next((m.name for m in getattr(hint, "__metadata__", ()) if isinstance(m, Kind)), None)


def _least(hint: Any) -> int | None:
    marks = getattr(hint, "__metadata__", ())
    return next((m.least for m in marks if isinstance(m, AtLeast)), None)


def _admits(option: Any, value: Any) -> bool:
    """Whether a value's outer type fits an annotation; items are not checked."""
    if (least := _least(option)) is not None:
        fits = _admits(get_args(option)[0], value)
        return fits and (len(value) if isinstance(value, Sized) else value) >= least
    if _kind(option) is not None:
        return callable(value) or _is_node(value)
    base = get_origin(option) or option
    if base is Literal:
        return any(
            value == choice and isinstance(value, type(choice)) for choice in get_args(option)
        )
    if base is None or base is type(None):
        return value is None
    if base in _NUMBERS:
        return isinstance(value, _NUMBERS[base]) and (base is bool or not isinstance(value, bool))
    if base in _SEQUENCES:
        return isinstance(value, (list, tuple, range))
    if isinstance(base, type) and is_dataclass(base):
        own_node = isinstance(value, Mapping) and value.get("type", base.__name__) == base.__name__
        return own_node or isinstance(value, base)
    if base is Any or base is Callable:
        return base is Any or callable(value) or _is_node(value)
    try:
        return not isinstance(base, type) or isinstance(value, base)
    except TypeError:  # a protocol or typed dictionary, which isinstance does not support
        return True


def _built(option: Any, value: Any, what: str, name: str) -> Any:
    if (kind := _kind(option)) is not None:
        return bind(value, kind)
    if _least(option) is not None:
        option = get_args(option)[0]
    base = get_origin(option) or option
    if base in _SEQUENCES:
        items = get_args(option)
        if base is tuple and items[1:] != (...,):  # tuple[int, str], or no items: one by one
            return bind(value)
        return tuple(fit(item, items[0] if items else Any, what, name) for item in value)
    if isinstance(base, type) and is_dataclass(base):
        return value if isinstance(value, base) else build_dataclass(base, value)
    return value if base in (Mapping, dict) else bind(value)


def build_dataclass(cls: type[T], node: Mapping[str, Any]) -> T:
    """Builds a dataclass from its config node, which may have its name as "type".

    Raises:
        ValueError: as `check_knobs`.
    """
    given = {k: v for k, v in node.items() if k != "type"}
    return cls(**check_knobs(cls, given, cls.__name__))


def _describe(option: Any) -> str:
    if (kind := _kind(option)) is not None:
        return f"an op of the kind {kind!r}, e.g. dict(type={(list_ops(kind) or ['...'])[0]!r})"
    if (least := _least(option)) is not None:
        bare = get_args(option)[0]
        limit = (
            f" with at least {least} item(s)" if get_origin(bare) in _SEQUENCES else f" >= {least}"
        )
        return _describe(bare) + limit
    base, items = get_origin(option) or option, get_args(option)
    if base is Literal:
        return " or ".join(map(repr, items))
    if base in _SEQUENCES:
        inside = " or ".join(map(_describe, _options(items[0]))) if items else ""
        return f"a list of {inside}" if inside else "a list"
    return "None" if option in (None, type(None)) else getattr(base, "__name__", str(base))


def composition(method: str | Mapping[str, Any], **knobs: Any) -> dict[str, Any]:
    """The fields of `Method` that a preset or a composition describes, not yet built.

    Args:
        method: name of a preset, or `dict(type=name, knob=value, ...)`.
        **knobs: further knobs; `refiners` are applied after those that `method` has. Every preset that
            has no knob of that name itself also takes the fields in `COMMON`, those in `READOUT` for
            all of its readouts, and `stitched=True`, which is short for `image=dict(type="canvas")`.

    Raises:
        ValueError: for unknown presets or knobs; the message lists the valid ones.
    """
    config = {"type": method} if isinstance(method, str) else dict(method)
    if "refiners" in knobs:
        knobs["refiners"] = [*config.get("refiners", ()), *knobs["refiners"]]
    config.update(knobs)
    name = config.pop("type", "Method")
    if name == "Method":
        return config
    preset = find(METHODS, name)
    own = inspect.signature(preset).parameters
    place = {k: config.pop(k) for k in READOUT if k in config and k not in own}
    stitched = "stitched" not in own and config.pop("stitched", False)
    common = {k: config.pop(k) for k in COMMON if k in config and k not in own}
    fields_of_method = preset(**check_knobs(preset, config, f"method {name!r}"))
    if not isinstance(fields_of_method, Mapping):
        raise ValueError(
            f"method {name!r} returned a {type(fields_of_method).__name__}: expected a dict of the "
            "fields of Method"
        )
    common["refiners"] = [*fields_of_method.get("refiners", ()), *common.get("refiners", ())]
    if place:
        readouts = fields_of_method.get("readouts", [{}])
        if any("type" in node for node in readouts):
            raise ValueError(
                f"method {name!r} has its own reader, which does not support {', '.join(place)}"
            )
        common["readouts"] = [{**node, **place} for node in readouts]
    if stitched:
        common["image"] = _stitching(stitched, fields_of_method, name)
    return {**fields_of_method, **common}


def _stitching(stitched: object, composition: Mapping[str, Any], name: str) -> dict[str, Any]:
    if stitched is not True:
        raise ValueError(f"method {name!r}: stitched={stitched!r}: expected True or False")
    if composition.get("image"):
        raise ValueError(
            f"method {name!r} already has an image stage: it cannot be combined with stitched=True"
        )
    return dict(type="canvas")


def pick(what: str, name: str, options: Mapping[str, T]) -> T:
    """`options[name]`.

    Raises:
        ValueError: if there is no such option; the message suggests the closest one.
    """
    if name not in options:
        raise ValueError(f"unknown {what} {name!r}{suggest(name, options)}")
    return options[name]


def tuned(dataset: str, constants: Mapping[str, Sequence[Any]], **given: Any) -> dict[str, Any]:
    """Knobs by name, with a dataset's constants in place of None.

    Args:
        dataset: name of the dataset.
        constants: by dataset, the constants of all of `given`, in the same order.
        **given: the knobs.

    Raises:
        ValueError: if there are no constants for the dataset; the message suggests the closest name.
    """
    usual = pick("dataset", dataset, constants)
    return {k: u if v is None else v for (k, v), u in zip(given.items(), usual, strict=True)}


def suggest(name: object, valid: Iterable[str]) -> str:
    """The tail of an error message: the closest valid name, then all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ";"
    return f"{hint} valid: {', '.join(names) or 'none'}"


def knobs(fn: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters and their defaults, with `...` for none."""
    parameters = inspect.signature(fn).parameters.values()
    return {
        p.name: ... if p.default is p.empty else p.default
        for p in parameters
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }


def method_node(method: str | Mapping[str, Any]) -> dict[str, Any]:
    """The config node of a method with all knobs of its preset.

    Raises:
        ValueError: for an unknown preset.
    """
    node = dict(type=method) if isinstance(method, str) else dict(method)
    name = node.get("type", "Method")
    return dict(type=name) | ({} if name == "Method" else knobs(find(METHODS, name))) | node


def list_ops(kind: str | None = None) -> list[str]:
    """Names of the registered ops, of one kind or all."""
    return sorted(
        n for n, f in list(OPS.module_dict.items()) if kind in (None, getattr(f, "kind", None))
    )


def list_methods() -> list[str]:
    """Names of the registered methods."""
    return sorted(METHODS.module_dict)
