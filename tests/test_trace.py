"""What a trace caches, and what it drops when the words change."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import FunctionType, ModuleType

import pytest
import tiny
import torch
from torch import Tensor

import sfp
from sfp.feature_cache import run
from sfp.functional.windows import WindowGrid
from sfp.registry import OPS, bind, needs_words
from sfp.trace import LayerError, Words
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")


def test_a_trace_with_other_words():
    """What depends on the words goes, directly or through what it is made of; the rest stays."""
    trace = tiny.clip().visual.trace(tiny.images(1), text=tiny.queries(3), index=(0, 1, 2))

    def worded(trace: sfp.Trace) -> Tensor:
        return torch.ones(64, len(trace.index))

    source = bind(dict(type="layer_sum", layers=[3]))
    plain = bind(dict(type="similarity", layer=3))
    kept, heads, words = trace.once(plain), trace.heads(5), trace.once(worded)
    guess = trace.guess(source)
    assert trace.once(worded) is words
    assert trace.guess(source) is guess
    other = trace.with_words(tiny.queries(5), range(5))
    assert other.text.shape == (5, 32)
    assert other.once(plain) is kept
    assert other.heads(5) is heads
    assert other.once(worded).shape == (64, 5)
    assert other.guess(source).shape == (1, 5, 8, 8)
    assert trace.once(worded) is words  # the first one is as it was
    assert trace.guess(source) is guess


def test_reading_changes_nothing():
    trace = tiny.clip().visual.trace(tiny.images(1), text=tiny.queries(3), index=(0, 1, 2))
    before = dict(vars(trace))
    repr([trace.text, trace.index, trace.image, trace.query_features()])
    assert vars(trace) == before


def mine(trace: sfp.Trace, layer: int, *, above: float = 1.0) -> Tensor:
    return trace.outputs[layer].patches.norm(dim=-1) > above


def test_who_needs_words():
    similarity = dict(type="similarity", layer=3)
    assert not needs_words(bind(similarity))
    assert not needs_words(bind(dict(similarity, fill=dict(type="zero"))))
    assert needs_words(bind(dict(similarity, fill=lambda tokens, mask: tokens)))
    guessed = dict(type="read_last", attention=dict(type="self_self"))
    feedback = dict(type="semantic_feedback", source=guessed)
    assert needs_words(bind(feedback))
    assert needs_words(
        bind(dict(type="average", rules=[dict(type="feedback_keys", feedback=feedback)]))
    )
    assert needs_words(mine)  # nobody said
    assert needs_words(bind(dict(type=mine)))
    method = sfp.Method(edits=(sfp.Purify((3,), mine, bind(dict(type="zero"))),))
    assert method.words_in_trunk
    assert not method.words_in_readouts
    for name in sfp.list_methods():
        method = sfp.build_method(name)
        assert not method.words_in_trunk
        assert method.words_in_readouts == (name in ("resclip", "fsa"))


@pytest.mark.parametrize(("words", "expected"), [(None, True), (False, False), (True, True)])
def test_other_peoples_ops_say_whether_they_need_words(words, expected):
    try:

        @sfp.op("affinity", words=words)
        def ones(trace: sfp.Trace) -> Tensor:
            return torch.ones(len(trace.image), 64, 64)

        assert needs_words(bind(dict(type="aggregate", affinity=dict(type="ones")))) == expected
    finally:
        OPS.module_dict.pop("ones", None)


@pytest.mark.parametrize(
    "method",
    [
        dict(type="sfp", pre_layer=11),
        dict(type="sfp", post_layer=12),
        dict(type="sfp", layers=[-1]),
        dict(type="sfp", layers=[40]),
        dict(type="cliptrase", layer=12),
        dict(type="gclip", blocks=[12]),
        dict(type="gclip", cs_blocks=[12]),
        dict(type="resclip", layers=[-13]),
        dict(type="sfp_paper", integrator_start=11),
        dict(readouts=[dict(blocks=[12])]),
    ],
    ids=str,
)
def test_bad_layers_are_wrong_settings(method):
    """So that a command that meets one exits with 2: they are known only once the model is."""
    with pytest.raises(LayerError) as error:
        sfp.build_method(method).logits(tiny.clip().visual, tiny.images(1), tiny.queries(3))
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(
    "method", ["sfp", "cliper", dict(type="clip_surgery", stitched=True)], ids=str
)
def test_all_tensors_of_a_trace_are_counted(method):
    """Those that Python's garbage collector reaches from what is cached, without the model."""
    context = dict(text=tiny.queries(3), index=(0, 1, 2))
    image = tiny.images(1, 64, 96)[0]
    whole = WholeImage(WindowGrid.over((64, 96), 64, 32), image, regions=torch.zeros(64, 96).long())
    windows = torch.stack([whole.cut(place)[0] for place in whole.grid.places])
    method = sfp.build_method(method)
    _, features = run(method, tiny.clip().visual, windows, dict(context, whole=whole))

    def reached(part: object, seen: set[int]) -> Iterator[Tensor]:
        if id(part) in seen or isinstance(part, (type, ModuleType, FunctionType, torch.nn.Module)):
            return
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        else:
            for inner in gc.get_referents(part):
                yield from reached(inner, seen)

    storages = {x.untyped_storage().data_ptr(): x for x in reached(features, set())}
    assert features.nbytes == sum(x.untyped_storage().nbytes() for x in storages.values())


def test_edits_that_need_words_get_them_on_the_whole_image_too():
    def worded(trace: sfp.Trace, layer: int) -> sfp.Tokens:
        tokens = trace.outputs[layer]
        assert trace.index == (0, 0)
        return tokens.with_data(tokens.data * len(trace.known_words().queries))

    whole = WholeImage(WindowGrid.over((64, 96), 64, 32), tiny.images(1, 64, 96)[0])
    windows = torch.stack([whole.cut(place)[0] for place in whole.grid.places])
    context = dict(text=tiny.queries(2), index=(0, 0), words=Words(("sky", "cloud"), tiny.queries))
    method = sfp.Method(edits=(worded,))
    trace = method.run(tiny.clip().visual, windows, whole=whole, **context)
    assert trace.of_image().words == trace.words
