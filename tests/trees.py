"""Miniature data trees in the on-disk layout of the benchmarks, for tests.

`build("voc21", root)` writes what `configs/cfg_voc21.py` reads with `DATA_ROOT=root`: two or three
small images of different sizes with labels, and files of another split that must not be read.
`download("coco_stuff164k", root)` writes what comes from the authors instead, before any conversion.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

SIZES = ((60, 90), (96, 64), (72, 72))  # height, width


@dataclass(frozen=True)
class Layout:
    """Where a benchmark keeps its files; `{}` stands for the name of an image.

    Attributes:
        image: Path of an image below DATA_ROOT.
        label: Path of its label map.
        stems: Names of the images that are evaluated, one per entry of `SIZES`.
        other: Name of an image of another split, and the folder names that replace the split's.
        labels: How many label values there are, from 0; 255 comes on top, if they fit into 8 bits.
        listing: Path of the list of images, if there is one.
        classes: Path of the class file, if it comes with the data.
        without_zero: Whether label 0 does not count.
    """

    image: str
    label: str
    stems: tuple[str, ...]
    other: tuple[str, str, str]
    labels: int
    listing: str | None = None
    classes: str | None = None
    without_zero: bool = False

    @property
    def ignored(self) -> int:
        """What stands for pixels that do not count once labels are loaded."""
        return 255 if self.labels <= 256 else 65535


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
_STUFF = Layout(
    image="coco_stuff164k/images/val2017/{}.jpg",
    label="coco_stuff164k/annotations/val2017/{}_labelTrainIds.png",
    stems=("000000000139", "000000000285", "000000581781"),
    other=("000000000009", "val2017", "train2017"),
    labels=171,
)
_CITY = Layout(
    image="cityscapes/leftImg8bit/val/{}_leftImg8bit.png",
    label="cityscapes/gtFine/val/{}_gtFine_labelTrainIds.png",
    stems=(
        "frankfurt/frankfurt_000000_000294",
        "frankfurt/frankfurt_000001_082466",
        "munster/munster_000000_000019",
    ),
    other=("aachen/aachen_000000_000019", "/val/", "/train/"),
    labels=19,
)
LAYOUTS = {
    "voc21": _VOC,
    "voc20": replace(_VOC, without_zero=True),
    "context60": _CONTEXT,
    "context59": replace(_CONTEXT, without_zero=True),
    "coco_object": Layout(
        image="coco_object/images/val2017/{}.jpg",
        label="coco_object/annotations/val2017/{}_instanceTrainIds.png",
        stems=("000000000139", "000000000285", "000000581781"),
        other=("000000000009", "val2017", "train2017"),
        labels=81,
    ),
    "coco_stuff164k": _STUFF,
    "ade20k": Layout(
        image="ade/ADEChallengeData2016/images/validation/{}.jpg",
        label="ade/ADEChallengeData2016/annotations/validation/{}.png",
        stems=("ADE_val_00000001", "ADE_val_00000002", "ADE_val_00002000"),
        other=("ADE_train_00000001", "validation", "training"),
        labels=151,
        without_zero=True,
    ),
    "city_scapes": _CITY,
    "ade847": Layout(
        image="ADE20K_2021_17_01/images/ADE/validation/{}.jpg",
        label="ADE20K_2021_17_01/annotations847/validation/{}.png",
        stems=(
            "home_or_hotel/bedroom/ADE_val_00000002",
            "urban/street/ADE_val_00000001",
            "urban/street/ADE_val_00002000",
        ),
        other=("urban/street/ADE_train_00000001", "validation", "training"),
        labels=848,
        classes="ADE20K_2021_17_01/cls_ade847.txt",
        without_zero=True,
    ),
    "context459": replace(
        _CONTEXT,
        label="VOCdevkit/VOC2010/SegmentationClassContext459/{}.png",
        labels=460,
        classes="VOCdevkit/VOC2010/cls_context459.txt",
        without_zero=True,
    ),
    "coco27": replace(
        _STUFF, label="coco_stuff164k/annotations/val2017/{}_label27Ids.png", labels=27
    ),
    "city_scapes27": replace(
        _CITY, label="cityscapes/gtFine/val/{}_gtFine_label27Ids.png", labels=27
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
        _save(root / layout.label.format(stem), labels, palette=layout.labels in (21, 60))
        written[layout.image.format(stem)] = labels

    stem, split, another = layout.other
    for template, shape in ((layout.image, (32, 48, 3)), (layout.label, (32, 48))):
        path = template.format(stem)
        _save(root / (path.replace(split, another) if split else path), np.zeros(shape, np.uint8))
    if layout.classes:
        (root / layout.classes).write_text("".join(f"{n}\n" for n in _names(layout.labels - 1)))
    if layout.listing:
        path = root / layout.listing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in layout.stems))
        path.with_name("train.txt").write_text(f"{layout.other[0]}\n")
    return written


def evaluated(name: str, labels: np.ndarray) -> np.ndarray:
    """The labels of a file as an evaluation sees them."""
    layout = LAYOUTS[name]
    labels = labels.astype(int)
    if not layout.without_zero:
        return labels
    return np.where(np.isin(labels, (0, layout.ignored)), layout.ignored, labels - 1)


# COCO-Stuff, as its annotation files have it: the category id of some classes of the 171, and their
# supercategory's place among the 27
STUFF = {  # class: (id, coarse class)
    0: (1, 9),  # person
    1: (2, 11),  # bicycle: vehicle
    10: (11, 8),  # fire hydrant: outdoor
    11: (13, 8),  # stop sign: outdoor; there is no 12
    24: (27, 6),  # backpack: accessory
    62: (72, 0),  # tv: electronic
    79: (90, 4),  # toothbrush: indoor
    80: (92, 17),  # banner: textile
    90: (102, 12),  # ceiling-other: ceiling
    108: (120, 26),  # fog: water
    115: (127, 24),  # hill: solid
    136: (148, 26),  # river: water
    157: (169, 22),  # tree: plant
    170: (182, 24),  # wood: solid
    255: (256, 255),  # unlabelled
}
# Cityscapes: the training id of an id, and its place among the 27
CITY = {
    0: (255, 255),
    6: (255, 255),
    7: (0, 0),
    9: (255, 2),
    11: (2, 4),
    17: (5, 10),
    18: (255, 11),
}
CITY |= {24: (11, 17), 29: (255, 22), 33: (18, 26)}
# Pascal Context: number among the 459, and label among the 59
CONTEXT = {0: 0, 1: 0, 2: 1, 9: 2, 25: 7, 258: 34, 284: 37, 445: 57, 458: 59, 459: 0}
# the full ADE20K: numbers of objects in the order of the labels 1, 2, ...; others do not count
ADE_FIRST = (2978, 312, 2420, 6000, 255, 256, 257)


def download(name: str, root: Path) -> dict[str, np.ndarray]:
    """Writes what a dataset's authors offer, unpacked as docs/data.md says.

    Args:
        name: Benchmark whose labels have to be converted.
        root: What DATA_ROOT will be.

    Returns:
        The labels that belong into the files of label maps, by their path relative to `root`.
    """
    layout = LAYOUTS[name]
    rng = np.random.default_rng(len(name))
    written, instances = {}, []
    for number, (stem, size) in enumerate(zip(layout.stems, SIZES, strict=True)):
        _save(root / layout.image.format(stem), rng.integers(0, 256, (*size, 3), np.uint8))
        if name in ("coco_stuff164k", "coco27"):
            classes = _blocks(rng, size, list(STUFF))
            source = root / f"coco_stuff164k/annotations/val2017/{stem}.png"
            _save(source, _mapped(classes, {k: v[0] - 1 for k, v in STUFF.items()}))
            fine = name == "coco_stuff164k"
            labels = classes if fine else _mapped(classes, {k: v[1] for k, v in STUFF.items()})
        elif name in ("city_scapes", "city_scapes27"):
            numbers = _blocks(rng, size, list(CITY))
            _save(root / f"cityscapes/gtFine/val/{stem}_gtFine_labelIds.png", numbers)
            labels = _mapped(numbers, {k: v[name == "city_scapes27"] for k, v in CITY.items()})
        elif name.startswith("context"):
            numbers = _blocks(rng, size, list(CONTEXT)).astype(np.uint16)
            source = root / f"VOCdevkit/VOC2010/trainval/{stem}.mat"
            source.parent.mkdir(parents=True, exist_ok=True)
            savemat(source, {"LabelMap": numbers})
            labels = numbers if name == "context459" else _mapped(numbers, CONTEXT)
        elif name == "ade847":
            numbers = _blocks(rng, size, [0, *ADE_FIRST, 1234])
            blue = rng.integers(0, 256, size)
            seg = np.stack([numbers // 256 * 10, numbers % 256, blue], -1).astype(np.uint8)
            _save(root / layout.image.format(stem).replace(".jpg", "_seg.png"), seg)
            labels = _mapped(numbers, {0: 0, 1234: 0} | {n: k + 1 for k, n in enumerate(ADE_FIRST)})
        elif name == "coco_object":
            labels = np.zeros(size, int)
            labels[10:30, 20:50] = number + 1
            box = [20, 10, 50, 10, 50, 30, 20, 30]
            things = dict(category_id=number + 1, segmentation=[box], area=600, image_id=number)
            instances.append((dict(id=number, file_name=f"{stem}.jpg"), size, things))
        written[layout.label.format(stem)] = labels

    if name == "coco_object":
        unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
        content = dict(
            images=[dict(image, height=h, width=w) for image, (h, w), _ in instances],
            annotations=[things for *_, things in instances],
            categories=[dict(id=number) for number in sorted({*range(1, 91)} - unused)],
        )
        path = root / "coco_object/annotations/instances_val2017.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    if name.startswith("context"):
        path = root / "VOCdevkit/VOC2010/ImageSets/Main/val.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{stem}\n" for stem in layout.stems))
        lines = [f"{k}: {n}\n" for k, n in enumerate(_names(459), start=1)]
        (root / "VOCdevkit/VOC2010/labels.txt").write_text("".join(lines))
    if name == "ade847":
        rest = sorted({*range(1, 900)} - {*ADE_FIRST})[: 847 - len(ADE_FIRST)]
        lines = [f"{k}: {n}\n" for k, n in zip([*ADE_FIRST, *rest], _names(847), strict=True)]
        (root / "ADE20K_2021_17_01/labels847.txt").write_text("".join(lines))
    return written


def _names(count: int) -> list[str]:
    """Names of classes, as long lists have them: some with synonyms, some of which are shared."""
    return [f"thing {k}, object {k // 2}" if k % 3 else f"thing {k}" for k in range(count)]


def _blocks(rng: np.random.Generator, size: tuple[int, int], values: list[int]) -> np.ndarray:
    """Blocks of 12 pixels of random values; all occur."""
    blocks = rng.choice(values, (-(-size[0] // 12), -(-size[1] // 12)))
    blocks.flat[: len(values)] = values
    pixels = np.kron(blocks, np.ones((12, 12)))[: size[0], : size[1]]
    return pixels.astype(np.uint8 if max(values) < 256 else np.uint16)


def _mapped(pixels: np.ndarray, table: dict[int, int]) -> np.ndarray:
    return np.vectorize(table.get)(pixels).astype(np.uint8)


def _labels(rng: np.random.Generator, size: tuple[int, int], labels: int) -> np.ndarray:
    """Blocks of 12 pixels of random labels, among them the first, the last and 255 (ignored)."""
    blocks = rng.integers(0, labels, (-(-size[0] // 12), -(-size[1] // 12)))
    blocks.flat[:4] = 0, labels - 1, 255, 1
    pixels = np.kron(blocks, np.ones((12, 12)))[: size[0], : size[1]]
    return pixels.astype(np.uint8 if labels <= 256 else np.uint16)


def _save(path: Path, pixels: np.ndarray, *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:  # as Pascal's own labels: indexed colours
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
