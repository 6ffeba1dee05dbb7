"""The mmsegmentation segmentor, a wrapper around an `Engine`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models.segmentors.base import BaseSegmentor
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from sfp.clip.model import CLIP
from sfp.engine import Engine, Queries
from sfp.functional.labels import Labels
from sfp.method import Method, build_method
from sfp.palette import colour_map
from sfp.preprocessor import ImagePreprocessor, flipped, unflipped, unpadded
from sfp.registry import pick, suggest
from sfp.tokens import Tokens
from sfp.vocabulary import Vocabulary, load_vocabulary


@MODELS.register_module(force=True)
class OpenVocabSegmentor(BaseSegmentor):
    """A frozen CLIP as an mmsegmentation segmentor, for any registered method and any words.

    Args:
        weights: name, path or state dict for `load_clip`.
        classes: path of a class file, a list of names or lists of synonyms in label order, or a
            `Vocabulary`.
        method: preset name or config for `build_method`.
        query_features: text features (Q, C) to use instead of encoding the names, or a safetensors
            file with such a tensor "queries".
        scores: whether results also include `seg_logits`, (K, H, W) probabilities.
        palette: colour of each class for visualizers; by default Pascal VOC's colour map, extended.
        data_preprocessor: by default an `ImagePreprocessor` with the weights' normalisation.
        init_cfg: mmengine's.
        pretrained, train_cfg: set by `mmseg.apis.init_model`; must be None.
        **settings: settings of the `Engine`: windows, precision, thresholds, guides, masks, refinement.
    """

    def __init__(
        self,
        weights: str | Path | Mapping[str, Tensor] | CLIP,
        classes: str | Path | Sequence[str | Sequence[str]] | Vocabulary,
        method: str | Mapping[str, Any] | Method = "sfp",
        *,
        query_features: Tensor | str | Path | None = None,
        scores: bool = True,
        palette: Sequence[Sequence[int]] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        pretrained: None = None,
        train_cfg: None = None,
        **settings: Any,
    ) -> None:
        # built with mmseg's registry: without a default scope mmengine's would not find it
        preprocessor = MODELS.build(dict(data_preprocessor or dict(type="ImagePreprocessor")))
        super().__init__(preprocessor, init_cfg)
        for name in settings:
            if name not in SETTINGS:
                raise ValueError(f"the segmentor has no setting {name!r}{suggest(name, SETTINGS)}")
        self.method = build_method(method)
        self.vocabulary = load_vocabulary(classes)
        self.scores = scores
        self._palette = palette
        self.engine = Engine(weights, **settings)
        # registered as submodules, so that they move with this module
        engine = self.engine
        self.clip, self.guides, self.masks = engine.clip, engine.guides, engine.masks
        self.regions = engine.regions
        if isinstance(self.data_preprocessor, ImagePreprocessor):
            self.data_preprocessor.follow(self.clip)
        if query_features is not None:
            query_features = self.engine.given_features(query_features, self.vocabulary)
        self.register_buffer("query_features", query_features, persistent=False)
        # mmseg's test-time augmentation takes one channel for a sigmoid with a decode head
        self.out_channels = max(self.vocabulary.num_classes, 2)

    @property
    def dataset_meta(self) -> dict[str, Any]:
        """Class names and colours for mmseg's visualizers."""
        palette = self._palette or colour_map(self.vocabulary.num_classes)
        return dict(classes=self.vocabulary.names, palette=palette)

    @dataset_meta.setter
    def dataset_meta(self, value: Any) -> None:
        """Ignored, since mmseg's inferencer assigns Cityscapes' to every model; the words decide."""

    @property
    def queries(self) -> Queries:
        """The words, with the features that were given or else encoded by the engine."""
        if self.query_features is not None:
            return Queries(self.query_features, self.vocabulary.index)
        return self.engine.queries(self.vocabulary)

    def text_features(self) -> Tensor:
        """Unit features of the queries, (Q, C) float32."""
        return self.queries.features

    @torch.inference_mode()
    def forward(
        self,
        inputs: Tensor | Sequence[Tensor],
        data_samples: Sequence[SegDataSample] | None = None,
        mode: str = "tensor",
    ) -> Any:
        """The entry point of mmengine, for normalised images (3, H, W) as a list or a batch.

        Modes: "predict" returns a `SegDataSample` per image; "tensor" the query logits, a list of
        (Q, H, W); "loss" raises, because there is nothing to train.
        """
        modes: dict[str, Callable[..., Any]] = dict(
            predict=self.predict, tensor=self.encode_decode, loss=self.loss
        )
        return pick("mode", mode, modes)(inputs, data_samples)

    def loss(self, inputs: Any, data_samples: Any) -> dict[str, Tensor]:
        """Raises `NotImplementedError`: the methods are training-free."""
        raise NotImplementedError(
            "the methods are training-free and have no loss: use mode='predict'"
        )

    def extract_feat(self, inputs: Tensor) -> Tokens:
        """Patch tokens of windows (B, 3, H, W) in the joint space, of width C."""
        return self.engine.tokens(self.method, inputs, self.queries)

    def patch_features(self, image: Tensor) -> Tensor:
        """Unit-length patch features of all windows of an image (3, H, W): (N, C) float32."""
        return self.engine.features(self.method, image, prepare=self._prepare)

    def encode_decode(
        self, inputs: Tensor | Sequence[Tensor], batch_img_metas: Any = None
    ) -> list[Tensor]:
        """Merged query logits of each image at its own size, a list of (Q, H, W)."""
        sizes = [x.shape[-2:] for x in inputs]
        (sheets,) = self.engine.logits(
            [self.method], inputs, sizes, self.queries, prepare=self._prepare
        )
        return [sheet.rows(0, sheet.size[0]) for sheet in sheets]

    _forward = encode_decode  # mmseg's name for it

    def predict(
        self,
        inputs: Tensor | Sequence[Tensor],
        data_samples: Sequence[SegDataSample] | None = None,
    ) -> list[SegDataSample]:
        """Labels each image at its original size.

        Args:
            inputs: normalised images (3, H, W) of any size; windows smaller than one patch are padded
                with zeros, the mean colour.
            data_samples: samples with `ori_shape`, and with padding and flip if the pipeline uses them;
                without samples the input size is taken as the original size.

        Returns:
            The samples with `pred_sem_seg` (1, H, W), `confidence` (1, H, W), the probability of the
            winning class, and if `scores` is set, `seg_logits` (K, H, W).
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
        """Labels the same images by several methods; those with equal trunks share its run.

        Args:
            methods: methods to use instead of this segmentor's own.
            inputs, samples: as in `predict`.

        Returns:
            For each method, the labels of each image.
        """
        images = [unpadded(x, sample) for x, sample in zip(inputs, samples, strict=True)]
        sizes = [
            sample.metainfo.get("ori_shape", x.shape[-2:])[:2]
            for x, sample in zip(images, samples, strict=True)
        ]
        queries = self.queries
        # pipelines flip images only for test-time augmentation, which averages the scores
        scores = self.scores or any("flip" in sample.metainfo for sample in samples)
        paths = [str(sample.metainfo.get("img_path", "")) for sample in samples]
        regions = None
        if any(method.needs_regions for method in methods):
            names = [str(Path(path).with_suffix("")) if path else None for path in paths]
            regions = self.engine.stored_regions(names)
        if regions is not None:
            regions = [
                ids if ids is None else ids.flip(flipped(sample))
                for ids, sample in zip(regions, samples, strict=True)
            ]
        try:
            each = self.engine.logits(
                methods, images, sizes, queries, prepare=self._prepare, regions=regions
            )
        except FloatingPointError as error:
            raise FloatingPointError(": ".join([*filter(None, paths), str(error)])) from None
        return [
            [
                unflipped(
                    self.engine.label(
                        image,
                        sheet,
                        queries.index,
                        method=method,
                        scores=scores,
                        full_image=self._full_image(sample, image.device),
                        prepare=self._prepare,
                    ),
                    sample,
                )
                for image, sheet, sample in zip(images, sheets, samples, strict=True)
            ]
            for method, sheets in zip(methods, each, strict=True)
        ]

    def _prepare(self, image: Tensor) -> Tensor:
        """Normalises `image` if the preprocessor has left it in 8 bits."""
        return self.data_preprocessor.normalise(image) if image.dtype == torch.uint8 else image

    def _full_image(self, sample: SegDataSample, device: torch.device) -> Tensor | None:
        """The image (3, H, W) that the pipeline step `KeepImage` has kept for mask proposers."""
        if self.masks is None or (full := sample.metainfo.get("full_image")) is None:
            return None
        image = torch.as_tensor(full, device=device).permute(2, 0, 1)
        return self.data_preprocessor.normalise(image).flip(flipped(sample))


# the settings that a config may have, with their defaults
SETTINGS = {
    name: parameter.default
    for cls in (OpenVocabSegmentor, Engine)
    for name, parameter in inspect.signature(cls).parameters.items()
    if name not in ("settings", "cache_bytes")
}
