"""The benchmarks and the mini world as mmseg datasets.

Most are mmseg's own; `LocalFiles` adds clear errors for missing files. Importing this module registers
them in mmseg's `DATASETS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from PIL import Image
from torch import Tensor

from sfp._mmseg import mmseg
from sfp.data.benchmarks import absent, by_dataset
from sfp.data.ids import CITYSCAPES_27, COCO_COARSE
from sfp.data.images import (
    DataError,
    check_whole,
    orientation,
    read_bytes,
    read_image,
    read_labels,
    turned,
)
from sfp.files import cache_dir
from sfp.mini import CLASSES, PALETTE, prepare
from sfp.palette import colour_map

DATASETS = mmseg.registry.DATASETS
TRANSFORMS = mmseg.registry.TRANSFORMS

IGNORED = 255  # label of ignored pixels
WIDE_IGNORED = 65535  # label of ignored pixels with more than 255 classes
LABEL_STEPS = ("LoadAnnotations", "LoadLabels")  # pipeline steps that load labels
FILES = {"img_path": "image", "seg_map_path": "label"}  # key in mmseg's records and what it holds


class LabelSizeError(DataError):
    """A label map whose size differs from its image, or with several numbers per pixel."""


class LabelValueError(DataError):
    """A label map with numbers that are not classes."""


@TRANSFORMS.register_module(force=True)  # modules may be imported again
class KeepImage(BaseTransform):
    """Stores the image, before it is resized, as `full_image`.

    With `PackSegInputs(meta_keys=(..., "full_image"))` it is passed to the segmentor, for masks at full
    resolution. Steps that flip must come after it.
    """

    def transform(self, results: dict) -> dict:
        """Sets `full_image`, (H, W, 3) as loaded."""
        results["full_image"] = results["img"]
        return results


@TRANSFORMS.register_module(force=True)
class CentreCrop(BaseTransform):
    """Crops an image and its label map to the centre square, as in CLIP's own preprocessing.

    The short side is resized first (bicubic with antialiasing; labels by nearest neighbour), and only
    the square is evaluated. This step must come after the labels are loaded.

    Args:
        size: side of the square, in pixels.
        void: class id given to ignored pixels (255), so that they are evaluated; None ignores them.
    """

    def __init__(self, size: int, void: int | None = None) -> None:
        self.size, self.void = size, void

    def transform(self, results: dict) -> dict:
        """Replaces `img` and `gt_seg_map`, (size, size), and sets `img_shape` and `ori_shape`."""
        results["img"] = self._square(results["img"], Image.Resampling.BICUBIC)
        results["img_shape"] = results["ori_shape"] = (self.size, self.size)
        if "gt_seg_map" in results:
            labels = self._square(results["gt_seg_map"], Image.Resampling.NEAREST)
            if self.void is not None:
                labels = np.where(labels == IGNORED, np.array(self.void, labels.dtype), labels)
            results["gt_seg_map"] = labels
        return results

    def _square(self, pixels: np.ndarray, how: Image.Resampling) -> np.ndarray:
        height, width = pixels.shape[:2]
        # rounded as in torchvision's Resize and CenterCrop
        sides = tuple(side * self.size // min(height, width) for side in (width, height))
        image = Image.fromarray(pixels.astype(np.int32) if pixels.ndim == 2 else pixels)
        left, top = (round((side - self.size) / 2) for side in sides)
        square = image.resize(sides, how).crop((left, top, left + self.size, top + self.size))
        return np.asarray(square).astype(pixels.dtype)


@TRANSFORMS.register_module(force=True)
class LoadImage(BaseTransform):
    """The first step of a pipeline for images of every kind, by `read_image`.

    The benchmarks keep mmsegmentation's `LoadImageFromFile`, because mmseg's own tools look for it by
    name; for their images (8-bit JPEG and PNG without transparency) both give the same pixels.
    """

    def transform(self, results: dict) -> dict:
        """Reads `img_path` and sets the same fields as `LoadImageFromFile`."""
        image = read_image(results["img_path"], bgr=True)
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results


@TRANSFORMS.register_module(force=True)
class LoadLabels(BaseTransform):
    """Loads label maps of 8 or 16 bits; mmsegmentation's `LoadAnnotations` keeps only 8.

    Args:
        ignored: label given to unlabelled pixels if the dataset has `reduce_zero_label`.
    """

    def __init__(self, ignored: int = WIDE_IGNORED) -> None:
        self.ignored = ignored

    def transform(self, results: dict) -> dict:
        """Reads `seg_map_path`, if there is one; sets `gt_seg_map`, (H, W) int32."""
        if "seg_map_path" not in results:  # mmseg's inference_model only has images
            return results
        path = results["seg_map_path"]
        labels = read_labels(path).astype(np.int32)
        upright = tuple(results.get("ori_shape", labels.shape))
        if labels.shape != upright and (tag := orientation(path)) != 1:
            labels = turned(labels, tag)  # the sizes say that its own tag counts
        if results["reduce_zero_label"]:
            labels = np.where((labels == 0) | (labels == self.ignored), self.ignored, labels - 1)
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results


def check_labels(
    labels: Tensor, sizes: Sequence[Sequence[int]], classes: int, ignore: int, name: str
) -> None:
    """Checks that a label map has the size of its image and only ids of classes.

    Args:
        labels: (1, H, W) or (H, W).
        sizes: the valid sizes.
        classes: number of classes; ids go from 0 to one less.
        ignore: the id of ignored pixels.
        name: name of the label map for errors.

    Raises:
        LabelSizeError: if its size is wrong.
        LabelValueError: if it has other ids.
    """
    if (
        tuple(labels.shape[-2:]) not in {tuple(size[:2]) for size in sizes}
        or labels[..., 0, 0].numel() != 1
    ):
        raise LabelSizeError(
            f"{name}: label map of shape {tuple(labels.shape)}, expected one number for each pixel of "
            f"the image, {' or '.join(sorted({'x'.join(map(str, s[:2])) for s in sizes}))}"
        )
    wrong = labels[(labels != ignore) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise LabelValueError(
            f"{name}: label {int(wrong[0])} in {int((wrong == wrong[0]).sum())} pixels, expected 0 to "
            f"{classes - 1}, or {ignore} for what does not count; are these the labels of another "
            "dataset, or not converted yet?"
        )


class LocalFiles(mmseg.datasets.BaseSegDataset):
    """Checks, before anything runs, that each image and label file is there; then each file itself.

    In mmseg itself, a missing folder is a bare assertion, an empty one an evaluation of nothing, a
    missing file an error after half of the images, a truncated JPEG a half-grey picture, and the labels
    of another dataset a low score. Here every error names the file.
    """

    def records(self) -> list[dict]:
        """The records, as in mmseg, of the images in the list or folder.

        Labels need not exist.

        Raises:
            FileNotFoundError: If the image folder or the list is missing, or empty.
        """
        self._need_folder("img_path")
        if self.ann_file and not os.path.isfile(self.ann_file):
            raise self._missing("there is no list of images", self.ann_file)
        data = super().load_data_list()
        if not data:
            where = self.ann_file or self.data_prefix["img_path"]
            raise self._missing(f"there is no *{self.img_suffix} image in", where)
        return data

    def load_data_list(self) -> list[dict]:
        """Lists the images and labels.

        Returns:
            mmseg's record of each image.

        Raises:
            FileNotFoundError: If a folder, the image list or a file is missing.
        """
        data = self.records()
        self._need_folder("seg_map_path")
        for key, what in FILES.items():
            if lost := absent(record[key] for record in data):
                count = f"{len(lost)} of {len(data)} {what}s missing, first"
                raise self._missing(count, lost[0])
        return data

    def prepare_data(self, idx: int) -> Any:
        """The record of an image after the pipeline.

        Raises:
            DataError: if the image or its label map is invalid; the message names the file.
        """
        return self.load(self.get_data_info(idx))

    def load(self, record: dict) -> Any:
        """Runs the pipeline on a record of `records`; errors as in `prepare_data`."""
        image, label = record["img_path"], record.get("seg_map_path")
        narrow = not any(isinstance(step, LoadLabels) for step in self.pipeline.transforms)
        for path in filter(None, (image, label)):
            data = read_bytes(path)
            check_whole(data, path)
            if narrow and path == label and data[:4] == b"\x89PNG" and data[24] == 16:
                raise DataError(
                    f"{label}: a 16-bit label map, of which LoadAnnotations would keep 8 bits: use "
                    "dict(type='LoadLabels') in the pipeline"
                )
        try:
            data = self.pipeline(record)
        except Exception as error:  # of any step of any pipeline: the file is what it lacks
            files = f"{image} with labels {label}" if label else image
            raise DataError(f"{files}: {type(error).__name__}: {error}") from error
        sample = data.get("data_samples") if isinstance(data, dict) else None
        if sample is not None and "gt_sem_seg" in sample:
            sizes = [sample.metainfo[key] for key in ("ori_shape", "img_shape")]
            classes = len(self.metainfo["classes"])
            check_labels(sample.gt_sem_seg.data, sizes, classes, self.ignore_index, str(label))
        return data

    def _need_folder(self, key: str) -> None:
        if not os.path.isdir(self.data_prefix[key]):
            raise self._missing(f"there is no {FILES[key]} folder", self.data_prefix[key])

    def _missing(self, what: str, path: str) -> FileNotFoundError:
        """The error for a missing file or folder, with advice."""
        root = os.environ.get("DATA_ROOT") or "not set, so ./data is used"
        benchmark = by_dataset(type(self).__name__)
        advice = ""
        if benchmark and benchmark.downloads:
            advice = f", `sfp data prepare {benchmark.name}` what to download, and converts it"
        return FileNotFoundError(
            f"{type(self).__name__}: {what} {os.path.abspath(path)}. Set the environment variable "
            f"DATA_ROOT to the folder that holds the datasets (now: {root}); docs/data.md shows how "
            f"each of them is laid out{advice}."
        )


def reading(node: Mapping[str, Any], folder: Path) -> LocalFiles:
    """A dataset with a pipeline that only reads; its images and labels need not exist.

    Args:
        node: mmseg's dataset node, without `data_root` and `pipeline`.
        folder: folder of its files.

    Raises:
        FileNotFoundError: if its class names are part of the data and missing.
    """
    kind = DATASETS.get(node["type"])
    assert kind is not None
    assert issubclass(kind, LocalFiles)
    labels = LoadLabels() if issubclass(kind, NamedLabels) else mmseg.datasets.LoadAnnotations()
    return kind(
        **{k: v for k, v in node.items() if k != "type"},
        data_root=str(folder),
        pipeline=[LoadImageFromFile(), labels, mmseg.datasets.PackSegInputs()],
        lazy_init=True,
    )


def image_name(dataset: LocalFiles, record: Mapping[str, Any]) -> str:
    """An image's path below the image folder, with forward slashes, without its suffix."""
    path = os.path.relpath(record["img_path"], dataset.data_prefix["img_path"])
    return Path(path).as_posix().removesuffix(dataset.img_suffix)


