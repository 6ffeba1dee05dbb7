"""Custom data: a few images and label maps in a folder, and a config for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from sfp.evaluation import configs

FOLDER = Path(__file__).parents[2] / "configs"


class OwnData:
    """Images and label maps below a folder; two classes of the mini world unless said otherwise."""

    def __init__(self, root: Path, count: int = 3) -> None:
        self.root = root
        (root / "images").mkdir(parents=True)
        (root / "labels").mkdir()
        generator = np.random.default_rng(0)
        self.truth = {}
        for i in range(count):
            self.image(f"{i}.png", generator.integers(0, 256, (48, 64, 3), np.uint8))
            truth = np.zeros((48, 64), np.uint8)
            truth[: 10 + 10 * i] = 1
            self.label(f"{i}.png", truth)

    def image(self, name: str, pixels: np.ndarray, **options) -> Path:
        path = self.root / "images" / name
        Image.fromarray(pixels).save(path, **options)
        return path

    def label(self, name: str, labels: np.ndarray) -> Path:
        self.truth[name] = labels
        path = self.root / "labels" / name
        Image.fromarray(labels).save(path)
        return path

    def file(self, work: str = "work", classes=("grass", "sky"), evaluator: str = "") -> Path:
        """A config as its user writes it."""
        classes = list(classes)
        path = self.root / f"{work}.py"
        path.write_text(f"""\
_base_ = {str(FOLDER / "base_config.py")!r}
model = dict(weights="mini", classes={classes!r}, method=dict(_delete_=True, type="clip"))
test_dataloader = dict(num_workers=0, dataset=dict(
    type="BaseSegDataset", metainfo=dict(classes={classes!r}), data_root={str(self.root)!r},
    data_prefix=dict(img_path="images", seg_map_path="labels"), img_suffix=".png",
    pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"),
              dict(type="PackSegInputs")]))
work_dir = {str(self.root / work)!r}
{evaluator}
""")
        return path

    def config(self, work: str = "work", options=None, **more) -> Config:
        return configs.load_config(self.file(work, **more), options=options)


@pytest.fixture
def own(tmp_path) -> OwnData:
    return OwnData(tmp_path / "own")
