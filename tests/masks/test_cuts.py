"""Normalised cuts and region means, against dense algebra and loops."""

from __future__ import annotations

import pytest
import segmentors
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.functional.windows import WindowGrid
from sfp.guides import TransformersGuide
from sfp.masks import CutMasks, cuts
from sfp.registry import bind
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")


def planted(noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Features of 12 x 15 patches, (180, 16), of a background, a square and a bar; and their parts."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.zeros(12, 15, dtype=torch.int64)
    parts[2:8, 2:7] = 1
    parts[4:6, 4:5] = 0  # a hole
    parts[6:10, 9:13] = 2
    centres = torch.randn(3, 16, generator=generator)
    features = centres[parts.flatten()] + noise * torch.randn(180, 16, generator=generator)
    return features, parts


def relation(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    unit = F.normalize(torch.randn(count, 3, generator=generator) + 0.5, dim=-1)
    return unit @ unit.T > 0.3


@pytest.mark.parametrize("count", [3, 40, 600])
def test_eigenvector_against_a_dense_solution(count):
    """(D - A) x = lambda D x by Cholesky, in float64; signs are free."""
    from scipy.linalg import eigh

    alike = relation(count)
    weights = torch.where(alike, 1.0, 1e-5).double()
    degree = torch.diag(weights.sum(1))
    values, vectors = eigh((degree - weights).numpy(), degree.numpy(), subset_by_index=[1, 2])
    assert values[1] - values[0] > 1e-6  # else any mixture of the two is one
    expected, found = torch.from_numpy(vectors[:, 0]), cuts.second_eigenvector(alike)
    cosine = F.cosine_similarity(found, expected, dim=0)
    assert cosine.abs() == pytest.approx(1, abs=1e-4)


def test_planted_parts_are_found():
    features, parts = planted()
    masks = cuts.normalised_cuts(features, (12, 15), count=8, alike=0.5)
    assert (masks.sum(0) == 1).all()  # everything, once
    square = parts == 1
    square[4:6, 4:5] = True  # the hole is filled
    assert any(torch.equal(mask, square) for mask in masks)
    assert any(torch.equal(mask, parts == 2) for mask in masks)
    (only,) = cuts.normalised_cuts(features, (12, 15), count=0, alike=0.5)
    assert only.all()


def test_a_ring_is_no_mask():
    """A mask that is less than half of itself with its holes: its patches stay with the rest."""
    parts = torch.zeros(14, 14, dtype=torch.int64)
    parts[2:12, 2:12] = 1
    parts[3:11, 3:11] = 0
    centres = torch.eye(2)
    (mask,) = cuts.normalised_cuts(centres[parts.flatten()], (14, 14), count=1, alike=0.5)
    assert mask.all()


def test_tiny_and_uniform_grids():
    for grid in ((1, 1), (1, 2), (2, 2), (1, 9)):
        features = torch.ones(grid[0] * grid[1], 4)
        masks = cuts.normalised_cuts(features, grid)
        assert (masks.sum(0) == 1).all()


def test_the_proposer():
    dino = segmentors.dino()
    image = tiny.images(1, 40, 70)[0]
    propose = CutMasks(model=dino, side=64, count=3, alike=0.6)
    sheet = propose(image, torch.zeros(0, 1, 2), (40, 70))
    square = F.interpolate(image[None], (64, 64), mode="bilinear", antialias=True)
    tokens = TransformersGuide(model=dino)(square, "k")
    masks = cuts.normalised_cuts(tokens.data[0], (8, 8), count=3, alike=0.6)
    expected = F.interpolate(2 * masks[None].float() - 1, (40, 70), mode="bilinear")[0]
    torch.testing.assert_close(sheet.rows(0, 40), expected, atol=1e-5, rtol=0)


def test_lavg_by_a_setting():
    """Every pixel is in a region, and regions have one label up to their borders."""
    model = sfp.load(
        tiny.clip(**tiny.WORDS),
        method="lavg",
        regions=dict(propose=dict(type="cuts", model=segmentors.dino(), side=64, alike=0.6)),
        slide_crop=64,
        slide_stride=32,
        short_side=None,
    )
    picture = (torch.rand(6, 9, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    picture = picture.repeat_interleave(12, 0).repeat_interleave(12, 1)
    found = model.segment(picture.numpy(), ["cat", "dog", "tree"])
    pixels = model.engine.normalise(picture.permute(2, 0, 1))
    ids = model.engine.regions(model.clip.visual, pixels, (72, 108))
    same = model.segment(picture.numpy(), ["cat", "dog", "tree"], regions=ids)
    assert (found.labels == same.labels).all()
    assert len(ids.unique()) > 1
    for i in set(ids.unique().tolist()) - {0}:
        scores = torch.tensor(found.scores)[:, ids == i]
        apart = (scores - scores.median(1, keepdim=True).values).abs().amax(0)
        assert (apart < 1e-4).float().mean() > 0.6  # all but what lies at a border


@pytest.mark.parametrize("windows", [1, 3])
def test_region_means_against_pixels(windows):
    image = tiny.images(1, 64, 64 if windows == 1 else 128)[0]
    grid = WindowGrid.over(image.shape[1:], 64, 32)
    assert len(grid.places) == windows
    ids = (image[0] > 0).long() + 2 * (image[1] > 0.5).long()
    visual, text = tiny.clip().visual, tiny.queries(4)
    whole = WholeImage(grid, image, regions=ids)
    cut = torch.stack([whole.cut(place)[0] for place in grid.places])
    trace = visual.trace(cut, whole=whole, text=text, depth=12)
    logits = sfp.build_method("sclip").read_logits(trace)
    found = bind(dict(type="region_mean"))(logits, trace)[0]
    joined = grid.stitch(logits)
    pixels = F.interpolate(joined, image.shape[1:], mode="bilinear")[0]
    expected = pixels.clone()
    for i in range(1, 4):
        inside = ids == i
        expected[:, inside] = pixels[:, inside].mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