# mmseg's own Pascal classes add only bare assertions to their names and colours


@DATASETS.register_module(force=True)
class PascalVOC21Dataset(LocalFiles):
    """Pascal VOC 2012 with background, 21 classes."""

    METAINFO = mmseg.datasets.PascalVOCDataset.METAINFO


@DATASETS.register_module(force=True)
class PascalVOC20Dataset(LocalFiles):
    """Pascal VOC 2012 without background: its pixels are ignored."""

    METAINFO = {key: values[1:] for key, values in mmseg.datasets.PascalVOCDataset.METAINFO.items()}

    def __init__(self, reduce_zero_label: bool = True, **kwargs: Any) -> None:
        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)


@DATASETS.register_module(force=True)
class PascalContext60Dataset(LocalFiles):
    """Pascal Context with background, 60 classes."""

    METAINFO = mmseg.datasets.PascalContextDataset.METAINFO


@DATASETS.register_module(force=True)
class PascalContext59Dataset(LocalFiles):
    """Pascal Context without background: its pixels are ignored."""

    METAINFO = mmseg.datasets.PascalContextDataset59.METAINFO

    def __init__(self, reduce_zero_label: bool = True, **kwargs: Any) -> None:
        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)


@DATASETS.register_module(force=True)
class COCOObjectDataset(LocalFiles):
    """The 80 things of COCO and background, as written by `sfp data prepare coco_object`."""

    # The things are the first 80 classes of COCO-Stuff, in the order of COCO's category ids.
    METAINFO = dict(
        classes=("background", *mmseg.datasets.COCOStuffDataset.METAINFO["classes"][:80]),
        palette=colour_map(81),
    )

    def __init__(
        self,
        img_suffix: str = ".jpg",
        seg_map_suffix: str = "_instanceTrainIds.png",
        **kwargs: Any,
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)


