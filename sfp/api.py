"""The short way in: load a model, name the classes, segment pictures.

Example::

    model = sfp.load("ViT-B/16", method="sfp")
    result = model.segment("street.jpg", ["road", "car", ["person", "pedestrian"]])
    result.labels, result.names, result.save("labels.png")
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, overload

import mmcv
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfp import mini
from sfp.clip.model import CLIP
from sfp.clip.text import text_bank
from sfp.clip.vit import VisionTransformer
from sfp.data.images import LONG_SIDE, as_image, check_short_side
from sfp.feature_cache import Memory
from sfp.functional.labels import assign
from sfp.functional.windows import LogitSheet
from sfp.method import Method, build_method
from sfp.result import Result
from sfp.segmentor import OpenVocabSegmentor
from sfp.trace import Trace
from sfp.vocabulary import Vocabulary
from sfp.words import BACKGROUND, Classes, as_vocabulary

SLAB = 2**24  # scores that are computed at once
PORTION = 8  # images of a list that are in work together
NOTHING = Vocabulary((), (), ())
WORDS = 2**14  # queries whose features are kept, 2 kB each


def load(
    weights: str | Path | Mapping[str, Tensor] | CLIP = "ViT-B/16",
    method: str | Mapping[str, Any] | Method = "sfp",
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compiled: bool = False,
    short_side: int | Literal["auto"] | None = "auto",
    slide_crop: int = 224,
    slide_stride: int = 112,
    templates: str | Sequence[str] = "imagenet",
    logit_scale: float = 40.0,
    pamr_steps: int = 0,
    window_batch: int | None = None,
    guides: Mapping[str, Any] | None = None,
    memory_mb: int = 512,
) -> Model:
    """A CLIP with a method, ready to segment. The defaults are the benchmarks' (docs/protocol.md).

    Args:
        weights: name, path or state dict for `load_clip`; or a `CLIP`, which is moved.
        method: preset name, `dict(type=name, knob=value, ...)` or a `Method`; `sfp.list_methods()`.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        precision: "auto" (fp16 on CUDA, fp32 elsewhere), "fp32", "fp16", "bf16", or "int8", an
            approximation for CPUs.
        compiled: whether the blocks' MLPs go through `torch.compile`; for GPUs, on CPUs it costs time.
        short_side: pixels that the short side is resized to (the long one to 2048 at most); "auto"
            takes 336, and 224 for the mini CLIP, which was trained on that; None leaves images as they
            are.
        slide_crop, slide_stride: side and distance of the windows; crop 0 takes images whole.
        templates: prompts with one `{}`, or the name of a set that mmseg ships.
        logit_scale: inverse temperature of the softmax over all queries.
        pamr_steps: steps of pixel-adaptive refinement; 0 for none.
        window_batch: most windows in one forward pass; None for what suits the device.
        guides: external encoders by name, for methods that ask for them (ProxyCLIP).
        memory_mb: MiB on the device for features of recent images, so that other words for them are
            quick; 0 keeps none.

    Raises:
        WeightsError: if the weights cannot be found, downloaded or read.
        ValueError: if a setting is wrong; the message names the valid ones.
    """
    if short_side == "auto":
        short_side = mini.short_side(weights)
    if short_side is not None:
        check_short_side(short_side)
    if memory_mb < 0:
        raise ValueError(f"memory_mb={memory_mb}: expected 0 (nothing is kept) or more")
    device = _device(device)
    segmentor = _Segmentor(
        weights,
        NOTHING,
        method,
        precision=precision,
        compiled=compiled,
        slide_crop=slide_crop,
        slide_stride=slide_stride,
        templates=templates,
        logit_scale=logit_scale,
        pamr_steps=pamr_steps,
        window_batch=window_batch,
        guides=guides,
        scores=False,
        data_preprocessor=dict(type="ImagePreprocessor", bgr_to_rgb=False),
    )
    segmentor.memory = Memory(memory_mb * 2**20)
    return Model(segmentor.to(device).eval(), short_side)


def _device(device: str | torch.device) -> torch.device:
    """What a name stands for.

    Raises:
        ValueError: if there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} is not to be had here: {reason}") from None
    return device


