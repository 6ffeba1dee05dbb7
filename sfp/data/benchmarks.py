"""The benchmarks, one row each: names, classes, config, files on disk, and their sources.

To add one, add its row here, a config cfg_<name>.py, its class file cls_<name>.txt, and, if
mmsegmentation has no class that reads it, one in `sfp.data.datasets`. If its label maps are not
published in the form that is read, `sfp.data.conversions` makes them.

Datasets are named by strings: nothing here needs mmsegmentation or PyTorch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfp.data.ids import CITYSCAPES_27, COCO_COARSE

if TYPE_CHECKING:
    from sfp.data.conversions import Step
    from sfp.data.datasets import LocalFiles

_PACKAGE = Path(__file__).parents[1]
_INSTALLED = _PACKAGE / "configs"
# in the repository the configs and class files are the folder `configs`; installed, `sfp.configs`
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


@dataclass(frozen=True)
class Download:
    """A file to download: its name, its address, and the folder to unpack it in."""

    file: str
    url: str
    into: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        name: name of its config, configs/cfg_<name>.py.
        title: its name in papers.
        classes: number of classes.
        dataset: mmseg's dataset node, as in its config without `data_root` and `pipeline`.
        class_file: its class file in the folder of the configs; empty if the data contains it.
        aliases: other common names.
        renamed: classes whose name in the dataset differs from the first synonym in the class file.
        images: number of images; several numbers if releases differ, the usual one first. None if
            they are not downloaded.
        folder: folder of its files, relative to the data root.
        suffixes: suffixes of image and label files.
        downloads: files to download, with folders relative to the data root.
        terms: terms of use.
        layout: a file of each kind in `folder`, with a remark.
        note: further remarks.
    """

    name: str
    title: str
    classes: int
    dataset: dict[str, Any]
    class_file: str = ""
    aliases: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    images: tuple[int, ...] = ()
    folder: str = ""
    suffixes: tuple[str, str] = (".jpg", ".png")
    downloads: tuple[Download, ...] = ()
    terms: str = ""
    layout: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def config(self) -> Path:
        """The path of its config."""
        return CONFIGS / f"cfg_{self.name}.py"

    @property
    def words(self) -> Path:
        """The path of its class file.

        Raises:
            FileNotFoundError: if the data contains it.
        """
        if not self.class_file:
            raise FileNotFoundError(
                f"the class names of {self.name} are part of its data: run "
                f"`sfp data prepare {self.name}`, and give the path of "
                f"{self.dataset['names_file']} in DATA_ROOT/{self.folder}"
            )
        return CONFIGS / self.class_file

    @property
    def class_names(self) -> tuple[str, ...]:
        """The dataset's names of its classes, in label order.

        Raises:
            FileNotFoundError: if the data contains them.
        """
        lines = self.words.read_text(encoding="utf-8").splitlines()
        firsts = (line.split(", ")[0].strip() for line in lines)
        return tuple(self.renamed.get(name, name) for name in firsts)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The conversions of its label maps, in order; each can use the files of earlier ones."""
        from sfp.data.conversions import STEPS  # imports OpenCV

        return STEPS.get(self.name, ())

    def stems(self, root: Path) -> list[str]:
        """The images, from their list or folder: paths relative to the image folder, without suffix.

        Args:
            root: the data root.

        Raises:
            FileNotFoundError: if there are none.
        """
        folder = root / self.folder
        images, suffix = folder / self.dataset["data_prefix"]["img_path"], self.suffixes[0]
        if "ann_file" in self.dataset:
            where = folder / self.dataset["ann_file"]
            if not where.is_file():
                raise FileNotFoundError(f"{self.title}: there is no list of images {where}")
            lines = where.read_text(encoding="utf-8").split("\n")
            stems = [line.strip() for line in lines if line.strip()]
        else:
            where = images
            if not where.is_dir():
                raise FileNotFoundError(f"{self.title}: there is no image folder {where}")
            found = (
                Path(place, file).relative_to(images).as_posix()
                for place, _, files in os.walk(images, followlinks=True)
                for file in files
                if file.endswith(suffix) and not file.startswith(".")
            )
            stems = sorted(path.removesuffix(suffix) for path in found)
        if not stems:
            raise FileNotFoundError(
                f"{self.title}: there is no *{suffix} image in {where}; docs/data.md shows how its "
                "files are laid out"
            )
        return stems

    def paths(self, root: Path, stem: str) -> tuple[Path, Path]:
        """An image and its label map."""
        prefix = self.dataset["data_prefix"]
        image, label = (root / self.folder / prefix[key] for key in ("img_path", "seg_map_path"))
        return image / f"{stem}{self.suffixes[0]}", label / f"{stem}{self.suffixes[1]}"

    def state(self, root: Path) -> tuple[int, str]:
        """Which files exist, from a look into the folders.

        Returns:
            The number of images, and "ready", "missing" or a list of what is missing.
        """
        try:
            files = [self.paths(root, stem) for stem in self.stems(root)]
            if names := self.dataset.get("names_file"):
                (root / self.folder / names).stat()
        except OSError:
            return 0, "missing"
        lost = {
            what: len(absent(pair[i] for pair in files))
            for i, what in enumerate(("image", "label"))
        }
        lacks = [f"{n} of {len(files)} {what}s missing" for what, n in lost.items() if n]
        if len(files) not in self.images:
            lacks.append(f"expected {self.images[0]} images")
        return len(files), ", ".join(lacks) or "ready"

    def build(self, root: Path) -> LocalFiles:
        """The dataset with a pipeline that only reads; its images and labels need not exist.

        Args:
            root: the data root.

        Raises:
            FileNotFoundError: if its class names are part of the data and missing.
        """
        from sfp.data.datasets import reading  # imports mmsegmentation

        return reading(self.dataset, root / self.folder)


def absent(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Those of many paths that do not exist, found by one look per folder instead of per file."""

    @cache
    def names(folder: str) -> frozenset[str]:
        return frozenset(os.listdir(folder) if os.path.isdir(folder) else ())

    texts = map(str, paths)
    return [p for p in texts if os.path.basename(p) not in names(os.path.dirname(p) or ".")]