@DATASETS.register_module(force=True)
class COCOStuff164kDataset(LocalFiles, mmseg.datasets.COCOStuffDataset):
    """COCO-Stuff 164k, 171 classes of things and stuff."""


@DATASETS.register_module(force=True)
class COCOCoarse27Dataset(LocalFiles):
    """The 27 supercategories of COCO-Stuff, the classes of unsupervised segmentation."""

    METAINFO = dict(classes=tuple(COCO_COARSE), palette=colour_map(28)[1:])

    def __init__(
        self, img_suffix: str = ".jpg", seg_map_suffix: str = "_label27Ids.png", **kwargs: Any
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)


@DATASETS.register_module(force=True)
class ADE20K150Dataset(LocalFiles, mmseg.datasets.ADE20KDataset):
    """ADE20K, 150 classes; unlabelled pixels are ignored."""


@DATASETS.register_module(force=True)
class Cityscapes19Dataset(LocalFiles, mmseg.datasets.CityscapesDataset):
    """Cityscapes, 19 classes."""


@DATASETS.register_module(force=True)
class Cityscapes27Dataset(LocalFiles):
    """All 27 classes of Cityscapes that are not void, those of unsupervised segmentation."""

    METAINFO = dict(classes=tuple(CITYSCAPES_27), palette=list(CITYSCAPES_27.values()))

    def __init__(
        self,
        img_suffix: str = "_leftImg8bit.png",
        seg_map_suffix: str = "_gtFine_label27Ids.png",
        **kwargs: Any,
    ) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)


