"""Votes in masks against loops over pixels, and SAM against the library's own processor."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import segmentors
import tiny
import torch
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn import functional as F

import sfp
from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.functional import masks as functional
from sfp.functional.clusters import cluster_peaks
from sfp.functional.labels import Labels
from sfp.functional.masks import (
    MaskSheet,
    fuse_contained,
    paint_masks,
    same_area,
    stability,
    vote_in_masks,
    without_doubles,
)
from sfp.guides import TransformersGuide
from sfp.masks import DinoMasks, MaskVote, SamMasks, build_masks
from sfp.masks.dino import above_mass
from sfp.methods.cliptrase import cluster_points
from sfp.ops.points import grid_points
from sfp.registry import bind

pytestmark = pytest.mark.usefixtures("no_grad")

CLUSTERS = dict(type="cluster_points", affinity=dict(type="head_cosine"), eps=2.0)
GRID = dict(type="grid_points", side=3)


def sheet(masks: Tensor) -> MaskSheet:
    """Masks (M, H, W) that need no resampling."""
    height, width = masks.shape[1:]
    return MaskSheet(masks.float() - 0.5, torch.eye(height), torch.eye(width))


def random_labels(height: int, width: int, classes: int, seed: int = 0) -> Labels:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(classes, height, width, generator=generator).softmax(0)
    confidence, labels = scores.max(0)
    return Labels(labels, confidence, scores)


def random_masks(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Overlapping rectangles, one of them empty."""
    rng = np.random.default_rng(seed)
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks[1:]:
        y, x = (np.sort(rng.integers(0, n + 1, 2)) for n in (height, width))
        mask[y[0] : y[1], x[0] : x[1]] = True
    return masks