def find(name: str) -> Benchmark | None:
    """The benchmark with a name or alias, if there is one."""
    aliases = {alias: row for row in BENCHMARKS.values() for alias in row.aliases}
    return BENCHMARKS.get(name) or aliases.get(name)


def by_dataset(kind: str) -> Benchmark | None:
    """The benchmark that an mmseg dataset class of this name reads."""
    return next((row for row in BENCHMARKS.values() if row.dataset["type"] == kind), None)


# -- what rows share -----------------------------------------------------------------------------

_FLICKR = "The images are Flickr's, under its terms of use and their owners' licences"
_COCO_TERMS = f"Annotations: CC BY 4.0. {_FLICKR}."
_ADE_TERMS = "Images for non-commercial research and education only."
_VOC_NAMES = {
    "ship": "boat",
    "table": "diningtable",
    "people": "person",
    "television monitor": "tvmonitor",
}
CONTEXT_LIST = "ImageSets/SegmentationContext/val.txt"
CONTEXT_CLASSES = "cls_context459.txt"
ADE_LIST = "labels847.txt"
ADE_CLASSES = "cls_ade847.txt"


def _spelled(*names: str) -> dict[str, str]:
    """Class names whose blanks the class file leaves out."""
    return {name.replace(" ", ""): name for name in names}


def _voc(name: str, kind: str, classes: int, renamed: Mapping[str, str]) -> Benchmark:
    return Benchmark(
        name=name,
        title=name.upper(),
        classes=classes,
        dataset=dict(
            type=kind,
            ann_file="ImageSets/Segmentation/val.txt",
            data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ),
        class_file=f"cls_{name}.txt",
        renamed=renamed,
        images=(1449,),
        folder="VOCdevkit/VOC2012",
        downloads=(
            Download(
                "VOCtrainval_11-May-2012.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
                ".",
            ),
        ),
        terms=f"{_FLICKR}.",
        layout={
            "ImageSets/Segmentation/val.txt": "1449 names",
            "JPEGImages/2007_000033.jpg": "",
            "SegmentationClass/2007_000033.png": "",
        },
    )


