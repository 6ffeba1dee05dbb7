"""Values of knobs are checked against their annotations when a method is built."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Optional, get_args

import numpy as np
import pytest
from torch import Tensor

import sfp
from sfp import kinds
from sfp.kinds import Affinity, Detector, Rule
from sfp.registry import METHODS, OPS, Kind, bind, check_knobs, fit, list_ops, parameter_types

ZERO, SOM = dict(type="zero"), dict(type="som")
COSINE = dict(type="head_cosine")


@pytest.mark.parametrize(
    "node",
    [
        dict(type="cluster_vote", affinity=COSINE, noise=ZERO),
        dict(type="cluster_vote", affinity=SOM),
        dict(type="cluster_vote", affinity="head_cosine"),
        dict(type="cluster_vote", affinity=COSINE, noise=bind(ZERO)),
        dict(type="feedback_keys", feedback=dict(type="self_self")),
        dict(type="average", rules=[dict(type="self_self"), SOM]),
        dict(type="average", rules=dict(type="self_self")),
        dict(type="similarity", layer=3, fill=SOM),
        dict(type="scaled", rule=COSINE, gain=1.0),
        dict(type="read_last", attention=COSINE),
        dict(type="cls_product", source=COSINE),
    ],
    ids=str,
)
def test_nested_parts_have_to_be_of_the_kind_that_is_needed(node):
    with pytest.raises(ValueError, match=r"is of kind|expected an op of the kind|expected a list"):
        bind(node)


def test_every_nested_part_is_checked():
    """No op or preset has a knob that takes a part and does not say of which kind."""
    known = {name for name, kind in vars(kinds).items() if isinstance(_kind(kind), str)}
    assert len(known) >= 12
    for fn in (*OPS.module_dict.values(), *METHODS.module_dict.values()):
        for knob, hint in parameter_types(fn).items():
            if inspect.signature(fn).parameters[knob].kind is inspect.Parameter.KEYWORD_ONLY:
                assert "Callable[" not in str(hint) or "Kind(" in str(hint), (fn, knob)


def _kind(hint: Any) -> str | None:
    return next((m.name for m in getattr(hint, "__metadata__", ()) if isinstance(m, Kind)), None)


def test_every_kind_has_a_type():
    named = {_kind(value) for value in vars(kinds).values()} - {None}
    assert {OPS.module_dict[name].kind for name in list_ops()} <= named


def choices() -> list[Any]:
    """Every knob that is one of a few words, of all ops and presets."""
    found = []
    for what, registry in (("op", OPS), ("method", METHODS)):
        for name, fn in registry.module_dict.items():
            for knob, hint in parameter_types(fn).items():
                if "Literal" in str(hint) and get_args(hint):
                    found.append(pytest.param(what, name, knob, id=f"{name}-{knob}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("what", "name", "knob"), choices())
@pytest.mark.parametrize(
    "value", ["nonsense", "", 7, 1.5, object()], ids=lambda x: type(x).__name__
)
def test_words_that_are_none_of_those(what, name, knob, value):
    fn = (OPS if what == "op" else METHODS).get(name)
    ops = dict(affinity=dict(type="head_cosine"), rule=dict(type="self_self"))
    ops.update(layers=[0], share=0.5)
    needed = {
        n: ops.get(n)
        for n, p in inspect.signature(fn).parameters.items()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    }
    with pytest.raises(ValueError, match=rf"{knob}=.*(valid:|expected)"):
        check_knobs(fn, {**needed, knob: value}, name)


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, -2, np.int64(3)], [True, 2.5, "3", None]),
        (float, [3, 0.5, np.float32(0.5)], [True, "0.5", None, [1.0]]),
        (bool, [True, False], [0, 1, "True", None]),
        (str, ["a", ""], [3, None]),
        (int | None, [3, None], ["None", 2.5]),
        (Optional[float], [3.5, None], ["x"]),  # noqa: UP045
        (Literal["a", "b"], ["a", "b"], ["c", "", None, 1]),
        (Literal["a", None], ["a", None], ["None"]),
        (Sequence[int], [[1, 2], (3,), range(4), []], [3, "12", [1.5], ["1"], [True]]),
        (Sequence[int] | Literal["all"], [[1], "all"], ["every", 3, [2.5]]),
        (Sequence[Sequence[int]], [[[1], [2, 3]]], [[1]]),
        (tuple[int, ...], [(1, 2)], [("a",)]),
        (bool | str | Mapping[str, Any], [True, "median", dict(type="median")], [3, None]),
        (Callable[[Tensor], Tensor], [abs], [3]),
        (Any, [3, "x", None, dict(a=1)], []),
        (Detector | None, [None, SOM, max], [ZERO, "som", 3]),
        (Sequence[Rule], [[dict(type="self_self")]], [[COSINE], dict(type="self_self")]),
        (Affinity, [COSINE, bind(COSINE)], [None, SOM, OPS.get("som")]),
    ],
)
def test_annotations(hint, good, bad):
    for value in good:
        fit(value, hint, "f", "knob")
    for value in bad:
        with pytest.raises(ValueError, match=r"knob|kind"):
            fit(value, hint, "f", "knob")


def test_values_are_built():
    rules = fit([dict(type="self_self", pairs=["qq"])], Sequence[Rule], "f", "rules")
    assert rules == (bind(dict(type="self_self", pairs=("qq",))),)
    assert fit([[1], range(2)], Sequence[Sequence[int]], "f", "x") == ((1,), (0, 1))
    assert sfp.Method(readouts=[dict(blocks=[-1])]) == sfp.build_method("clip")
    assert hash(sfp.Method(readouts=[sfp.Readout(blocks=[-1])])) == hash(sfp.build_method("clip"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(edits=[dict(layers=[3], detector=ZERO, mitigator=ZERO)]), "'detector' is needed"),
        (dict(readouts=[dict(attention=SOM)]), "'attention' is needed"),
        (dict(readouts=[dict(attention=[dict(type="self_self")])]), "attention=.*expected an op"),
        (dict(readouts=[dict(ffn="no")]), "Readout: ffn='no': expected bool"),
        (dict(readouts=[dict(blocks=-1)]), "Readout: blocks=-1: expected a list of int"),
        (dict(readouts=dict(ffn=False)), "Method: readouts=.*: expected a list of Readout"),
        (dict(depth="12"), "Method: depth='12': expected int or None"),
        (dict(refiners=[dict(type="global_bias", weight="-0.3")]), "weight='-0.3': expected float"),
        (dict(positions=SOM), "'positions' is needed"),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", [sfp.build_method, lambda fields: sfp.Method(**fields)])
def test_fields(build, fields, message):
    with pytest.raises(ValueError, match=message):
        build(fields)


def test_ops_of_modules_that_evaluate_their_annotations():
    """Without `from __future__ import annotations` they are objects, not strings."""
    code = """
    from typing import Literal
    import sfp
    from sfp.kinds import Detector

    @sfp.op("refiner")
    def picky(logits, trace, *, noise: Detector, how: Literal["a", "b"] = "a", share=0.5):
        return logits

    def fails(**knobs):
        try:
            sfp.build_method("clip", refiners=[dict(type="picky", **knobs)])
        except ValueError as error:
            return str(error)

    assert fails(noise=dict(type="som")) is None
    assert "'detector' is needed" in fails(noise=dict(type="zero"))
    assert "did you mean 'a'" in fails(noise=dict(type="som"), how="aa")
    """
    try:  # as a file would be: without this one's import from `__future__`
        program = compile(textwrap.dedent(code), "picky.py", "exec", dont_inherit=True)
        exec(program, {"__name__": "picky"})
    finally:
        OPS.module_dict.pop("picky", None)


def test_knobs_that_are_not_keyword_only():
    """The README's example without its `*,`."""

    def quiet(trace, layer, below=0.5): ...

    with pytest.raises(
        ValueError, match=r"'below' is a positional parameter.*make it keyword-only"
    ):
        bind(dict(type=quiet, below=0.3))