class NamedLabels(LocalFiles):
    """A dataset whose data contains the class names, with 16-bit labels in which 0 is ignored.

    Args:
        names_file: a class file relative to `data_root`; line k names label k.
        **kwargs: Arguments of `BaseSegDataset`.
    """

    def __init__(self, names_file: str, data_root: str | None = None, **kwargs: Any) -> None:
        path = Path(data_root or "", names_file)
        if not path.is_file():
            raise self._missing("there is no file of class names", str(path))
        # whole lines: first synonyms may be shared
        names = tuple(path.read_text(encoding="utf-8-sig").rstrip().split("\n"))
        super().__init__(
            metainfo=dict(classes=names, palette=colour_map(len(names) + 1)[1:]),
            data_root=data_root,
            **dict(dict(reduce_zero_label=True, ignore_index=WIDE_IGNORED), **kwargs),
        )


@DATASETS.register_module(force=True)
class PascalContext459Dataset(NamedLabels):
    """Pascal Context with all its 459 classes; unlabelled pixels are ignored."""


@DATASETS.register_module(force=True)
class ADE20K847Dataset(NamedLabels):
    """The full ADE20K with the 847 classes of open-vocabulary segmentation; others are ignored."""


@DATASETS.register_module(force=True)
class MiniSceneDataset(LocalFiles):
    """The drawn scenes of `sfp.mini`, rendered on first use.

    Args:
        data_root: Folder of the scenes, by default in the cache folder.
        scenes: Number of scenes.
        **kwargs: Arguments of `BaseSegDataset`.
    """

    METAINFO = dict(classes=CLASSES, palette=[list(colour) for colour in PALETTE])

    def __init__(
        self,
        data_root: str | None = None,
        scenes: int = 200,
        img_suffix: str = ".png",
        **kwargs: Any,
    ) -> None:
        if not isinstance(scenes, int) or scenes < 1:
            raise ValueError(f"scenes={scenes!r}: expected a whole number of at least 1")
        folder = data_root or cache_dir(f"mini-{scenes}")
        try:
            root = prepare(folder, scenes=scenes)
        except OSError as error:
            raise OSError(
                f"cannot write the {scenes} scenes of the mini world to {folder}: {error}. Set "
                "SFP_CACHE to a writable folder on a disk with a few megabytes left"
            ) from error
        super().__init__(data_root=str(root), img_suffix=img_suffix, **kwargs)