def vote_by_hand(
    masks: np.ndarray, labels: Labels, classes: int, mean: bool, share: float, prob_thd: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The docstring of `vote_in_masks`, pixel by pixel, in float64."""
    new = labels.labels.numpy().copy()
    confidence = labels.confidence.double().numpy().copy()
    scores = labels.scores.double().numpy().copy()
    table = []
    for mask in masks:
        pixels = list(zip(*np.nonzero(mask), strict=True))
        shares = np.zeros(classes)
        for y, x in pixels:
            if mean:
                shares += labels.scores[:, y, x].double().numpy() / len(pixels)
            else:
                shares[labels.labels[y, x]] += 1 / len(pixels)
        table.append((len(pixels), shares))
    for y in range(new.shape[0]):
        for x in range(new.shape[1]):
            own = [
                (area, m)
                for m, (area, shares) in enumerate(table)
                if masks[m, y, x] and shares.max() >= share
            ]
            if own:
                shares = table[min(own)[1]][1]
                new[y, x] = shares.argmax()
                confidence[y, x] = shares.max()
                scores[:, y, x] = shares
                if mean and shares.max() < prob_thd:
                    new[y, x] = 0
    return new, confidence, scores


# -- the vote ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("prob_thd", [0.0, 0.25])
@pytest.mark.parametrize("budget", [2**24, 40], ids=["whole", "slabs"])
def test_vote_against_loops(mean, share, prob_thd, budget, monkeypatch):
    monkeypatch.setattr(functional, "BUDGET", budget)
    labels, masks = random_labels(13, 17, 5), random_masks(9, 13, 17)
    masks[5] = masks[4]  # a tie of areas
    result = vote_in_masks(sheet(masks), labels, 5, mean=mean, share=share, prob_thd=prob_thd)
    expected = vote_by_hand(masks.numpy(), labels, 5, mean, share, prob_thd)
    assert np.array_equal(result.labels.numpy(), expected[0])
    assert (result.labels != labels.labels).any()
    np.testing.assert_allclose(result.confidence.numpy(), expected[1], atol=1e-6)
    np.testing.assert_allclose(result.scores.numpy(), expected[2], atol=1e-6)


def test_vote_settings_act():
    labels, masks = random_labels(13, 17, 5), sheet(random_masks(9, 13, 17))
    results = [
        vote_in_masks(masks, labels, 5, **settings).labels
        for settings in ({}, dict(mean=True), dict(share=0.3), dict(mean=True, prob_thd=0.25))
    ]
    assert len({tuple(r.flatten().tolist()) for r in results}) == 4


def test_vote_without_scores_and_without_masks():
    full = random_labels(6, 7, 3)
    lean = Labels(full.labels, full.confidence, None)
    masks = random_masks(4, 6, 7)
    assert torch.equal(
        vote_in_masks(sheet(masks), lean, 3).labels, vote_in_masks(sheet(masks), full, 3).labels
    )
    assert vote_in_masks(sheet(masks), lean, 3).scores is None
    for none in (masks[:0], masks[:1]):  # no mask; an empty one
        assert torch.equal(vote_in_masks(sheet(none), full, 3).labels, full.labels)
    with pytest.raises(ValueError, match="needs labels with scores"):
        vote_in_masks(sheet(masks), lean, 3, mean=True)


def test_vote_leaves_its_input_alone():
    labels = random_labels(6, 7, 3)
    before = [x.clone() for x in (labels.labels, labels.confidence, labels.scores)]
    vote_in_masks(sheet(torch.ones(1, 6, 7)), labels, 3)
    after = (labels.labels, labels.confidence, labels.scores)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_vote_on_one_pixel():
    labels = random_labels(1, 1, 3)
    result = vote_in_masks(sheet(torch.ones(2, 1, 1)), labels, 3)
    assert torch.equal(result.labels, labels.labels)
    assert result.confidence.item() == 1  # all of its mask agree


@pytest.mark.parametrize("shape", [(1, 1), (300, 200), (1, 1000), (7, 9), (4000, 30)], ids=str)
def test_same_area(shape):
    small = same_area(torch.rand(3, *shape), 64, 8)
    height, width = small.shape[1:]
    assert height % 8 == width % 8 == 0
    if min(shape) * 64 / (shape[0] * shape[1]) ** 0.5 >= 8:  # a patch fits
        assert height * width == pytest.approx(64 * 64, rel=0.35)
        assert height / width == pytest.approx(shape[0] / shape[1], rel=0.35)


# -- point prompts -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_peaks_against_loops(count):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(24, 24, generator=generator)
    labels = torch.randint(-1, 3, (24,), generator=generator)
    labels[labels == 2] = -1
    labels[[5, 11]] = 2  # a cluster of two patches
    points = cluster_peaks(rows, labels, (4, 6), count)
    assert points.shape == (3, count, 2)
    for k in range(3):
        members = [i for i in range(24) if labels[i] == k]
        prototype = [sum(float(rows[m, n]) for m in members) / len(members) for n in range(24)]
        chosen = [max(members, key=lambda i: prototype[i])]
        while len(chosen) < count:
            far = {
                i: min(np.hypot(i % 6 - j % 6, i // 6 - j // 6) for j in chosen) for i in members
            }
            best = max(members, key=lambda i: far[i])
            chosen.append(best if far[best] else chosen[0])
        expected = [((i % 6 + 0.5) / 6, (i // 6 + 0.5) / 4) for i in chosen]
        np.testing.assert_allclose(points[k].numpy(), expected, atol=1e-6)


def test_peaks_without_clusters():
    assert cluster_peaks(torch.eye(6), torch.full((6,), -1), (2, 3), 2).shape == (0, 2, 2)


def trace(size: tuple[int, int] = (64, 64), **context) -> sfp.Trace:
    return tiny.clip().visual.trace(tiny.images(1, *size), depth=12, **context)


def test_grid_points():
    (points,) = grid_points(trace(), side=2)
    assert points.tolist() == [[[0.25, 0.25]], [[0.75, 0.25]], [[0.25, 0.75]], [[0.75, 0.75]]]


def test_points_of_a_guides_clusters():
    """Two halves of an image that an encoder tells apart, on a grid that is not CLIP's."""

    def halves(image: Tensor) -> sfp.Tokens:
        side = (torch.arange(12) % 4 >= 2).float()  # of a 3 x 4 grid
        return sfp.Tokens(F.one_hot(side.long(), 2).float()[None], (3, 4), prefix=0)

    affinity = bind(dict(type="guide_similarity", guide="halves"))
    (points,) = cluster_points(trace(guides=dict(halves=halves)), affinity=affinity, guide="halves")
    assert points[:, 0, 0].tolist() == [0.125, 0.625]
    with pytest.raises(ValueError, match=r"'halves' cannot leave out noise.*noise=None"):
        cluster_points(
            trace(guides=dict(halves=halves)),
            affinity=affinity,
            guide="halves",
            noise=bind(dict(type="som")),
        )


# -- SAM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["sam", "sam2"])
def model(request) -> nn.Module:
    return getattr(segmentors, request.param)()


def normalised(pixels: np.ndarray) -> Tensor:
    """An RGB picture (H, W, 3) of bytes as the segmentor's preprocessor leaves it."""
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()
    return (image - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def picture(height: int, width: int) -> np.ndarray:
    smooth = F.interpolate(
        torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)),
        (height, width),
        mode="bilinear",
    )
    return (smooth[0] * 255).byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(48, 90), (200, 70), (64, 64), (5, 3)], ids=str)
