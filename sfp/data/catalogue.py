"""An entry per dataset: what it is, where it comes from, how it lies on disk, what converts it.

To add a dataset, register its class in `sfp.data.datasets`, write a config, and add an entry here:
`sfp data` lists, prepares and checks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmcv.transforms import LoadImageFromFile

from sfp._mmseg import mmseg
from sfp.data import convert
from sfp.data.coco_object import object_jobs
from sfp.data.convert import Job
from sfp.data.datasets import (
    DATASETS,
    Cityscapes19Dataset,
    Cityscapes27Dataset,
    LoadLabels,
    LocalFiles,
    NamedLabels,
)


@dataclass(frozen=True)
class Download:
    """A file to fetch: its name, where it is offered, and the folder it is unpacked in."""

    file: str
    url: str
    into: str


@dataclass(frozen=True)
class Step:
    """A conversion.

    Attributes:
        what: it writes.
        jobs: from the entry and the root of all data to the files to make.
    """

    what: str
    jobs: Callable[[Entry, Path], Sequence[Job]]


@dataclass(frozen=True)
class Entry:
    """A dataset.

    Attributes:
        title: what papers call it.
        images: how many are evaluated; several numbers if releases differ, the usual one first.
        classes: how many.
        folder: of its files, below the root of all data.
        dataset: mmseg's node, as in configs/cfg_<name>.py without `data_root` and `pipeline`.
        downloads: what to fetch; folders are below the root of all data.
        terms: of use.
        layout: a file of each kind below `folder`, and what to know about it.
        steps: conversions, in order; each finds there what those before have written.
        note: what else one should know.
    """

    title: str
    images: tuple[int, ...]
    classes: int
    folder: str
    dataset: dict[str, Any]
    downloads: tuple[Download, ...]
    terms: str
    layout: dict[str, str]
    steps: tuple[Step, ...] = ()
    note: str = ""

    def build(self, root: Path) -> LocalFiles:
        """The dataset with a pipeline that only reads; its images and labels need not be there.

        Args:
            root: of all data.

        Raises:
            FileNotFoundError: if its class names come with its files and are not there.
        """
        kind = DATASETS.get(self.dataset["type"])
        assert kind is not None
        assert issubclass(kind, LocalFiles)
        labels = LoadLabels() if issubclass(kind, NamedLabels) else mmseg.datasets.LoadAnnotations()
        return kind(
            **{k: v for k, v in self.dataset.items() if k != "type"},
            data_root=str(root / self.folder),
            pipeline=[LoadImageFromFile(), labels, mmseg.datasets.PackSegInputs()],
            lazy_init=True,
        )


def _per_image(
    source: str, function: Callable[[Path], convert.Labels]
) -> Callable[[Entry, Path], list[Job]]:
    """A label map for each image, from the file of that pattern below the dataset's folder."""
    return lambda entry, root: convert.per_image(
        entry.build(root), root / entry.folder / source, function
    )


# -- Pascal VOC and Context ----------------------------------------------------------------------

_FLICKR = "The images are Flickr's, under its terms of use and their owners' licences"


