"""The segmentor that mmsegmentation runs: windows in, labels out."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.models.segmentors.base import BaseSegmentor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.checkpoints.loading import load_clip
from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.clip.int8 import quantised
from sfp.clip.model import CLIP
from sfp.clip.text import prompt_templates, text_bank
from sfp.clip.vit import VisionTransformer
from sfp.functional.labels import Labels, assign
from sfp.functional.pamr import pamr
from sfp.functional.windows import LogitSheet, WindowGrid
from sfp.guides import build_guides
from sfp.masks import build_masks
from sfp.method import Method, build_method
from sfp.numerics import finite, first_bad
from sfp.palette import colour_map
from sfp.registry import suggest
from sfp.tokens import Tokens
from sfp.vocabulary import Vocabulary, load_vocabulary

LARGE = 2**24  # pixels from which an image is normalised window by window, to stay in 8 bits
PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,  # what is not 8-bit
}


@MODELS.register_module()
class ImagePreprocessor(SegDataPreProcessor):
    """Normalises each image of a batch and leaves them as a list, so that their sizes may differ.

    Args:
        mean, std: RGB in 0..255; by default those of the segmentor's weights, for most OpenAI's.
        bgr_to_rgb: whether images come as mmseg loads them.
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        bgr_to_rgb: bool = True,
    ) -> None:
        super().__init__(
            mean=CLIP_MEAN if mean is None else mean,
            std=CLIP_STD if std is None else std,
            bgr_to_rgb=bgr_to_rgb,
        )
        self._given = dict(mean=mean, std=std)

    def follow(self, clip: CLIP) -> None:
        """Takes the normalisation that `clip` was trained with, where none was given."""
        for name, given in self._given.items():
            if given is None:
                getattr(self, name).copy_(torch.tensor(getattr(clip, name))[:, None, None])

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """`inputs`: images (3, H, W) in 0..255, BGR as mmseg loads them -> a list of float images.

        Only 8-bit images of more than `LARGE` pixels are left as they are.
        """
        data = self.cast_data(data)
        images = [x if _is_large(x) else self.normalise(x) for x in data["inputs"]]
        return dict(inputs=images, data_samples=data.get("data_samples"))

    def normalise(self, image: Tensor) -> Tensor:
        """An image, or a part of one, as the network wants it: RGB, float, mean 0."""
        image = image[[2, 1, 0]] if self._channel_conversion else image
        return (image.float() - self.mean) / self.std


def _is_large(image: Tensor) -> bool:
    return image.dtype == torch.uint8 and image[0].numel() > LARGE


