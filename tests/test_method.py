"""Methods: building, effects of edits on later blocks, ablations, layers, surgery."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
import reference
import tiny
import torch
from conformance import clip, image, state_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from torch import Tensor, nn

import sfp
from sfp.engine import Engine, Queries
from sfp.methods.sfp import Enhancer
from sfp.ops.detectors import l2_norm, som
from sfp.ops.mitigators import neighbour_mean
from sfp.registry import METHODS, OPS, Op, bind
from sfp.trace import Trace

pytestmark = pytest.mark.usefixtures("no_grad")

BASE = Path(__file__).parents[1] / "configs" / "base_config.py"
COMBINATIONS = ["qq", "kk", "vv", "qq+kk", "qq+vv", "kk+vv", "qq+kk+vv"]


def features(name: str, pixels: Tensor | None = None, **knobs) -> Tensor:
    """Of weights A, on the golden picture in which the release finds ten outliers."""
    pixels = image("sq") if pixels is None else pixels
    return sfp.build_method(name, **knobs).features(clip().visual, pixels)[0].data


def change(a: Tensor, b: Tensor) -> float:
    """Largest difference of the patches, relative to the largest value."""
    return float((a - b)[:, -196:].abs().max() / a.abs().max())


# -- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("sclp", "unknown method 'sclp'; did you mean 'sclip'"),
        (dict(type="spf"), "unknown method 'spf'; did you mean 'sfp'"),
        (dict(type="sfp", purfy=False), "method 'sfp' has no knob 'purfy'; did you mean 'purify'"),
        (dict(type="clip", csa=True), "method 'clip' has no knob 'csa'"),
        (dict(type="sfp", enhancer="kk+qq"), r"unknown enhancer='kk\+qq'; did you mean"),
        (dict(type="sfp_paper", enhancer=""), "unknown enhancer=''; valid: kk, "),
        (dict(type="sfp", pm="l2_nrm"), "'l2_nrm'; did you mean 'l2_norm'"),
        (dict(type="sfp", pm="average"), "'average' is of kind 'attention', but 'detector' is"),
        (
            dict(type="sfp", pm=dict(type="som", top=3)),
            "op 'som' has no knob 'top'; did you mean 'top_k'",
        ),
        (dict(readout=[]), "Method has no field 'readout'; did you mean 'readouts'"),
        (dict(readouts=[dict(fnn=False)]), "Readout has no field 'fnn'; did you mean 'ffn'"),
        (dict(readouts=[dict(attention=dict(type="self_slef"))]), "did you mean 'self_self'"),
        (dict(readouts=[dict(residual=dict(type="som"))]), "'residual' is needed.*: cls_token, "),
        (
            dict(readouts=[dict(attention=dict(type="affinity_attention"))]),
            r"op 'affinity_attention' needs the knob\(s\) affinity",
        ),
        (
            dict(edits=[dict(layers=[3], detector=dict(type="som"))]),
            r"Purify needs the field\(s\) mitigator",
        ),
        (dict(refiners=[dict(type="remove_redundency")]), "did you mean 'remove_redundancy'"),
        (dict(surgery=[dict(type="suppress_chanel")]), "did you mean 'suppress_channel'"),
        (dict(type="gem", depth=1), "'gem': depth=1: expected int >= 2"),
        (dict(type="clearclip", last_n_layers=0), "last_n_layers=0: expected int >= 1"),
        (dict(type="cliptrase", cells=0), "cells=0: expected int >= 1 or None"),
        (dict(type="sfp", integrator_start=9, integrator_end=3), "start=9 comes after .*end=3"),
        (dict(readouts=[]), r"readouts=\[\]: expected a list of .* with at least 1 item"),
        (
            dict(readouts=[dict(blocks=[])]),
            r"Readout: blocks=\[\]: expected a list of int with",
        ),
        (
            dict(readouts=[dict(attention=dict(type="self_self", pairs=["qp"]))]),
            "op 'self_self': unknown pairs='qp'; valid: kk, kq,",
        ),
    ],
)
def test_errors_at_build_time(config, message):
    with pytest.raises(ValueError, match=message):
        sfp.build_method(config)


@pytest.mark.parametrize(
    "readout",
    [
        dict(after=[dict(type="aggregate", affinity=dict(type="som"))]),
        dict(attention=dict(type="average", rules=[dict(type="cls_token")])),
        dict(before=[dict(type="aggregate", affinity=dict(type="similarity"))]),
    ],
)
def test_nested_nodes_fail_at_build_time_too(readout):
    with pytest.raises(ValueError, match=r"valid|kind|needs"):
        sfp.build_method(dict(readouts=[readout]))


@pytest.mark.parametrize("alone", ["nearst", "", None])
def test_choices_of_ops_fail_at_build_time_too(alone):
    mitigator = dict(type="neighbour_mean", alone=alone)
    edits = [dict(layers=[3], detector=dict(type="som"), mitigator=mitigator)]
    with pytest.raises(ValueError, match=r"alone=.*valid: keep, nearest, zero"):
        sfp.build_method(dict(edits=edits))


@pytest.mark.parametrize("layers", [-2, (), "everything"])
@pytest.mark.parametrize("name", ["sfp", "sfp_paper"])
def test_layers_of_the_wrong_type(name, layers):
    with pytest.raises(ValueError, match="layers"):
        sfp.build_method(name, layers=layers)


@pytest.mark.parametrize("layers", [[-1], [11], [12], [-13]])
def test_an_edit_after_the_last_block_would_do_nothing(layers):
    """The last block runs inside readouts only: an edit there, or beyond, has to be refused."""

    def run() -> None:
        method = sfp.build_method("sfp", layers=layers)
        method.features(tiny.clip().visual, tiny.images(1))

    with pytest.raises((ValueError, LookupError), match="layer"):
        run()


def test_presets_take_knobs_both_ways():
    assert sfp.build_method("sfp", pm="lof") == sfp.build_method(dict(type="sfp", pm="lof"))
    assert sfp.build_method(dict(type="sfp", pm="lof"), pm="som") == sfp.build_method("sfp")
    assert sfp.build_method("sfp", pm="SOM") == sfp.build_method("sfp")
    assert sfp.build_method("sfp", pm="L2") == sfp.build_method("sfp", pm="l2_norm")
    assert sfp.build_method("sfp", pm="lof") != sfp.build_method("sfp")
    assert sfp.build_method("clip") == sfp.Method() == sfp.build_method({})
    method = sfp.build_method("sclip")
    assert sfp.build_method(method) is method
    with pytest.raises(ValueError, match=r"\['csa'\] cannot be set"):
        sfp.build_method(method, csa=False)
    config = dict(type="sfp", purify=False)
    sfp.build_method(config)
    assert config == dict(type="sfp", purify=False)  # left as it was


def test_refiners_follow_those_of_a_preset_and_of_a_node():
    first, last = dict(type="query_probabilities"), dict(type="region_mean")
    node = dict(type="Method", refiners=[first])
    preset = dict(type="clip_surgery", refiners=[first])
    for config, own in ((node, []), (preset, ["remove_redundancy"])):
        expected = [*own, "query_probabilities", "region_mean"]
        for method in (
            sfp.build_method(config, refiners=[last]),
            sfp.build_method("lavg", base=config),
        ):
            assert [refiner.fn.__name__ for refiner in method.refiners] == expected
    assert node == dict(type="Method", refiners=[first])  # left as it was


def test_a_config_file_says_what_the_preset_says():
    """Lists of a config file, nested in mmengine's own types, build the same method."""
    node = dict(
        type="Method",
        edits=[dict(layers=[3, -2], detector=dict(type="som"), mitigator=dict(type="lof"))],
        readouts=[dict(attention=dict(type="self_self", pairs=["qq", "vv"]), ffn=False)],
    )
    node["edits"][0]["mitigator"] = dict(type="neighbour_mean")
    config = Config(dict(method=node)).method
    method = sfp.build_method(config)
    assert method.edits[0].detector == Op(som)
    assert method.readouts[0].attention == bind(dict(type="self_self", pairs=("qq", "vv")))
    method.features(tiny.clip().visual, tiny.images(1))


