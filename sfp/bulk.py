"""Label maps of very many images: folders, lists and tar shards in, PNG files out.

Images are labelled in batches while threads read and write files. Finished images are skipped, so an
interrupted run resumes; failures are recorded, and the run continues. The choice of engine (local or
Ray) only decides which process gets which inputs.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sfp.clip.checkpoints import published
from sfp.clip.checkpoints.loading import locate, open_weights, weights_digest
from sfp.data.images import LONG_SIDE, read_image, resize_short_side
from sfp.data.listing import Item, Outcome, Unit, items
from sfp.engine import Engine, Queries, choose_device
from sfp.files import atomic_write, sha256_file
from sfp.functional.labels import Labels
from sfp.method import Method, build_method, check_needs
from sfp.overlay import Panel, label_picture, overlay
from sfp.palette import colour_map
from sfp.plugins import import_modules, own_code
from sfp.registry import method_node
from sfp.vocabulary import Vocabulary, load_vocabulary

UNIMPORTANT = (
    "window_batch",
    "compiled",
    "graphs",
    "cache_bytes",
)  # affect the last digits at most
# what images are made into, whatever a config says
PREPROCESSOR = dict(type="ImagePreprocessor", bgr_to_rgb=True, mean=None, std=None)
# settings of the segmentor that do not affect labels
SHOWN = ("scores", "palette", "init_cfg", "pretrained", "train_cfg")
LABEL_STEPS = ("LoadAnnotations", "LoadLabels")  # pipeline steps that do not change images
# first and last bytes of a complete file, as written by this module
MARKS = {".png": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"), ".jpg": (b"\xff\xd8", b"\xff\xd9")}
FORMATS = {".png": "PNG", ".jpg": "JPEG"}
T = TypeVar("T")
R = TypeVar("R")


def whole(path: Path) -> bool:
    """Whether a picture file starts and ends as it should; the data in between is not checked."""
    first, last = MARKS[path.suffix]
    try:
        with open(path, "rb") as file:
            if file.read(len(first)) != first:
                return False
            file.seek(-len(last), os.SEEK_END)
            return file.read() == last
    except OSError:
        return False


@dataclass(frozen=True)
class Job:
    """The settings of a bulk run, as plain values that can be sent to other processes.

    Attributes:
        weights: name or path.
        classes: the words.
        method: preset name or config node.
        short_side: size in pixels to which the short side is resized; None does not resize.
        settings: settings of the `Engine` that are not its defaults.
        query_features: file of text features to use instead of encoding the words.
        whole_image_masks: whether mask proposers see images at their own size.
    """

    weights: str
    classes: Vocabulary
    method: str | Mapping[str, Any] = "sfp"
    short_side: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    query_features: str | None = None
    whole_image_masks: bool = False

    def describe(self) -> dict[str, Any]:
        """Everything that determines the label maps, as JSON values.

        Weights that are not on this machine are downloaded, since mirrors have other files.

        Raises:
            WeightsError, ValueError: as in `load_clip`.
        """
        engine = inspect.signature(Engine).parameters
        defaults = {k: p.default for k, p in engine.items() if k not in ("weights", *UNIMPORTANT)}
        own = {k: v for k, v in self.settings.items() if k not in UNIMPORTANT}
        record: dict[str, Any] = dict(
            weights=dict(name=self.weights, sha256=self._digest()),
            vocabulary=asdict(self.classes),
            method=method_node(self.method),
            protocol=dict(
                defaults | own,
                short_side=self.short_side,
                whole_image_masks=self.whole_image_masks,
                query_features=self.query_features and sha256_file(self.query_features),
            ),
        )
        if code := own_code():
            record["version of your own code"] = code
        return json.loads(json.dumps(record, default=str))

    def _digest(self) -> str:
        if self.weights != published.NONE:
            locate(self.weights)
        return weights_digest(self.weights) or open_weights(self.weights).digest

    def build_method(self) -> Method:
        """The method.

        Raises:
            ValueError: if it is wrong, or needs guides or regions that the settings lack.
        """
        method = build_method(self.method)
        check_needs(method, self.settings.get("guides"), self.settings.get("regions"))
        return method


def job_from_config(config: Mapping[str, Any], short_side: int | None = None) -> Job:
    """The job that labels images as an evaluation of the config would.

    Args:
        config: config of a benchmark, or one like it.
        short_side: replaces the size in the config's `Resize`. With neither, images keep their size; a
            config without a `test_pipeline` uses the size that `sfp.load` would.

    Raises:
        ValueError: if the config has a setting or pipeline step that bulk labelling does not support.
    """
    model = dict(config["model"])
    known = inspect.signature(Engine).parameters
    settings = {k: v for k, v in model.items() if k in known and k != "weights"}
    read = {"type", "classes", "method", "query_features", "data_preprocessor", *SHOWN}
    left = [f"model.{name}" for name in sorted(set(model) - set(known) - read)]
    prepared = model.get("data_preprocessor") or {}
    left += [f"{k} of the preprocessor" for k, v in prepared.items() if v != PREPROCESSOR.get(k)]
    left += [name for name in ("clusters", "load_from", "custom_hooks") if config.get(name)]
    left += ["test_cfg.fp16"] * bool(config.get("test_cfg", {}).get("fp16"))
    if left:
        raise ValueError(
            f"`sfp label` does not support the config's setting(s) {', '.join(left)}: remove them "
            "from the config"
        )
    masks = False
    steps = config.get("test_pipeline", ())
    for step in steps:
        if step["type"] == "Resize" and step.get("keep_ratio") and "scale" in step:
            long, short = max(step["scale"]), min(step["scale"])
            if long != LONG_SIDE:
                raise ValueError(f"Resize to {step['scale']}: the long side must be {LONG_SIDE}")
            short_side = short if short_side is None else short_side
        elif step["type"] == "KeepImage":
            masks = True
        elif step["type"] not in ("LoadImageFromFile", "PackSegInputs", *LABEL_STEPS):
            raise ValueError(
                f"`sfp label` does not support the step {step['type']!r} of the config's "
                "test_pipeline, only Resize with scale and keep_ratio=True"
            )
    if short_side is None and not steps:
        short_side = published.short_side(model["weights"])
    return Job(
        weights=str(model["weights"]),
        classes=load_vocabulary(model["classes"]),
        method=model.get("method", "sfp"),
        short_side=short_side,
        settings=settings,
        query_features=model.get("query_features"),
        whole_image_masks=masks,
    )


def claim(out: Path, job: Job) -> None:
    """Marks an output folder as belonging to this job, or checks that it does.

    Raises:
        ValueError: if the folder holds label maps of another job.
    """
    mine = job.describe()
    path = out / "settings.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        other = [k for k in mine if mine[k] != found.get(k)]
        if other:
            raise ValueError(
                f"{out} holds label maps made with another {' and '.join(other)}: choose another "
                f"folder, or remove it ({path} has the settings used)"
            )
        return
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Loaded:
    name: str
    image: NDArray[np.uint8]  # RGB
    pixels: Tensor  # (3, h, w) uint8, as the network sees it


@dataclass(frozen=True)
class _Labelled:
    name: str
    image: NDArray[np.uint8]
    labels: NDArray[Any]
    confidence: NDArray[np.uint8]  # 0..255


class Labeller:
    """Turns image files into label maps, with threads for reading and writing.

    Args:
        job: the settings.
        out: folder for the results: labels/<name>.png, confidence/<name>.png, overlay/<name>.jpg.
        confidence: whether to write the probability of the winning class, 0..255.
        overlay: whether to write the labels drawn over the image.
        batch_size: images whose windows go through the network together.
        workers: threads that decode and write.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """

    def __init__(
        self,
        job: Job,
        out: str | Path,
        *,
        confidence: bool = False,
        overlay: bool = False,
        batch_size: int = 4,
        workers: int = 4,
        device: str = "auto",
    ) -> None:
        classes = job.classes.num_classes
        if overlay and classes > 255:
            raise ValueError(
                f"an overlay shows 255 classes at most, but the vocabulary has {classes}"
            )
        self.job = job
        self.method = job.build_method()
        self.engine = Engine(job.weights, **job.settings).to(choose_device(device))
        if job.query_features is None:
            self.queries = self.engine.queries(job.classes)
        else:
            features = self.engine.given_features(job.query_features, job.classes)
            self.queries = Queries(features.to(self.engine.device), job.classes.index)
        self.palette = colour_map(256)
        self.dtype = np.uint8 if classes <= 256 else np.uint16
        self.folders = {Path(out, "labels"): ".png"}
        if confidence:
            self.folders[Path(out, "confidence")] = ".png"
        if overlay:
            self.folders[Path(out, "overlay")] = ".jpg"
        self.batch_size = batch_size
        self.workers = workers

    def done(self, name: str) -> bool:
        """Whether all results of an image exist and are complete."""
        return all(whole(folder / f"{name}{end}") for folder, end in self.folders.items())

    def run(self, units: Iterable[Unit]) -> Iterator[Outcome]:
        """Labels every image of the units and yields an outcome for each.

        Outcomes come in order, except that skipped and failed images do not wait for a batch to fill.
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
            image = read_image(item.data or item.path, name=item.name)
            side = self.job.short_side
            resized = image if side is None else resize_short_side(image, side)
            pixels = torch.from_numpy(resized.transpose(2, 0, 1).copy())
            return _Loaded(item.name, image, pixels)
        except Exception as error:  # a bad image must not stop the others
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
            results = self.predict(batch)
        except Exception as error:
            if isinstance(error, LookupError) and not isinstance(error, (KeyError, IndexError)):
                raise  # the method needs something that no image will have, e.g. a layer
            if len(batch) == 1:
                yield _failed(batch[0].name, error)
            else:  # find out which image fails
                for entry in batch:
                    yield from self._predict([entry])
            return
        for entry, result in zip(batch, results, strict=True):
            labels = result.labels.cpu().numpy().astype(self.dtype)
            confidence = (result.confidence.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
            yield _Labelled(entry.name, entry.image, labels, confidence)

    def predict(self, batch: Sequence[_Loaded]) -> list[Labels]:
        """The labels of images; their windows go through the network together."""
        engine = self.engine
        inputs = [engine.input(entry.pixels) for entry in batch]
        sizes = [entry.image.shape[:2] for entry in batch]
        regions = None
        if self.method.needs_regions:
            regions = engine.stored_regions([entry.name for entry in batch])
        (sheets,) = engine.logits([self.method], inputs, sizes, self.queries, regions=regions)
        return [
            engine.label(
                pixels,
                sheet,
                self.queries.index,
                method=self.method,
                full_image=self._full(entry),
            )
            for entry, pixels, sheet in zip(batch, inputs, sheets, strict=True)
        ]

    def _full(self, entry: _Loaded) -> Tensor | None:
        if not self.job.whole_image_masks or self.engine.masks is None:
            return None
        pixels = torch.from_numpy(entry.image.transpose(2, 0, 1).copy())
        return self.engine.normalise(pixels.to(self.engine.device))

    def _write(self, result: _Labelled | Outcome) -> Outcome:
        if isinstance(result, Outcome):
            return result
        try:
            for folder, suffix in self.folders.items():
                with atomic_write(folder / f"{result.name}{suffix}") as path:
                    self._picture(result, folder.name).save(path, FORMATS[suffix])
        except Exception as error:
            return _failed(result.name, error)
        return Outcome(result.name, "done")

    def _picture(self, result: _Labelled, what: str) -> Image.Image:
        if what == "overlay":
            return Image.fromarray(overlay(Panel(result.image, result.labels), self.palette[:255]))
        if what == "labels":
            return label_picture(result.labels, self.palette)
        return Image.fromarray(result.confidence)


def _failed(name: str, error: Exception) -> Outcome:
    return Outcome(name, "failed", f"{type(error).__name__}: {error}")


def _ahead(
    pool: ThreadPoolExecutor, fn: Callable[[T], R], entries: Iterable[T], depth: int
) -> Iterator[R]:
    """`map(fn, entries)` in the pool, in order, running at most `depth` entries ahead."""
    queue: deque[Future[R]] = deque()
    for entry in entries:
        queue.append(pool.submit(fn, entry))
        if len(queue) > depth:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()


class _RayLabeller:
    """A `Labeller` as a Ray Data actor, from columns of units to columns of outcomes."""

    def __init__(self, knobs: dict[str, Any], modules: Sequence[str]) -> None:
        import_modules(modules)
        self.labeller = Labeller(**knobs)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        units = [Unit(*row) for row in zip(batch["path"], batch["name"], strict=True)]
        outcomes = list(self.labeller.run(units))
        return {k: [getattr(x, k) for x in outcomes] for k in ("name", "status", "error")}


def run_on_ray(
    units: Sequence[Unit],
    knobs: dict[str, Any],
    *,
    processes: int | None = None,
    modules: Sequence[str] = (),
) -> Iterator[Outcome]:
    """Like `Labeller.run`, distributed by Ray Data over the processes of a machine or a cluster.

    Every process must be able to reach the inputs and outputs. Outcomes come in any order.

    Args:
        units: what to label.
        knobs: arguments of `Labeller`.
        processes: number of processes; by default one per GPU of the cluster, or one.
        modules: modules that each process imports first, as in `import_modules`.

    Raises:
        ModuleNotFoundError: if Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--engine ray needs Ray Data ({error}): pip install 'sfp[scale]', or omit --engine"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command has its own
    gpus = int(ray.cluster_resources().get("GPU", 0))
    processes = processes or gpus or 1
    # many images per call keep a process's threads busy; a shard holds many images anyway
    archives = any(unit.is_archive for unit in units)
    size = 1 if archives else min(256, -(-len(units) // processes))
    rows = [dict(path=str(Path(unit.path).absolute()), name=unit.name) for unit in units]
    done = ray.data.from_items(rows).map_batches(
        _RayLabeller,
        fn_constructor_kwargs=dict(
            knobs=dict(knobs, out=Path(knobs["out"]).absolute()),
            modules=[str(Path(m).absolute()) if m.endswith(".py") else m for m in modules],
        ),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_gpus=1 if gpus else 0,
    )
    return (Outcome(**row) for row in done.iter_rows())
