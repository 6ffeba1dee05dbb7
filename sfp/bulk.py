"""Label maps of very many images: folders, lists and tar shards in, PNG files out.

One path for every size: images are read, decoded, labelled in batches and written, the reading and
the writing in threads beside the network. What is done is skipped, so a killed run continues; what
fails is recorded, and the run goes on. An engine only decides which process gets which inputs.
"""

from __future__ import annotations

import json
import logging
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image

from sfp import mini
from sfp.data.datasets import LABEL_STEPS
from sfp.data.images import LONG_SIDE, check_short_side
from sfp.evaluation.card import NOTED, settings
from sfp.files import atomic_write
from sfp.palette import colour_map
from sfp.segmentor import OpenVocabSegmentor
from sfp.visualize.sheets import Panel, label_picture, overlay

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
SHARDS = {".tar", ".tgz", ".gz"}
# first and last bytes of a whole file
MARKS = {
    ".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"),
    ".jpg": (b"\xff\xd8", b"\xff\xd9"),
    ".jpeg": (b"\xff\xd8", b"\xff\xd9"),
}
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Unit:
    """A file to work on, an image or a tar shard, and its name: a relative path without suffix."""

    path: str
    name: str


@dataclass(frozen=True)
class Item:
    """An image: its name, and its bytes or the path that has them."""

    name: str
    path: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Outcome:
    """What became of an image: "done", "skipped" (it was done before) or "failed", and why."""

    name: str
    status: str
    error: str = ""


def list_units(inputs: Sequence[str | Path]) -> list[Unit]:
    """The files behind inputs: folders (searched), lists (.txt), tar shards, images.

    Lists hold a path per line; a relative one starts at the list. Names keep the folders below an
    input folder or a list.

    Raises:
        FileNotFoundError: if an input does not exist or has no images.
        ValueError: if two files would be written to one label map.
    """
    units = [unit for entry in inputs for unit in _units(Path(entry))]
    taken: dict[str, str] = {}
    for unit in units:
        if taken.setdefault(unit.name, unit.path) != unit.path:
            raise ValueError(
                f"{taken[unit.name]} and {unit.path} would both become {unit.name}.png: rename one, "
                "or label the folders one by one"
            )
    return units


def _units(path: Path) -> list[Unit]:
    if path.is_dir():
        files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
        # hidden files are somebody's half-written ones
        images = [f for f in files if f.suffix.lower() in SUFFIXES | SHARDS and f.name[0] != "."]
        if not images:
            raise FileNotFoundError(
                f"no image or tar shard in {path}: expected files with the endings "
                f"{', '.join(sorted(SUFFIXES | SHARDS))}"
            )
        return [_unit(f, f.relative_to(path)) for f in sorted(images)]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a folder, a list, a shard or an image"
        )
    if path.suffix == ".txt":
        lines = filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        files = [Path(os.path.normpath(path.parent / line)) for line in lines]
        return [_unit(f, _below(f, path.parent)) for f in files]
    return [_unit(path, Path(path.name))]


def _unit(path: Path, name: Path) -> Unit:
    return Unit(str(path), name.with_suffix("").as_posix())


def _below(path: Path, root: Path) -> Path:
    """A path seen from `root` if it lies there, else from the top of the file system."""
    path, root = path.absolute(), Path(os.path.normpath(root.absolute()))
    return path.relative_to(root if path.is_relative_to(root) else path.anchor)


def items(unit: Unit, done: Callable[[str], bool]) -> Iterator[Item | Outcome]:
    """The images of a unit; those that are done or cannot be had as outcomes, without their bytes.

    Shards are read as a stream, from the first byte to the last.
    """
    if Path(unit.path).suffix.lower() not in SHARDS:
        yield (
            Outcome(unit.name, "skipped") if done(unit.name) else Item(unit.name, path=unit.path)
        )
        return
    seen = set()
    try:
        with tarfile.open(unit.path, "r|*") as shard:
            for member in shard:
                place = PurePosixPath(member.name)
                if not member.isfile() or place.suffix.lower() not in SUFFIXES:
                    continue
                if place.is_absolute() or ".." in place.parts:
                    yield Outcome(f"{unit.name}/{place}", "failed", "its path leaves the shard")
                    continue
                name = f"{unit.name}/{place.with_suffix('')}"
                if name in seen:
                    yield Outcome(name, "failed", f"{unit.path} has two images of this name")
                elif done(name):
                    yield Outcome(name, "skipped")
                else:
                    stream = shard.extractfile(member)
                    assert stream is not None  # it is a file
                    yield Item(name, data=stream.read())
                seen.add(name)
    except (tarfile.TarError, OSError, EOFError) as error:
        yield Outcome(unit.name, "failed", f"{unit.path}: {error}; the rest of it is left out")