def test_sam_against_the_librarys_processor(size):
    """Preprocessing, prompts and postprocessing of `transformers` itself, which resizes with Pillow."""
    processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    processor = processing.SamImageProcessorPil(
        size=dict(longest_edge=64), pad_size=dict(height=64, width=64)
    )
    model, pixels = segmentors.sam(), picture(*size)
    points = torch.tensor([[[0.2, 0.3]], [[0.9, 0.6]], [[0.5, 0.5]]])
    inputs = processor(pixels, return_tensors="pt")
    seen = []
    encode = model.get_image_embeddings
    model.get_image_embeddings = lambda pixel_values: encode(
        seen.append(pixel_values) or pixel_values
    )
    masks = SamMasks(model=model)(normalised(pixels), points, size)
    off = (seen[0] - inputs["pixel_values"]) * 255 * 0.225
    assert off.abs().max() < 1.1  # Pillow rounds to whole grey levels, on its way and in the end

    height, width = (int(n) for n in inputs["reshaped_input_sizes"][0])
    at = points * torch.tensor([width, height]) - 0.5
    out = model(pixel_values=seen[0], input_points=at[None])
    (full,) = processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False,
        pad_size=dict(height=64, width=64),
    )  # fmt: skip
    best = out.iou_scores[0].argmax(1)
    expected = full[torch.arange(3), best]
    assert masks.size == size
    ours = masks.rows(0, size[0])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    assert 0.02 < (ours > 0).float().mean() < 0.98


def test_sam_by_hand(model):
    """Both kinds: pixels, prompts and masks, written out once more."""
    pixels = picture(40, 80)
    points = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(1))
    inner = (32, 64) if model.config.model_type == "sam" else (64, 64)
    x = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x - mean[:, None, None]) / std[:, None, None]
    x = F.interpolate(x, inner, mode="bilinear", antialias=True)
    x = F.pad(x, (0, 0, 0, 64 - inner[0]))
    at = points * torch.tensor([inner[1], inner[0]]) - 0.5
    out = model(pixel_values=x, input_points=at[None])
    best = out.iou_scores[0].argmax(1)
    low = out.pred_masks[0][torch.arange(5), best][None]
    if model.config.model_type == "sam":
        low = F.interpolate(low, (64, 64), mode="bilinear")[..., :32, :]
    expected = F.interpolate(low, (33, 70), mode="bilinear")[0]
    for batch in (2, 64):
        masks = SamMasks(model=model, prompt_batch=batch)(normalised(pixels), points, (33, 70))
        torch.testing.assert_close(masks.rows(0, 33), expected, atol=2e-3, rtol=1e-3)
    iou = out.iou_scores[0].amax(1)
    middle = float(iou.sort().values[1:3].mean())
    some = SamMasks(model=model, min_iou=middle)(normalised(pixels), points, (33, 70))
    torch.testing.assert_close(some.rows(0, 33), expected[iou >= middle], atol=2e-3, rtol=1e-3)
    none = SamMasks(model=model, min_iou=1e9)(normalised(pixels), points, (33, 70))
    assert len(none.maps) == 0


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (300, 2)], ids=str)
def test_sam_on_odd_images(model, size):
    sam = SamMasks(model=model)
    masks = sam(normalised(picture(*size)), torch.tensor([[[0.5, 0.5]]]), size)
    assert masks.rows(0, size[0]).shape == (1, *size)
    nothing = sam(normalised(picture(*size)), torch.zeros(0, 1, 2), size)
    assert nothing.rows(0, size[0]).shape == (0, *size)


