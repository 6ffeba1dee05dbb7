"""SAM's refinement of labels, against Trident's official numbers and loops, with a small SAM."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import segmentors
import tiny
import torch
from conformance import Case, cases
from torch import Tensor, nn
from torch.nn import functional as F

import sfp
from sfp.functional.labels import Labels
from sfp.functional.windows import nearest
from sfp.masks import MaskVote, SamRefine, build_masks
from sfp.masks.refine import class_prompts

pytestmark = pytest.mark.usefixtures("no_grad")


class Cones(nn.Module):
    """A stand-in for SAM: in each box a pyramid of logits, sure of it as a list says."""

    def __init__(self, sure: list[float], side: int = 1024) -> None:
        super().__init__()
        self.sure, self.asked = sure, []
        self.config = SimpleNamespace(
            model_type="sam", prompt_encoder_config=SimpleNamespace(image_size=side)
        )
        self.weight = nn.Parameter(torch.zeros(1))

    def get_image_embeddings(self, pixels: Tensor) -> Tensor:
        return pixels

    def forward(self, *, image_embeddings, multimask_output, **prompts: Tensor):
        assert not multimask_output
        boxes, first = prompts["input_boxes"][0], sum(len(x["input_boxes"][0]) for x in self.asked)
        self.asked.append(prompts)
        side = self.config.prompt_encoder_config.image_size // 4
        at = torch.arange(side) + 0.5
        maps = []
        for x0, y0, x1, y1 in (boxes / 4).tolist():
            across = (at - (x0 + x1) / 2).abs() / ((x1 - x0) / 2 + 4.37)
            down = (at - (y0 + y1) / 2).abs() / ((y1 - y0) / 2 + 4.37)
            maps.append(8 * (1 - torch.maximum(across[None], down[:, None])))
        iou = [self.sure[(first + i) % len(self.sure)] for i in range(len(boxes))]
        return SimpleNamespace(
            pred_masks=torch.stack(maps)[None, :, None], iou_scores=torch.tensor(iou)[None, :, None]
        )


@pytest.mark.parametrize("name", cases("unit/trident_refine/"))
def test_golden_trident_refine(name):
    case, hyper = Case(name), Case(name).hyper
    size = tuple(hyper["size"])
    scores = F.interpolate(case.inputs[case.entry["input"]][None], size, mode="bilinear")
    scores = scores[0].softmax(0)
    confidence, winner = scores.max(0)
    labels = Labels(winner, confidence, scores)
    case.check("before", winner.to(torch.uint8))
    model = Cones(hyper["predicted_iou"])
    refine = SamRefine(
        model=model,
        coarse_thd=hyper["coarse_thd"],
        min_area=hyper["min_area"],
        min_iou=hyper["iou_thd"],
        mask_factor=hyper["mask_factor"],
    )
    image = torch.zeros(3, *size)
    new = refine(None, image, labels, hyper["classes"])
    case.check("pred", new.labels.to(torch.uint8))
    boxes = torch.cat([prompts["input_boxes"][0] for prompts in model.asked])
    points = torch.cat([prompts["input_points"][0, :, 0] for prompts in model.asked])
    case.check("boxes_1024", boxes)
    case.check("points_1024", points)
    half = [side // 2 for side in size]
    small = F.interpolate(scores[None], half, mode="bilinear")[0]
    case.check("mask_input_s8", torch.stack([refine.mask_input(x)[::8, ::8] for x in small]))
    assert len(boxes) == case.entry["info"]["components"]
    model.asked = []
    found, failed = refine.spread(image, labels)
    # the release returns the old probabilities too, wherever a mask did not count
    returned = torch.where(failed, torch.maximum(found, scores), found)
    case.check("scores_s4", returned[:, ::4, ::4])
    changed = int((new.labels != winner).sum())
    slack = case.outputs["pred"]["max_mismatch_pixels"]
    assert changed == pytest.approx(case.entry["info"]["changed"], abs=slack)
    assert changed > slack


def drawn(height: int = 40, width: int = 56, classes: int = 4) -> Labels:
    generator = torch.Generator().manual_seed(0)
    coarse = 3 * torch.randn(1, classes, 6, 8, generator=generator)
    scores = F.interpolate(coarse, (height, width), mode="bilinear")[0].softmax(0)
    confidence, winner = scores.max(0)
    return Labels(winner, confidence, scores)


def neighbours(y: int, x: int) -> list[tuple[int, int]]:
    return [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def test_parts_against_a_flood():
    labels = drawn()
    coarse_thd, min_area = 0.5, 12
    sure = labels.scores.amax(0) >= coarse_thd
    expected = []
    for label in range(4):
        left = {tuple(at) for at in ((labels.labels == label) & sure).nonzero().tolist()}
        for start in sorted(left):
            part, queue = set(), [start] if start in left else []
            while queue:
                at = queue.pop()
                if at in left:
                    left.remove(at)
                    part.add(at)
                    queue += neighbours(*at)
            if len(part) >= min_area:
                ys, xs = zip(*part, strict=True)
                prob = labels.scores[label]
                best = max(sorted(part), key=lambda at, prob=prob: float(prob[at]))
                box = [min(xs), min(ys), max(xs), max(ys)]
                expected.append((label, box, [best[1], best[0]], part))
    found = [
        (prompts.label, box, point, {tuple(at) for at in (prompts.parts == i).nonzero().tolist()})
        for prompts in class_prompts(
            labels.labels, labels.scores, coarse_thd=coarse_thd, min_area=min_area
        )
        for i, (box, point) in enumerate(
            zip(prompts.boxes.tolist(), prompts.points.tolist(), strict=True), 1
        )
    ]
    assert found == expected
    assert len(found) > 5


def test_restoring_against_loops():
    """A part whose mask does not count keeps its label where that is more probable."""
    labels, image = drawn(), torch.zeros(3, 40, 56)
    settings = dict(min_area=4, coarse_thd=0.3)
    released, restored = (
        SamRefine(model=Cones([0.9, 0.1], 64), restore=restore, **settings)(None, image, labels, 4)
        for restore in (False, True)
    )
    found, failed = SamRefine(model=Cones([0.9, 0.1], 64), **settings).spread(image, labels)
    for y, x in torch.cartesian_prod(torch.arange(40), torch.arange(56)).tolist():
        best = max(range(4), key=lambda k, y=y, x=x: float(found[k, y, x]))
        old = int(labels.labels[y, x])
        new = best if found[best, y, x] > 0 else old
        assert released.labels[y, x] == new
        back = bool(failed[y, x]) and labels.confidence[y, x] > found[best, y, x]
        assert restored.labels[y, x] == (old if back else new)
    assert (released.labels != restored.labels).any()
    assert torch.equal(restored.scores.argmax(0), restored.labels)
    best = restored.scores.amax(0)
    inside = (restored.scores != labels.scores).any(0)
    expected = torch.where(inside, best.clamp_min(0.3), best)
    assert torch.equal(restored.confidence, expected)


@pytest.fixture(params=["sam", "sam2"])
def model(request) -> nn.Module:
    return getattr(segmentors, request.param)(mask_channels=16)  # with less all maps look alike


@pytest.mark.slow
def test_a_small_sam(model):
    """As `transformers` runs it, part by part; batches of prompts change nothing."""
    labels = drawn()
    image = tiny.images(1, 40, 56)[0]
    settings = dict(min_area=4, coarse_thd=0.3, min_iou=-1e9, mask_factor=20.0)
    found, failed = SamRefine(model=model, **settings).spread(image, labels)
    other, _ = SamRefine(model=model, prompt_batch=1, **settings).spread(image, labels)
    torch.testing.assert_close(other, found, atol=1e-5, rtol=1e-4)
    assert not failed.any()
    refine = SamRefine(model=model, **settings)
    small = F.interpolate(labels.scores[None], (20, 28), mode="bilinear")[0]
    embeddings = refine.embed(image)
    inner = (64, 64) if refine.stretch else (46, 64)
    assert refine.inner(40, 56) == inner
    expected = torch.zeros_like(found)
    asked = class_prompts(nearest(labels.labels, (20, 28)), small, coarse_thd=0.3, min_area=4)
    for prompts in asked:
        for box, point in zip(prompts.boxes.tolist(), prompts.points.tolist(), strict=True):
            across, down = inner[1] / 28, inner[0] / 20
            out = model(
                image_embeddings=embeddings,
                input_points=torch.tensor([[[[point[0] * across, point[1] * down]]]]),
                input_boxes=torch.tensor(
                    [[[box[0] * across, box[1] * down, box[2] * across, box[3] * down]]]
                ),
                input_masks=refine.mask_input(prompts.prob)[None, None],
                multimask_output=False,
            )
            logits = out.pred_masks[0, 0]
            if not refine.stretch:
                logits = F.interpolate(logits[None], (64, 64), mode="bilinear")[0]
                logits = logits[:, : inner[0], : inner[1]]
            logits = F.interpolate(logits[None], (40, 56), mode="bilinear")[0, 0]
            own = logits.sigmoid() * labels.scores[prompts.label]
            before = expected[prompts.label]
            expected[prompts.label] = torch.where(logits > 0, torch.maximum(before, own), before)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert 0 < (found > 0).float().mean() < 1
    flat, _ = SamRefine(model=model, **{**settings, "mask_factor": 0.0}).spread(image, labels)
    assert (flat - found).abs().max() > 1e-3


def test_nothing_sure_and_odd_sizes(model):
    for size in ((1, 1), (3, 70), (65, 2)):
        labels = drawn(*size)
        refine = SamRefine(model=model, min_area=1, min_iou=math.inf)
        new = refine(None, tiny.images(1, *size)[0], labels, 4)
        assert torch.equal(new.labels, labels.labels)
        assert torch.equal(new.scores, labels.scores)
    labels = drawn()
    new = SamRefine(model=model, coarse_thd=2.0)(None, tiny.images(1, 40, 56)[0], labels, 4)
    assert torch.equal(new.labels, labels.labels)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_method(model, precision):
    """By a setting of the model; labels, confidence and what is not in masks fit together."""
    node = dict(type="sam_refine", model=model, coarse_thd=0.1, min_area=2, min_iou=-1e9)
    held = dict(node, coarse_thd=0.34)
    settings = dict(method="sclip", slide_crop=64, slide_stride=32, short_side=None)
    settings.update(precision=precision)
    picture = (np.random.default_rng(0).random((70, 90, 3)) * 255).astype(np.uint8)
    words = ["cat", "dog", "tree"]
    plain, new = (
        sfp.load(tiny.clip(**tiny.WORDS), masks=masks, **settings).segment(picture, words)
        for masks in (None, node)
    )
    changed = new.labels != plain.labels
    assert changed.any()
    assert (new.confidence[changed] <= 1).all()
    assert (plain.scores == new.scores).all()
    held = sfp.load(tiny.clip(**tiny.WORDS), masks=held, **settings)
    free, thresholded = (held.segment(picture, words, background=x) for x in (None, 0.339))
    inside = free.confidence >= 0.34
    assert (thresholded.labels[inside] == free.labels[inside] + 1).all()


def test_settings():
    built = build_masks(dict(type="sam_refine", model=Cones([0.5]), restore=True))
    assert isinstance(built, SamRefine)
    assert built.restore
    vote = dict(propose=nn.Identity(), points=dict(type="grid_points", side=3))
    assert isinstance(build_masks(dict(type="vote", **vote)), MaskVote)
    for node, message in (
        (dict(type="sam_refin", model="x"), "did you mean 'sam_refine'"),
        (dict(type="sam_refine", modle="x"), "no knob 'modle'.*'model'"),
        (dict(type="sam_refine", model=Cones([1.0]), shrink=0), "shrink=0"),
        (dict(type="sam_refine", model=nn.Identity()), "valid: sam, sam2"),
    ):
        with pytest.raises(ValueError, match=message):
            build_masks(node)
    bare = replace(drawn(), scores=None)
    with pytest.raises(ValueError, match="with scores"):
        built(None, torch.zeros(3, 4, 4), bare, 4)