def decode(data: bytes) -> np.ndarray:
    """Pixels as mmseg's LoadImageFromFile has them, (H, W, 3) uint8 BGR.

    Raises:
        ValueError: if the bytes are no image, or not all of one.
    """
    if not data:
        raise ValueError("the file is empty")
    for first, last in MARKS.values():
        # what a camera appends may follow the last mark; a decoder would paint the rest grey
        if data.startswith(first) and last not in data[-4096:]:
            raise ValueError("the file is truncated")
    image = mmcv.imfrombytes(data, flag="color")
    if image is None:
        raise ValueError("not an image that OpenCV can read")
    return image


def whole(path: Path) -> bool:
    """Whether a picture is there from its first to its last bytes; its inside is not looked at."""
    first, last = MARKS[path.suffix]
    try:
        with open(path, "rb") as file:
            if file.read(len(first)) != first:
                return False
            file.seek(-len(last), os.SEEK_END)
            return file.read() == last
    except OSError:
        return False


def bulk_config(config: Config, short_side: int | None = None) -> Config:
    """A config reduced to what labelling needs: the model, and the steps from file to network.

    Args:
        config: of a benchmark, whose steps are taken over, or configs/base_config.py.
        short_side: pixels that the short side of each image is resized to; by default the
            config's, or what fits the weights if it has no steps.

    Raises:
        ValueError: if `short_side` is no such number.
    """
    config = config.copy()
    steps = [s for s in config.get("test_pipeline", []) if s["type"] not in LABEL_STEPS]
    if short_side is not None or not steps:
        side = mini.short_side(config.model.get("weights")) if short_side is None else short_side
        check_short_side(side)
        resize = dict(type="Resize", scale=(LONG_SIDE, side), keep_ratio=True)
        steps = [dict(type="LoadImageFromFile"), resize, dict(type="PackSegInputs")]
    config.test_pipeline = steps
    for key in ("test_dataloader", "test_evaluator"):
        config.pop(key, None)
    return config