def test_position_rules_can_be_chosen_in_a_config():
    plain = sfp.build_method("sclip")
    exact = sfp.build_method("sclip", positions=dict(type="resample_positions", offset=0.0))
    visual, long = tiny.clip().visual, tiny.images(1, 40, 96)
    assert not torch.allclose(
        plain.features(visual, long)[0].data, exact.features(visual, long)[0].data
    )
    native = tiny.images(1)
    assert torch.equal(
        plain.features(visual, native)[0].data, exact.features(visual, native)[0].data
    )


@pytest.mark.parametrize("name", sfp.list_methods())
def test_methods_can_be_copied_and_sent_to_other_processes(name):
    method = sfp.build_method(name)
    method.operate(clip().visual)  # having been used changes nothing
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin == method
        assert hash(twin) == hash(method)
        assert twin.operate(clip().visual) is method.operate(clip().visual)


# -- ops -----------------------------------------------------------------------------------------


def test_ops_are_equal_when_function_and_knobs_are():
    a = bind(dict(type="similarity", layer=3, cut=0.4, fill=dict(type="neighbour_mean")))
    b = bind(dict(cut=0.4, fill=dict(type="neighbour_mean"), layer=3, type="similarity"))
    assert a == b
    assert hash(a) == hash(b)
    assert a is not b
    assert len({a, b, bind(dict(type="similarity", layer=3))}) == 2
    assert bind(dict(type="self_self", pairs=["qq"])) == bind(dict(type="self_self", pairs=("qq",)))
    assert bind(dict(type="layer_sum", layers=[3, 4])) == bind(
        dict(type="layer_sum", layers=range(3, 5))
    )
    assert repr(a) == "similarity(cut=0.4, fill=neighbour_mean(), layer=3)"


