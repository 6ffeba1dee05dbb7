"""SAM 3 prompted with words: instances, a map and a presence score for each query."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.checkpoints.published import HALF, WeightsError
from sfp.clip.fingerprint import state_key
from sfp.clip.tokenizer import tokenize
from sfp.feature_cache import LRUCache
from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.registry import GUIDES

WORDS = 2**12  # queries whose text tokens are kept


@dataclass(frozen=True)
class Prompts:
    """Queries in SAM 3's format; can be indexed by queries.

    Attributes:
        tokens: projected text tokens, (Q, T, C).
        mask: which of them are not padding, (Q, T) bool.
    """

    tokens: Tensor
    mask: Tensor

    def __getitem__(self, queries: Tensor) -> Prompts:
        return Prompts(self.tokens[queries], self.mask[queries])

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Detections:
    """What SAM 3 finds for n queries, float32 logits.

    Attributes:
        scores: scores of I instances, (n, I).
        masks: masks of the instances, (n, I, h, w).
        presence: whether the query occurs in the image, (n,).
        semantic: the query's map, (n, h, w).
    """

    scores: Tensor
    masks: Tensor
    presence: Tensor
    semantic: Tensor


@GUIDES.register_module(name="sam3")
class Sam3Guide(FrozenModel):
    """A frozen SAM 3 (Carion et al., 2025): images and words -> `Detections`.

    It was trained on masks with words, so methods that use it see more supervision than image-text
    pairs; say so beside their numbers. An image is encoded once for all queries, which are decoded in
    batches. Images are resized to a square, bilinear with antialiasing.

    Args:
        model: "facebook/sam3", which is gated on the Hugging Face Hub; or a folder with its
            `config.json` and `model.safetensors`; or a `Sam3Model`.
        batch: largest number of queries decoded at once; each takes memory for 200 masks of 288 x 288.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights.

    Attributes:
        side: side of the training images in pixels.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed, or too old.
        WeightsError: if it cannot be loaded; the message says how to obtain it.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        batch: int = 8,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = _loaded(model)
        super().__init__(model, Renormalise(HALF, HALF, image_mean, image_std))
        backbone = self.model.config.vision_config.backbone_config
        self.side: int = backbone.image_size
        self._patch: int = backbone.patch_size
        self.batch = batch
        self._texts: LRUCache[Tensor] = LRUCache(WORDS)

    @torch.no_grad()
    def encode(self, queries: Sequence[str]) -> Prompts:
        """The text tokens of queries, each encoded once."""
        state = state_key(self.model.text_encoder)
        return _padded([[self._text(query, state)] for query in queries])

    @torch.no_grad()
    def encode_in_context(
        self,
        queries: Sequence[str],
        neighbours: int,
        related: Mapping[str, Sequence[str]],
        most: int,
    ) -> Prompts:
        """The text tokens of queries, followed by a token for each of some other words (ActiveSAM).

        A word's token is the mean of its token embeddings, as they enter the text transformer, through
        the projection of text tokens.

        Args:
            queries: words.
            neighbours: number of other queries that follow, those with the most similar (cosine) means,
                each multiplied by its share in the softmax of these similarities.
            related: words that follow a query, by the query.
            most: largest number of related words.
        """
        means = torch.stack([self._mean(query) for query in queries])  # (Q, D)
        unit = F.normalize(means.float(), dim=-1)
        alike = (unit @ unit.T).fill_diagonal_(-torch.inf)
        near, number = alike.topk(min(neighbours, len(queries) - 1))
        share = near.softmax(-1).to(means)
        project = self.model.text_projection
        rows = []
        state = state_key(self.model.text_encoder)
        for i, query in enumerate(queries):
            others = [*(share[i, :, None] * means[number[i]])]
            others += [self._mean(word) for word in related.get(query, ())[:most]]
            rows.append([self._text(query, state), *(project(other)[None] for other in others)])
        return _padded(rows)

    @torch.no_grad()
    def embed(self, image: Tensor, side: int | None = None) -> tuple[Tensor, ...]:
        """The features of an image (1, 3, H, W) for all queries, (1, C, h, w) from fine to coarse.

        Args:
            image: normalised for the segmentor's weights.
            side: side of the square in pixels; by default that of training. For another one the rotary
                positions of the global blocks are recomputed.

        Raises:
            ValueError: if the side is not a multiple of the patch.
        """
        side = side or self.side
        pixels = self.resized(image, (side, side))
        dtype = next(self.model.parameters()).dtype
        return tuple(self._tower(side)(pixels.to(dtype)).fpn_hidden_states[:-1])

    @torch.no_grad()
    def presence(self, embedded: Sequence[Tensor], prompts: Prompts) -> Tensor:
        """Logits for the presence of each query in an image, (Q,) float32, without masks.

        Args:
            embedded: result of `embed`.
            prompts: Q queries.
        """
        coarse, found = embedded[-1], []
        for part in _parts(prompts, self.batch):
            encoded = self.model.detr_encoder(
                vision_features=[coarse.expand(len(part), -1, -1, -1)],
                text_features=part.tokens,
                vision_pos_embeds=[self._positions(coarse).expand(len(part), -1, -1, -1)],
                text_mask=part.mask,
            )
            decoded = self.model.detr_decoder(
                vision_features=encoded.last_hidden_state,
                text_features=encoded.text_features,
                vision_pos_encoding=encoded.pos_embeds_flattened,
                text_mask=part.mask,
                spatial_shapes=encoded.spatial_shapes,
            )
            found.append(decoded.presence_logits[-1, :, 0].float())
        return torch.cat(found)

    @torch.no_grad()
    def detect(self, embedded: Sequence[Tensor], prompts: Prompts) -> Iterator[Detections]:
        """The detections for each query in an image, in order, one batch of queries at a time.

        Args:
            embedded: result of `embed`.
            prompts: the queries.
        """
        places = [self._positions(level) for level in embedded]
        for part in _parts(prompts, self.batch):

            def shared(levels: Sequence[Tensor], count: int = len(part)) -> list[Tensor | None]:
                # the library leaves the last level out, which `embed` has done
                return [*(level.expand(count, -1, -1, -1) for level in levels), None]

            out = self.model(
                vision_embeds=SimpleNamespace(
                    fpn_hidden_states=shared(embedded),
                    fpn_position_encoding=shared(places),
                    hidden_states=None,
                    attentions=None,
                ),
                text_embeds=SimpleNamespace(pooler_output=part.tokens),
                attention_mask=part.mask,
            )
            yield Detections(
                out.pred_logits.float(),
                out.pred_masks.float(),
                out.presence_logits[:, 0].float(),
                out.semantic_seg[:, 0].float(),
            )

    def _tower(self, side: int) -> Callable[..., Any]:
        """The image encoder for squares of a side, around the same weights."""
        tower = self.model.vision_encoder
        if side == self.side:
            return tower
        if side % self._patch:
            raise ValueError(f"side={side} of SAM 3's square: expected a multiple of {self._patch}")
        # a copy, since other threads may be using the tower
        tower = copy.deepcopy(tower, {id(p): p for p in tower.parameters()})
        config = tower.config.backbone_config
        config.image_size = side
        for layer in tower.backbone.layers:
            if not layer.window_size:
                layer.position_ids = layer.precompute_positions(config, 0).to(layer.position_ids)
        return tower

    def _positions(self, level: Tensor) -> Tensor:
        encoding = self.model.vision_encoder.neck.position_encoding
        return encoding(level.shape, level.device, level.dtype)

    def _ids(self, words: str) -> Tensor:
        context = self.model.config.text_config.max_position_embeddings
        return tokenize([words], context).to(self.model.device)

    def _text(self, query: str, state: Any) -> Tensor:
        """Its projected tokens, (T, C), start and end marks included."""
        if (text := self._texts.get((query, state))) is None:
            ids = self._ids(query)
            with torch.inference_mode(False):  # cached for calls both inside and outside that mode
                out = self.model.get_text_features(ids, attention_mask=torch.ones_like(ids))
                text = out.pooler_output[0]
            self._texts.put((query, state), text)
        return text

    def _mean(self, words: str) -> Tensor:
        """The mean of its token embeddings, (D,), start and end marks included."""
        return self.model.text_encoder.get_input_embeddings()(self._ids(words))[0].mean(0)


def _padded(rows: Sequence[Sequence[Tensor]]) -> Prompts:
    """Prompts of tokens, (T, C) in parts, of different lengths."""
    each = [torch.cat(list(row)) for row in rows]
    mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in each]
    pad = nn.utils.rnn.pad_sequence
    return Prompts(pad(each, batch_first=True), pad(mask, batch_first=True))


def _parts(prompts: Prompts, size: int) -> Iterator[Prompts]:
    for tokens, mask in zip(prompts.tokens.split(size), prompts.mask.split(size), strict=True):
        yield Prompts(tokens, mask)


def _loaded(name: str) -> nn.Module:
    try:
        return pretrained(name, "Sam3Model", "guides")
    except AttributeError as error:
        raise ImportError(
            "SAM 3 needs a newer transformers: pip install 'transformers>=5'"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"cannot load SAM 3 from {name!r}: {reason} facebook/sam3 is gated: accept its terms at "
            "https://huggingface.co/facebook/sam3, then log in (hf auth login, or HF_TOKEN). Without a "
            "network, put its config.json and model.safetensors into a folder and pass that: "
            "guides=dict(sam3=dict(type='sam3', model='FOLDER'))"
        ) from error
