"""A memory of regions, from images to logits, against loops over pixels in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.clip.int8 import quantised
from sfp.engine import Engine, Queries
from sfp.functional.regions import cells_of_masks
from sfp.methods import region_memory
from sfp.methods.region_memory import probe, recalled, remember, same_model, write_memory

pytestmark = pytest.mark.usefixtures("no_grad")

KEYS = dict(guide="dino", output=None)
BASE = dict(type="clearclip")


def colours(pixels: Tensor, output: str | None = None) -> sfp.Tokens:
    """A stand-in for a guide: mean colours of cells of 6 pixels."""
    maps = F.avg_pool2d(pixels.float(), 6)
    return sfp.Tokens(maps.flatten(2).mT, (maps.shape[2], maps.shape[3]), prefix=0)


def engine() -> Engine:
    made = Engine(tiny.clip(), slide_crop=64, slide_stride=32)
    made.guides = Guides()  # a plain function is no module, which an engine's guides are
    return made


class Guides(torch.nn.ModuleDict):
    """One guide that is no module."""

    def items(self):
        return dict(dino=colours).items()


def pictures(count: int = 3) -> list[Tensor]:
    return list(tiny.images(count, 64, 96, seed=4))


def columns(first: int = 1) -> Tensor:
    """Four regions of 20 columns, and 16 of none."""
    ids = torch.arange(96) // 20 + first
    return ids.masked_fill(torch.arange(96) >= 80, 0).expand(64, 96)


def mean_of_pixels(maps: Tensor, ids: Tensor, number: int) -> Tensor:
    """Unit mean of a map's unit vectors, resampled to the pixels, over those of a region."""
    up = F.interpolate(F.normalize(maps.double(), dim=1), tuple(ids.shape), mode="bilinear")
    return F.normalize(up[0][:, ids == number].mean(1), dim=0)


def joined(maps: Tensor) -> Tensor:
    """Maps of two windows of 8 x 8 cells, 4 apart, as one: (1, D, 8, 12) float64."""
    whole = torch.zeros(1, maps.shape[1], 8, 12, dtype=torch.float64)
    count = torch.zeros(12, dtype=torch.float64)
    for first, window in zip((0, 4), maps, strict=True):
        whole[0, :, :, first : first + 8] += window
        count[first : first + 8] += 1
    return whole / count