def _voc(kind: str, title: str, classes: int) -> Entry:
    return Entry(
        title=title,
        images=(1449,),
        classes=classes,
        folder="VOCdevkit/VOC2012",
        dataset=dict(
            type=kind,
            ann_file="ImageSets/Segmentation/val.txt",
            data_prefix=dict(img_path="JPEGImages", seg_map_path="SegmentationClass"),
        ),
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


CONTEXT_LIST = "ImageSets/SegmentationContext/val.txt"
CONTEXT_CLASSES = "cls_context459.txt"


def _context_list(entry: Entry, root: Path) -> list[Job]:
    folder = root / entry.folder
    source = folder / "ImageSets" / "Main" / "val.txt"
    return [Job(folder / CONTEXT_LIST, source.read_text, source)]


def _context_names(entry: Entry, root: Path) -> list[Job]:
    source = root / entry.folder / "labels.txt"

    def make() -> str:
        convert.check_context_names(source)
        return convert.class_file(convert.read_names(source, count=459).values())

    return [Job(root / entry.folder / CONTEXT_CLASSES, make, source)]


def _context(kind: str, title: str, classes: int) -> Entry:
    wide = classes == 459
    labels = "SegmentationClassContext" + "459" * wide
    layout = {
        CONTEXT_LIST: "5104 or 5105 names; written by prepare",
        "ImageSets/Main/val.txt": "what it is written from: 5105 names",
        "JPEGImages/2008_000002.jpg": "",
        "trainval/2008_000002.mat": "10103 files, LabelMap with 459 classes",
        f"{labels}/2008_000002.png": "written by prepare",
    }
    if wide:
        layout |= {
            "labels.txt": "459 names, '1: accordion' and so on",
            CONTEXT_CLASSES: "the same as a class file; written by prepare",
        }
    dataset: dict[str, Any] = dict(
        type=kind,
        ann_file=CONTEXT_LIST,
        data_prefix=dict(img_path="JPEGImages", seg_map_path=labels),
    )
    page = "https://cs.stanford.edu/~roozbeh/pascal-context/"
    folder = "VOCdevkit/VOC2010"
    convert_map = convert.context_all if wide else convert.context_frequent
    return Entry(
        title=title,
        images=(5104, 5105),
        classes=classes,
        folder=folder,
        dataset=dict(dataset, names_file=CONTEXT_CLASSES) if wide else dataset,
        downloads=(
            Download(
                "VOCtrainval_03-May-2010.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/",
                ".",
            ),
            Download("trainval.tar.gz", page, folder),
            *([Download("labels.txt", page, folder)] * wide),
        ),
        terms=f"{_FLICKR}; for the annotations see their page.",
        layout=layout,
        steps=(
            Step("list of images", _context_list),
            *([Step("459 class names", _context_names)] * wide),
            Step(f"maps of {classes} classes", _per_image("trainval/{}.mat", convert_map)),
        ),
        note="A list or label maps that are there are kept (--force replaces them): "
        "mmsegmentation's converter makes them from trainval_merged.json (the Detail API), for 5104 "
        "of the 5105 images. That file is not read here.",
    )


# -- COCO ----------------------------------------------------------------------------------------

_IMAGES = "http://images.cocodataset.org/zips/val2017.zip"
_COCO_TERMS = f"Annotations: CC BY 4.0. {_FLICKR}."


def _object_jobs(entry: Entry, root: Path) -> list[Job]:
    return object_jobs(root / entry.folder)


_OBJECT = Entry(
    title="COCO-Object",
    images=(5000,),
    classes=81,
    folder="coco_object",
    dataset=dict(
        type="COCOObjectDataset",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
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
    steps=(Step("maps of 81 classes", _object_jobs),),
    note="The images are those of COCO-Stuff; a link to its folder images saves a copy.",
)

_PIXELS = Download(
    "stuffthingmaps_trainval2017.zip",
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
    "stuffthingmaps_trainval2017.zip",
    "coco_stuff164k/annotations",
)
_STUFF = Entry(
    title="COCO-Stuff 164k",
    images=(5000,),
    classes=171,
    folder="coco_stuff164k",
    dataset=dict(
        type="COCOStuff164kDataset",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
    downloads=(Download("val2017.zip", _IMAGES, "coco_stuff164k/images"), _PIXELS),
    terms=_COCO_TERMS,
    layout={
        "images/val2017/000000000139.jpg": "",
        "annotations/val2017/000000000139.png": "pixels are category ids minus 1",
        "annotations/val2017/000000000139_labelTrainIds.png": "written by prepare",
    },
    steps=(
        Step("maps of 171 classes", _per_image("annotations/val2017/{}.png", convert.stuff_labels)),
    ),
)


def _stuff_jobs(entry: Entry, root: Path) -> Sequence[Job]:
    return _STUFF.steps[0].jobs(_STUFF, root)


_COARSE = Entry(
    title="COCO-27",
    images=(5000,),
    classes=27,
    folder=_STUFF.folder,
    dataset=dict(
        type="COCOCoarse27Dataset",
        data_prefix=dict(img_path="images/val2017", seg_map_path="annotations/val2017"),
    ),
    downloads=_STUFF.downloads,
    terms=_COCO_TERMS,
    layout={
        **_STUFF.layout,
        "annotations/val2017/000000000139_label27Ids.png": "written by prepare, from the one above",
    },
    steps=(
        Step("maps of 171 classes", _stuff_jobs),
        Step(
            "maps of 27 classes",
            _per_image("annotations/val2017/{}_labelTrainIds.png", convert.coarse_labels),
        ),
    ),
    note="Papers on unsupervised segmentation evaluate a part of val2017, the images that a list of "
    "theirs names; with that list as ann_file the config does too. See docs/data.md.",
)

# -- ADE20K --------------------------------------------------------------------------------------

_ADE = Entry(
    title="ADE20K",
    images=(2000,),
    classes=150,
    folder="ade/ADEChallengeData2016",
    dataset=dict(
        type="ADE20K150Dataset",
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
    ),
    downloads=(
        Download(
            "ADEChallengeData2016.zip",
            "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            "ade",
        ),
    ),
    terms="Images for non-commercial research and education only.",
    layout={
        "images/validation/ADE_val_00000001.jpg": "",
        "annotations/validation/ADE_val_00000001.png": "",
    },
)

ADE_LIST = "labels847.txt"
ADE_CLASSES = "cls_ade847.txt"


def _ade_names(path: Path) -> dict[int, str]:
    return convert.read_names(path, count=847, consecutive=False)


def _ade_classes(entry: Entry, root: Path) -> list[Job]:
    source = root / entry.folder / ADE_LIST
    return [
        Job(
            root / entry.folder / ADE_CLASSES,
            lambda: convert.class_file(_ade_names(source).values()),
            source,
        )
    ]


def _ade_labels(entry: Entry, root: Path) -> list[Job]:
    numbers = _ade_names(root / entry.folder / ADE_LIST)
    labels = {number: label for label, number in enumerate(numbers, start=1)}
    function = partial(convert.ade_objects, labels=labels)
    return _per_image("images/ADE/validation/{}_seg.png", function)(entry, root)


_ADE_FULL = Entry(
    title="ADE20K-847",
    images=(2000,),
    classes=847,
    folder="ADE20K_2021_17_01",
    dataset=dict(
        type="ADE20K847Dataset",
        names_file=ADE_CLASSES,
        data_prefix=dict(
            img_path="images/ADE/validation", seg_map_path="annotations847/validation"
        ),
    ),
    downloads=(
        Download("ADE20K_2021_17_01.zip", "https://ade20k.csail.mit.edu/ (registration)", "."),
    ),
    terms="Images for non-commercial research and education only.",
    layout={
        "images/ADE/validation/urban/street/ADE_val_00000001.jpg": "in a folder for each scene",
        "images/ADE/validation/urban/street/ADE_val_00000001_seg.png": "objects, by colour",
        ADE_LIST: "yours: 847 lines '2978: wall', see the note",
        ADE_CLASSES: "the same as a class file; written by prepare",
        "annotations847/validation/urban/street/ADE_val_00000001.png": "written by prepare",
    },
    steps=(
        Step("847 class names", _ade_classes),
        Step("maps of 847 classes", _ade_labels),
    ),
    note="Which 847 of over 3000 objects count is a list of MaskFormer's code "
    "(ADE20K_SEM_SEG_FULL_CATEGORIES), which this repository has not: write it to "
    f"{ADE_LIST}, for each entry in the order of trainId a line '<id>: <name>'.",
)

# -- Cityscapes ----------------------------------------------------------------------------------


def _cityscapes(kind: type[LocalFiles], title: str, suffix: str) -> Entry:
    names = kind.METAINFO["classes"]
    function = partial(convert.cityscapes_labels, classes=names)
    page = "https://www.cityscapes-dataset.com/downloads/ (registration)"
    stem = "val/frankfurt/frankfurt_000000_000294"
    return Entry(
        title=title,
        images=(500,),
        classes=len(names),
        folder="cityscapes",
        dataset=dict(
            type=kind.__name__,
            data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val"),
        ),
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
        steps=(
            Step(
                f"maps of {len(names)} classes",
                _per_image("gtFine/val/{}_gtFine_labelIds.png", function),
            ),
        ),
    )


CATALOGUE: dict[str, Entry] = {  # by the name of the config, cfg_<name>.py
    "voc21": _voc("PascalVOC21Dataset", "VOC21", 21),
    "context60": _context("PascalContext60Dataset", "Context60", 60),
    "coco_object": _OBJECT,
    "voc20": _voc("PascalVOC20Dataset", "VOC20", 20),
    "context59": _context("PascalContext59Dataset", "Context59", 59),
    "coco_stuff164k": _STUFF,
    "ade20k": _ADE,
    "city_scapes": _cityscapes(Cityscapes19Dataset, "Cityscapes", "labelTrainIds"),
    "ade847": _ADE_FULL,
    "context459": _context("PascalContext459Dataset", "Context459", 459),
    "coco27": _COARSE,
    "city_scapes27": _cityscapes(Cityscapes27Dataset, "Cityscapes-27", "label27Ids"),
}
