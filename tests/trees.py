"""Miniature data trees in the on-disk layout of the eight benchmarks, for tests.

`build("voc21", root)` writes what `configs/cfg_voc21.py` reads with `DATA_ROOT=root`: two or three
small images of different sizes with labels, and files of another split that must not be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((60, 90), (96, 64), (72, 72))  # height, width


@dataclass(frozen=True)
class Layout:
    """Where a benchmark keeps its files; `{}` stands for the name of an image.

    Attributes:
        image: Path of an image below DATA_ROOT.
        label: Path of its label map.
        stems: Names of the images that are evaluated, one per entry of `SIZES`.
        other: Name of an image of another split, and the folder names that replace the split's.
        labels: How many label values there are, from 0; 255 comes on top.
        listing: Path of the list of images, if there is one.
    """

    image: str
    label: str
    stems: tuple[str, ...]
    other: tuple[str, str, str]
    labels: int
    listing: str | None = None


_VOC = Layout(
    image="VOCdevkit/VOC2012/JPEGImages/{}.jpg",
    label="VOCdevkit/VOC2012/SegmentationClass/{}.png",
    stems=("2007_000033", "2007_000042", "2011_003255"),
    other=("2007_000032", "", ""),
    labels=21,
    listing="VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
)
_CONTEXT = Layout(
    image="VOCdevkit/VOC2010/JPEGImages/{}.jpg",
    label="VOCdevkit/VOC2010/SegmentationClassContext/{}.png",
    stems=("2008_000002", "2008_000003", "2010_006078"),
    other=("2008_000001", "", ""),
    labels=60,
    listing="VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
)
LAYOUTS = {
    "voc21": _VOC,
    "voc20": _VOC,
    "context60": _CONTEXT,
    "context59": _CONTEXT,
    "coco_object": Layout(
        image="coco_object/images/val2017/{}.jpg",
        label="coco_object/annotations/val2017/{}_instanceTrainIds.png",
        stems=("000000000139", "000000000285", "000000581781"),
        other=("000000000009", "val2017", "train2017"),
        labels=81,
    ),
    "coco_stuff164k": Layout(
        image="coco_stuff164k/images/val2017/{}.jpg",
        label="coco_stuff164k/annotations/val2017/{}_labelTrainIds.png",
        stems=("000000000139", "000000000285", "000000581781"),
        other=("000000000009", "val2017", "train2017"),
        labels=171,
    ),
    "ade20k": Layout(
        image="ade/ADEChallengeData2016/images/validation/{}.jpg",
        label="ade/ADEChallengeData2016/annotations/validation/{}.png",
        stems=("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00002000"),
        other=("ADE_train_00000001", "validation", "training"),
        labels=151,
    ),
    "city_scapes": Layout(
        image="cityscapes/leftImg8bit/val/{}_leftImg8bit.png",
        label="cityscapes/gtFine/val/{}_gtFine_labelTrainIds.png",
        stems=(
            "frankfurt/frankfurt_000000_000294",
            "frankfurt/frankfurt_000001_082466",
            "munster/munster_000000_000019",
        ),
        other=("aachen/aachen_000000_000019", "/val/", "/train/"),
        labels=19,
    ),
}


def build(name: str, root: Path) -> dict[str, np.ndarray]:
    """Writes the tree of a benchmark.

    Args:
        name: Benchmark, one of `LAYOUTS`: the name of its config without "cfg_".
        root: What DATA_ROOT will be.

    Returns:
        The labels as they are in the files, for each evaluated image path relative to `root`.
    """
    layout = LAYOUTS[name]
    rng = np.random.default_rng(len(name))
    written = {}
    for stem, size in zip(layout.stems, SIZES, strict=True):
        labels = _labels(rng, size, layout.labels)
        _save(root / layout.image.format(stem), rng.integers(0, 256, (*size, 3), np.uint8))
        _save(root / layout.label.format(stem), labels, palette="VOCdevkit" in layout.label)
        written[layout.image.format(stem)] = labels

    stem, split, another = layout.other
    for template, shape in ((layout.image, (32, 48, 3)), (layout.label, (32, 48))):
        path = template.format(stem)
        _save(root / (path.replace(split, another) if split else path), np.zeros(shape, np.uint8))
    if layout.listing:
        path = root / layout.listing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in layout.stems))
        path.with_name("train.txt").write_text(f"{layout.other[0]}\n")
    return written


def _labels(rng: np.random.Generator, size: tuple[int, int], labels: int) -> np.ndarray:
    """Blocks of 12 pixels of random labels, among them the first, the last and 255 (ignored)."""
    blocks = rng.integers(0, labels, (-(-size[0] // 12), -(-size[1] // 12)))
    blocks.flat[:4] = 0, labels - 1, 255, 1
    return np.kron(blocks, np.ones((12, 12)))[: size[0], : size[1]].astype(np.uint8)


def _save(path: Path, pixels: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:  # as Pascal's own labels: indexed colours
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