def test_functions_that_nobody_registered_can_be_used():
    def mine(trace: Trace, layer: int, *, above: float = 1.0) -> Tensor:
        return trace.outputs[layer].patches.norm(dim=-1) > above

    assert bind(mine) is mine
    assert bind(dict(type=mine, above=2.0), "detector") == Op(mine, (("above", 2.0),))
    with pytest.raises(ValueError, match="'mine' has no knob 'abve'; did you mean 'above'"):
        bind(dict(type=mine, abve=2.0))


def test_an_affinity_is_computed_once_per_run():
    calls = []
    try:

        @sfp.op("affinity")
        def counted(trace: Trace, *, layer: int) -> Tensor:
            calls.append(layer)
            return torch.ones(len(trace.image), 64, 64)

        node = dict(type="counted", layer=3)
        smooth, other = dict(type="aggregate", affinity=node), dict(node, layer=4)
        readout = dict(
            before=[smooth, dict(type="aggregate", affinity=other)],
            attention=dict(type="affinity_attention", affinity=dict(node)),
            after=[smooth],
        )
        method = sfp.build_method(dict(readouts=[readout, readout]))
        for runs in (1, 2):  # and again in the next run
            method.features(tiny.clip().visual, tiny.images(2))
            assert sorted(calls) == [3] * runs + [4] * runs
    finally:
        OPS.module_dict.pop("counted", None)


# -- edits ---------------------------------------------------------------------------------------


def test_purified_tokens_feed_the_next_block():
    visual, pixels = clip().visual, torch.cat([image("sq"), image("sqb")])
    _, plain = sfp.build_method("clip").features(visual, pixels)
    _, trace = sfp.build_method("sfp_paper").features(visual, pixels)
    assert sorted(trace.masks) == list(range(11))
    edited = [i for i in range(11) if trace.masks[i].any()]
    assert len(edited) > 3
    for i, block in enumerate(visual.blocks[:-1]):
        before = block(trace.entering(i).data)  # what an unedited block would put out
        tokens = trace.outputs[i].with_data(before)
        torch.testing.assert_close(
            trace.outputs[i].data, neighbour_mean(tokens, trace.masks[i]).data
        )
        differs = (trace.outputs[i].data - plain.outputs[i].data).abs().max() > 1e-4
        assert differs == (i >= edited[0])


def test_an_edit_of_one_layer_leaves_the_earlier_ones():
    _, plain = sfp.build_method("clip").features(clip().visual, image("sq"))
    _, trace = sfp.build_method("sfp_paper", layers=[4, 7], pm="l2_norm").features(
        clip().visual, image("sq")
    )
    assert sorted(trace.masks) == [4, 7]
    same = [torch.equal(trace.outputs[i].data, plain.outputs[i].data) for i in range(11)]
    assert same == [True] * 4 + [False] * 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sq", {}),
        ("sqb", {}),
        ("nan_sq", {}),
        ("sq", dict(purify=False)),
        ("sqb", dict(enhancer="qk")),
        ("sq", dict(enhancer="vv")),
        ("sqb", dict(integrator=False)),
        ("sq", dict(first=8)),
    ],
    ids=str,
)
def test_sfp_paper_against_plain_mathematics(name, knobs):
    """There are no goldens of the poster's method: `reference.py` has it in a hundred lines."""
    expected, outliers = reference.sfp_paper(state_dict(), image(name)[0], **knobs)
    assert any(outliers.values())
    renamed = {"integrator_start" if k == "first" else k: v for k, v in knobs.items()}
    exact = copy.deepcopy(clip()).double()
    tokens, trace = sfp.build_method("sfp_paper", **renamed).features(
        exact.visual, image(name).double()
    )
    for i, mask in trace.masks.items():
        assert mask[0].nonzero()[:, 0].tolist() == outliers[i]
    torch.testing.assert_close(tokens.data[0], expected, atol=1e-6, rtol=1e-5)