def test_sam_is_frozen_and_says_when_it_breaks(model):
    sam = SamMasks(model=model).train()
    assert not any(module.training for module in sam.modules())
    half = SamMasks(model=segmentors.sam()).to(torch.bfloat16)
    masks = half(normalised(picture(40, 60)), torch.tensor([[[0.5, 0.5]]]), (40, 60))
    assert masks.rows(0, 40).dtype == torch.float32
    broken = segmentors.sam()
    broken.mask_decoder.iou_token.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"the SAM of the settings.*precision='fp32'"):
        SamMasks(model=broken)(normalised(picture(9, 9)), torch.tensor([[[0.5, 0.5]]]), (9, 9))
    with pytest.raises(ValueError, match="model of type 'vit'; valid: sam, sam2"):
        SamMasks(model=segmentors.dino())


def test_sam_from_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SamMasks(model=str(tmp_path))
    points = torch.tensor([[[0.2, 0.7]]])
    ours, direct = (
        x(normalised(picture(40, 60)), points, (40, 60)).rows(0, 40)
        for x in (loaded, SamMasks(model=model))
    )
    torch.testing.assert_close(ours, direct)


def test_the_extra_is_named_when_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"sfp\[sam\]"):
        SamMasks(model="facebook/sam-vit-base")


# -- DINO ----------------------------------------------------------------------------------------


def test_dino_by_similarity():
    model = segmentors.dino()
    image = tiny.images(1, 48, 72)[0]
    points = torch.tensor([[[0.12, 0.2], [0.93, 0.9]], [[0.56, 0.4], [0.56, 0.4]]])
    dino = DinoMasks(model=model, side=64, centre=0.9)
    masks = dino(image, points, (30, 50))
    tokens = TransformersGuide(model=model)(same_area(image, 64, 8)[None])
    height, width = tokens.grid
    assert (height, width) == (7, 10)  # of 52.3 x 78.4 pixels
    unit = F.normalize(tokens.data[0].double(), dim=1)
    for ours, prompt in zip(masks.maps, points, strict=True):
        cells = [int(y * height) * width + int(x * width) for x, y in prompt.tolist()]
        mean = np.mean([[float(a @ b) for b in unit] for a in unit])
        expected = [np.mean([float(unit[c] @ u) for c in cells]) - 0.9 * mean for u in unit]
        np.testing.assert_allclose(ours.flatten().numpy(), expected, atol=1e-5)
    full = F.interpolate(masks.maps[None], (30, 50), mode="bilinear")[0]
    torch.testing.assert_close(masks.rows(0, 30), full, atol=1e-5, rtol=0)
    assert 0 < (full > 0).float().mean() < 1


def test_dino_by_attention():
    model = segmentors.dino()
    image = tiny.images(1, 64, 64)[0]
    points = torch.tensor([[[0.1, 0.2]], [[0.99, 0.99]]])
    masks = DinoMasks(model=model, side=64, by="attention", mass=0.5)(image, points, (8, 8))
    weights, _ = TransformersGuide(model=model).attention(image[None])
    torch.testing.assert_close(masks.maps.flatten(1), above_mass(weights[0, [8, 63]], 0.5))


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.6, 1.0])
def test_mass_against_loops(mass):
    weights = torch.rand(6, 11, generator=torch.Generator().manual_seed(0))
    for row, ours in zip(weights.tolist(), above_mass(weights, mass) > 0, strict=True):
        chosen, held = set(), 0.0
        for i in sorted(range(11), key=lambda i: -row[i]):
            chosen.add(i)
            held += row[i] / sum(row)
            if held >= mass - 1e-6:
                break
        assert set(ours.nonzero()[:, 0].tolist()) == chosen


@pytest.mark.parametrize("by", ["similarity", "attention"])
def test_dino_on_odd_images(by):
    dino = DinoMasks(model=segmentors.dino(), by=by, side=32)
    for size in ((1, 1), (1, 90), (300, 2)):
        image, points = tiny.images(1, *size)[0], torch.tensor([[[0.5, 0.5]]])
        assert dino(image, points, size).rows(0, size[0]).shape == (1, *size)
        assert dino(image, points[:0], size).rows(0, size[0]).shape == (0, *size)


