"""Reports of `sfp audit` about tuned constants, and about the data that models were trained on."""

from __future__ import annotations

import pytest

from sfp.evaluation.choices import constants, seen
from sfp.evaluation.configs import find_config
from sfp.evaluation.run import load_config
from sfp.evaluation.settings import settings
from sfp.methods import resclip, rfclip


def card(config: str, **options) -> dict:
    options = {name.replace("__", "."): value for name, value in options.items()}
    return settings(load_config(find_config(config), options=options))


def test_what_a_benchmark_sets():
    found = {name: value for name, value, _ in constants(card("voc21"))}
    assert found == dict(logit_scale="50.0", prob_thd="0.15", area_thd="0.1")
    assert list(constants(card("ade20k"))) == [("short side of images", "384", "336")]
    assert list(constants(card("mini"))) == []  # 224 is what its weights were trained on


def test_what_a_user_sets():
    found = list(constants(card("mini", model__method__beta=0.2, model__pamr_steps=10)))
    assert found == [("method beta", "0.2", "0.4"), ("pamr_steps", "10", "0")]


@pytest.mark.parametrize("preset", [resclip, rfclip])
def test_constants_of_a_method_for_a_data_set(preset):
    name = next(iter(preset.DATASETS))
    method = dict(_delete_=True, type=preset.__name__.rpartition(".")[2], dataset=name)
    found = {name: value for name, value, _ in constants(card("mini", model__method=method))}
    assert set(found) == {"method dataset", f"method's constants for {name}"}


def test_default_constants_that_were_tuned_for_the_data_set():
    method = dict(_delete_=True, type="resclip")
    (found,) = constants(card("context59", model__method=method))
    assert found[:2] == ("method's constants for context59", "[0.25, 0.4, 1.8, 0.7]")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(model__weights="ViT-B/16"), {}),
        (dict(model__weights="tipsv2-l14"), {"tipsv2-l14": "two captions"}),
        (
            dict(model__guides=dict(dino=dict(type="transformers", model="facebook/dinov2-base"))),
            {"guide dino (facebook/dinov2-base)": "LVD-142M"},
        ),
        (
            dict(model__guides=dict(dino=dict(type="transformers", model="my/encoder"))),
            {"guide dino (my/encoder)": "unknown data"},
        ),
        (
            dict(model__guides=dict(dino=dict(type="transformers", model="samuel/encoder"))),
            {"guide dino (samuel/encoder)": "unknown data"},
        ),
        (
            dict(model__masks=dict(propose=dict(type="sam", model="facebook/sam-vit-base"))),
            {"masks (facebook/sam-vit-base)": "SA-1B"},
        ),
    ],
)
def test_what_models_have_seen(options, expected):
    found = dict(seen(card("voc21", **options)))
    assert set(found) == set(expected)
    assert all(expected[model] in text for model, text in found.items())


def test_the_mini_world_was_seen():
    ((model, text),) = seen(card("mini"))
    assert model == "mini"
    assert "same generator" in text


def test_the_default_constants_of_a_method_are_defaults():
    method = dict(_delete_=True, type="object_presence")
    assert list(constants(card("mini", model__method=method))) == []