# -- ablations -----------------------------------------------------------------------------------

# Every knob, with values that have to change the features.
FLAGS = {
    "sfp": dict(
        purify=[False],
        pm=["l2_norm", "lof", dict(type="som", gain=0.5)],
        layers=["all", [-3], [4, -2]],
        top_k=[3, None],
        res_cls=[0.0, 0.6],
        res_scale=[2.0],
        beta=[0.0, 0.8],
        pre_layer=[5, -2],
        post_layer=[0, 8],
        enhancer=["qk", *(x for x in COMBINATIONS if x != "qq+kk")],
        integrator=[False],
        integrator_start=[0, 9],
        integrator_end=[3, 10],
    ),
    "sfp_paper": dict(
        purify=[False],
        pm=["l2_norm", "lof", dict(type="som", gain=1.5)],
        layers=[[-2], [0, 1]],
        enhancer=["qk", *(x for x in COMBINATIONS if x != "qq+kk")],
        integrator=[False],
        integrator_start=[5, 10],
    ),
}
SETTINGS = [
    pytest.param(name, {knob: value}, id=f"{name}-{knob}={value}")
    for name, flags in FLAGS.items()
    for knob, values in flags.items()
    for value in values
]


def test_every_flag_is_flipped():
    for name, flags in FLAGS.items():
        assert set(flags) == set(inspect.signature(METHODS.get(name)).parameters)
    config = Config.fromfile(str(BASE)).model.method
    assert config.pop("type") == "sfp"
    assert set(config) <= set(FLAGS["sfp"])
    assert {"purify", "pm", "enhancer", "integrator", "integrator_start"} <= set(config)
    assert set(COMBINATIONS) == set(get_args(Enhancer)) - {"qk"}


@functools.cache
def by_default(name: str) -> Tensor:
    return features(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "knobs"), SETTINGS)