# -- in the segmentor ----------------------------------------------------------------------------

NAMES = [["sky", "wall"], "cat", "tv", "boat"]


class Halves(nn.Module):
    """A stand-in for SAM: the left half of any image, and what the image was."""

    def forward(self, image: Tensor, points: Tensor, size: tuple[int, int]) -> MaskSheet:
        self.image, self.points = image, points
        mask = torch.zeros(1, *size)
        mask[:, :, : size[1] // 2] = 1
        return sheet(mask)


def segmentor(**settings) -> sfp.OpenVocabSegmentor:
    defaults = dict(
        weights=tiny.clip(),
        classes=NAMES,
        method="clip",
        query_features=tiny.queries(5),
        slide_crop=64,
        slide_stride=32,
        logit_scale=10.0,
    )
    return sfp.OpenVocabSegmentor(**{**defaults, **settings})


def predict(model: sfp.OpenVocabSegmentor, image: Tensor, **meta) -> SegDataSample:
    (result,) = model([image], [SegDataSample(metainfo=meta)], mode="predict")
    return result


@pytest.mark.slow
@pytest.mark.parametrize("vote", ["mode", "mean"])
def test_segmentor_votes(vote):
    image = tiny.images(1, 80, 100)[0]
    plain = predict(segmentor(prob_thd=0.45), image, ori_shape=(50, 70))
    halves = Halves()
    model = segmentor(prob_thd=0.45, masks=dict(propose=halves, points=CLUSTERS, vote=vote))
    result = predict(model, image, ori_shape=(50, 70))
    labels, scores = plain.pred_sem_seg.data[0], plain.seg_logits.data
    if vote == "mode":
        winner = labels[:, :35].flatten().bincount().argmax()
    else:
        mean = scores[:, :, :35].mean((1, 2))
        winner = mean.argmax() if mean.max() >= 0.45 else torch.tensor(0)
    assert (labels[:, :35] != winner).any()
    assert (result.pred_sem_seg.data[0, :, :35] == winner).all()
    assert torch.equal(result.pred_sem_seg.data[0, :, 35:], labels[:, 35:])
    assert torch.equal(result.seg_logits.data[:, :, 35:], scores[:, :, 35:])
    assert torch.equal(halves.image, image)
    assert len(halves.points)
    lean = predict(
        segmentor(
            prob_thd=0.45, scores=False, masks=dict(propose=halves, points=CLUSTERS, vote=vote)
        ),
        image,
        ori_shape=(50, 70),
    )
    assert "seg_logits" not in lean
    assert torch.equal(lean.pred_sem_seg.data, result.pred_sem_seg.data)


@pytest.mark.parametrize("vote", ["mode", "mean"])
@pytest.mark.parametrize("words", [["cat", "dog", "sky"], ["cat", "background", "sky"]])
def test_votes_with_a_threshold_for_the_background(vote, words):
    """Labels vote after the threshold; a mean of probabilities is compared with it."""
    settings = dict(slide_crop=64, slide_stride=32, short_side=None, method="sclip")
    settings.update(device="cpu", memory_mb=0)
    masks = dict(propose=Halves(), points=CLUSTERS, vote=vote)
    plain, voting = (sfp.load(tiny.clip(**tiny.WORDS), masks=m, **settings) for m in (None, masks))
    image = picture(80, 100)
    free = plain.segment(image, words)
    for share in (0.2, 0.5, 0.8):
        level = float(np.quantile(free.confidence, share))
        below = plain.segment(image, words, background=level)
        found = voting.segment(image, words, background=level)
        assert found.names == below.names
        added, rest = len(found.names) - 3, found.names.index("background")
        if vote == "mode":
            votes = list(below.labels[:, :50].ravel())
            winner = max(np.roll(np.arange(len(found.names)), -added), key=votes.count)
        else:
            mean = free.scores[:, :, :50].mean((1, 2))
            winner = mean.argmax() + added if mean.max() >= level else rest
        assert (found.labels[:, :50] == winner).all()
        assert np.array_equal(found.labels[:, 50:], below.labels[:, 50:])


@pytest.mark.parametrize("direction", [None, "horizontal", "vertical", "diagonal"])
def test_the_kept_image_reaches_the_masks(direction):
    """At its own size, normalised, and mirrored as the labels are."""
    full = picture(90, 120)[..., ::-1].copy()  # BGR, as loaded
    halves = Halves()
    model = segmentor(masks=dict(propose=halves, points=GRID))
    flip = dict(flip=True, flip_direction=direction) if direction else {}
    result = predict(model, tiny.images(1, 60, 80)[0], ori_shape=(90, 120), full_image=full, **flip)
    sides = dict(horizontal=(2,), vertical=(1,), diagonal=(1, 2)).get(direction, ())
    expected = normalised(full[..., ::-1].copy()).flip(sides)
    torch.testing.assert_close(halves.image, expected)
    labels = result.pred_sem_seg.data[0]
    voted = labels[:, 60:] if direction in ("horizontal", "diagonal") else labels[:, :60]
    assert len(voted.unique()) == 1
    assert len(halves.points) == 9


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True], ids=["followed", "given"])
@pytest.mark.parametrize("kind", ["sam", "dino"])
def test_masks_are_the_same_whatever_the_weights_normalise_by(kind, given):
    pixels, points = picture(40, 60), torch.tensor([[[0.3, 0.4]]])
    node = dict(type=kind, model=getattr(segmentors, kind)())
    expected = MaskVote(propose=node, points=GRID).propose(normalised(pixels), points, (40, 60))
    clip = tiny.clip()
    clip.mean, clip.std = (127.5,) * 3, (63.75,) * 3
    if given:  # the config's word comes before the weights'
        node.update(image_mean=(127.5,) * 3, image_std=(63.75,) * 3)
        clip.mean = (1.0, 2.0, 3.0)
    model = segmentor(weights=clip, masks=dict(propose=node, points=GRID))
    image = (torch.from_numpy(pixels).permute(2, 0, 1).float() - 127.5) / 63.75
    ours = model.masks.propose(image, points, (40, 60))
    torch.testing.assert_close(ours.maps, expected.maps, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (7, 90), (64, 64), (130, 40)], ids=str)