def read(image: Tensor, own: Engine, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of an image's regions, pixel by pixel."""
    method = sfp.build_method(BASE)
    windows = torch.stack([image[:, :, :64], image[:, :, 32:]])
    maps = F.normalize(method.features(own.clip.visual, windows)[0].as_map(), dim=1)
    whole = joined(maps)
    keys = [mean_of_pixels(colours(image[None]).as_map(), regions, i) for i in range(1, 5)]
    values = [mean_of_pixels(whole, regions, i) for i in range(1, 5)]
    return torch.stack(keys), torch.stack(values)


@pytest.fixture
def memory(tmp_path) -> str:
    own, method = engine(), sfp.build_method(BASE)
    reads = (own.read(method, image, regions=columns()) for image in pictures())
    path = tmp_path / "memory.safetensors"
    write_memory(path, *remember(reads, **KEYS), own.clip.visual, guide="dino", output="None")
    return str(path)


def test_what_is_kept():
    own, method = engine(), sfp.build_method(BASE)
    keys, values = remember(
        (own.read(method, image, regions=columns()) for image in pictures()), **KEYS
    )
    assert keys.dtype == values.dtype == torch.float16
    expected = [read(image, own, columns()) for image in pictures()]
    for found, each in zip((keys, values), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(found.double(), torch.cat(each), atol=1e-3, rtol=0)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_against_pixels(memory, share):
    own, image, text = engine(), tiny.images(1, 64, 96, seed=7)[0], tiny.queries(5)
    kept = [read(other, own, columns()) for other in pictures()]
    keys, values = (torch.cat(each) for each in zip(*kept, strict=True))
    ids = columns()
    queries = Queries(text, tuple(range(5)))
    method = sfp.build_method(
        "region_memory", base=BASE, memory=memory, count=3, share=share, **KEYS
    )
    ((found,),) = own.logits([method], [image], [(64, 96)], queries, regions=[ids])
    found = found.rows(0, 64).double()
    windows = torch.stack([image[:, :, :64], image[:, :, 32:]])
    low = joined(sfp.build_method(BASE).logits(own.clip.visual, windows, text)[0])
    plain = F.interpolate(low, (64, 96), mode="bilinear")[0]
    for number in range(1, 5):
        key = mean_of_pixels(colours(image[None]).as_map(), ids, number)
        nearest = sorted(range(len(keys)), key=lambda i: -float(keys[i] @ key))[:3]
        value = F.normalize(values[nearest].mean(0), dim=0)
        expected = (1 - share) * plain + share * (text.double() @ value)[:, None, None]
        inside = (ids == number).expand_as(plain)
        torch.testing.assert_close(found[inside], expected[inside], atol=2e-3, rtol=0)
    outside = (ids == 0).expand_as(plain)
    torch.testing.assert_close(found[outside], plain[outside], atol=1e-5, rtol=0)


def test_nearest_in_portions(monkeypatch):
    own, keys, values = tiny.queries(4, 1), tiny.queries(50, 2), tiny.queries(50, 3)
    expected = F.normalize(values[(own @ keys.T).topk(7, dim=1).indices].mean(1), dim=-1)
    torch.testing.assert_close(recalled(own, keys, values, 7), expected)
    monkeypatch.setattr(region_memory, "BUDGET", 4 * 9)
    torch.testing.assert_close(recalled(own, keys, values, 7), expected)
    few = F.normalize(values[:2].mean(0).expand(4, -1), dim=-1)
    torch.testing.assert_close(recalled(own, keys[:2], values[:2], 7), few)


def test_cells_of_masks_are_sums_over_pixels():
    maps = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    member = torch.from_numpy(np.random.default_rng(0).random((6, 13, 11)) > 0.6).double()
    up = F.interpolate(maps, (13, 11), mode="bilinear")[0]
    expected = torch.stack([(up * mask).sum((1, 2)) for mask in member])
    found = cells_of_masks(member, (4, 5)) @ maps[0].flatten(1).T
    torch.testing.assert_close(found, expected)


def test_a_model_is_recognised_in_any_precision():
    """But not after fine-tuning, also where most of it was frozen."""
    vit = tiny.clip().visual
    own = probe(vit)
    for other in (copy.deepcopy(vit).half(), copy.deepcopy(vit).bfloat16(), quantised(vit)):
        assert same_model(own, probe(other)), other
    tuned = copy.deepcopy(vit)
    with torch.no_grad():
        tuned.blocks[1].mlp.c_fc.weight += 1e-3
    assert not same_model(own, probe(tuned))
    assert not same_model(own, {})


def test_what_does_not_fit_is_named(memory, tmp_path):
    own, image = engine(), pictures(1)[0]
    queries = Queries(tiny.queries(5), tuple(range(5)))

    def run(own: Engine = own, **knobs: object) -> None:
        method = sfp.build_method("region_memory", base=BASE, **{"memory": memory, **KEYS, **knobs})
        own.logits([method], [image], [(64, 96)], queries, regions=[columns()])

    with pytest.raises(
        ValueError, match=r"was made with \{'output': 'None'\}, but the method uses"
    ):
        run(output="q+k")
    other = engine()
    other.clip = tiny.clip(seed=1)
    with pytest.raises(ValueError, match="was made with other weights"):
        run(other)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="expected a file that `sfp fit memory` wrote"):
        run(memory=str(broken))
    with pytest.raises(FileNotFoundError):
        run(memory=str(tmp_path / "none"))
    empty = torch.zeros(64, 96, dtype=torch.long)
    reads = [own.read(sfp.build_method(BASE), image, regions=empty)]
    with pytest.raises(ValueError, match="no image has a region"):
        remember(reads, **KEYS)
