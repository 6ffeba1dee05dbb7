"""The engine: images, words and methods in, logits and labels out, in plain PyTorch.

Words and methods are arguments of its calls, so one engine serves any number of them, also from several
threads. `sfp.Model`, the mmsegmentation segmentor, bulk labelling and clustering each hold one.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.checkpoints.loading import load_clip
from sfp.clip.fingerprint import state_key
from sfp.clip.int8 import quantised
from sfp.clip.model import CLIP
from sfp.clip.text import model_templates, prompt_templates, text_bank
from sfp.clip.vit import VisionTransformer
from sfp.feature_cache import FeatureCache, LRUCache, is_hashable
from sfp.functional.kept import constant
from sfp.functional.labels import Labels, Threshold, assign, below, decided, within
from sfp.functional.pamr import Refinement, Unit
from sfp.functional.precision import cpu_has, native_half
from sfp.functional.regions import vote_in_regions
from sfp.functional.windows import LogitSheet, WindowGrid, nearest
from sfp.graphs import Graphs
from sfp.guides import build_guides
from sfp.masks import RegionFiles, build_masks, build_regions
from sfp.method import Method
from sfp.numerics import finite, first_bad
from sfp.registry import suggest
from sfp.tokens import Tokens
from sfp.trace import NO_REGIONS, RegionsError, Trace, Words
from sfp.vocabulary import Vocabulary
from sfp.whole import WholeImage

LARGE = 2**24  # pixels above which an image stays in 8 bits and is normalised window by window
BANKS = 16  # text banks kept in memory; all are cached on disk
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # for everything that is not 8-bit
}
Prepare: TypeAlias = "Callable[[Tensor], Tensor]"
_CONVERTING = threading.Lock()


@runtime_checkable
class FollowsNormalisation(Protocol):
    """A part whose input images are normalised for a particular CLIP."""

    def follow(self, clip: CLIP) -> None:
        """Uses the mean and standard deviation of `clip` from now on."""


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device with a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(name)!r} is not available here: {reason}") from None
    return device


@dataclass(frozen=True)
class Queries:
    """Encoded words.

    Attributes:
        features: unit text features, (Q, C) float32.
        index: class of each query, from 0, in order.
        words: the queries, or None if only their features are known.
    """

    features: Tensor
    index: tuple[int, ...]
    words: tuple[str, ...] | None = None


class Engine:
    """A frozen CLIP with everything between an image and its labels except words and method.

    Windows of equal size, of all images of a call, go through the network together; their
    low-resolution logits are merged and upsampled by two small matrices (`functional/windows.py`).

    Args:
        weights: name, path or state dict for `load_clip`; or a `CLIP`, used as it is.
        templates: prompt templates, a list or the name of a set (`sfp.clip.templates`); "auto" uses
            those of the model's authors, for nearly all models CLIP's 80.
        logit_scale: inverse temperature of the softmax over queries; "auto" uses the one that the model
            was trained with (100 in CLIP). Methods were tuned with 40 to 55 on CLIP, but the cosines of
            SigLIP and others are much smaller.
        prob_thd: pixels whose best probability is below this become class 0. Two numbers are the bounds
            of a threshold computed for each image, Otsu's (S2C2Seg).
        area_thd: classes that win at most this share of the pixels not won by the background are
            removed; the background is class 0, for `sfp.load` the class of that name.
        slide_crop: side of the sliding windows in pixels; 0 processes whole images.
        slide_stride: stride of the windows in pixels.
        slide_tiles: use non-overlapping windows instead: equal tiles with sides of about `slide_crop`,
            each resized to the tower's training size (TextRegion). `slide_stride` and `pad_windows`
            are then ignored.
        pad_windows: pad windows with zeros to whole patches (True, as in ClearCLIP's release), or to
            multiples of this many pixels (56 in ProxyCLIP and CorrCLIP), instead of dropping the pixels
            beyond the last whole patch.
        whole_via_input: with `slide_crop=0`, resize logits to the size of the network's input before
            the original size (NACLIP's release).
        window_batch: largest number of windows per forward pass; None means 32 on a GPU and one per
            thread (at least 2) on a CPU, where more would cost memory and gain next to nothing.
        pamr_steps: steps of pixel-adaptive mask refinement on the final logits; 0 for none.
        pamr_dilations: dilations of its neighbourhoods, in pixels.
        pamr_unit: unit of its colour differences, "deviation" or "mean" (`sfp.functional.pamr.pamr`).
        guides: external encoders by name, as config nodes or modules, for methods that need them.
        masks: settings of a `MaskVote`, `dict(type="sam_refine", ...)` for a `SamRefine`, or a module
            with their interface: makes labels follow the masks of SAM or DINO.
        regions: settings of a `RegionMap`, `dict(type="files", folder=...)` for `RegionFiles`, or a
            module with their interface: finds regions for methods that need them, if the caller gives
            none.
        precision: "auto" (fp16 on CUDA, fp32 elsewhere, so that all CPUs give the same labels), "fp32",
            "fp16", "bf16", "half" (fp16 on CUDA, bf16 on a CPU with instructions for it, else fp32), or
            "int8": approximate 8-bit products in the blocks, only on a CPU (`sfp/clip/int8.py`).
            `Engine.computes_in` tells which one is in use.
        compiled: run the blocks' MLPs through `torch.compile`; meant for GPUs, slower on CPUs.
        graphs: on a GPU, replay the network as a CUDA graph, recorded at the first batch of each shape,
            so that Python launches no kernels. Helps where batches are too small to fill the GPU. Hooks
            on modules do not run, and no features are cached. No effect on a CPU.
        cache_bytes: size of the cache for features of recent images; 0 for none.

    Raises:
        WeightsError: if the weights cannot be found, downloaded or read.
        ValueError: if a setting is wrong; the message lists the valid values.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | CLIP,
        *,
        templates: str | Sequence[str] = "auto",
        logit_scale: float | str = 40.0,
        prob_thd: Threshold = 0.0,
        area_thd: float | None = None,
        slide_crop: int = 224,
        slide_stride: int = 112,
        slide_tiles: bool = False,
        pad_windows: bool | int = False,
        whole_via_input: bool = False,
        window_batch: int | None = None,
        pamr_steps: int = 0,
        pamr_dilations: Sequence[int] = (8, 16),
        pamr_unit: Unit = "deviation",
        guides: Mapping[str, Any] | None = None,
        masks: Mapping[str, Any] | nn.Module | None = None,
        regions: Mapping[str, Any] | nn.Module | None = None,
        precision: str = "auto",
        compiled: bool = False,
        graphs: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        if precision not in (known := ["auto", "half", *PRECISIONS]):
            raise ValueError(f"unknown precision {precision!r}{suggest(precision, known)}")
        if slide_crop and not slide_tiles and not 0 < slide_stride <= slide_crop:
            raise ValueError(
                f"slide_stride={slide_stride} must be between 1 and slide_crop={slide_crop}: "
                "larger strides would leave pixels without a label"
            )
        if slide_tiles and not slide_crop:
            raise ValueError(
                f"slide_tiles=True needs slide_crop > 0, the side of the tiles, got {slide_crop}"
            )
        if window_batch is not None and window_batch < 1:
            raise ValueError(f"window_batch={window_batch}: expected at least 1, or None")
        if isinstance(logit_scale, str) and logit_scale != "auto":
            raise ValueError(f"logit_scale={logit_scale!r}: expected a number or 'auto'")
        model_templates(templates)  # raises before anything is loaded
        if pamr_steps < 0:
            raise ValueError(f"pamr_steps={pamr_steps}: expected 0 (no refinement) or more")
        if not pamr_dilations or min(pamr_dilations) < 1:
            raise ValueError(
                f"pamr_dilations={pamr_dilations}: expected at least one, from 1 pixel"
            )
        if pamr_unit not in (units := ("deviation", "mean")):
            raise ValueError(f"unknown pamr_unit={pamr_unit!r}{suggest(pamr_unit, units)}")
        if isinstance(prob_thd, Sequence) and not (
            len(prob_thd) == 2 and 0 <= prob_thd[0] <= prob_thd[1]
        ):
            raise ValueError(
                f"prob_thd={prob_thd!r}: expected a number, or the least and the largest threshold"
            )
        self.prob_thd = prob_thd
        self.area_thd = area_thd
        self.slide_crop = slide_crop
        self.slide_stride = slide_stride
        self.slide_tiles = slide_tiles
        self.pad_windows = pad_windows
        self.whole_via_input = whole_via_input
        self.window_batch = window_batch
        self.pamr_steps = pamr_steps
        self.pamr_dilations = tuple(pamr_dilations)
        self.pamr_unit: Unit = pamr_unit
        self.precision = precision
        self.guides = build_guides(guides)
        self.masks = build_masks(masks)
        self.regions = build_regions(regions)
        self.clip = _adapted(
            weights if isinstance(weights, CLIP) else load_clip(weights), precision, compiled
        )
        self.logit_scale = (
            float(self.clip.logit_scale.exp()) if logit_scale == "auto" else float(logit_scale)
        )
        self.templates = model_templates(templates, self.clip.text.templates)
        for part in (self.masks, self.regions, *self.guides.values()):
            if isinstance(part, FollowsNormalisation):
                part.follow(self.clip)
        self.cache = FeatureCache(cache_bytes)
        self.graphs = Graphs() if graphs else None
        self._banks: LRUCache[Tensor] = LRUCache(BANKS)
        self._converted: tuple[torch.device, torch.dtype] | None = None
        self.convert()

    # -- device and precision --------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.clip.device

    @property
    def computes_in(self) -> str:
        """The precision in use on this device: "fp32", "fp16", "bf16" or "int8"."""
        if self.precision == "half":
            return native_half(self.device) or "fp32"
        if self.precision == "auto":
            return "fp16" if self.device.type == "cuda" else "fp32"
        return self.precision

    def to(self, device: str | torch.device) -> Engine:
        """Moves all parts to a device and converts them to the precision for it."""
        for part in self.parts():
            part.to(device)
        self.convert()
        return self

    def parts(self) -> list[nn.Module]:
        """All modules with weights: the CLIP, the guides, the mask and region proposers."""
        proposers = [part for part in (self.masks, self.regions) if part is not None]
        return [self.clip, self.guides, *proposers]

    def convert(self) -> None:
        """Converts the weights to `precision` if their device or dtype has changed.

        A host framework may move or cast modules at any time (mmengine's Runner calls `.to`), so every
        call of the engine starts with this check.

        Raises:
            ValueError: if the device does not support the precision.
        """
        device = self.device
        if (device, self.clip.dtype) == self._converted:
            return
        with _CONVERTING:
            name = self.computes_in
            if name == "int8" and device.type != "cpu":
                raise ValueError("precision='int8' needs a CPU: on a GPU use 'fp16' or 'bf16'")
            if device.type == "cpu" and name != "fp32" and cpu_has(name) is False:
                warnings.warn(
                    f"this CPU has no instructions for {name}, so it is slower than fp32 here "
                    "(precision='half' uses bf16 only on CPUs that have them)",
                    stacklevel=3,
                )
            for part in self.parts():
                part.to(PRECISIONS[name])
            self._converted = (device, PRECISIONS[name])

    # -- words -----------------------------------------------------------------------------------

    def queries(self, vocabulary: Vocabulary) -> Queries:
        """The text features of a vocabulary, encoded or read from the cache."""
        return Queries(self.encode(vocabulary.queries), vocabulary.index, tuple(vocabulary.queries))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit text features averaged over templates, (Q, C) float32.

        Their last bits depend on which texts are encoded together.
        """
        self.convert()
        key = (self.clip.text_digest, self.device, self.clip.dtype, tuple(texts))
        if (bank := self._banks.get(key)) is None:
            with torch.inference_mode(False):  # cached for calls both inside and outside that mode
                bank = text_bank(self.clip, texts, self.templates).float()
            self._banks.put(key, bank)
        return bank

    def template_banks(self, texts: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Unit text features for each template separately, (M, Q, C) float32."""
        self.convert()
        templates = prompt_templates(templates)
        key = (self.clip.text_digest, self.device, self.clip.dtype, tuple(texts), tuple(templates))
        if (banks := self._banks.get(key)) is None:
            with torch.inference_mode(False):
                each = [text_bank(self.clip, texts, [template]) for template in templates]
                banks = torch.stack(each).float()
            self._banks.put(key, banks)
        return banks

    def given_features(self, features: Tensor | str | Path, vocabulary: Vocabulary) -> Tensor:
        """Text features computed elsewhere, as unit vectors (Q, C) float32.

        Args:
            features: a tensor (Q, C), or a safetensors file with such a tensor "queries".
            vocabulary: the queries that its rows belong to.

        Raises:
            ValueError: if the file cannot be read or the shape is wrong.
        """
        if isinstance(features, (str, Path)):
            try:
                features = load_file(features)["queries"]
            except (KeyError, SafetensorError) as error:
                raise ValueError(
                    f"query_features={str(features)!r}: expected a safetensors file with a tensor "
                    f"'queries' that has one row per query ({type(error).__name__}: {error})"
                ) from None
        expected = (len(vocabulary.queries), self.clip.embed_dim)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"query_features of shape {tuple(features.shape)}: expected {expected}, one row per "
                "query of `classes`"
            )
        return F.normalize(features.float(), dim=-1)

    # -- images ----------------------------------------------------------------------------------

    def normalise(self, image: Tensor) -> Tensor:
        """Normalises an RGB image or window (3, H, W) uint8; floats are returned unchanged."""
        if image.dtype != torch.uint8:
            return image
        mean, std = (constant(x, image)[:, None, None] for x in (self.clip.mean, self.clip.std))
        return (image.float() - mean) / std

    def input(self, image: Tensor) -> Tensor:
        """An RGB image (3, H, W) uint8 on the engine's device, normalised unless it is large."""
        image = image.to(self.device)
        return image if is_large(image) else self.normalise(image)

    # -- the network -----------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(
        self,
        methods: Sequence[Method],
        images: Tensor | Sequence[Tensor],
        sizes: Sequence[Sequence[int]],
        queries: Queries,
        *,
        prepare: Prepare | None = None,
        regions: Sequence[Tensor | None] | None = None,
    ) -> list[list[LogitSheet]]:
        """Runs all windows of all images through the network.

        Args:
            methods: the methods; those with equal trunks share its run, unless features are cached.
            images: (3, H, W) each, normalised, or 8-bit if `prepare` accepts that.
            sizes: rows and columns of each image's output.
            queries: the words.
            prepare: prepares a window for the network; `normalise` by default.
            regions: for each image an id map (h, w) of any size, 0 where there is no region, or for
                methods that support them overlapping masks, (R, h, w) floats. None uses the engine's
                own proposer if a method needs regions.

        Returns:
            For each method, the merged logits of each image.
        """
        self.convert()
        prepare = prepare or self.normalise
        weights = self._weights() if self.cache.limit and self.graphs is None else None
        maps = self._regions(methods, images, regions, sizes, prepare)
        wholes = [
            WholeImage(self._grid(image), image, prepare, _fitted(ids, image))
            for image, ids in zip(images, maps, strict=True)
        ]
        logits: list[list[list[Tensor]]] = [[[] for _ in images] for _ in methods]
        together = [i for i, method in enumerate(methods) if method.needs_whole]
        apart = [i for i in range(len(methods)) if i not in together]
        if apart:
            for numbers, windows, ids in self._batches(wholes):
                outputs = self.window_logits(
                    [methods[i] for i in apart], windows, queries, weights, regions=ids
                )
                for i, batch in zip(apart, outputs, strict=True):
                    for n, output in zip(numbers, batch, strict=True):
                        logits[i][n].append(output)
        if together:
            for n, whole in enumerate(wholes):
                windows, ids = self._windows(whole)
                outputs = self.window_logits(
                    [methods[i] for i in together],
                    windows,
                    queries,
                    weights,
                    regions=ids,
                    whole=whole,
                )
                for i, output in zip(together, outputs, strict=True):
                    logits[i][n] += output
        return [
            [
                _sheet(method, whole.grid, torch.stack(parts), (int(size[0]), int(size[1])), ids)
                for whole, parts, size, ids in zip(wholes, each, sizes, maps, strict=True)
            ]
            for method, each in zip(methods, logits, strict=True)
        ]

    @torch.inference_mode()
    def read(
        self,
        method: Method,
        image: Tensor,
        *,
        prepare: Prepare | None = None,
        regions: Tensor | None = None,
    ) -> tuple[Tokens, Trace]:
        """A method's features of all windows of an image, without words, and their trace.

        Args:
            method, image, prepare: as in `logits`.
            regions: regions of the image, as in `logits`; by default those of the engine's own
                proposer, if the method needs some.

        Raises:
            LookupError: if the method needs words to compute its features.
        """
        self.convert()
        prepare = prepare or self.normalise
        if regions is None and method.needs_regions:
            regions = self.propose_regions(image, image.shape[-2:], prepare=prepare)
        regions = _fitted(None if regions is None else regions.to(self.device), image)
        whole = WholeImage(self._grid(image), image, prepare, regions)
        windows, ids = self._windows(whole)
        return method.features(
            self.clip.visual,
            windows,
            regions=ids,
            whole=whole,
            portion=self.windows_at_once,
            **self.context(),
        )

    def features(self, method: Method, image: Tensor, *, prepare: Prepare | None = None) -> Tensor:
        """Unit features of the patches of all windows of an image, (N, C) float32.

        Raises:
            LookupError: if the method needs words to compute its features.
        """
        tokens, _ = self.read(method, image, prepare=prepare)
        return F.normalize(tokens.patches.float(), dim=-1).flatten(0, 1)

    def tokens(self, method: Method, windows: Tensor, queries: Queries) -> Tokens:
        """Patch features of windows (B, 3, H, W) in the joint space, of width C."""
        self.convert()
        read, _ = method.features(self.clip.visual, windows, **self.context(queries))
        return read.only_patches()

    def window_logits(
        self,
        methods: Sequence[Method],
        windows: Tensor,
        queries: Queries,
        weights: Hashable = None,
        *,
        regions: Tensor | None = None,
        whole: WholeImage | None = None,
    ) -> list[Tensor]:
        """Each method's logits for windows (B, 3, H, W) at patch resolution, (B, Q, h, w).

        Args:
            methods: the methods.
            windows: normalised windows.
            queries: the words.
            weights: cache key that changes with the weights; None does not use the cache.
            regions: region ids of the windows' pixels, (B, H, W).
            whole: the image, if these are all of its windows; methods that work on the grid of the
                whole image then return (1, Q, h, w).

        Windows for which half precision gives NaN or infinite values run again in float32.

        Raises:
            FloatingPointError: if float32 does so too; the message names the first part affected.
        """
        vit, context = self.clip.visual, self.context(queries)
        context.update(regions=regions)
        if whole is not None:
            context.update(whole=whole, portion=self.windows_at_once)
        logits = self._run(methods, windows, context, vit, weights)
        bad = [method for method, x in zip(methods, logits, strict=True) if not finite(x)]
        if not bad:
            return logits
        where = first_bad(bad[0], vit, windows, context)
        if vit.dtype != torch.float32:
            single = copy.deepcopy(vit).float()
            logits = self._eager(methods, windows, context, single)  # a rare case: not cached
            if all(finite(x) for x in logits):
                warnings.warn(
                    f"NaN or infinite values in {vit.dtype}, first in {where}; these windows "
                    "ran again in float32 (precision='fp32' avoids the first run)",
                    stacklevel=2,
                )
                return logits
            where = first_bad(bad[0], single, windows, context)
        raise FloatingPointError(
            f"NaN or infinite values, first in {where}, also in float32: the weights or the image "
            "are damaged or exceeded the range of the precision they were converted to, or this part "
            "computes them"
        )

    def _run(
        self,
        methods: Sequence[Method],
        windows: Tensor,
        context: Mapping[str, Any],
        vit: VisionTransformer,
        weights: Hashable,
    ) -> list[Tensor]:
        if weights is not None:
            return [self.cache.logits(m, vit, windows, context, weights) for m in methods]
        apart = context.get("regions") is None and context.get("whole") is None
        if self.graphs is not None and apart and all(map(is_hashable, methods)):
            modules = [vit, *self.guides.values(), *(method.operate(vit) for method in methods)]
            pointers = tuple(p.data_ptr() for module in modules for p in module.parameters())
            return self.graphs(
                (tuple(methods), id(context["text"]), context["index"], pointers, self._autocast()),
                lambda batch: self._eager(methods, batch, context, vit),
                windows,
                alive=(context, modules),
            )
        return self._eager(methods, windows, context, vit)

    def _eager(
        self,
        methods: Sequence[Method],
        windows: Tensor,
        context: Mapping[str, Any],
        vit: VisionTransformer,
    ) -> list[Tensor]:
        logits: list[Tensor | None] = [None] * len(methods)
        for trunk in dict.fromkeys(method.trunk for method in methods):
            sharing = [i for i, method in enumerate(methods) if method.trunk == trunk]
            trace = methods[sharing[0]].run(vit, windows, **context)
            for i in sharing:
                logits[i] = methods[i].read_logits(trace)
        return logits  # type: ignore[return-value]

    def context(self, queries: Queries | None = None) -> dict[str, Any]:
        """The fields of a trace other than the image; those of words only if there are some."""
        fields: dict[str, Any] = dict(
            guides=dict(self.guides.items()), normalisation=(self.clip.mean, self.clip.std)
        )
        if queries is not None:
            fields.update(text=queries.features, index=queries.index)
            if (words := queries.words) is not None:
                fields.update(words=Words(words, partial(self.template_banks, words)))
        return fields

    def _weights(self) -> Hashable:
        """A key for everything that features depend on besides pixels and method."""
        return state_key(self.clip.visual), state_key(self.guides), self._autocast()

    def _autocast(self) -> Hashable:
        kind = self.device.type
        return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    def _grid(self, image: Tensor) -> WindowGrid:
        patch = self.clip.visual.patch
        if self.slide_tiles:
            native = [patch * cells for cells in self.clip.visual.usual_grid]
            return WindowGrid.tiles(image.shape[-2:], self.slide_crop, native)
        return WindowGrid.over(
            image.shape[-2:],
            self.slide_crop,
            self.slide_stride,
            multiple=patch if self.pad_windows is True else int(self.pad_windows) or 1,
            least=patch,
            via_input=self.whole_via_input,
        )

    def _batches(
        self, wholes: Sequence[WholeImage]
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Batches of windows of equal size: their images' numbers, (B, 3, H, W), and their regions."""
        queues: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = defaultdict(list)
        for n, whole in enumerate(wholes):
            queues[whole.grid.window] += [(n, place) for place in whole.grid.places]
        step = self.windows_at_once
        for queue in queues.values():
            for i in range(0, len(queue), step):
                batch = queue[i : i + step]
                cut = [wholes[n].cut(place) for n, place in batch]
                ids = [part for _, part in cut if part is not None]
                windows = torch.stack([window for window, _ in cut])
                yield [n for n, _ in batch], windows, torch.stack(ids) if ids else None

    def _windows(self, whole: WholeImage) -> tuple[Tensor, Tensor | None]:
        """All windows of an image, (B, 3, H, W), and their regions, (B, H, W)."""
        cut = [whole.cut(place) for place in whole.grid.places]
        ids = [part for _, part in cut if part is not None]
        return torch.stack([window for window, _ in cut]), torch.stack(ids) if ids else None

    def stored_regions(self, names: Sequence[str | None]) -> list[Tensor | None] | None:
        """The regions of images that lie in files, where the settings say so (`RegionFiles`).

        Args:
            names: the images' paths without their endings; None for images without one.
        """
        if not isinstance(self.regions, RegionFiles):
            return None
        return [None if name is None else self.regions.read(name) for name in names]

    def _regions(
        self,
        methods: Sequence[Method],
        images: Tensor | Sequence[Tensor],
        given: Sequence[Tensor | None] | None,
        sizes: Sequence[Sequence[int]],
        prepare: Prepare,
    ) -> list[Tensor | None]:
        """Each image's id map if a method needs one, either given or proposed at the output size."""
        if not any(method.needs_regions for method in methods):
            return [None] * len(images)
        maps: Sequence[Tensor | None] = [None] * len(images) if given is None else given
        return [
            self.propose_regions(image, size, prepare=prepare)
            if ids is None
            else ids.to(self.device)
            for ids, image, size in zip(maps, images, sizes, strict=True)
        ]

    def propose_regions(
        self, image: Tensor, size: Sequence[int], *, prepare: Prepare | None = None
    ) -> Tensor:
        """The regions of an image (3, H, W) by the engine's own proposer, at a size: (H', W') ids.

        Or masks, (R, h, w), where the settings leave them as they are.

        Raises:
            LookupError: if the settings name no proposer.
        """
        if self.regions is None:
            raise RegionsError(NO_REGIONS)
        return self.regions(
            self.clip.visual,
            (prepare or self.normalise)(image),
            (int(size[0]), int(size[1])),
            guides=dict(self.guides.items()),
        )

    @property
    def windows_at_once(self) -> int:
        """Largest number of windows per forward pass: `window_batch`, or a default by device."""
        if self.window_batch is not None:
            return self.window_batch
        return max(torch.get_num_threads(), 2) if self.device.type == "cpu" else 32

    # -- labels ----------------------------------------------------------------------------------

    @torch.inference_mode()
    def label(
        self,
        image: Tensor,
        sheet: LogitSheet,
        index: Sequence[int],
        *,
        method: Method | None = None,
        scores: bool = False,
        full_image: Tensor | None = None,
        prepare: Prepare | None = None,
        threshold: float | None = None,
        background: int | None = 0,
    ) -> Labels:
        """Labels an image: refinement, softmax, best synonym, thresholds, vote in masks.

        Args:
            image: as in `logits`.
            sheet: its merged logits.
            index: class of each query.
            method: its `decision` computes the class scores; None uses the softmax over queries.
            scores: whether to return class probabilities, (K, H, W).
            full_image: normalised input of mask proposers; `image` by default.
            prepare: as in `logits`.
            threshold: pixels whose best probability is below this become `background`: before labels
                vote in masks, but after stages that work on probabilities. In addition to `prob_thd`.
            background: class that `area_thd` leaves alone. None: there is none, so that all classes
                may be removed but the largest, and pixels below `threshold` get the number K.
        """
        prepare = prepare or self.normalise
        classes = index[-1] + 1
        of_scores = getattr(self.masks, "needs_scores", False)
        refine = self.refinement(image, prepare)
        decision = None if method is None else method.decision
        labels = assign(
            **decided(sheet, refine, index, self.logit_scale, decision),
            prob_thd=self.prob_thd,
            area_thd=self.area_thd,
            background=background,
            keep_scores=scores or of_scores,
        )
        confidence = labels.confidence
        rest = classes if background is None else background
        if threshold is not None and (sheet.regions is not None or not of_scores):
            labels, classes = below(labels, threshold, rest), max(classes, rest + 1)
        if sheet.regions is not None:
            labels = vote_in_regions(labels, sheet.regions, classes)
        if self.masks is not None:
            labels = self.masks(
                self.clip.visual,
                prepare(image) if full_image is None else full_image,
                labels,
                classes,
                guides=dict(self.guides.items()),
                prob_thd=float(within(confidence, self.prob_thd)),
            )
            if threshold is not None and of_scores:
                labels = below(labels, threshold, rest)
        return labels if scores else replace(labels, scores=None)

    def refinement(self, image: Tensor, prepare: Prepare | None = None) -> Refinement | None:
        """PAMR on an image (3, H, W), or None if `pamr_steps` is 0."""
        if not self.pamr_steps:
            return None
        image = (prepare or self.normalise)(image)
        return Refinement(image, self.pamr_steps, self.pamr_dilations, self.pamr_unit)


def _fitted(ids: Tensor | None, image: Tensor) -> Tensor | None:
    """An id map resized to an image (3, H, W); masks are returned unchanged."""
    if ids is None or ids.ndim == 3:
        return ids
    return nearest(ids, (image.shape[-2], image.shape[-1]))


def _sheet(
    method: Method, grid: WindowGrid, logits: Tensor, size: tuple[int, int], ids: Tensor | None
) -> LogitSheet:
    """Merges the logits of an image's windows, or of its whole grid; attaches regions that vote."""
    if method.direct or len(logits) != len(grid.places):
        # the padding is in the network's pixels, so it must go before the output's size
        grid = replace(grid.whole, direct=method.direct and not any(grid.padding))
    sheet = grid.sheet(logits, size)
    if method.vote == "no" or ids is None:
        return sheet
    if ids.ndim == 3:
        raise RegionsError(NO_REGIONS)
    if method.vote == "all_but_smallest":
        ids = torch.where(ids == ids.min(), 0, ids + 1)
    return replace(sheet, regions=nearest(ids, size))


def is_large(image: Tensor) -> bool:
    """Whether an 8-bit image is so large that it should be normalised window by window."""
    return image.dtype == torch.uint8 and image[0].numel() > LARGE


def _adapted(clip: CLIP, precision: str, compiled: bool) -> CLIP:
    """A CLIP in 8 bits or compiled, as a copy that shares weights; the caller's is not changed."""
    if precision != "int8" and not compiled:
        return clip
    clip = copy.deepcopy(clip, {id(p): p for p in clip.parameters()})
    if precision == "int8":
        clip.visual = quantised(clip.visual)
    if compiled:
        for block in clip.visual.blocks:
            block.mlp.compile(dynamic=True)
    return clip