@pytest.mark.parametrize(
    "propose",
    [
        lambda: SamMasks(model=segmentors.sam()),
        lambda: SamMasks(model=segmentors.sam2()),
        lambda: DinoMasks(model=segmentors.dino(), side=48),
        lambda: DinoMasks(model=segmentors.dino(), side=48, by="attention"),
    ],
    ids=["sam", "sam2", "dino", "dino-attention"],
)
def test_any_size_and_precision(size, propose):
    for precision in ("fp32", "bf16"):
        model = segmentor(
            precision=precision,
            masks=dict(propose=propose(), points=CLUSTERS, vote="mean", side=64),
        )
        result = predict(model, tiny.images(1, *size)[0], ori_shape=size)
        assert result.pred_sem_seg.shape == size
        assert result.seg_logits.data.isfinite().all()
        weights = {p.dtype for p in model.masks.parameters()}
        assert weights == {dict(fp32=torch.float32, bf16=torch.bfloat16)[precision]}


def test_no_clusters_no_change():
    image = tiny.images(1, 80, 100)[0]
    alone = dict(CLUSTERS, eps=1e-6, min_samples=2)
    model = segmentor(masks=dict(propose=dict(type="sam", model=segmentors.sam()), points=alone))
    result, plain = (predict(m, image, ori_shape=(80, 100)) for m in (model, segmentor()))
    assert torch.equal(result.pred_sem_seg.data, plain.pred_sem_seg.data)


