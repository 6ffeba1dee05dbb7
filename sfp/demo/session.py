"""The model behind the page: one request at a time, with recent photos and traces cached."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sfp.api import Model
from sfp.data.images import read_image
from sfp.demo.pictures import Pixels, bounded
from sfp.method import Purify, build_method, self_contained_methods
from sfp.result import Result
from sfp.tokens import upcast
from sfp.trace import Trace
from sfp.visualize.tokens import as_map, named_detectors, patch_index
from sfp.vocabulary import Vocabulary, as_vocabulary, parse_words

MAX_PIXELS = 2**27  # 134 million, 0.4 GB in memory
MAX_QUERIES = 256  # each is a batch of prompts for the text encoder
OWN = "the method's own"
FALLBACK = "som"  # for methods without a detector


@dataclass(frozen=True)
class Timed:
    """A result, and the time in seconds for its words and its image."""

    result: Result
    text: float
    image: float

    def __str__(self) -> str:
        return (
            f"text {self.text:.2f} s, image {self.image:.2f} s, "
            f"total {self.text + self.image:.2f} s"
        )


@dataclass(frozen=True)
class Found:
    """The patches that a detector marks in a layer.

    Attributes:
        mask: (h, w).
        norms: norms of plain CLIP's tokens in the layer's output, (h, w).
        detector: its name and knobs.
        replaced: whether the method replaces these patches in this layer.
    """

    mask: NDArray[np.bool_]
    norms: NDArray[np.float32]
    detector: str
    replaced: bool


def typed_vocabulary(words: str | None, background: str | None = None) -> Vocabulary:
    """The words of the page's two fields, never taken as file names, since anyone may type them.

    Raises:
        ValueError: if there are none, one appears twice, or there are too many.
    """
    classes = parse_words(words or "")
    typed = [word for synonyms in classes for word in synonyms]
    if twice := sorted({word for word in typed if typed.count(word) > 1}):
        raise ValueError(f"{twice[0]!r} appears twice, so the scores would tie: remove one")
    rest = parse_words(background) if background and background.strip() else []
    vocabulary = as_vocabulary(classes, [word for names in rest for word in names] or None)
    if (count := len(vocabulary.queries)) > MAX_QUERIES:
        raise ValueError(f"{count} words: expected {MAX_QUERIES} at most")
    return vocabulary


class Session:
    """Computes the results shown by the page.

    Photos are given as paths, which are also the cache keys: gradio's paths contain a hash of the
    contents.

    Args:
        model: from `sfp.load`.
        weights: name of the weights.

    Attributes:
        blocks: number of blocks of the image encoder.
        patch: side of a patch in pixels.
        methods: names of the presets that run with the model's guides.
    """

    def __init__(self, model: Model, weights: str) -> None:
        self.model = model
        self.weights = weights
        self.blocks = len(model.clip.visual.blocks)
        self.patch = model.clip.visual.patch
        self.methods = self_contained_methods(model.engine.guides.keys())
        self._lock = threading.RLock()
        self.photo = lru_cache(8)(self._photo)
        self._trace = lru_cache(3)(self._run)  # each holds the tokens of all layers

    def _photo(self, path: str) -> Pixels:
        return bounded(read_image(path, name=Path(path).name, max_pixels=MAX_PIXELS))

    def segment(self, path: str, vocabulary: Vocabulary, method: str) -> Timed:
        """Segments a photo.

        Raises:
            ValueError: if the photo cannot be used.
        """
        photo = self.photo(path)
        with self._lock:
            start = time.perf_counter()
            self.model.encode(vocabulary.queries)
            encoded = time.perf_counter()
            result = self.model.segment(photo, vocabulary, method=method)
            return Timed(result, encoded - start, time.perf_counter() - encoded)

    def resized(self, path: str) -> Pixels:
        """The photo at the size used for traces."""
        return self.model.resized(self.photo(path))

    def outliers(self, path: str, method: str, detector: str, layer: int) -> Found:
        """The outliers that a detector finds in the output of a layer.

        Args:
            path: path of the photo.
            method: name of the method.
            detector: name of a detector, applied to plain CLIP's tokens; or `OWN` for the method's own,
                applied in its own run.
            layer: absolute number of any layer but the last.
        """
        purify = next((e for e in build_method(method).edits if isinstance(e, Purify)), None)
        with self._lock, torch.inference_mode():
            plain = self._trace(path, "clip")
            if detector == OWN and purify is not None:
                trace = self._trace(path, method)
                name, found = repr(purify.detector), purify.detector
            else:
                trace = plain
                name = FALLBACK if detector == OWN else detector
                found = named_detectors([name])[name]
            replaced = layer in trace.masks
            mask = trace.masks[layer] if replaced else found(trace, layer)
            norms = plain.outputs[layer].patches.norm(dim=-1)
            return Found(as_map(trace, mask[0]) > 0, as_map(plain, norms[0]), name, replaced)

    def attention(
        self, path: str, method: str, layer: int, patch: tuple[int, int]
    ) -> tuple[NDArray[np.float32], float]:
        """The attention of a patch (row, column) in a block, averaged over heads.

        Returns:
            Its attention to each patch, (h, w), and to the class token; they sum to 1.
        """
        with self._lock, torch.inference_mode():
            trace = self._trace(path, method)
            heads = trace.heads(layer)
            n = heads.prefix + patch_index(trace, patch)
            row = heads.similar(heads.q[:, :, n : n + 1], heads.k).softmax(-1)  # (1, H, 1, T)
            share = upcast(row)[0, :, 0].mean(0)
            return as_map(trace, share[heads.prefix :]), float(share[: heads.prefix].sum())

    def _run(self, path: str, method: str) -> Trace:
        return self.model.trace(self.photo(path), method=method)
