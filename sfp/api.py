"""The main entry point: load a model, name the classes, segment images.

Example::

    model = sfp.load("ViT-B/16", method="sfp")
    result = model.segment("street.jpg", ["road", "car", ["person", "pedestrian"]])
    result.labels, result.names, result.save("labels.png")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sfp.clip.checkpoints import published
from sfp.clip.model import CLIP
from sfp.clip.text import text_bank
from sfp.data.images import as_image, check_short_side, resize_short_side
from sfp.engine import Engine, Queries, choose_device
from sfp.feature_cache import FeatureCache, LRUCache
from sfp.method import Method, build_method
from sfp.result import Result, Scores
from sfp.trace import Trace
from sfp.vocabulary import (
    BACKGROUND,
    Classes,
    Vocabulary,
    as_vocabulary,
    background_threshold,
    check_threshold,
)

PORTION = 8  # images of a list that are processed together
WORDS = 2**14  # queries whose features are cached, 2 kB each
BANKS = 16  # vocabularies whose features are cached


def load(
    weights: str | Path | Mapping[str, Tensor] | CLIP = "ViT-B/16",
    method: str | Mapping[str, Any] | Method = "sfp",
    *,
    device: str | torch.device = "auto",
    precision: str = "auto",
    compiled: bool = False,
    graphs: bool = False,
    short_side: int | Literal["auto"] | None = "auto",
    slide_crop: int = 224,
    slide_stride: int = 112,
    slide_tiles: bool = False,
    pad_windows: bool | int = False,
    whole_via_input: bool = False,
    templates: str | Sequence[str] = "auto",
    logit_scale: float | str = 40.0,
    area_thd: float | None = None,
    pamr_steps: int = 0,
    window_batch: int | None = None,
    guides: Mapping[str, Any] | None = None,
    masks: Mapping[str, Any] | nn.Module | None = None,
    regions: Mapping[str, Any] | nn.Module | None = None,
    memory_mb: int = 512,
) -> Model:
    """Loads a CLIP and a method. The defaults are those of the benchmarks (docs/protocol.md).

    Args:
        weights: name, path or state dict for `load_clip`; or a `CLIP`, which is moved.
        method: preset name, `dict(type=name, knob=value, ...)` or a `Method`; `sfp.list_methods()`.
        device: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
        short_side: size in pixels to which the short side is resized (the long one to at most 2048).
            "auto" means 336, or the training size of the weights if that is known to be smaller (224
            for the mini CLIP), and no resizing for methods without CLIP (SAM 3's). None never resizes.
        precision, compiled, graphs, slide_crop, slide_stride, slide_tiles: as in `sfp.engine.Engine`.
        pad_windows, whole_via_input, templates, logit_scale: as in `sfp.engine.Engine`.
        area_thd, pamr_steps, window_batch, guides, masks, regions: as in `sfp.engine.Engine`.
        memory_mb: MiB on the device for cached features of recent images, which make segmenting them
            again with other words fast; 0 caches none.

    Raises:
        WeightsError: if the weights cannot be found, downloaded or read.
        ValueError: if a setting is wrong; the message lists the valid values.
    """
    if short_side not in ("auto", None):
        short_side = check_short_side(short_side)
    if memory_mb < 0:
        raise ValueError(f"memory_mb={memory_mb}: expected 0 (no cache) or more")
    device = choose_device(device)
    method = build_method(method)
    engine = Engine(
        weights,
        precision=precision,
        compiled=compiled,
        graphs=graphs,
        slide_crop=slide_crop,
        slide_stride=slide_stride,
        slide_tiles=slide_tiles,
        pad_windows=pad_windows,
        whole_via_input=whole_via_input,
        templates=templates,
        logit_scale=logit_scale,
        area_thd=area_thd,
        pamr_steps=pamr_steps,
        window_batch=window_batch,
        guides=guides,
        masks=masks,
        regions=regions,
        cache_bytes=memory_mb * 2**20,
    )
    usual = short_side == "auto"
    if short_side == "auto":
        short_side = _usual_short_side(weights, engine.clip)
    return Model(engine.to(device), method, short_side, for_clip=usual)


def _usual_short_side(weights: Any, clip: CLIP) -> int | None:
    """The short side of named weights; unnamed ones as wide as the mini CLIP use the mini's."""
    like_mini = clip.visual.conv1.out_channels == published.ARCHITECTURES[published.MINI].width
    unnamed = not isinstance(weights, (str, Path))
    return published.short_side(published.MINI if unnamed and like_mini else weights)


class Model:
    """Segments images; created by `load`. Thread-safe, and can be pickled.

    Each word is encoded once. Features of recent images are cached, so that segmenting the same image
    with other words costs little more than a product of features and words; results are equal to the
    last bit. Methods that use the words inside the network (ResCLIP) recompute that part.

    Args:
        engine: the frozen model with its settings.
        method: default for `segment`.
        short_side: as in `load`.
        for_clip: whether `short_side` applies to CLIP only, so that methods without CLIP see images at
            their own size.
    """

    def __init__(
        self,
        engine: Engine,
        method: Method,
        short_side: int | None,
        *,
        for_clip: bool = False,
    ) -> None:
        self.engine = engine
        self.method = method
        self.short_side = short_side
        self.for_clip = for_clip
        self._words: LRUCache[Tensor] = LRUCache(WORDS)
        self._banks: LRUCache[Queries] = LRUCache(BANKS)

    @property
    def clip(self) -> CLIP:
        """The frozen model."""
        return self.engine.clip

    @property
    def memory(self) -> FeatureCache:
        """The cached features of recent images; `memory.clear()` empties the cache."""
        return self.engine.cache

    @overload
    def segment(
        self,
        images: list[Any] | tuple[Any, ...],
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
        regions: Sequence[Any] | None = None,
    ) -> list[Result]: ...

    @overload
    def segment(
        self,
        images: Any,
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
        regions: Any = None,
    ) -> Result: ...

    def segment(
        self,
        images: Any,
        classes: Classes,
        *,
        background: str | Sequence[str] | float | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
        regions: Any = None,
    ) -> Result | list[Result]:
        """Labels each pixel with one of the classes.

        Args:
            images: a path, a `file://` URL, bytes, a Pillow image, an array (H, W, 3) in RGB, uint8 or
                floats from 0 to 1, or a tensor (3, H, W) of the same (`sfp.as_image`); or a list of
                them, of any sizes, whose windows go through the network together.
            classes: a list with a name or a list of synonyms per class, the path of a class file, or
                the name of a benchmark ("voc21", "ade20k", ...) to use its words (but not its
                thresholds).
            background: None: every pixel becomes one of the classes. A word or a list of words: they
                describe everything else and become class 0, "background". A number: pixels whose best
                probability is lower become "background": that class if there is one, otherwise a new
                class 0. Probabilities depend on all classes; benchmarks use 0.15 to 0.35.
            method: replaces the model's own method.
            regions: for methods that need them, an integer map of region ids, (h, w) of any size with
                the image's aspect ratio, 0 where there is no region; for TextRegion and LaVG also
                overlapping masks, (R, h, w), bool or floats above 0 inside. For a list of images, a
                list. By default the model's region proposer supplies them.

        Returns:
            The result at the image's own size; for a list of images, a list of results.

        Raises:
            ImageError: if an image cannot be used; the message names it.
            ValueError: if classes, background or method are invalid.
            FloatingPointError: if the network outputs NaN or infinite values.
        """
        threshold = background_threshold(background)
        vocabulary = as_vocabulary(classes, background)
        method = self._method(method)
        if method.decision is None:  # otherwise scores are not a softmax over queries
            check_threshold(vocabulary, threshold)
        if not isinstance(images, (list, tuple)):
            where = f"{images}: " if isinstance(images, (str, os.PathLike)) else ""
            ids = self._regions([images], None if regions is None else [regions], method)
            return self._segment([as_image(images)], vocabulary, method, threshold, where, ids)[0]
        if regions is not None and len(regions) != len(images):
            raise ValueError(
                f"got {len(regions)} region maps for {len(images)} images: pass one per image"
            )
        results: list[Result] = []
        for first in range(0, len(images), PORTION):
            portion = [
                as_image(image, name=_name(image, number))
                for number, image in enumerate(images[first : first + PORTION], first)
            ]
            where = f"images {first} to {first + len(portion) - 1}: "
            own = slice(first, first + PORTION)
            ids = self._regions(images[own], None if regions is None else regions[own], method)
            results += self._segment(portion, vocabulary, method, threshold, where, ids)
        return results

    @torch.inference_mode()
    def _segment(
        self,
        images: list[NDArray[np.uint8]],
        vocabulary: Vocabulary,
        method: Method,
        threshold: float | None,
        where: str,
        regions: Sequence[Tensor | None] | None = None,
    ) -> list[Result]:
        engine, queries = self.engine, self.queries(vocabulary)
        as_it_is = self.for_clip and not method.reads_clip
        inputs = [
            engine.input(_tensor(image)) if as_it_is else self.input(image) for image in images
        ]
        sizes = [image.shape[:2] for image in images]
        try:
            (sheets,) = engine.logits([method], inputs, sizes, queries, regions=regions)
        except FloatingPointError as error:
            raise FloatingPointError(f"{where}{error}") from None
        results = []
        named = vocabulary.names
        background = named.index(BACKGROUND) if BACKGROUND in named else None
        added = threshold is not None and background is None
        names = (BACKGROUND, *named) if added else named
        for image, pixels, sheet in zip(images, inputs, sheets, strict=True):
            full = None
            if engine.masks is not None:
                full = engine.normalise(_tensor(image).to(engine.device))
            found = engine.label(
                pixels,
                sheet,
                queries.index,
                method=method,
                full_image=full,
                threshold=threshold,
                background=background,
            )
            labels = found.labels.to(torch.int32).cpu().numpy()
            if added:  # its number is K, that of the result is 0
                labels = (labels + 1) % len(names)
            confidence = found.confidence.float().cpu().numpy()
            if (refine := engine.refinement(pixels)) is not None:
                refine = replace(refine, image=refine.image.cpu())
            scores = Scores(
                sheet.cpu(), queries.index, engine.logit_scale, added, refine, method.decision
            )
            results.append(Result(labels, confidence, names, image, scores))
        return results

    @torch.no_grad()
    def trace(
        self,
        image: Any,
        *,
        classes: Classes | None = None,
        method: str | Mapping[str, Any] | Method | None = None,
    ) -> Trace:
        """Runs the trunk once over the whole image, to inspect masks, tokens and attention.

        `segment` runs window by window instead (unless `slide_crop=0`). The input of the run is
        `self.resized(image)`; patch (row, column) starts at its pixel (row, column) * patch size.

        Args:
            image: a single image, as in `segment`.
            classes: words, for methods that need them.
            method: replaces the model's own method; its edits apply.

        Example::

            trace = model.trace("photo.jpg")
            trace.masks  # {layer: (1, N) bool}, the outliers replaced
            trace.attention(11)[0].mean(0)[1 + patch]  # (T,), the attention of a patch
            visualize.outliers(model.resized("photo.jpg"), trace, layers=[5, 10])
        """
        self.engine.convert()
        queries = None if classes is None else self.queries(as_vocabulary(classes))
        context = self.engine.context(queries)
        pixels = self.engine.normalise(self.input(as_image(image)))
        return self._method(method).run(self.clip.visual, pixels[None], **context)

    def resized(self, image: Any) -> NDArray[np.uint8]:
        """The image at the size that the network sees, RGB, (H, W, 3)."""
        pixels = as_image(image)
        return pixels if self.short_side is None else resize_short_side(pixels, self.short_side)

    def input(self, image: NDArray[np.uint8]) -> Tensor:
        """The resized image from which windows are cut, (3, h, w) on the model's device."""
        return self.engine.input(_tensor(self.resized(image)))

    def queries(self, vocabulary: Vocabulary) -> Queries:
        """The text features of a vocabulary."""
        key = (vocabulary.queries, vocabulary.index, self._state())
        if (found := self._banks.get(key)) is None:
            words = vocabulary.queries
            found = Queries(self.encode(words), vocabulary.index, words)
            self._banks.put(key, found)  # a graph's recording is of this tensor
        return found

    def encode(self, queries: Sequence[str]) -> Tensor:
        """Unit text features averaged over templates, (Q, C) float32; each word is encoded once."""
        state = self._state()
        with torch.inference_mode(False):  # kept for calls both inside and outside that mode
            return torch.stack([self._embedding(query, state) for query in queries])

    def _state(self) -> tuple[Any, ...]:
        self.engine.convert()
        return self.clip.text_digest, self.clip.dtype, self.engine.device

    def _embedding(self, query: str, state: tuple[Any, ...]) -> Tensor:
        # one at a time: batching words would change the last bits
        if (row := self._words.get((query, *state))) is None:
            row = text_bank(self.clip, [query], self.engine.templates)[0]
            self._words.put((query, *state), row)
        return row

    def _regions(
        self, images: Sequence[Any], regions: Sequence[Any] | None, method: Method
    ) -> Sequence[Tensor | None] | None:
        """The regions of images: those given, or those of files named as the images."""
        if regions is not None:
            return [_ids(each) for each in regions]
        if not method.needs_regions:
            return None
        names = [
            str(Path(x).with_suffix("")) if isinstance(x, (str, os.PathLike)) else None
            for x in images
        ]
        return self.engine.stored_regions(names)

    def _method(self, method: str | Mapping[str, Any] | Method | None) -> Method:
        return self.method if method is None else build_method(method)

    def __repr__(self) -> str:
        return (
            f"Model({len(self.clip.visual.blocks)} blocks, patch {self.clip.visual.patch}, "
            f"{self.engine.device}, {self.engine.computes_in}, short side {self.short_side})"
        )


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image.transpose(2, 0, 1).copy())  # (3, H, W)


def _ids(regions: Any) -> Tensor:
    """An id map or masks, in the engine's format."""
    ids = torch.as_tensor(regions)
    if ids.ndim == 3 and (ids.is_floating_point() or ids.dtype == torch.bool):
        return ids.float()
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or bool((ids < 0).any()):
        raise ValueError(
            f"regions of shape {tuple(ids.shape)} and type {ids.dtype}: expected an id map (h, w) of "
            "whole numbers from 0, or masks (R, h, w) of bool or floats"
        )
    return ids.long()


def _name(image: Any, number: int) -> str:
    """The name of an image in a list, for errors; empty for paths, which name themselves."""
    return "" if isinstance(image, (str, os.PathLike)) else f"image {number} of the list"