def test_clusters_of_a_guide_prompt():
    """DINO instead of CLIP decides where the points are."""
    points = dict(
        type="cluster_points",
        affinity=dict(type="guide_similarity", guide="dino"),
        guide="dino",
        eps=1.0,
    )
    halves = Halves()
    model = segmentor(
        masks=dict(propose=halves, points=points),
        guides=dict(dino=dict(type="transformers", model=segmentors.dino())),
    )
    predict(model, tiny.images(1, 80, 100)[0], ori_shape=(80, 100))
    assert len(halves.points)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (dict(propose=dict(type="sma", model="x"), points=GRID), "did you mean 'sam'"),
        (dict(propose=dict(type="sam", modle="x"), points=GRID), "no knob 'modle'.*'model'"),
        (dict(propose=dict(model="x"), points=GRID), "has no type; valid: .*dino"),
        (dict(propose=nn.Identity(), points=dict(type="grid_point")), "did you mean 'grid_points'"),
        (dict(propose=nn.Identity(), points=dict(type="som")), "of kind 'detector'"),
        (dict(propose=nn.Identity(), points=GRID, vote="mod"), "did you mean 'mode'"),
        (dict(propose=nn.Identity()), "needs the knob.*points"),
        (dict(propose=nn.Identity(), points=GRID, vot="mean"), "no knob 'vot'"),
        (dict(propose=dict(type="dino", model=nn.Identity(), by="x"), points=GRID), "unknown by"),
    ],
)
def test_settings_that_are_wrong(node, message):
    with pytest.raises(ValueError, match=message):
        build_masks(node)


def test_building():
    assert build_masks(None) is None
    vote = MaskVote(propose=nn.Identity(), points=GRID)
    assert build_masks(vote) is vote


