"""The registry: names, and registering a name twice."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import tiny

import sfp
from sfp.method import build_method
from sfp.registry import METHODS, OPS, Op, Registry, op

CELL = """
@sfp.op("detector")
def quiet(trace, layer, *, below={below}):
    return trace.outputs[layer].patches.norm(dim=-1) < below
"""


@pytest.fixture
def registry():
    return Registry("thing")


def test_ways_to_register(registry):
    @registry.register_module()
    def one(): ...

    @registry.register_module
    def two(): ...

    @registry.register_module(name="drei")
    class Three: ...

    def four(): ...

    assert registry.register_module(module=four) is four
    registry.register_module("five", module=four)
    assert registry.module_dict == dict(one=one, two=two, drei=Three, four=four, five=four)
    assert registry.get("one") is one
    assert registry.get("three") is None


@pytest.mark.parametrize("module", ["__main__", "builtins"])
def test_a_cell_that_is_run_again_counts(module):
    """A notebook gives every version of a cell a file name of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, below in enumerate([0.5, 0.2]):
                code = compile(CELL.format(below=below), f"/tmp/ipykernel_1/{i}.py", "exec")
                exec(code, dict(sfp=sfp, __name__=module))
        edit = sfp.build_method("sfp", pm="quiet").edits[0]
        assert edit.detector.fn.__kwdefaults__ == dict(below=0.2)
    finally:
        OPS.module_dict.pop("quiet", None)


def test_another_ones_name(registry):
    def mine(): ...

    def yours(): ...

    yours.__module__, yours.__name__, yours.__qualname__ = "their.parts", "mine", "mine"
    yours.__code__ = yours.__code__.replace(co_filename="their/parts.py")
    registry.register_module(module=mine)
    with pytest.warns(
        UserWarning, match="thing 'mine' of test_registry is replaced .* their.parts"
    ):
        registry.register_module(module=yours)
    assert registry.get("mine") is yours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.register_module(module=mine, force=True)
    assert registry.get("mine") is mine


@pytest.mark.process
@pytest.mark.slow
def test_what_others_replace_stays_replaced():
    """Whatever was imported first: a name of ours that somebody else has taken is theirs."""
    code = """
import warnings
warnings.simplefilter("ignore")
from sfp.registry import METHODS, OPS, op

@op("detector")
def som(trace, layer): ...

@METHODS.register_module()
def clip(): return {}

import sfp
assert OPS.get("som") is som and METHODS.get("clip") is clip
assert sfp.build_method("sfp_paper").edits[0].detector.fn is som
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_built_in_names():
    assert {"sfp", "clip"} <= set(METHODS.module_dict)
    assert {"som", "self_self"} <= set(OPS.module_dict)


def test_signatures_of_ops_are_checked_when_they_are_registered():
    with pytest.raises(ValueError, match=r"'d' of kind 'detector' .* expected \(trace, layer, \*"):

        @op("detector")
        def d(trace): ...

    with pytest.raises(ValueError, match=r"'a' of kind 'attention' .* expected \(heads, trace, \*"):

        @op("attention")
        def a(heads, trace, temperature): ...


@pytest.mark.parametrize(
    ("kind", "result", "message"),
    [
        ("detector", lambda trace, i: trace.outputs[i].patches[..., 0], r"float32 .*\(2, 4\)"),
        ("detector", lambda trace, i: None, "NoneType, but"),
        ("attention", lambda heads, trace: heads.logits("k", "k").mean(1), r"\(2, H or 1, M, 5\)"),
        ("smoother", lambda tokens, trace: tokens.data, "returns Tokens"),
        ("refiner", lambda logits, trace: logits[:, :1], "with the Q of its argument, 3"),
    ],
)
def test_results_of_other_peoples_ops_are_checked(kind, result, message):
    """An error names the op, where PyTorch would broadcast or fail far from it."""
    result.kind, part = kind, Op(result)
    vit = tiny.clip().visual
    readout = dict(attention=part if kind == "attention" else None)
    readout["after"] = [part] if kind == "smoother" else []
    edit = dict(layers=[-2], detector=part, mitigator=dict(type="zero"))
    method = build_method(
        dict(
            type="Method",
            edits=[edit] if kind == "detector" else [],
            readouts=[readout],
            refiners=[part] if kind == "refiner" else [],
        )
    )
    image = tiny.images(2, 2 * vit.patch, 2 * vit.patch)
    with pytest.raises(ValueError, match=f"op '<lambda>' returned .*{message}"):
        method.logits(vit, image, tiny.queries(3))
