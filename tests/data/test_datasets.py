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

from sfp.data.datasets import COCOObjectDataset, MiniSceneDataset, PascalVOC20Dataset, colour_map
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
    assert "not set, which means ./data" in message


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


@MODELS.register_module(force=True)
class NeverReached(BaseModel):
    """A model that a test without data has no use for."""

    def forward(self, inputs, data_samples=None, mode="tensor"):
        raise AssertionError


def test_the_runner_says_it_too(tmp_path, monkeypatch):
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