def _context(name: str, classes: int) -> Benchmark:
    wide = classes == 459
    labels = "SegmentationClassContext459" if wide else "SegmentationClassContext"
    page = "https://cs.stanford.edu/~roozbeh/pascal-context/"
    folder = "VOCdevkit/VOC2010"
    dataset: dict[str, Any] = dict(
        type=f"Pascal{name.capitalize()}Dataset",
        ann_file=CONTEXT_LIST,
        data_prefix=dict(img_path="JPEGImages", seg_map_path=labels),
    )
    downloads = [
        Download(
            "VOCtrainval_03-May-2010.tar", "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/", "."
        ),
        Download("trainval.tar.gz", page, folder),
    ]
    layout = {
        CONTEXT_LIST: "5104 or 5105 names; written by prepare",
        "ImageSets/Main/val.txt": "5105 names, from which that list is written",
        "JPEGImages/2008_000002.jpg": "",
        "trainval/2008_000002.mat": "10103 files, LabelMap with 459 classes",
        f"{labels}/2008_000002.png": "written by prepare",
    }
    if wide:
        dataset["names_file"] = CONTEXT_CLASSES
        downloads.append(Download("labels.txt", page, folder))
        layout |= {
            "labels.txt": "459 names, '1: accordion' and so on",
            CONTEXT_CLASSES: "the same as a class file; written by prepare",
        }
    return Benchmark(
        name=name,
        title=name.capitalize(),
        classes=classes,
        dataset=dataset,
        class_file="" if wide else f"cls_{name}.txt",
        images=(5104, 5105),
        folder=folder,
        downloads=tuple(downloads),
        terms=f"{_FLICKR}; for the annotations see their page.",
        layout=layout,
        note="An existing list and label maps are kept (--force replaces them): mmsegmentation's "
        "converter makes them from trainval_merged.json (the Detail API), for 5104 of the 5105 "
        "images. That file is not read here.",
    )


_VAL2017 = dict(img_path="images/val2017", seg_map_path="annotations/val2017")
_IMAGES = "http://images.cocodataset.org/zips/val2017.zip"
_OBJECT = Benchmark(
    name="coco_object",
    title="COCO-Object",
    classes=81,
    dataset=dict(type="COCOObjectDataset", data_prefix=_VAL2017),
    class_file="cls_coco_object.txt",
    renamed={"sky": "background"},
    images=(5000,),
    folder="coco_object",
    suffixes=(".jpg", "_instanceTrainIds.png"),
    downloads=(
        Download("val2017.zip", _IMAGES, "coco_object/images"),
        Download(
            "annotations_trainval2017.zip",
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            "coco_object",
        ),
    ),
    terms=_COCO_TERMS,
    layout={
        "images/val2017/000000000139.jpg": "",
        "annotations/instances_val2017.json": "",
        "annotations/val2017/000000000139_instanceTrainIds.png": "written by prepare",
    },
    note="The images are those of COCO-Stuff; a link to its folder images avoids a copy.",
)
_STUFF = Benchmark(
    name="coco_stuff164k",
    title="COCO-Stuff 164k",
    classes=171,
    dataset=dict(type="COCOStuff164kDataset", data_prefix=_VAL2017),
    class_file="cls_coco_stuff.txt",
    aliases=("coco_stuff",),
    renamed=_spelled(
        *("traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball"),
        *("baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog"),
        *("potted plant", "dining table", "cell phone", "teddy bear", "hair drier"),
    ),
    images=(5000,),
    folder="coco_stuff164k",
    suffixes=(".jpg", "_labelTrainIds.png"),
    downloads=(
        Download("val2017.zip", _IMAGES, "coco_stuff164k/images"),
        Download(
            "stuffthingmaps_trainval2017.zip",
            "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
            "stuffthingmaps_trainval2017.zip",
            "coco_stuff164k/annotations",
        ),
    ),
    terms=_COCO_TERMS,
    layout={
        "images/val2017/000000000139.jpg": "",
        "annotations/val2017/000000000139.png": "pixels are category ids minus 1",
        "annotations/val2017/000000000139_labelTrainIds.png": "written by prepare",
    },
)
_COARSE = replace(
    _STUFF,
    name="coco27",
    title="COCO-27",
    classes=27,
    dataset=dict(type="COCOCoarse27Dataset", data_prefix=_VAL2017),
    class_file="cls_coco27.txt",
    aliases=(),
    renamed={members[0].replace(" ", ""): name for name, members in COCO_COARSE.items()},
    suffixes=(".jpg", "_label27Ids.png"),
    layout={
        **_STUFF.layout,
        "annotations/val2017/000000000139_label27Ids.png": "written by prepare, from the one above",
    },
    note="Papers on unsupervised segmentation evaluate a subset of val2017, given by a list of "
    "images; set ann_file to that list to do the same. See docs/data.md.",
)
_ADE = Benchmark(
    name="ade20k",
    title="ADE20K",
    classes=150,
    dataset=dict(
        type="ADE20K150Dataset",
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    ),
    class_file="cls_ade20k.txt",
    renamed=_spelled(
        *("chest of drawers", "pool table", "screen door", "coffee table", "kitchen island"),
        *("swivel chair", "arcade machine", "television receiver", "dirt track"),
        *("conveyer belt", "swimming pool", "trade name", "traffic light", "crt screen"),
        "bulletin board",
    ),
    images=(2000,),
    folder="ade/ADEChallengeData2016",
    downloads=(
        Download(
            "ADEChallengeData2016.zip",
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "ade",
        ),
    ),
    terms=_ADE_TERMS,
    layout={
        "images/validation/ADE_val_00000001.jpg": "",
        "annotations/validation/ADE_val_00000001.png": "",
    },
)
_ADE_FULL = Benchmark(
    name="ade847",
    title="ADE20K-847",
    classes=847,
    dataset=dict(
        type="ADE20K847Dataset",
        names_file=ADE_CLASSES,
        data_prefix=dict(
            img_path="images/ADE/validation", seg_map_path="annotations847/validation"
        ),
    ),
    images=(2000,),
    folder="ADE20K_2021_17_01",
    downloads=(
        Download("ADE20K_2021_17_01.zip", "https://ade20k.csail.mit.edu/ (registration)", "."),
    ),
    terms=_ADE_TERMS,
    layout={
        "images/ADE/validation/urban/street/ADE_val_00000001.jpg": "in a folder for each scene",
        "images/ADE/validation/urban/street/ADE_val_00000001_seg.png": "objects, by colour",
        ADE_LIST: "written by you: 847 lines like '2978: wall', see the note",
        ADE_CLASSES: "the same as a class file; written by prepare",
        "annotations847/validation/urban/street/ADE_val_00000001.png": "written by prepare",
    },
    note="The 847 classes among over 3000 objects are listed in MaskFormer's code "
    "(ADE20K_SEM_SEG_FULL_CATEGORIES), but not in this repository: write them to "
    f"{ADE_LIST}, one line '<id>: <name>' per entry, ordered by trainId.",
)