def claim(out: Path, config: Config) -> None:
    """Marks an output folder as made with these settings, or checks that it is.

    Raises:
        ValueError: if label maps of other settings are there.
    """
    mine = {k: v for k, v in settings(config).items() if k not in NOTED}
    path = out / "settings.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [k for k in mine if mine[k] != found.get(k)]
        if other:
            raise ValueError(
                f"{out} holds label maps made with another {' and '.join(other)}: choose another "
                f"folder, or remove it ({path} says how they were made)"
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Loaded:
    name: str
    image: np.ndarray  # BGR
    packed: dict[str, Any]


@dataclass(frozen=True)
class _Labelled:
    name: str
    image: np.ndarray
    labels: np.ndarray
    confidence: np.ndarray  # 0..255


class Labeller:
    """A segmentor with its threads, from images to files.

    Args:
        config: from `bulk_config`.
        out: folder of the results: labels/<name>.png, confidence/<name>.png, overlay/<name>.jpg.
        confidence: whether to write the probability of the winning class, 0..255.
        overlay: whether to write the labels over the image.
        batch_size: images whose windows go through the network together.
        workers: threads that decode and write.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        confidence: bool = False,
        overlay: bool = False,
        batch_size: int = 4,
        workers: int = 4,
        device: str = "auto",
    ) -> None:
        init_default_scope("mmseg")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = MODELS.build(config.model)
        assert isinstance(model, OpenVocabSegmentor)
        self.model = model.to(device).eval()
        self.model.text_features()
        self.palette = colour_map(256)
        classes = self.model.vocabulary.num_classes
        if overlay and classes > 255:
            raise ValueError(f"an overlay shows 255 classes at most, the vocabulary has {classes}")
        self.dtype = np.uint8 if classes <= 256 else np.uint16
        self.prepare = Compose([dict(type="LoadImageFromNDArray"), *config.test_pipeline[1:]])
        folders = dict(labels=".png", confidence=".png" * confidence, overlay=".jpg" * overlay)
        self.folders = {Path(out, key): suffix for key, suffix in folders.items() if suffix}
        self.batch_size = batch_size
        self.workers = workers

    def done(self, name: str) -> bool:
        """Whether all results of an image are there, whole."""
        return all(whole(folder / f"{name}{end}") for folder, end in self.folders.items())

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Labels every image of the units; yields what became of each.

        In order, but what needs no network overtakes the images that wait for their batch.
        """
        ahead = 2 * self.batch_size
        with ThreadPoolExecutor(self.workers) as pool:
            found = (item for unit in units for item in items(unit, self.done))
            loaded = _ahead(pool, self._load, found, ahead)
            yield from _ahead(pool, self._write, self._label(loaded), ahead)

    def _load(self, item: Item | Outcome) -> _Loaded | Outcome:
        if isinstance(item, Outcome):
            return item
        try:
            image = decode(item.data or Path(item.path).read_bytes())
            return _Loaded(item.name, image, self.prepare(dict(img=image)))
        except Exception as error:  # whatever one image does, the others go on
            return _failed(item.name, error)

    def _label(self, loaded: Iterable[_Loaded | Outcome]) -> Iterator[_Labelled | Outcome]:
        batch: list[_Loaded] = []
        for entry in loaded:
            if isinstance(entry, Outcome):
                yield entry
                continue
            batch.append(entry)
            if len(batch) == self.batch_size:
                yield from self._predict(batch)
                batch = []
        if batch:
            yield from self._predict(batch)

    def _predict(self, batch: list[_Loaded]) -> Iterator[_Labelled | Outcome]:
        try:
            samples = self.model.test_step(
                dict(
                    inputs=[entry.packed["inputs"] for entry in batch],
                    data_samples=[entry.packed["data_samples"] for entry in batch],
                )
            )
        except Exception as error:
            if len(batch) == 1:
                yield _failed(batch[0].name, error)
            else:  # find out whose fault it is
                for entry in batch:
                    yield from self._predict([entry])
            return
        for entry, sample in zip(batch, samples, strict=True):
            labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(self.dtype)
            confidence = (sample.confidence.data[0].float() * 255).round().byte().cpu().numpy()
            yield _Labelled(entry.name, entry.image, labels, confidence)

    def _write(self, result: _Labelled | Outcome) -> Outcome:
        if isinstance(result, Outcome):
            return result
        try:
            for folder, suffix in self.folders.items():
                with atomic_write(folder / f"{result.name}{suffix}") as path:
                    self._picture(result, folder.name).save(path)
        except Exception as error:
            return _failed(result.name, error)
        return Outcome(result.name, "done")

    def _picture(self, result: _Labelled, what: str) -> Image.Image:
        if what == "overlay":
            rgb = np.ascontiguousarray(result.image[..., ::-1])
            return Image.fromarray(overlay(Panel(rgb, result.labels), self.palette[:255]))
        if what == "labels":
            return label_picture(result.labels, self.palette)
        return Image.fromarray(result.confidence)


def _failed(name: str, error: Exception) -> Outcome:
    return Outcome(name, "failed", f"{type(error).__name__}: {error}")


def _ahead(
    pool: ThreadPoolExecutor, fn: Callable[[T], R], entries: Iterable[T], depth: int
) -> Iterator[R]:
    """`map(fn, entries)` in the pool, in order, at most `depth` results ahead."""
    queue: deque[Future[R]] = deque()
    for entry in entries:
        queue.append(pool.submit(fn, entry))
        if len(queue) > depth:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


class _RayLabeller:
    """A `Labeller` as an actor of Ray Data: it gets units in columns, and gives outcomes back."""

    def __init__(self, knobs: dict[str, Any]) -> None:
        self.labeller = Labeller(**knobs)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        units = [Unit(*row) for row in zip(batch["path"], batch["name"], strict=True)]
        outcomes = list(self.labeller.run(units))
        return {k: [getattr(x, k) for x in outcomes] for k in ("name", "status", "error")}


def run_on_ray(
    units: Sequence[Unit], knobs: dict[str, Any], *, processes: int | None = None
) -> Iterator[Outcome]:
    """As `Labeller.run`, spread by Ray Data over the processes of a machine or a cluster.

    Inputs and outputs must lie where every process can reach them. Outcomes come as they come.

    Args:
        units: what to label.
        knobs: arguments of `Labeller`.
        processes: how many; by default one per GPU of the cluster, or one.

    Raises:
        ModuleNotFoundError: if Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--engine ray needs Ray Data ({error}): pip install 'sfp[scale]', or leave --engine out"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processes = processes or gpus or 1
    # many images per call keep the threads of a process fed; a shard is many images already
    shards = any(Path(unit.path).suffix.lower() in SHARDS for unit in units)
    size = 1 if shards else min(256, -(-len(units) // processes))
    rows = [dict(path=str(Path(unit.path).absolute()), name=unit.name) for unit in units]
    done = ray.data.from_items(rows).map_batches(
        _RayLabeller,
        fn_constructor_kwargs=dict(knobs=dict(knobs, out=Path(knobs["out"]).absolute())),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_gpus=1 if gpus else 0,
    )
    return (Outcome(**row) for row in done.iter_rows())