class Model:
    """Segments pictures; made by `load`.

    Words are encoded once each. What the network saw in recent images is kept, so that the same image
    with other words costs little more than a product of features and words; results are the same to the
    last bit. Methods that look at the words inside the network (ResCLIP) run that part again.

    Attributes:
        clip: the frozen model.
        method: used where `segment` names no other.
        short_side: as in `load`.
        memory: what is kept of recent images; `memory.clear()` forgets it.
    """

    def __init__(self, segmentor: _Segmentor, short_side: int | None) -> None:
        self.clip = segmentor.clip
        self.method = segmentor.method
        self.short_side = short_side
        self.memory = segmentor.memory
        self._wordless = segmentor
        self._build_method = lru_cache(build_method)  # names only: a dict has no hash
        self._embed = lru_cache(WORDS)(self._embed_one)

    @overload
    def segment(
        self,
        images: list[Any] | tuple[Any, ...],
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
    ) -> list[Result]: ...

    @overload
    def segment(
        self,
        images: Any,
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
    ) -> Result: ...

    @torch.inference_mode()
    def segment(
        self,
        images: Any,
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
    ) -> Result | list[Result]:
        """Labels each pixel with one of the classes.

        Args:
            images: a path, a `file://` URL, bytes, a Pillow image, an array (H, W, 3) in RGB, uint8 or
                floats from 0 to 1, or a tensor (3, H, W) of the same (`sfp.as_image`); or a list of
                them, of any sizes, whose windows go through the network together.
            classes: what to look for: a list of names or of lists of synonyms, the path of a class
                file, or the name of a benchmark ("voc21", "ade20k", ...: its words, not its
                thresholds).
            background: None: every pixel becomes one of the classes. Words, one or a list: they
                describe what is none of them, as class 0, "background". A number: pixels whose
                best probability is less become "background": that class if there is one, else a
                new class 0. Probabilities depend on all classes; benchmarks use 0.15 to 0.35.
            method: in place of the model's own.

        Returns:
            The result of an image at its own size; a list of them for a list.

        Raises:
            ImageError: if an image cannot be used; the message names it.
            ValueError: if classes, background or method are not right.
            FloatingPointError: if the network puts out NaN or infinite values.
        """
        threshold = _threshold(background)
        vocabulary = as_vocabulary(classes, background)
        segmentor = self._segmentor(vocabulary, self._method(method))
        if not isinstance(images, (list, tuple)):
            where = f"{images}: " if isinstance(images, (str, os.PathLike)) else ""
            return self._segment(segmentor, [as_image(images)], threshold, where)[0]
        results: list[Result] = []
        for first in range(0, len(images), PORTION):
            portion = [
                as_image(image, name=_name(image, number))
                for number, image in enumerate(images[first : first + PORTION], first)
            ]
            where = f"images {first} to {first + len(portion) - 1}: "
            results += self._segment(segmentor, portion, threshold, where)
        return results

    def _segment(
        self,
        segmentor: _Segmentor,
        images: list[NDArray[np.uint8]],
        threshold: float | None,
        where: str,
    ) -> list[Result]:
        inputs = [self._input(segmentor, image) for image in images]
        sizes = [image.shape[:2] for image in images]
        try:
            (sheets,) = segmentor.sheets([segmentor.method], inputs, sizes)
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}{error}") from None
        return [
            _result(segmentor, image, pixels, sheet, threshold)
            for image, pixels, sheet in zip(images, inputs, sheets, strict=True)
        ]

    @torch.no_grad()
    def trace(
        self,
        image: Any,
        *,
        classes: Classes | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
    ) -> Trace:
        """One run of the trunk over the whole image, to look inside: masks, tokens, attention.

        `segment` runs window by window instead (unless `slide_crop=0`). `self.resized(image)` is the
        picture that belongs to it; patch (row, column) shows its pixels from (row, column) * patch.

        Args:
            image: as in `segment`, one.
            classes: for methods that ask for words.
            method: whose edits apply, in place of the model's own.

        Example::

            trace = model.trace("photo.jpg")
            trace.masks  # {layer: (1, N) bool}, the outliers that were replaced
            trace.attention(11)[0].mean(0)[1 + patch]  # (T,), where a patch looks
            visualize.outliers(model.resized("photo.jpg"), trace, layers=[5, 10])
        """
        vocabulary = NOTHING if classes is None else as_vocabulary(classes)
        segmentor = self._segmentor(vocabulary, self._method(method))
        context: dict[str, Any] = dict(guides=dict(segmentor.guides.items()))
        if classes is not None:
            context.update(text=segmentor.text_features(), index=vocabulary.index)
        pixels = segmentor._normalised(self._input(segmentor, as_image(image)))
        return segmentor.method.run(self.clip.visual, pixels[None], **context)

    def resized(self, image: Any) -> NDArray[np.uint8]:
        """The picture at the size in which the network sees it, RGB, (H, W, 3)."""
        pixels = as_image(image)
        if self.short_side is None:
            return pixels
        return mmcv.imrescale(pixels, (LONG_SIDE, self.short_side))  # what mmcv's Resize does

    def encode(self, queries: Sequence[str]) -> Tensor:
        """Unit text features of words, over all templates, (Q, C) float32; each is encoded once."""
        return torch.stack([self._embed(query) for query in queries])

    def _embed_one(self, query: str) -> Tensor:
        # one by one: what shares a batch would change the last bits
        with torch.inference_mode(False):  # kept for calls in which that may be on or off
            return text_bank(self.clip, [query], self._wordless.templates)[0]

    def _method(self, method: str | Mapping[str, Any] | Method | None) -> Method:
        if method is None:
            return self.method
        return self._build_method(method) if isinstance(method, str) else build_method(method)

    def _segmentor(self, vocabulary: Vocabulary, method: Method) -> _Segmentor:
        features = self.encode(vocabulary.queries) if vocabulary.queries else None
        return self._wordless.about(vocabulary, features, method)

    def _input(self, segmentor: _Segmentor, image: NDArray[np.uint8]) -> Tensor:
        """What the segmentor's windows are cut from, (3, h, w)."""
        pixels = torch.from_numpy(self.resized(image).transpose(2, 0, 1).copy())
        (prepared,) = segmentor.data_preprocessor(dict(inputs=[pixels]))["inputs"]
        return prepared

    def __repr__(self) -> str:
        weights = next(self.clip.parameters())
        return (
            f"Model({len(self.clip.visual.blocks)} blocks, patch {self.clip.visual.patch}, "
            f"{weights.device}, {str(weights.dtype).removeprefix('torch.')}, "
            f"short side {self.short_side})"
        )


