"""Image towers of other families, each against the package that defines it."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from torch import Tensor
from towers import FAMILIES, Family

from sfp.clip.vit import VisionTransformer

pytestmark = pytest.mark.usefixtures("no_grad")
EACH = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def family(name: str) -> Family:
    return FAMILIES[name]()


@functools.cache
def tower(name: str) -> VisionTransformer:
    return family(name).tower()


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=tolerance, rtol=0)


def compared(name: str, image: Tensor, **knobs) -> None:
    """Tokens of every block and the embedding."""
    ours = tower(name)
    rescale = knobs.pop("rescale", None)
    if rescale is not None:
        ours.rope.rescale = rescale
    try:
        expected, outputs = family(name).run(image)
        trace = ours.trace(image, **knobs)
        for i, tokens in enumerate([*trace.outputs, trace.leaving()][: len(outputs)]):
            close(tokens.data, outputs[i])
        close(trace.global_embedding(), expected)
        if not knobs:
            close(ours(image), expected)
    finally:
        if rescale is not None:
            ours.rope.rescale = False


@EACH
def test_on_the_grid_of_training(name):
    compared(name, tiny.images(2, *family(name).size))


@EACH
def test_on_another_grid(name):
    given = family(name)
    compared(name, tiny.images(2, *given.other), **given.knobs)
