"""Masks of Mask2Former and EoMT against the library's own processing, and regions from files."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import segmentors
import tiny
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp import bulk
from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.data.images import DataError
from sfp.data.listing import list_units
from sfp.masks import RegionFiles, RegionMap, UniversalMasks, build_regions
from sfp.vocabulary import load_vocabulary

pytestmark = pytest.mark.usefixtures("no_grad")

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NONE = torch.zeros(0, 1, 2)


def picture(height: int, width: int) -> Tensor:
    """Colours in 0..1, (3, height, width)."""
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, (height, width), mode="bilinear")[0]


def normalised(image: Tensor, mean, std) -> Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return (image - mean) / std


def for_clip(image: Tensor) -> Tensor:
    return normalised(image * 255, CLIP_MEAN, CLIP_STD)


def kept(out, least: float) -> tuple[Tensor, Tensor]:
    """Which queries name a class, and how surely."""
    best, label = out.class_queries_logits[0].softmax(-1).max(-1)
    return (label != 4) & (best > least), best


# -- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (64, 64), (200, 96)], ids=str)
def test_eomt_beside_the_library(size):
    """Its processor resizes, fills up with black, and takes both back; here the same by hand."""
    model, image = segmentors.eomt(), picture(*size)
    proposer = UniversalMasks(model=model, min_score=0.3)
    scale = 64 / max(size)
    inner = [int(side * scale + 0.5) for side in size]
    assert proposer.inner(*size) == tuple(inner)
    small = F.interpolate(image[None], inner, mode="bilinear", antialias=True)[0]
    square = F.pad(small, (0, 64 - inner[1], 0, 64 - inner[0]))  # zeros before the normalisation
    out = model(pixel_values=normalised(square, *IMAGENET)[None])
    chosen, best = kept(out, 0.3)
    assert 0 < chosen.sum() < 9
    maps = F.interpolate(out.masks_queries_logits, (64, 64), mode="bilinear")
    maps = maps[:, :, : inner[0], : inner[1]]
    expected = F.interpolate(maps, (70, 50), mode="bilinear")[0, chosen]
    sheet = proposer(for_clip(image), NONE, (70, 50))
    torch.testing.assert_close(sheet.rows(0, 70), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sheet.scores, best[chosen], atol=1e-4, rtol=1e-4)


def test_mask2former_beside_the_library():
    model, image = segmentors.mask2former(), picture(50, 80)
    proposer = UniversalMasks(model=model, min_score=0.3, short_side=64, long_side=96)
    assert proposer.inner(50, 80) == (64, 96)  # 60 x 96, up to multiples of 32
    assert proposer.inner(50, 50) == (64, 64)
    resized = F.interpolate(image[None], (64, 96), mode="bilinear", antialias=True)
    out = model(pixel_values=normalised(resized, *IMAGENET))
    chosen, best = kept(out, 0.3)
    assert 0 < chosen.sum() < 9
    sheet = proposer(for_clip(image), NONE, (70, 50))
    expected = F.interpolate(out.masks_queries_logits, (70, 50), mode="bilinear")[0, chosen]
    torch.testing.assert_close(sheet.rows(0, 70), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(sheet.scores, best[chosen], atol=1e-4, rtol=1e-4)


def test_regions_painted_by_score():
    """Overlapping masks become ids: the surest owns a pixel."""
    image = for_clip(picture(64, 64))
    proposer = UniversalMasks(model=segmentors.eomt(), min_score=0.3)
    sheet = proposer(image, NONE, (48, 56))
    member, found = sheet.rows(0, 48) > 0, RegionMap(propose=proposer, paint="score")
    ids = found(tiny.clip().visual, image, (48, 56))
    order = sheet.scores.argsort(descending=True).tolist()
    for y, x in [(0, 0), (10, 20), (40, 50), (30, 3)]:
        owner = next((i + 1 for i in order if member[i, y, x]), 0)
        assert ids[y, x] == owner


def test_other_models_are_named():
    with pytest.raises(ValueError, match="model of type 'vit'; valid: mask2former"):
        UniversalMasks(model=segmentors.dino())


# -- files ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    return folder


def test_kinds_of_files(folder):
    ids = np.arange(12).reshape(3, 4)
    Image.fromarray(ids.astype(np.uint8)).save(folder / "grey.png")
    palette = Image.fromarray(ids.astype(np.uint8), "P")
    palette.putpalette(list(range(255, 255 - 36, -1)))
    palette.save(folder / "palette.png")
    cv2.imwrite(str(folder / "deep.png"), (ids * 5000).astype(np.uint16))
    large = ids * 70000
    colours = np.stack([large % 256, large // 256 % 256, large // 65536], 2).astype(np.uint8)
    Image.fromarray(colours).save(folder / "coco.png")
    np.save(folder / "array.npy", ids)
    np.save(folder / "masks.npy", ids[None] > np.arange(2)[:, None, None])
    files = RegionFiles(folder=str(folder))
    for name, factor in dict(grey=1, palette=1, deep=5000, coco=70000, array=1).items():
        found = files.read(f"/photos/{name}")
        assert found.dtype == torch.int64
        assert torch.equal(found, torch.from_numpy(ids * factor)), name
    assert files.read("masks").dtype == torch.float32
    assert files.read("masks").shape == (2, 3, 4)


def test_the_longest_path_that_is_there(folder):
    (folder / "b").mkdir()
    for value, name in enumerate(["c.png", "b/c.png", "d.png"]):
        Image.new("L", (2, 2), value).save(folder / name)
    files = RegionFiles(folder=str(folder))
    assert [int(files.read(x).max()) for x in ("/a/b/c", "b/c", "/x/c", "c", "q/d")] == [
        1,
        1,
        0,
        0,
        2,
    ]


def test_what_is_wrong_is_named(folder, tmp_path):
    files = RegionFiles(folder=str(folder))
    with pytest.raises(DataError, match=r"'a/b': expected .*maps.b\.png or .*maps.b\.npy"):
        files.read("a/b")
    np.save(folder / "floats.npy", np.zeros((2, 2)))
    np.save(folder / "negative.npy", np.full((2, 2), -1))
    (folder / "broken.npy").write_bytes(b"no")
    for name in ("floats", "negative"):
        with pytest.raises(DataError, match="expected an id map"):
            files.read(name)
    with pytest.raises(DataError, match="broken"):
        files.read("broken")
    with pytest.raises(FileNotFoundError, match="put a file for each image there"):
        build_regions(dict(type="files", folder=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="expected 'files'; proposers of masks"):
        build_regions(dict(type="sam", model="x"))
    with pytest.raises(ValueError, match="has no knob 'foldr'"):
        build_regions(dict(type="files", foldr="x"))


@pytest.fixture
def photo(tmp_path, folder):
    """A photo, and its regions: left and right."""
    pixels = (picture(48, 64) * 255).byte().permute(1, 2, 0).numpy()
    path = tmp_path / "photos" / "a.b.png"
    path.parent.mkdir()
    Image.fromarray(pixels).save(path)
    ids = np.repeat(np.repeat([[1, 2]], 24, 0), 16, 1).astype(np.uint8)
    Image.fromarray(ids).save(folder / "a.b.png")
    return path, ids


def test_by_every_door(photo, folder, tmp_path):
    """`Model`, bulk labelling and the segmentor find the file of an image; pixels have none."""
    path, ids = photo
    regions = dict(type="files", folder=str(folder))
    method = dict(type="lavg", base="sclip")
    weights = str(tiny.save(tmp_path / "tiny.safetensors", **tiny.WORDS))
    model = sfp.load(weights, method, short_side=None, regions=regions, device="cpu")
    words = ["sky", "grass", "cat"]
    expected = model.segment(path, words, regions=ids).labels
    assert np.array_equal(model.segment(path, words).labels, expected)
    assert np.array_equal(model.segment([str(path)], words)[0].labels, expected)
    with pytest.raises(LookupError, match="this image has no name: pass its path"):
        model.segment(np.array(Image.open(path)), words)
    job = bulk.Job(weights, load_vocabulary(words), method, None, dict(regions=regions))
    (outcome,) = bulk.Labeller(job, tmp_path / "out", workers=1).run(list_units([path.parent]))
    assert outcome.status == "done", outcome.error
    assert np.array_equal(np.array(Image.open(tmp_path / "out/labels/a.b.png")), expected)


def test_the_segmentor(photo, folder, tmp_path):
    structures = pytest.importorskip("mmseg.structures")
    path, ids = photo
    segmentor = sfp.OpenVocabSegmentor(
        tiny.clip(**tiny.WORDS),
        ["sky", "grass", "cat"],
        dict(type="lavg", base="sclip"),
        regions=dict(type="files", folder=str(folder)),
    )
    image = for_clip(picture(48, 64))
    sample = structures.SegDataSample(metainfo=dict(img_path=str(path)))
    (found,) = segmentor.predict([image], [sample])
    flipped = structures.SegDataSample(
        metainfo=dict(img_path=str(path), flip=True, flip_direction="horizontal")
    )
    (mirrored,) = segmentor.predict([image.flip(-1)], [flipped])
    engine = segmentor.engine
    given = [torch.from_numpy(ids).long()]
    for own, pixels, regions in (
        (found, image, given),
        (mirrored, image.flip(-1), [given[0].flip(-1)]),
    ):
        ((sheet,),) = engine.logits(
            [segmentor.method], [pixels], [(48, 64)], segmentor.queries, regions=regions
        )
        labels = engine.label(pixels, sheet, segmentor.queries.index).labels
        labels = labels if own is found else labels.flip(-1)
        assert torch.equal(own.pred_sem_seg.data[0], labels)