class _Segmentor(OpenVocabSegmentor):
    """The segmentor, with a memory between it and the network."""

    memory: Memory

    def about(self, vocabulary: Vocabulary, features: Tensor | None, method: Method) -> _Segmentor:
        """One with words, their features (Q, C) and a method of its own; all modules are shared."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.vocabulary, other.query_features, other.method = vocabulary, features, method
        return other

    def _window_logits(
        self, methods: Sequence[Method], windows: Tensor, vit: VisionTransformer
    ) -> list[Tensor]:
        return [self.memory.logits(method, vit, windows, self._context()) for method in methods]


def _threshold(background: str | Sequence[str] | float | None) -> float | None:
    """The number among the meanings of `background`."""
    if isinstance(background, bool) or not isinstance(background, (int, float)):
        if isinstance(background, (str, list, tuple, type(None))):
            return None
        raise ValueError(
            f"background={background!r}: expected None, words, or a probability between 0 and 1"
        )
    if not 0 < background < 1:
        raise ValueError(f"background={background}: a threshold lies between 0 and 1")
    return float(background)


def _name(image: Any, number: int) -> str:
    """What errors call an image of a list: its path is name enough."""
    return "" if isinstance(image, (str, os.PathLike)) else f"image {number} of the list"


def _result(
    segmentor: OpenVocabSegmentor,
    image: NDArray[np.uint8],
    pixels: Tensor,
    sheet: LogitSheet,
    threshold: float | None,
) -> Result:
    names = segmentor.vocabulary.names
    label = partial(assign, index=segmentor.vocabulary.index, scale=segmentor.logit_scale)
    found = label(segmentor.final_rows(pixels, sheet), sheet.size)
    labels = found.labels.to(torch.int32).cpu().numpy()
    confidence = found.confidence.float().cpu().numpy()
    added = threshold is not None and BACKGROUND not in names
    if added:
        names, labels = (BACKGROUND, *names), labels + 1
    if threshold is not None:
        labels[confidence < threshold] = names.index(BACKGROUND)

    def slabs() -> Iterator[NDArray[np.float32]]:
        with torch.inference_mode():
            rows = segmentor.final_rows(pixels, sheet)
        height, width = sheet.size
        step = max(SLAB // (len(names) * width), 1)
        for start in range(0, height, step):
            stop = min(start + step, height)
            with torch.inference_mode():
                slab = partial(_shifted, rows, start)
                scores = label(slab, (stop - start, width), keep_scores=True).scores
            assert scores is not None  # they were asked for
            known = scores.float().cpu().numpy()
            yield np.pad(known, ((1, 0), (0, 0), (0, 0))) if added else known

    return Result(labels, confidence, names, image, slabs)


def _shifted(rows: Callable[[int, int], Tensor], by: int, start: int, stop: int) -> Tensor:
    """Rows counted from row `by`."""
    return rows(start + by, stop + by)
