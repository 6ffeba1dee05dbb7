"""The eight benchmarks and the mini world as mmseg datasets.

mmseg has most of them; `LocalFiles` adds what people miss when a file is not where it should be.
Importing this module registers them in mmseg's `DATASETS`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from mmcv.transforms import BaseTransform
from torch import Tensor

from sfp.cache import cache_dir
from sfp.images import DataError, check_whole, read_bytes, read_image
from sfp.mini import CLASSES, PALETTE, prepare
from sfp.mm import mmseg

DATASETS = mmseg.registry.DATASETS
TRANSFORMS = mmseg.registry.TRANSFORMS

FILES = {"img_path": "image", "seg_map_path": "label"}  # key in mmseg's records and what it holds


def colour_map(count: int) -> list[list[int]]:
    """The colours of Pascal VOC: the bits of a label spread over red, green and blue.

    Args:
        count: Number of labels, at most 256.

    Returns:
        `[red, green, blue]` of each label.

    Example:
        >>> colour_map(3)
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    return [
        [
            sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3))
            for channel in range(3)
        ]
        for label in range(count)
    ]


def _files(folder: str) -> frozenset[str]:
    """Names in a folder, none if it does not exist."""
    return frozenset(os.listdir(folder) if os.path.isdir(folder) else ())


