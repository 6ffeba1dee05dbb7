"""The datasets: class lists, missing files, and the mini world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner

from sfp.data.datasets import (
    CentreCrop,
    COCOObjectDataset,
    MiniSceneDataset,
    PascalVOC20Dataset,
    colour_map,
)
from sfp.mini import CLASSES, PALETTE
from sfp.vocabulary import load_vocabulary

FOLDER = Path(__file__).parents[2] / "configs"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Builds the data of a benchmark; returns the files and a function that loads the dataset."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "data"))

    def make(name: str):
        files = trees.build(name, tmp_path / "data")
        return tmp_path / "data", files, lambda: build(name)

    return make


def build(name: str):
    cfg = Config.fromfile(str(FOLDER / f"cfg_{name}.py"))
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(cfg.test_dataloader.dataset)


def raises(load, path: Path) -> str:
    """The message of the error that names a path, the variable and the page."""
    with pytest.raises(FileNotFoundError) as error:
        load()
    message = str(error.value)
    for part in (str(path), "DATA_ROOT", "docs/data.md"):
        assert part in message
    return message


def test_class_lists():
    assert PascalVOC20Dataset.METAINFO["classes"][::19] == ("aeroplane", "tvmonitor")
    assert PascalVOC20Dataset.METAINFO["palette"] == colour_map(21)[1:]
    classes = COCOObjectDataset.METAINFO["classes"]
    assert len(classes) == 81
    assert len({tuple(c) for c in COCOObjectDataset.METAINFO["palette"]}) == 81
    with pytest.warns(UserWarning, match="'bed'"):
        names = load_vocabulary(FOLDER / "cls_coco_object.txt").names
    assert classes[1:] == names[1:]  # the labels mean what the vocabulary says


@pytest.mark.parametrize("name", trees.LAYOUTS)
def test_nothing_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    message = raises(lambda: build(name), tmp_path / "nowhere")
    first = "file of class names" if trees.LAYOUTS[name].classes else "image folder"
    assert f"there is no {first}" in message


def test_default_root(tmp_path, monkeypatch):
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    message = raises(lambda: build("ade20k"), tmp_path / "data" / "ade")
    assert "not set, so ./data is used" in message


@pytest.mark.parametrize("name", trees.LAYOUTS)
def test_a_label_is_missing(name, tree):
    root, files, load = tree(name)
    label = root / trees.LAYOUTS[name].label.format(trees.LAYOUTS[name].stems[1])
    label.unlink()
    assert f"1 of {len(files)} labels missing" in raises(load, label)
    assert f"`sfp data prepare {name}` what to download" in raises(load, label)


def test_images_are_missing(tree):
    root, files, load = tree("voc21")
    paths = [root / path for path in files]
    for path in paths[1:]:
        path.unlink()
    assert "2 of 3 images missing" in raises(load, paths[1])


def test_no_label_folder(tree):
    root, _, load = tree("context60")
    folder = root / "VOCdevkit/VOC2010/SegmentationClassContext"
    folder.rename(folder.with_name("Labels"))
    assert "there is no label folder" in raises(load, folder)


def test_no_list_of_images(tree):
    root, _, load = tree("context59")
    listing = root / "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt"
    listing.unlink()
    assert "there is no list of images" in raises(load, listing)


@pytest.mark.parametrize("name", ["voc20", "coco_stuff164k"])
def test_no_image(name, tree):
    root, files, load = tree(name)
    if listing := trees.LAYOUTS[name].listing:
        where = root / listing
        where.write_text("")
    else:
        where = root / next(iter(files)).rsplit("/", 1)[0]
        for path in files:
            (root / path).unlink()
    assert "there is no *.jpg image in" in raises(load, where)


class NeverReached(BaseModel):
    """A model that a test without data has no use for."""

    def forward(self, inputs, data_samples=None, mode="tensor"):
        raise AssertionError


def test_the_runner_says_it_too(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS.module_dict, "NeverReached", NeverReached)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    cfg = Config.fromfile(str(FOLDER / "cfg_city_scapes.py"))
    cfg.model = dict(type="NeverReached")
    cfg.work_dir = str(tmp_path / "work")
    cfg.experiment_name = "missing_data"
    runner = Runner.from_cfg(cfg)
    raises(runner.test, tmp_path / "nowhere" / "cityscapes" / "leftImg8bit" / "val")


def test_mini(tmp_path, monkeypatch):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    cfg = Config.fromfile(str(FOLDER / "cfg_mini.py"))
    cfg.test_dataloader.dataset.scenes = 3
    for _ in range(2):  # rendered, then found
        with DefaultScope.overwrite_default_scope("mmseg"):
            dataset = DATASETS.build(cfg.test_dataloader.dataset)
        assert isinstance(dataset, MiniSceneDataset)
        assert len(dataset) == 3
    assert Path(dataset.data_root).is_relative_to(tmp_path)
    assert dataset.metainfo["classes"] == CLASSES
    assert dataset.metainfo["palette"] == [list(colour) for colour in PALETTE]
    assert load_vocabulary(cfg.model.classes).names == CLASSES
    for item in dataset:
        labels = item["data_samples"].gt_sem_seg.data
        assert item["inputs"].shape == (3, 224, 224)
        assert item["inputs"].dtype == torch.uint8
        assert labels.shape == (1, 224, 224)
        assert set(np.unique(labels)) <= set(range(len(CLASSES)))


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (40, 40), (41, 83)])
def test_centre_crop(size):
    """Each pixel of the square is that at its place in the image; 255 counts if it is told to."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows, columns, rows * 0], -1).astype(np.uint8)
    labels = (rows // 10 * 16 + columns // 10).astype(np.uint8)
    labels[height // 2 - 3 : height // 2 + 3] = 255
    scale = min(size) / 20
    for void in (None, 3):
        found = CentreCrop(20, void)(dict(img=image, gt_seg_map=labels))
        assert found["ori_shape"] == found["img_shape"] == (20, 20)
        assert found["img"].shape == (20, 20, 3)
        assert found["gt_seg_map"].dtype == labels.dtype
        assert (255 in found["gt_seg_map"]) == (void is None)
        for y, x in np.ndindex(20, 20):
            row = (height - min(size)) / 2 + (y + 0.5) * scale - 0.5
            column = (width - min(size)) / 2 + (x + 0.5) * scale - 0.5
            if 2 < y < 17 and 2 < x < 17:  # kernels are cut at the borders of the image
                assert np.abs(found["img"][y, x, :2] - [row, column]).max() <= 1.5
            top, left = max(int(row) - 1, 0), max(int(column) - 1, 0)
            near = labels[top : int(row) + 3, left : int(column) + 3]
            expected = {void if v == 255 and void is not None else v for v in near.flatten()}
            assert found["gt_seg_map"][y, x] in expected
    assert "gt_seg_map" not in CentreCrop(20)(dict(img=image))
