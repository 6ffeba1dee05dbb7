"""The engine: images, words and methods in, logits and labels out. Plain PyTorch, no host.

One engine serves any number of words and methods, which are arguments of its calls, from several
threads if need be. `sfp.Model`, the mmsegmentation segmentor, bulk labelling and clustering each hold
one.
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
from sfp.functional.labels import Labels, Threshold, assign, decided, within
from sfp.functional.pamr import Refinement, Unit
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
BANKS = 16  # text banks in memory; the disk has all
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # of everything that is not 8-bit
}
Prepare: TypeAlias = "Callable[[Tensor], Tensor]"
_CONVERTING = threading.Lock()


@runtime_checkable
class FollowsNormalisation(Protocol):
    """A part that needs to know for which weights its input images are normalised."""

    def follow(self, clip: CLIP) -> None:
        """Takes over the mean and standard deviation of `clip`."""


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

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
    """Words that are ready to be compared with patches.

    Attributes:
        features: unit text features, (Q, C) float32.
        index: class of each query, from 0, in order.
        words: the queries, or None where there are features alone.
    """

    features: Tensor
    index: tuple[int, ...]
    words: tuple[str, ...] | None = None


class Engine:
    """A frozen CLIP with everything between an image and its labels but words and method.

    Windows of equal size, of all images of a call, go through the network together; their
    low-resolution logits are merged and upsampled by two small matrices (`functional/windows.py`).

    Args:
        weights: name, path or state dict for `load_clip`; or a `CLIP`, used as it is.
        templates: prompt templates, a list or the name of a set (`sfp.clip.templates`); "auto" takes
            those of the model's authors, CLIP's 80 for nearly all.
        logit_scale: inverse temperature of the softmax over queries; "auto" for that with which the
            model was trained (100 in CLIP). Methods were tuned with 40 to 55 on CLIP, but cosines of
            SigLIP and others are much smaller.
        prob_thd: pixels whose best class is less probable become class 0. Two numbers: the least and
            the largest of a threshold that each image has of its own, Otsu's (S2C2Seg).
        area_thd: classes that win no more than this share of the foreground are left out.
        slide_crop: side of the windows in pixels; 0 runs whole images.
        slide_stride: pixels between windows.
        slide_tiles: windows do not overlap: as many equal ones as fit at a side of `slide_crop`, each
            resized to the size that the tower was trained on (TextRegion); `slide_stride` and
            `pad_windows` do not count then.
        pad_windows: pad windows with zeros to whole patches (ClearCLIP's release), or to multiples of
            that many pixels (ProxyCLIP's and CorrCLIP's: 56), instead of leaving out the pixels beyond
            the last whole patch.
        whole_via_input: with `slide_crop=0`, logits go through the size of the network's input on
            their way to the original one (NACLIP's release).
        window_batch: most windows in one forward pass; None for 32 on a GPU and one per thread (at
            least 2) on a CPU, where more cost memory and gain next to nothing.
        pamr_steps: steps of pixel-adaptive refinement of the final logits; 0 for none.
        pamr_dilations: distances of its neighbours, in pixels.
        pamr_unit: in what it measures colours, "deviation" or "mean" (`sfp.functional.pamr.pamr`).
        guides: external encoders by name, config nodes or modules, for methods that need them.
        masks: settings of a `MaskVote`, `dict(type="sam_refine", ...)` for those of a `SamRefine`, or a
            module like them: labels follow the masks of SAM or DINO.
        regions: settings of a `RegionMap`, `dict(type="files", folder=...)` for `RegionFiles`, or a
            module like them: who finds the regions that some methods ask for, where the caller gives
            none.
        precision: "auto" (fp16 on CUDA, fp32 elsewhere), "fp32", "fp16", "bf16", or "int8": 8-bit
            products in the blocks, on a CPU only, an approximation (`sfp/clip/int8.py`).
        compiled: whether the blocks' MLPs go through `torch.compile`; for GPUs, on CPUs it costs time.
        graphs: whether a GPU replays the network as a CUDA graph: recorded at the first batch of each
            shape, after which Python launches nothing. For batches too small to fill the GPU; hooks
            on modules do not run then, and no features are cached. Off a GPU it changes nothing.
        cache_bytes: size of the cache of recent images' features; 0 for none.

    Raises:
        WeightsError: if the weights cannot be found, downloaded or read.
        ValueError: if a setting is wrong; the message names the valid ones.
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
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(
                f"unknown precision {precision!r}{suggest(precision, ['auto', *PRECISIONS])}"
            )
        if slide_crop and not slide_tiles and not 0 < slide_stride <= slide_crop:
            raise ValueError(
                f"slide_stride={slide_stride} must be between 1 and slide_crop={slide_crop}: "
                "larger strides leave pixels without a label"
            )
        if slide_tiles and not slide_crop:
            raise ValueError(
                "slide_tiles=True needs a side of about which windows are: slide_crop > 0"
            )
        if window_batch is not None and window_batch < 1:
            raise ValueError(f"window_batch={window_batch}: at least one window runs at a time")
        if isinstance(logit_scale, str) and logit_scale != "auto":
            raise ValueError(f"logit_scale={logit_scale!r}: expected a number or 'auto'")
        model_templates(templates)  # before anything is loaded
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
        """Where the weights are."""
        return self.clip.device

    def to(self, device: str | torch.device) -> Engine:
        """Moves all parts, and converts them to the precision that suits the device."""
        for part in self.parts():
            part.to(device)
        self.convert()
        return self

    def parts(self) -> list[nn.Module]:
        """Everything with weights: the CLIP, the guides, the proposers of masks and regions."""
        proposers = [part for part in (self.masks, self.regions) if part is not None]
        return [self.clip, self.guides, *proposers]

    def convert(self) -> None:
        """Brings the weights to `precision`, if they are on another device or of another type by now.

        A host moves and casts modules without telling (mmengine's Runner calls `.to`), so every call
        of the engine begins here: `precision` decides.

        Raises:
            ValueError: if the device cannot do it.
        """
        device = self.device
        if (device, self.clip.dtype) == self._converted:
            return
        with _CONVERTING:
            name = self.precision
            if name == "auto":
                name = "fp16" if device.type == "cuda" else "fp32"
            if name == "int8" and device.type != "cpu":
                raise ValueError("precision='int8' is for CPUs: on a GPU use 'fp16' or 'bf16'")
            for part in self.parts():
                part.to(PRECISIONS[name])
            self._converted = (device, PRECISIONS[name])

    # -- words -----------------------------------------------------------------------------------

    def queries(self, vocabulary: Vocabulary) -> Queries:
        """The text features of a vocabulary, encoded or read from the cache once."""
        return Queries(self.encode(vocabulary.queries), vocabulary.index, tuple(vocabulary.queries))

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Unit text features over all templates, (Q, C) float32.

        They depend, in the last bits, on which texts are encoded together.
        """
        self.convert()
        key = (self.clip.digest, self.device, self.clip.dtype, tuple(texts))
        if (bank := self._banks.get(key)) is None:
            with torch.inference_mode(False):  # the bank outlives calls with and without it
                bank = text_bank(self.clip, texts, self.templates).float()
            self._banks.put(key, bank)
        return bank

    def template_banks(self, texts: Sequence[str], templates: str | Sequence[str]) -> Tensor:
        """Unit text features of each template alone, (M, Q, C) float32."""
        self.convert()
        templates = prompt_templates(templates)
        key = (self.clip.digest, self.device, self.clip.dtype, tuple(texts), tuple(templates))
        if (banks := self._banks.get(key)) is None:
            with torch.inference_mode(False):
                each = [text_bank(self.clip, texts, [template]) for template in templates]
                banks = torch.stack(each).float()
            self._banks.put(key, banks)
        return banks

    def given_features(self, features: Tensor | str | Path, vocabulary: Vocabulary) -> Tensor:
        """Text features that were computed elsewhere, as unit vectors (Q, C) float32.

        Args:
            features: a tensor (Q, C), or a safetensors file that has it as "queries".
            vocabulary: what its rows stand for.

        Raises:
            ValueError: if the file or the shape is not right.
        """
        if isinstance(features, (str, Path)):
            try:
                features = load_file(features)["queries"]
            except (KeyError, SafetensorError) as error:
                raise ValueError(
                    f"query_features={str(features)!r}: expected a safetensors file with a tensor "
                    f"'queries' of one row for each query ({type(error).__name__}: {error})"
                ) from None
        expected = (len(vocabulary.queries), self.clip.embed_dim)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"query_features of shape {tuple(features.shape)}: expected {expected}, one row for "
                "each query of `classes`"
            )
        return F.normalize(features.float(), dim=-1)

    # -- images ----------------------------------------------------------------------------------

    def normalise(self, image: Tensor) -> Tensor:
        """An RGB image or window in 0..255, (3, H, W), as the network expects it; floats pass."""
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
        """All windows of all images through the network.

        Args:
            methods: those of equal trunk share its run.
            images: (3, H, W) each, normalised, or 8-bit if `prepare` takes it.
            sizes: rows and columns of each image's output.
            queries: the words.
            prepare: makes a window ready for the network; `normalise` by default.
            regions: an id map of each image, (h, w) of any size, 0 where it has none, or masks that may
                overlap, (R, h, w) floats, for methods that take them; None asks the engine's own
                proposer, if a method needs regions.

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
        """What a method reads in all windows of an image, without words, and their trace.

        Args:
            method, image, prepare: as in `logits`.
            regions: of the image, as in `logits`; by default those of the engine's own proposer, if
                the method needs some.

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
            guides=dict(self.guides.items()),
            regions=ids,
            whole=whole,
            portion=self.windows_at_once,
            normalisation=(self.clip.mean, self.clip.std),
        )

    def features(self, method: Method, image: Tensor, *, prepare: Prepare | None = None) -> Tensor:
        """Unit features of the patches of all windows of an image, (N, C) float32.

        Raises:
            LookupError: if the method needs words to compute its features.
        """
        tokens, _ = self.read(method, image, prepare=prepare)
        return F.normalize(tokens.patches.float(), dim=-1).flatten(0, 1)

    def tokens(self, method: Method, windows: Tensor, queries: Queries) -> Tokens:
        """Features of windows (B, 3, H, W) in the joint space, patches of width C."""
        self.convert()
        read, _ = method.features(self.clip.visual, windows, **self._context(queries))
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
        """Logits of windows (B, 3, H, W) by each method at patch resolution, (B, Q, h, w).

        Args:
            methods, windows, queries: as their names say.
            weights: changes with the weights, for the cache; None goes without it.
            regions: ids of the windows' pixels, (B, H, W).
            whole: the image whose windows, all of them, these are; methods that work on its grid as a
                whole then give (1, Q, h, w).

        Windows for which half precision gives NaN or infinite values run again in float32.

        Raises:
            FloatingPointError: if float32 does too; the message names the first part that did.
        """
        vit, context = self.clip.visual, self._context(queries)
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
            logits = self._eager(methods, windows, context, single)  # once: nothing to keep
            if all(finite(x) for x in logits):
                warnings.warn(
                    f"NaN or infinite values in {vit.dtype}, first in {where}; these windows "
                    "ran again in float32 (precision='fp32' does so at once)",
                    stacklevel=2,
                )
                return logits
            where = first_bad(bad[0], single, windows, context)
        raise FloatingPointError(
            f"NaN or infinite values, first in {where}, also in float32: the weights or the image "
            "are damaged, or were too large for the precision that they were converted to"
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
                (tuple(methods), id(context["text"]), context["index"], pointers),
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

    def _context(self, queries: Queries) -> dict[str, Any]:
        """What a trace knows besides the image."""
        words = queries.words
        return dict(
            text=queries.features,
            index=queries.index,
            words=None if words is None else Words(words, partial(self.template_banks, words)),
            guides=dict(self.guides.items()),
            normalisation=(self.clip.mean, self.clip.std),
        )

    def _weights(self) -> Hashable:
        """Changes with everything that features depend on besides pixels and method."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return state_key(self.clip.visual), state_key(self.guides), autocast

    def _grid(self, image: Tensor) -> WindowGrid:
        patch = self.clip.visual.patch
        if self.slide_tiles:
            native = [patch * cells for cells in self.clip.visual.native_grid]
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
        """Windows of equal size, (B, 3, H, W), each with the number of its image, and their regions."""
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
        """The id map of each image, if a method needs one: given, or proposed at the output's size."""
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
        """Most windows in one forward pass: `window_batch`, or what suits the device."""
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
    ) -> Labels:
        """Labels an image: refinement, softmax, best synonym, thresholds, vote in masks.

        Args:
            image: as in `logits`.
            sheet: its merged logits.
            index: class of each query.
            method: whose `decision` gives the class scores; None for the softmax over queries.
            scores: whether to return class probabilities, (K, H, W).
            full_image: what mask proposers see, normalised; `image` by default.
            prepare: as in `logits`.
        """
        prepare = prepare or self.normalise
        refine = self.refinement(image, prepare)
        rows = sheet.rows if refine is None else refine(sheet)
        decision = None if method is None else method.decision
        labels = assign(
            **decided(sheet, rows, index, self.logit_scale, decision),
            prob_thd=self.prob_thd,
            area_thd=self.area_thd,
            keep_scores=scores or getattr(self.masks, "needs_scores", False),
        )
        confidence = labels.confidence
        if sheet.regions is not None:
            labels = vote_in_regions(labels, sheet.regions, index[-1] + 1)
        if self.masks is not None:
            labels = self.masks(
                self.clip.visual,
                prepare(image) if full_image is None else full_image,
                labels,
                index[-1] + 1,
                guides=dict(self.guides.items()),
                prob_thd=float(within(confidence, self.prob_thd)),
            )
        return labels if scores else replace(labels, scores=None)

    def refinement(self, image: Tensor, prepare: Prepare | None = None) -> Refinement | None:
        """PAMR along the colours of an image (3, H, W), if the engine is set to refine."""
        if not self.pamr_steps:
            return None
        image = (prepare or self.normalise)(image)
        return Refinement(image, self.pamr_steps, self.pamr_dilations, self.pamr_unit)


def _fitted(ids: Tensor | None, image: Tensor) -> Tensor | None:
    """An id map at the size of an image (3, H, W); masks stay as they are."""
    if ids is None or ids.ndim == 3:
        return ids
    return nearest(ids, (image.shape[-2], image.shape[-1]))


def _sheet(
    method: Method, grid: WindowGrid, logits: Tensor, size: tuple[int, int], ids: Tensor | None
) -> LogitSheet:
    """Logits of an image's windows, or on one grid of the whole image, merged; with regions to vote."""
    if method.direct or len(logits) != len(grid.places):
        grid = replace(grid.whole, direct=method.direct)
    sheet = grid.sheet(logits, size)
    if method.vote == "no" or ids is None:
        return sheet
    if ids.ndim == 3:
        raise RegionsError(NO_REGIONS)
    if method.vote == "all_but_smallest":
        ids = torch.where(ids == ids.min(), 0, ids + 1)
    return replace(sheet, regions=nearest(ids, size))


def is_large(image: Tensor) -> bool:
    """Whether an image is better normalised window by window: 8 bits, and very many pixels."""
    return image.dtype == torch.uint8 and image[0].numel() > LARGE


def _adapted(clip: CLIP, precision: str, compiled: bool) -> CLIP:
    """A CLIP to run in 8 bits or compiled: a copy around the same weights, the caller's is left."""
    if precision != "int8" and not compiled:
        return clip
    clip = copy.deepcopy(clip, {id(p): p for p in clip.parameters()})
    if precision == "int8":
        clip.visual = quantised(clip.visual)
    if compiled:
        for block in clip.visual.blocks:
            block.mlp.compile(dynamic=True)
    return clip