@TRANSFORMS.register_module()
class KeepImage(BaseTransform):
    """Keeps the image as it is at this step, before it is resized, as `full_image`.

    With `PackSegInputs(meta_keys=(..., "full_image"))` the segmentor gets it, for masks that are found
    at full resolution. Steps that flip come after it.
    """

    def transform(self, results: dict) -> dict:
        """Sets `full_image`, (H, W, 3) as loaded."""
        results["full_image"] = results["img"]
        return results


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """`read_image` as the first step of a pipeline, for images of every kind.

    The benchmarks keep mmsegmentation's `LoadImageFromFile`, whose pixels these are too for what they
    consist of (8-bit JPEG and PNG without transparency), and which mmseg's own tools look for by name.
    """

    def transform(self, results: dict) -> dict:
        """Reads `img_path`; sets what `LoadImageFromFile` does."""
        image = read_image(results["img_path"], bgr=True)
        results.update(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        return results


def check_labels(
    labels: Tensor, sizes: Sequence[Sequence[int]], classes: int, ignore: int, name: str
) -> None:
    """Refuses a label map of another size than its image, and ids that are no class.

    Args:
        labels: (1, H, W) or (H, W).
        sizes: those that are right.
        classes: ids go from 0 to one less.
        ignore: the one other id, of pixels that do not count.
        name: what errors call the label map.

    Raises:
        DataError: if it is not right.
    """
    if (
        tuple(labels.shape[-2:]) not in {tuple(size[:2]) for size in sizes}
        or labels[..., 0, 0].numel() != 1
    ):
        raise DataError(
            f"{name}: label map of shape {tuple(labels.shape)}, expected one number for each pixel of "
            f"the image, {' or '.join(sorted({'x'.join(map(str, s[:2])) for s in sizes}))}"
        )
    wrong = labels[(labels != ignore) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise DataError(
            f"{name}: label {int(wrong[0])} in {int((wrong == wrong[0]).sum())} pixels, expected 0 to "
            f"{classes - 1}, or {ignore} for what does not count; are these the labels of another "
            "dataset, or not converted yet?"
        )


class LocalFiles(mmseg.datasets.BaseSegDataset):
    """Checks, before anything runs, that each image and label file is there; then each file itself.

    Without this a missing folder is an assertion without words, an empty one an evaluation of
    nothing, a missing file an error after half of the images, a truncated JPEG a half grey picture,
    and labels of another dataset a low score. Every error names the file.
    """

    labels_by = ""  # end of the advice: what writes the labels, if the download has none

    def load_data_list(self) -> list[dict]:
        """Lists the images and labels.

        Returns:
            mmseg's record of each image.

        Raises:
            FileNotFoundError: If a folder, the image list or a file is missing.
        """
        for key, what in FILES.items():
            if not os.path.isdir(self.data_prefix[key]):
                raise self._missing(f"there is no {what} folder", self.data_prefix[key])
        if self.ann_file and not os.path.isfile(self.ann_file):
            raise self._missing("there is no list of images", self.ann_file)
        data = super().load_data_list()
        if not data:
            where = self.ann_file or self.data_prefix["img_path"]
            raise self._missing(f"there is no *{self.img_suffix} image in", where)

        present = cache(_files)  # one look per folder, not one per file
        for key, what in FILES.items():
            paths = [record[key] for record in data]
            lost = [p for p in paths if os.path.basename(p) not in present(os.path.dirname(p))]
            if lost:
                count = f"{len(lost)} of {len(data)} {what}s missing, first"
                raise self._missing(count, lost[0])
        return data

    def prepare_data(self, idx: int) -> Any:
        """The record of an image after the pipeline.

        Raises:
            DataError: if the image or its label map is not right; the message names the file.
        """
        record = self.get_data_info(idx)
        image, label = record["img_path"], record.get("seg_map_path")
        for path in filter(None, (image, label)):
            data = read_bytes(path)
            check_whole(data, path)
            if path == label and data[:4] == b"\x89PNG" and data[24] == 16:
                raise DataError(f"{label}: a 16-bit label map, of which mmseg would keep 8 bits")
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

    def _missing(self, what: str, path: str) -> FileNotFoundError:
        """The error that says what is missing, and what to do about it."""
        root = os.environ.get("DATA_ROOT") or "not set, which means ./data"
        return FileNotFoundError(
            f"{type(self).__name__}: {what} {os.path.abspath(path)}. Set the environment variable "
            f"DATA_ROOT to the folder that holds the datasets (now: {root}); docs/data.md shows how "
            f"each of them is laid out{self.labels_by}."
        )


@DATASETS.register_module()
class PascalVOC21Dataset(LocalFiles, mmseg.datasets.PascalVOCDataset):
    """Pascal VOC 2012 with background, 21 classes."""


@DATASETS.register_module()
class PascalVOC20Dataset(LocalFiles, mmseg.datasets.PascalVOCDataset):
    """Pascal VOC 2012 without background: its pixels are ignored."""

    METAINFO = {key: values[1:] for key, values in mmseg.datasets.PascalVOCDataset.METAINFO.items()}

    def __init__(self, reduce_zero_label: bool = True, **kwargs: Any) -> None:
        super().__init__(reduce_zero_label=reduce_zero_label, **kwargs)


@DATASETS.register_module()
class PascalContext60Dataset(LocalFiles, mmseg.datasets.PascalContextDataset):
    """Pascal Context with background, 60 classes."""


@DATASETS.register_module()
class PascalContext59Dataset(LocalFiles, mmseg.datasets.PascalContextDataset59):
    """Pascal Context without background: its pixels are ignored."""


@DATASETS.register_module()
class COCOObjectDataset(LocalFiles):
    """The 80 things of COCO and background, as written by tools/dataset_converters/coco_object.py."""

    labels_by = ", and tools/dataset_converters/coco_object.py writes these labels"
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


@DATASETS.register_module()
class COCOStuff164kDataset(LocalFiles, mmseg.datasets.COCOStuffDataset):
    """COCO-Stuff 164k, 171 classes of things and stuff."""


@DATASETS.register_module()
class ADE20K150Dataset(LocalFiles, mmseg.datasets.ADE20KDataset):
    """ADE20K, 150 classes; unlabelled pixels are ignored."""


@DATASETS.register_module()
class Cityscapes19Dataset(LocalFiles, mmseg.datasets.CityscapesDataset):
    """Cityscapes, 19 classes."""


@DATASETS.register_module()
class MiniSceneDataset(LocalFiles):
    """The painted scenes of `sfp.mini`, rendered on first use.

    Args:
        data_root: Folder of the scenes, one in the cache folder by default.
        scenes: How many there are.
        **kwargs: What `BaseSegDataset` takes.
    """

    METAINFO = dict(classes=CLASSES, palette=[list(colour) for colour in PALETTE])

    def __init__(
        self,
        data_root: str | None = None,
        scenes: int = 200,
        img_suffix: str = ".png",
        **kwargs: Any,
    ) -> None:
        folder = data_root or cache_dir(f"mini-{scenes}")
        try:
            root = prepare(folder, scenes=scenes)
        except OSError as error:
            raise OSError(
                f"cannot write the {scenes} scenes of the mini world to {folder}: {error}. Set "
                "SFP_CACHE to a folder that can be written, on a disk with some megabytes left"
            ) from error
        super().__init__(data_root=str(root), img_suffix=img_suffix, **kwargs)
