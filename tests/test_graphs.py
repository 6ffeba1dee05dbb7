"""CUDA graphs, as far as they can be tested on a CPU: what is recorded, and when it is replayed.

That replays have the same results as runs is checked on a GPU, by `tools/gpu_check.sh`.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import tiny
import torch

import sfp
from sfp import graphs
from sfp.engine import Engine, Queries
from sfp.functional.kept import constant, held


@dataclass(frozen=True)
class Tape:
    """Stands for a recording: gives the first results again, whatever comes in."""

    outputs: list[torch.Tensor]

    def __call__(self, windows: torch.Tensor) -> list[torch.Tensor]:
        return self.outputs


@pytest.fixture
def recorded(monkeypatch):
    """How often something was recorded."""
    count: list[tuple[int, ...]] = []

    def record(self, function, windows, alive):
        count.append(tuple(windows.shape))
        return Tape(function(windows))

    monkeypatch.setattr(graphs, "recordable", lambda windows: True)
    monkeypatch.setattr(graphs.Graphs, "_record", record)
    return count


def tiles(
    engine: Engine, method: sfp.Method, image: torch.Tensor, queries: Queries
) -> torch.Tensor:
    ((sheet,),) = engine.logits([method], [image], [image.shape[1:]], queries)
    return sheet.tiles


def test_on_a_cpu_nothing_is_recorded():
    image, queries = tiny.images(1, 64, 96)[0], Queries(tiny.queries(4), (0, 1, 2, 3))
    settings = dict(slide_crop=64, slide_stride=32)
    method = sfp.build_method("sfp")
    plain, other = (Engine(tiny.clip(), **settings, graphs=graphs) for graphs in (False, True))
    assert torch.equal(tiles(plain, method, image, queries), tiles(other, method, image, queries))


def test_what_is_recorded_anew(recorded):
    clip = tiny.clip()
    engine = Engine(clip, slide_crop=64, slide_stride=32, window_batch=4, graphs=True)
    images = tiny.images(2, 64, 96)
    queries = Queries(tiny.queries(4), (0, 1, 2, 3))
    method = sfp.build_method("sfp")
    first = tiles(engine, method, images[0], queries)
    assert torch.equal(tiles(engine, method, images[1], queries), first)  # as `Tape` says
    assert recorded == [(2, 3, 64, 64)]
    other = Queries(tiny.queries(4), (0, 1, 1, 2))
    changes = [
        lambda: tiles(engine, sfp.build_method("sfp", beta=0.2), images[1], queries),
        lambda: tiles(engine, method, images[1], other),
        lambda: tiles(engine, method, images[1][:, :, :64], queries),
    ]
    for number, change in enumerate(changes, 2):
        change()
        change()
        assert len(recorded) == number
    clip.visual.proj = torch.nn.Parameter(clip.visual.proj * 2)
    tiles(engine, method, images[1], queries)
    assert len(recorded) == 5
    regions = [torch.ones(64, 96, dtype=torch.long)]  # an input that is not the image
    engine.logits([method], images[:1], [(64, 96)], queries, regions=regions)
    stitched = sfp.build_method("sfp", stitched=True)
    tiles(engine, stitched, images[0], queries)
    assert len(recorded) == 5


def test_what_cannot_be_recorded_runs_and_says_so(recorded, monkeypatch):
    def fails(*args, **knobs):
        raise RuntimeError("operation not permitted when stream is capturing")

    class Stream:
        def __init__(self, *args):
            pass

        def wait_stream(self, other):
            pass

    monkeypatch.undo()
    monkeypatch.setattr(graphs, "recordable", lambda windows: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", fails)
    kept = graphs.Graphs()
    windows = torch.ones(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="cannot be recorded.*stream is capturing"):
        (found,) = kept("key", lambda x: [x * 2], windows)
    assert torch.equal(found, windows * 2)
    (found,) = kept("key", lambda x: [x * 3], windows)  # not tried again
    assert torch.equal(found, windows * 3)


def test_words_and_autocast(recorded):
    """The same words are the same tensor in every call; an autocast run is another one."""
    settings = dict(device="cpu", short_side=None, slide_crop=0, graphs=True)
    model = sfp.load(tiny.clip(**tiny.WORDS), "sfp", **settings)
    image = tiny.images(1, 64, 96)[0].clamp(0, 1)
    for words in (["sky", "road"], ["sky", "grass"], ["sky", "road"]):
        model.segment(image, words)
        model.segment(image, words)
    assert len(recorded) == 2
    with torch.autocast("cpu", torch.bfloat16):
        model.segment(image, ["sky", "road"])
    assert len(recorded) == 3


def test_cached_constants_outlive_the_cache():
    """A graph reads them at their addresses, whatever the cache keeps."""
    like = torch.ones(1)
    with held() as constants:
        made = constant((1.5, 2.5), like)
    assert constants[0] is made
    constant((3.5,), like)
    assert len(constants) == 1


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_recordings_stay_behind(recorded, travel):
    kept = graphs.Graphs()
    kept("key", lambda x: [x], torch.ones(1, 3, 8, 8))
    travel(kept)("key", lambda x: [x], torch.ones(1, 3, 8, 8))
    assert len(recorded) == 2