@MODELS.register_module()
class OpenVocabSegmentor(BaseSegmentor):
    """Frozen CLIP as a segmentor: any of the registered methods, any words.

    Windows of equal size, from all images of a batch, go through the network together; their
    low-resolution logits are merged and upsampled by two small matrices (`functional/windows.py`).

    Args:
        weights: name, path or state dict for `load_clip`.
        classes: path of a class file, a list of names or of lists of synonyms, class 0 first, or a
            `Vocabulary`.
        method: preset name or config for `build_method`.
        templates: prompt templates, a list or the name of a set that mmseg ships.
        query_features: text features (Q, C) to use instead of encoding the names, or a safetensors
            file that has them as "queries".
        logit_scale: inverse temperature of the softmax over queries.
        prob_thd: pixels whose best class is less probable become class 0.
        area_thd: classes that win no more than this share of the foreground are left out.
        slide_crop: side of the windows in pixels; 0 runs the whole image at once.
        slide_stride: pixels between windows.
        pad_windows: pad windows with zeros to whole patches (ClearCLIP's release) instead of leaving
            pixels beyond the last whole patch out.
        whole_via_input: with `slide_crop=0`, logits go through the size of the network's input on
            their way to the original one (NACLIP's release).
        window_batch: most windows in one forward pass; None for 32 on a GPU and one for each thread
            (at least 2) on a CPU, where more cost memory and gain next to nothing.
        pamr_steps: steps of pixel-adaptive refinement on the final logits; 0 for none.
        pamr_dilations: distances of its neighbours, in pixels.
        guides: external encoders by name, config nodes or modules, for methods that ask for them.
        masks: knobs of a `MaskVote`, or a module like it: labels follow the masks of SAM or DINO.
            They see the image at the size that a step `KeepImage` of the pipeline had kept, else at
            the network's.
        precision: "auto" (fp16 on CUDA, fp32 elsewhere), "fp32", "fp16", "bf16", or "int8": 8-bit
            products in the blocks, on a CPU only, an approximation (`sfp/clip/int8.py`).
        compiled: whether the blocks' MLPs go through `torch.compile`; for GPUs, on CPUs it costs time.
        scores: whether results carry `seg_logits`, (K, H, W) probabilities, besides the labels.
        palette: colours per class for visualizers; by default those of Pascal VOC, continued.
        data_preprocessor: by default an `ImagePreprocessor` with the constants of the weights.
        init_cfg: mmengine's.
        pretrained, train_cfg: `mmseg.apis.init_model` sets them; only None has a meaning here.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | CLIP,
        classes: str | Path | Sequence[str | Sequence[str]] | Vocabulary,
        method: str | Mapping[str, Any] | Method = "sfp",
        *,
        templates: str | Sequence[str] = "imagenet",
        query_features: Tensor | str | Path | None = None,
        logit_scale: float = 40.0,
        prob_thd: float = 0.0,
        area_thd: float | None = None,
        slide_crop: int = 224,
        slide_stride: int = 112,
        pad_windows: bool = False,
        whole_via_input: bool = False,
        window_batch: int | None = None,
        pamr_steps: int = 0,
        pamr_dilations: Sequence[int] = (8, 16),
        guides: Mapping[str, Any] | None = None,
        masks: Mapping[str, Any] | nn.Module | None = None,
        precision: str = "auto",
        compiled: bool = False,
        scores: bool = True,
        palette: Sequence[Sequence[int]] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained: None = None,
        train_cfg: None = None,
    ) -> None:
        # built here, with mmseg's registry: without a default scope mmengine's would not find it
        preprocessor = MODELS.build(dict(data_preprocessor or dict(type="ImagePreprocessor")))
        super().__init__(preprocessor, init_cfg)
        if precision not in ("auto", *PRECISIONS):
            raise ValueError(
                f"unknown precision {precision!r}{suggest(precision, ['auto', *PRECISIONS])}"
            )
        if slide_crop and not 0 < slide_stride <= slide_crop:
            raise ValueError(
                f"slide_stride={slide_stride} must be between 1 and slide_crop={slide_crop}: "
                "larger strides leave pixels without a label"
            )
        if window_batch is not None and window_batch < 1:
            raise ValueError(f"window_batch={window_batch}: at least one window runs at a time")
        prompt_templates(templates)
        self.method = build_method(method)
        self.vocabulary = load_vocabulary(classes)
        self.templates = templates
        self.logit_scale = logit_scale
        self.prob_thd = prob_thd
        self.area_thd = area_thd
        self.slide_crop = slide_crop
        self.slide_stride = slide_stride
        self.pad_windows = pad_windows
        self.whole_via_input = whole_via_input
        self.window_batch = window_batch
        self.pamr_steps = pamr_steps
        self.pamr_dilations = tuple(pamr_dilations)
        self.precision = precision
        self.scores = scores
        self._palette = palette
        self.guides = build_guides(guides)
        self.masks = build_masks(masks)
        self.clip = weights if isinstance(weights, CLIP) else load_clip(weights)
        if isinstance(query_features, (str, Path)):
            query_features = _read_queries(query_features)
        for part in (self.data_preprocessor, self.masks, *self.guides.values()):
            if hasattr(part, "follow"):  # whose input is normalised as these weights want it
                part.follow(self.clip)
        if precision == "int8" or compiled:  # of these the caller's model shall know nothing
            self.clip = copy.deepcopy(self.clip, {id(p): p for p in self.clip.parameters()})
        if precision == "int8":
            self.clip.visual = quantised(self.clip.visual)
        if compiled:
            for block in self.clip.visual.blocks:
                block.mlp.compile(dynamic=True)
        if query_features is not None:
            expected = (len(self.vocabulary.queries), self.clip.text_projection.shape[1])
            if tuple(query_features.shape) != expected:
                raise ValueError(
                    f"query_features of shape {tuple(query_features.shape)}: expected {expected}, "
                    "one row for each query of `classes`"
                )
            query_features = F.normalize(query_features.float(), dim=-1)
        self.register_buffer("query_features", query_features, persistent=False)
        self._set_precision()

    @property
    def dataset_meta(self) -> dict[str, Any]:
        """Class names and colours for mmseg's visualizers."""
        palette = self._palette or colour_map(self.vocabulary.num_classes)
        return dict(classes=self.vocabulary.names, palette=palette)

    @dataset_meta.setter
    def dataset_meta(self, value: Any) -> None:
        """Does nothing: the words decide, and mmseg's inferencer sets Cityscapes' on every model."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OpenVocabSegmentor:
        # every move (.to, .cuda, mmengine's Runner) comes through here: the device decides
        super()._apply(fn, recurse)
        self._set_precision()
        return self

    def _set_precision(self) -> None:
        name = self.precision
        if name == "auto":
            name = "fp16" if self.clip.text_projection.device.type == "cuda" else "fp32"
        if name == "int8" and self.clip.text_projection.device.type != "cpu":
            raise ValueError("precision='int8' is for CPUs: on a GPU use 'fp16' or 'bf16'")
        self.clip.to(PRECISIONS[name])
        self.guides.to(PRECISIONS[name])
        if self.masks is not None:
            self.masks.to(PRECISIONS[name])

    def text_features(self) -> Tensor:
        """Unit features of the queries, (Q, C) float32; encoded, or read from the cache, once."""
        if self.query_features is None:
            with torch.inference_mode(
                False
            ):  # the buffer outlives this call, in which that may be on
                bank = text_bank(self.clip, self.vocabulary.queries, self.templates)
            self.register_buffer("query_features", bank, persistent=False)
        return self.query_features.float()

    @torch.inference_mode()
    def forward(
        self,
        inputs: Tensor | Sequence[Tensor],
        data_samples: Sequence[SegDataSample] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """Mmengine's entry point, with normalised images (3, H, W) as a list or a batch.

        Modes: "predict" gives a `SegDataSample` per image; "tensor" the query logits, a list of
        (Q, H, W); "loss" raises, there is nothing to train.
        """
        if mode == "predict":
            return self.predict(inputs, data_samples)
        if mode == "tensor":
            return self._forward(inputs, data_samples)
        if mode == "loss":
            return self.loss(inputs, data_samples)
        raise ValueError(f"unknown mode {mode!r}; valid: predict, tensor, loss")

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Tensor]:
        """Raises `NotImplementedError`: the methods are training-free."""
        raise NotImplementedError("training-free: there is no loss; use mode='predict'")

    def extract_feat(self, inputs: Tensor) -> Tokens:
        """Dense features of windows (B, 3, H, W) in the joint space: patch tokens of width C."""
        return self.method.features(self.clip.visual, inputs, **self._context())[0].only_patches()

    def _context(self) -> dict[str, Any]:
        """What a trace knows besides the image."""
        guides = dict(self.guides.items())
        return dict(text=self.text_features(), index=self.vocabulary.index, guides=guides)

    def encode_decode(
        self, inputs: Tensor | Sequence[Tensor], batch_img_metas: Any = None
    ) -> list[Tensor]:
        """Merged query logits of each image at its own size, a list of (Q, H, W)."""
        (sheets,) = self.sheets([self.method], inputs, [x.shape[-2:] for x in inputs])
        return [sheet.rows(0, sheet.size[0]) for sheet in sheets]

    def _forward(self, inputs: Any, data_samples: Any = None) -> list[Tensor]:
        return self.encode_decode(inputs)

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        data_samples: Sequence[SegDataSample] | None = None,
    ) -> list[SegDataSample]:
        """Labels each image at its original size.

        Args:
            inputs: normalised images (3, H, W), of any sizes; windows smaller than one patch are
                padded to it with zeros, the mean colour.
            data_samples: with `ori_shape`, and padding and flip where the pipeline has them; without
                samples the input size is the original size.

        Returns:
            The samples with `pred_sem_seg` (1, H, W), `confidence` (1, H, W), the probability of the
            winning class, and, if `scores`, `seg_logits` (K, H, W).
        """
        samples = list(data_samples or [SegDataSample() for _ in inputs])
        (results,) = self.predict_each([self.method], inputs, samples)
        for sample, result in zip(samples, results, strict=True):
            sample.pred_sem_seg = PixelData(data=result.labels[None])
            sample.confidence = PixelData(data=result.confidence[None])
            if result.scores is not None:
                sample.seg_logits = PixelData(data=result.scores)
        return samples

    @torch.inference_mode()
    def predict_each(
        self,
        methods: Sequence[Method],
        inputs: Tensor | Sequence[Tensor],
        samples: Sequence[SegDataSample],
    ) -> list[list[Labels]]:
        """What several methods make of the same images; those of equal trunk share its run.

        Args:
            methods: in place of this segmentor's own.
            inputs, samples: as in `predict`.

        Returns:
            For each method, the labels of each image.
        """
        images = [_unpad(x, sample) for x, sample in zip(inputs, samples, strict=True)]
        sizes = [
            sample.metainfo.get("ori_shape", x.shape[-2:])[:2]
            for x, sample in zip(images, samples, strict=True)
        ]
        try:
            each = self.sheets(methods, images, sizes)
        except FloatingPointError as error:
            paths = [str(s.metainfo["img_path"]) for s in samples if "img_path" in s.metainfo]
            raise FloatingPointError(": ".join([*paths, str(error)])) from None
        return [
            [
                _unflip(self._in_masks(image, self._label(image, sheet), sample), sample)
                for image, sheet, sample in zip(images, sheets, samples, strict=True)
            ]
            for sheets in each
        ]

    def _normalised(self, image: Tensor) -> Tensor:
        """`image`, normalised now if its preprocessor has put it off."""
        return self.data_preprocessor.normalise(image) if image.dtype == torch.uint8 else image

    def final_rows(self, image: Tensor, sheet: LogitSheet) -> Callable[[int, int], Tensor]:
        """`sheet.rows`, or slabs of what PAMR makes of them, which takes all of them at once."""
        if not self.pamr_steps:
            return sheet.rows
        image = self._normalised(image)
        guide = F.interpolate(image[None], sheet.size, mode="bilinear", align_corners=False)
        refined = pamr(
            guide,
            sheet.rows(0, sheet.size[0])[None],
            steps=self.pamr_steps,
            dilations=self.pamr_dilations,
        )[0]
        return lambda start, stop: refined[:, start:stop]

    def _label(self, image: Tensor, sheet: LogitSheet) -> Labels:
        return assign(
            self.final_rows(image, sheet),
            sheet.size,
            self.vocabulary.index,
            scale=self.logit_scale,
            prob_thd=self.prob_thd,
            area_thd=self.area_thd,
            keep_scores=self.scores or getattr(self.masks, "vote", None) == "mean",
        )

    def _in_masks(self, image: Tensor, labels: Labels, sample: SegDataSample) -> Labels:
        """The labels after the vote in the masks, if there are any."""
        if self.masks is None:
            return labels
        if (full := sample.metainfo.get("full_image")) is not None:  # (H, W, 3), not flipped
            image = torch.as_tensor(full, device=image.device).permute(2, 0, 1)
            image = self.data_preprocessor.normalise(image).flip(_flipped(sample))
        result = self.masks(
            self.clip.visual,
            self._normalised(image),
            labels,
            self.vocabulary.num_classes,
            guides=dict(self.guides.items()),
            prob_thd=self.prob_thd,
        )
        return result if self.scores else replace(result, scores=None)

    def sheets(
        self,
        methods: Sequence[Method],
        images: Tensor | Sequence[Tensor],
        sizes: Sequence[Sequence[int]],
    ) -> list[list[LogitSheet]]:
        """All windows of all images through the network: for each method, a sheet per image."""
        grids = [
            WindowGrid.over(
                x.shape[-2:],
                self.slide_crop,
                self.slide_stride,
                multiple=self.clip.visual.patch if self.pad_windows else 1,
                least=self.clip.visual.patch,
                via_input=self.whole_via_input,
            )
            for x in images
        ]
        queues: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = defaultdict(list)
        for n, grid in enumerate(grids):
            queues[grid.window] += [(n, place) for place in grid.places]
        logits: list[list[list[Tensor]]] = [[[] for _ in images] for _ in methods]
        for queue in queues.values():
            step = self.windows_at_once
            for i in range(0, len(queue), step):
                batch = queue[i : i + step]
                windows = torch.stack(
                    [grids[n].cut(images[n], place, self._normalised) for n, place in batch]
                )
                for each, outputs in zip(logits, self.window_logits(methods, windows), strict=True):
                    for (n, _), output in zip(batch, outputs, strict=True):
                        each[n].append(output)
        return [
            [
                grid.sheet(torch.stack(parts), (int(size[0]), int(size[1])))
                for grid, parts, size in zip(grids, each, sizes, strict=True)
            ]
            for each in logits
        ]

    @property
    def windows_at_once(self) -> int:
        """Most windows in one forward pass: `window_batch`, or what suits the device."""
        if self.window_batch is not None:
            return self.window_batch
        on_cpu = self.clip.text_projection.device.type == "cpu"
        return max(torch.get_num_threads(), 2) if on_cpu else 32

    def window_logits(self, methods: Sequence[Method], windows: Tensor) -> list[Tensor]:
        """Logits of windows (B, 3, H, W) by several methods, at patch resolution: (B, Q, h, w).

        Where half precision leads to NaN or infinite values, the windows run again in float32.

        Raises:
            FloatingPointError: if float32 does too; the message names the first part that did.
        """
        logits = self._window_logits(methods, windows, self.clip.visual)
        bad = [method for method, x in zip(methods, logits, strict=True) if not finite(x)]
        if not bad:
            return logits
        where = first_bad(bad[0], self.clip.visual, windows, self._context())
        if self.clip.visual.proj.dtype != torch.float32:
            single = copy.deepcopy(self.clip.visual).float()
            logits = self._window_logits(methods, windows, single)
            if all(finite(x) for x in logits):
                warnings.warn(
                    f"NaN or infinite values in {self.clip.visual.proj.dtype}, first in {where}; "
                    "these windows ran again in float32 (precision='fp32' avoids the detour)",
                    stacklevel=2,
                )
                return logits
            where = first_bad(bad[0], single, windows, self._context())
        raise FloatingPointError(
            f"NaN or infinite values, first in {where}, also in float32: the weights or the image "
            "are damaged, or were too large for the precision that they were converted to"
        )

    def _window_logits(
        self, methods: Sequence[Method], windows: Tensor, vit: VisionTransformer
    ) -> list[Tensor]:
        logits: list[Tensor | None] = [None] * len(methods)
        for trunk in dict.fromkeys(method.trunk for method in methods):
            sharing = [i for i, method in enumerate(methods) if method.trunk == trunk]
            trace = methods[sharing[0]].run(vit, windows, **self._context())
            for i in sharing:
                logits[i] = methods[i].read_logits(trace)
        return logits  # type: ignore[return-value]


def _read_queries(path: str | Path) -> Tensor:
    try:
        return load_file(path)["queries"]
    except (KeyError, SafetensorError) as error:
        raise ValueError(
            f"query_features={str(path)!r}: expected a safetensors file with a tensor 'queries' of one "
            f"row for each query ({type(error).__name__}: {error})"
        ) from None


def _unpad(image: Tensor, sample: SegDataSample) -> Tensor:
    """The image without what a pipeline or preprocessor padded: (left, right, top, bottom)."""
    meta = sample.metainfo
    left, right, top, bottom = meta.get("img_padding_size", meta.get("padding_size", [0] * 4))
    return image[:, top : image.shape[1] - bottom, left : image.shape[2] - right]


def _flipped(sample: SegDataSample) -> tuple[int, ...]:
    """Along which dimensions the pipeline had mirrored the image (test-time augmentation)."""
    if not sample.metainfo.get("flip"):
        return ()
    direction = sample.metainfo.get("flip_direction", "horizontal")
    return dict(horizontal=(-1,), vertical=(-2,), diagonal=(-2, -1))[direction]


def _unflip(result: Labels, sample: SegDataSample) -> Labels:
    """Turned back, if the pipeline had mirrored the image."""
    if not (sides := _flipped(sample)):
        return result
    scores = None if result.scores is None else result.scores.flip(sides)
    return Labels(result.labels.flip(sides), result.confidence.flip(sides), scores)