def test_every_flag_changes_the_features(name, knobs):
    (knob,) = knobs
    default = by_default(name)
    changed = features(name, **knobs)
    assert changed.isfinite().all()
    assert change(default, changed) > (1e-4 if knob in ("top_k", "res_scale", "pm") else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sfp", "sfp_paper"])
def test_all_self_self_combinations_differ(name):
    each = [features(name, enhancer=enhancer) for enhancer in COMBINATIONS]
    for a, b in itertools.combinations(each, 2):
        assert change(a, b) > 1e-3


def test_everything_off_is_the_ablations_base():
    """The poster's first row: the last block's attention alone, without residual and FFN."""
    base = features("sfp_paper", purify=False, enhancer="qk", integrator=False)
    same = sfp.build_method(dict(readouts=[dict(residual=None, ffn=False)]))
    torch.testing.assert_close(base, same.features(clip().visual, image("sq"))[0].data)


def test_sfp_needs_no_outliers():
    """The release has none left with res_cls = 0, and fails with `purify=False`."""
    without = features("sfp", purify=False, res_cls=0.0)
    none = features("sfp", res_cls=0.0)
    torch.testing.assert_close(without, none)


# -- layers --------------------------------------------------------------------------------------


def numbered(blocks: int, depth: int | None) -> Trace:
    clip = tiny.clip(layers=blocks)
    return clip.visual.trace(tiny.images(1, 8, 8), depth=depth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blocks", "depth", "layer", "absolute"),
    [
        (12, 12, 0, 0),
        (12, 12, 8, 8),
        (12, 12, -2, 10),
        (12, None, 11, 11),
        (24, 12, 0, 1),
        (24, 12, 3, 7),
        (24, 12, 8, 17),
        (24, 12, 11, 23),
        (24, 12, -2, 22),
        (24, 12, -24, 0),
        (24, None, 8, 8),
        (24, None, 23, 23),
        (6, 12, 0, 0),
        (6, 12, 8, 3),
        (6, 12, 11, 5),
    ],
)
def test_layers_keep_their_relative_depth(blocks, depth, layer, absolute):
    assert numbered(blocks, depth).layer(layer) == absolute


@settings(max_examples=60)
@given(st.integers(1, 48), st.integers(1, 48))
def test_layers_in_any_model(blocks, depth):
    from sfp.trace import absolute_layer

    layers = [absolute_layer(i, blocks, depth) for i in range(depth)]
    assert layers == sorted(layers)
    assert all(0 <= i < blocks for i in layers)
    assert layers[-1] == blocks - 1
    assert [absolute_layer(i, blocks, None) for i in range(blocks)] == list(range(blocks))
    assert [absolute_layer(i - blocks, blocks, depth) for i in range(blocks)] == list(range(blocks))
    if blocks == depth:
        assert layers == list(range(blocks))


@pytest.mark.parametrize("layer", [12, 13, -25])
def test_layers_that_do_not_exist(layer):
    with pytest.raises(LookupError, match=f"layer {layer} of a model with 24 blocks"):
        numbered(24, 12).layer(layer)


def test_output_of_the_last_block():
    with pytest.raises(LookupError, match="0 to 10; the last block runs only inside readouts"):
        numbered(12, 12).output(-1)


def test_depth_none_takes_numbers_literally():
    """On 24 blocks the releases read layers 3, 8 and 3 to 9 of 24."""
    visual, pixels = tiny.clip(layers=24).visual, tiny.images(1)

    def run(**knobs) -> Tensor:
        return sfp.build_method("sfp", **knobs).features(visual, pixels)[0].data

    scaled, literal = run(), run(depth=None)
    assert not torch.allclose(scaled, literal)
    torch.testing.assert_close(
        literal,
        run(depth=24, pre_layer=8, post_layer=3, integrator_start=3, integrator_end=9),
    )
    moved = run(
        depth=None, pre_layer=17, post_layer=7, layers=[22], integrator_start=7, integrator_end=19
    )
    # the same, but for the layers between: the summed ones are 7, 9, 11, ... when scaled
    assert change(scaled, moved) < change(scaled, literal)


# -- surgery -------------------------------------------------------------------------------------


def louder(vit: sfp.clip.vit.VisionTransformer, depth: int | None) -> None:
    """Replaces a weight of the last block."""
    linear = vit.blocks[-1].attn.out_proj
    linear.weight = nn.Parameter(linear.weight.detach() * 3, requires_grad=False)


def projected(vit: sfp.clip.vit.VisionTransformer, depth: int | None) -> None:
    """Replaces the final projection."""
    vit.proj = nn.Parameter(vit.proj.detach() * 2, requires_grad=False)


@pytest.mark.parametrize("surgery", [louder, projected])
def test_surgery_acts_on_a_copy(surgery):
    visual, pixels = tiny.clip().visual, tiny.images(1)
    before = {name: value.clone() for name, value in visual.state_dict().items()}
    plain = sfp.Method().features(visual, pixels)[0].data
    method = sfp.Method(surgery=(surgery,))
    operated = method.operate(visual)
    assert operated is not visual
    assert method.operate(visual) is operated  # once per model
    assert not torch.allclose(method.features(visual, pixels)[0].data, plain)
    assert all(torch.equal(visual.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(sfp.Method().features(visual, pixels)[0].data, plain)
    shared = {id(p) for p in visual.parameters()} & {id(p) for p in operated.parameters()}
    assert len(shared) >= len(before) - 2  # the rest takes no memory twice


def test_surgery_by_hand():
    visual, pixels = tiny.clip().visual, tiny.images(1)
    by_hand = copy.deepcopy(visual)
    by_hand.blocks[-1].attn.out_proj.weight.mul_(3)
    torch.testing.assert_close(
        sfp.Method(surgery=(louder,)).features(visual, pixels)[0].data,
        sfp.Method().features(by_hand, pixels)[0].data,
    )


def test_surgery_follows_the_model_to_another_precision():
    visual, pixels = tiny.clip().visual, tiny.images(1)
    method = sfp.Method(surgery=(louder,))
    single = method.features(visual, pixels)[0].data
    visual.double()
    double = method.features(visual, pixels.double())[0].data
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-3)
    visual.bfloat16()
    assert method.features(visual, pixels)[0].data.dtype == torch.bfloat16


def test_operated_models_go_when_their_model_goes():
    method, model = sfp.Method(surgery=(louder,)), tiny.clip()
    operated = weakref.ref(method.operate(model.visual))
    gc.collect()
    assert operated() is not None
    del model
    gc.collect()
    assert operated() is None


def test_operated_models_follow_the_weights():
    """Also the weights that surgery replaced, of which the copy shares nothing."""
    visual, pixels = tiny.clip().visual, tiny.images(1)
    method = sfp.Method(surgery=(louder,))
    method.features(visual, pixels)
    visual.blocks[-1].attn.out_proj.weight.mul_(-2)
    again = method.features(visual, pixels)[0].data
    torch.testing.assert_close(again, method.features(copy.deepcopy(visual), pixels)[0].data)


def test_equal_methods_share_an_operated_model_and_few_are_kept():
    visual = tiny.clip().visual
    first = sfp.build_method("gclip").operate(visual)
    assert sfp.build_method("gclip").operate(visual) is first
    copies = [sfp.build_method("gclip", channel=i).operate(visual) for i in range(20)]
    assert len({id(each) for each in copies}) == 20
    gone = weakref.ref(copies[0])
    del copies, first
    gc.collect()
    assert gone() is None


def test_threads_share_one_operated_model():
    visual, method = tiny.clip().visual, sfp.build_method("gclip")
    with ThreadPoolExecutor(8) as pool:
        operated = list(pool.map(lambda _: method.operate(visual), range(32)))
    assert len({id(each) for each in operated}) == 1


def test_no_surgery_no_copy():
    visual = tiny.clip().visual
    assert sfp.build_method("sfp").operate(visual) is visual


# -- logits --------------------------------------------------------------------------------------


def test_logits_are_refined_cosines():
    visual, pixels, text = tiny.clip().visual, tiny.images(2, 40, 72), tiny.queries(4)
    tokens, _ = sfp.build_method("sclip").features(visual, pixels)
    cosine = torch.stack(
        [torch.cosine_similarity(tokens.patches, query, dim=-1) for query in text], 1
    ).unflatten(2, (5, 9))
    logits, trace = sfp.build_method("sclip").logits(visual, pixels, text)
    torch.testing.assert_close(logits, cosine)
    assert trace.text is text

    def double(logits: Tensor, trace: Trace) -> Tensor:
        return logits * 2

    def one_more(logits: Tensor, trace: Trace) -> Tensor:
        return logits + 1

    sclip = sfp.build_method("sclip")
    refined = sfp.Method(readouts=sclip.readouts, refiners=(double, one_more))
    torch.testing.assert_close(refined.logits(visual, pixels, text)[0], cosine * 2 + 1)


def test_masks_are_recorded_where_edits_ran():
    purify = sfp.Purify((2, -2), bind(dict(type="l2_norm", top_k=4)), neighbour_mean)
    _, trace = sfp.Method(edits=(purify,)).features(tiny.clip().visual, tiny.images(2))
    assert {i: mask.sum(1).tolist() for i, mask in trace.masks.items()} == {2: [4, 4], 10: [4, 4]}
    unedited = tiny.clip().visual.trace(tiny.images(2))
    assert torch.equal(trace.masks[2], l2_norm(unedited, 2, top_k=4))


@pytest.mark.parametrize(
    "node",
    [
        dict(type="radseg", refiners=[dict(type="global_bias")]),
        dict(type="freecp", base="radseg"),
        dict(type="object_presence", base="radseg", scope="window"),
    ],
    ids=lambda node: str(node),
)
def test_a_part_for_windows_after_readouts_that_join_them(node):
    """It would combine each window with the features of the whole image."""
    engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32)
    words, (image,) = Queries(tiny.queries(3), (0, 1, 2)), tiny.images(1, 64, 96)
    with pytest.raises(ValueError, match=r"got 1 maps .*2.*join the windows of an image"):
        engine.logits([sfp.build_method(node)], [image], [(64, 96)], words)
    of_the_image = sfp.build_method("object_presence", base="radseg")
    ((sheet,),) = engine.logits([of_the_image], [image], [(64, 96)], words)
    assert sheet.tiles.shape == (8, 12, 3)  # one map, not two that are alike