def test_painting():
    """Every pixel belongs to one of its masks by the rule; by brute force."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(6, 9, 11, generator=generator) - 0.5
    maps[5] = -1  # empty
    scores = torch.rand(6, generator=generator)
    sheet = MaskSheet(maps, torch.eye(9), torch.eye(11), scores)
    areas = (maps > 0).flatten(1).sum(1)
    for paint, rank in (("smallest", -areas), ("largest", areas), ("score", scores)):
        ids = paint_masks(sheet, paint)
        for row, column in torch.cartesian_prod(torch.arange(9), torch.arange(11)).tolist():
            inside = [m for m in range(6) if maps[m, row, column] > 0]
            best = max(inside, key=lambda m: (rank[m].item(), -m), default=-1)
            assert ids[row, column] == best + 1
    assert not paint_masks(MaskSheet(maps[:0], torch.eye(9), torch.eye(11)), "largest").any()
    with pytest.raises(ValueError, match="gives no scores"):
        paint_masks(MaskSheet(maps, torch.eye(9), torch.eye(11)), "score")


class Corner(torch.nn.Module):
    """Proposes the left half of an image, and its upper left corner."""

    def forward(self, image, points, size):
        maps = -torch.ones(2, *size)
        maps[0, :, : size[1] // 2] = 1
        maps[1, : size[0] // 2, : size[1] // 2] = 1
        return MaskSheet(maps, torch.eye(size[0]), torch.eye(size[1]))


def test_proposed_regions_reach_the_method():
    """What a proposer finds is what the same map, given, leads to."""
    guide = torch.nn.Identity()
    guide.forward = lambda image, output=None: sfp.Tokens(
        torch.nn.functional.avg_pool2d(image, 8).flatten(2).mT,
        (image.shape[2] // 8, image.shape[3] // 8),
        prefix=0,
    )
    common = dict(
        method="corrclip", guides=dict(dino=guide), slide_crop=64, slide_stride=32, short_side=None
    )
    model = sfp.load(tiny.clip(**tiny.WORDS), regions=dict(propose=Corner()), **common)
    picture = (torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    found = model.segment(picture.numpy(), ["cat", "dog", "tree"])
    ids = torch.zeros(64, 96, dtype=torch.int64)
    ids[:, :48] = 1  # the larger one covers the smaller
    plain = sfp.load(tiny.clip(**tiny.WORDS), **common)
    given = plain.segment(picture.numpy(), ["cat", "dog", "tree"], regions=ids)
    assert (found.labels == given.labels).all()
    assert len(set(found.labels[:, :48].ravel().tolist())) == 1  # the region has voted
    with pytest.raises(LookupError, match="regions="):
        plain.segment(picture.numpy(), ["cat"])
    with pytest.raises(ValueError, match=r"unknown paint='bigest'.*did you mean 'largest'"):
        sfp.load(tiny.clip(**tiny.WORDS), regions=dict(propose=Corner(), paint="bigest"))


def blobs(count: int = 14) -> Tensor:
    """Smooth mask logits, some empty, some nearly alike."""
    generator = torch.Generator().manual_seed(3)
    maps = F.interpolate(
        torch.randn(1, count, 4, 4, generator=generator), (12, 16), mode="bilinear"
    )
    maps = maps[0] - 0.3
    maps[5] = -1
    maps[count // 2 :] = maps[: count - count // 2] + 0.15 * maps[count // 2 :]
    return maps


def cells_of(mask: Tensor) -> set[tuple[int, int]]:
    return {tuple(at) for at in (mask > 0).nonzero().tolist()}


def boxed(cells: set[tuple[int, int]]) -> set[tuple[int, int]]:
    if not cells:
        return set()
    ys, xs = zip(*cells, strict=True)
    return {(y, x) for y in range(min(ys), max(ys) + 1) for x in range(min(xs), max(xs) + 1)}


def iou(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)


def test_sets_of_masks_against_sets_of_cells():
    maps = blobs()
    scores = torch.rand(len(maps), generator=torch.Generator().manual_seed(0))
    inside = [cells_of(m) for m in maps]
    kept: list[int] = []
    for i in sorted(range(len(maps)), key=lambda i: -scores[i]):
        if all(iou(boxed(inside[i]), boxed(inside[j])) <= 0.6 for j in kept):
            kept.append(i)
    assert without_doubles(maps, scores, 0.6).tolist() == sorted(kept)
    assert 2 < len(kept) < len(maps)
    groups: list[list[int]] = []
    for i, own in enumerate(inside):
        for group in groups:
            first = inside[group[0]]
            share = len(own & first) / max(min(len(own), len(first)), 1)
            if share > 0.8 and iou(boxed(own), boxed(first)) > 0.2:
                group.append(i)
                break
        else:
            groups.append([i])
    fused, first = fuse_contained(maps, maps)
    assert first.tolist() == [group[0] for group in groups]
    expected = torch.stack([maps[group].amax(0) for group in groups])
    assert torch.equal(fused, expected)
    assert 2 < len(groups) < len(maps)
    for value, mask in zip(stability(maps, 0.2).tolist(), maps, strict=True):
        assert value == pytest.approx(len(cells_of(mask - 0.2)) / max(len(cells_of(mask + 0.2)), 1))
    empty = maps[:0]
    assert len(fuse_contained(empty, empty)[0]) == len(without_doubles(empty, scores[:0], 0.5)) == 0


def test_all_masks_of_a_prompt(model):
    generator = torch.Generator().manual_seed(0)
    image, points = normalised(picture(48, 90)), torch.rand(6, 1, 2, generator=generator)
    least = dict(model=model, min_iou=-1e9)
    every = SamMasks(multimask=True, **least)(image, points, (24, 45))
    best = SamMasks(**least)(image, points, (24, 45))
    assert len(every.maps) == 18
    triples = every.maps.unflatten(0, (6, 3))
    areas = (triples > 0).flatten(2).sum(2)
    assert (areas[:, :-1] >= areas[:, 1:]).all()
    for own, three, sure in zip(best.maps, triples, every.scores.view(6, 3), strict=True):
        torch.testing.assert_close(own, three[sure.argmax()])
    settings = dict(min_stability=float(stability(every.maps).median()), box_nms=0.95, fuse=True)
    some = SamMasks(multimask=True, **least, **settings)(image, points, (24, 45))
    assert 0 < len(some.maps) < 18
    assert len(some.scores) == len(some.maps)
    assert some.rows(0, 24).shape == (len(some.maps), 24, 45)


def test_masks_that_overlap_reach_textregion():
    """As they are proposed, which is what the same masks, given, lead to."""
    common = dict(method="textregion", slide_crop=40, slide_tiles=True, short_side=None)
    regions = dict(propose=Corner(), paint="none")
    model = sfp.load(tiny.clip(**tiny.WORDS), regions=regions, **common)
    picture = (torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()
    found = model.segment(picture.numpy(), ["cat", "dog", "tree"])
    masks = Corner()(None, None, (64, 96)).maps
    plain = sfp.load(tiny.clip(**tiny.WORDS), **common)
    given = plain.segment(picture.numpy(), ["cat", "dog", "tree"], regions=masks)
    assert (found.scores == given.scores).all()
    ids = (masks[0] > 0).long()
    once = plain.segment(picture.numpy(), ["cat", "dog", "tree"], regions=ids)
    assert abs(once.scores - given.scores).max() > 1e-3