def _cityscapes(name: str, kind: str, classes: int, suffix: str, **more: Any) -> Benchmark:
    page = "https://www.cityscapes-dataset.com/downloads/ (registration)"
    stem = "val/frankfurt/frankfurt_000000_000294"
    return Benchmark(
        name=name,
        classes=classes,
        dataset=dict(
            type=kind,
            data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        ),
        class_file=f"cls_{name}.txt",
        images=(500,),
        folder="cityscapes",
        suffixes=("_leftImg8bit.png", f"_gtFine_{suffix}.png"),
        downloads=(
            Download("leftImg8bit_trainvaltest.zip", page, "cityscapes"),
            Download("gtFine_trainvaltest.zip", page, "cityscapes"),
        ),
        terms="Non-commercial use, under Cityscapes' own licence.",
        layout={
            f"leftImg8bit/{stem}_leftImg8bit.png": "",
            f"gtFine/{stem}_gtFine_labelIds.png": "",
            f"gtFine/{stem}_gtFine_{suffix}.png": "written by prepare",
        },
        **more,
    )


_MINI = Benchmark(
    name="mini",
    title="mini world",
    classes=18,
    dataset=dict(
        type="MiniSceneDataset",
        scenes=200,
        data_prefix=dict(img_path="images", seg_map_path="labels"),
    ),
    class_file="cls_mini.txt",
)

BENCHMARKS: dict[str, Benchmark] = {
    row.name: row
    for row in (
        _voc("voc21", "PascalVOC21Dataset", 21, {"sky": "background", **_VOC_NAMES}),
        _context("context60", 60),
        _OBJECT,
        _voc("voc20", "PascalVOC20Dataset", 20, _VOC_NAMES),
        _context("context59", 59),
        _STUFF,
        _ADE,
        _cityscapes(
            *("city_scapes", "Cityscapes19Dataset", 19, "labelTrainIds"),
            title="Cityscapes",
            aliases=("cityscapes",),
            renamed={**_spelled("traffic light", "traffic sign"), "people": "person"},
        ),
        _ADE_FULL,
        _context("context459", 459),
        _COARSE,
        _cityscapes(
            *("city_scapes27", "Cityscapes27Dataset", len(CITYSCAPES_27), "label27Ids"),
            title="Cityscapes-27",
            aliases=("cityscapes27",),
        ),
        _MINI,  # drawn, not downloaded
    )
}
DOWNLOADED = {name: row for name, row in BENCHMARKS.items() if row.downloads}
