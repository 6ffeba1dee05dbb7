"""CLIPSeg as a scorer: a small trained decoder gives the probability of a query at each pixel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.fingerprint import state_key
from sfp.clip.tokenizer import tokenize
from sfp.feature_cache import LRUCache
from sfp.guides.transformers import FrozenModel, Renormalise, pretrained
from sfp.registry import GUIDES, Some
from sfp.tokens import Tokens

WORDS = 2**12  # queries whose text features are kept


@GUIDES.register_module(name="clipseg")
class ClipSegGuide(FrozenModel):
    """A frozen CLIPSeg (Lüddecke and Ecker, CVPR 2022): images and words -> maps in 0..1.

    Its decoder was trained on the masks of PhraseCut, so methods that use it see more supervision than
    image-text pairs; say so beside their numbers. Images are resized to a square, bilinear, with
    antialiasing.

    Args:
        model: a name on the Hugging Face hub, e.g. "CIDAS/clipseg-rd64-refined", or a folder; or a
            `CLIPSegForImageSegmentation`.
        side: side of the square in pixels.
        templates: prompts, each with one `{}`, whose text features are averaged without normalisation;
            by default only the name.
        batch: largest number of queries decoded at once.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        side: int = 352,
        templates: Some[str] = ("{}",),
        batch: int = 32,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = pretrained(model, "CLIPSegForImageSegmentation", "guides")
        super().__init__(model, Renormalise(image_mean=image_mean, image_std=image_std))
        self.side = side
        self.templates = tuple(templates)
        self.batch = batch
        self._texts: LRUCache[Tensor] = LRUCache(WORDS)

    @torch.no_grad()
    def scores(self, image: Tensor, queries: Sequence[str], size: tuple[int, int]) -> Tensor:
        """Probability of each query at each pixel, (B, Q, h, w) float32, of images (B, 3, H, W).

        Args:
            image: normalised for CLIP.
            queries: words.
            size: rows and columns (bilinear) of the result.
        """
        state = state_key(self.model.clip)
        texts = torch.stack([self._text(query, state) for query in queries])  # (Q, C)
        states = self._vision(image).hidden_states
        chosen = [states[i + 1] for i in self.model.extract_layers]  # (B, T, D) each
        found = []
        for number in range(len(image)):
            for part in texts.split(self.batch):
                own = [x[number].expand(len(part), -1, -1) for x in chosen]
                logits = self.model.decoder(own, part).logits.float()  # (n, side, side)
                maps = logits.sigmoid()[:, None]
                found.append(F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0])
        return torch.cat(found).unflatten(0, (len(image), len(queries)))

    @torch.no_grad()
    def forward(self, image: Tensor, output: str | None = None) -> Tokens:
        """Patch tokens of its image tower, (B, h * w, D) without a prefix."""
        tokens = self._vision(image).last_hidden_state
        cells = round((tokens.shape[1] - 1) ** 0.5)
        return Tokens(tokens[:, 1:], (cells, cells), prefix=0)

    def _vision(self, image: Tensor):  # type: ignore[no-untyped-def]  # of `transformers`
        pixels = self.resized(image, (self.side, self.side))
        dtype = next(self.model.parameters()).dtype
        return self.model.clip.vision_model(
            pixel_values=pixels.to(dtype), output_hidden_states=True, interpolate_pos_encoding=True
        )

    def _text(self, query: str, state: Hashable) -> Tensor:
        if (text := self._texts.get((query, state))) is None:
            ids = tokenize([template.format(query) for template in self.templates])
            with torch.inference_mode(False):  # cached for calls both inside and outside that mode
                out = self.model.clip.get_text_features(ids.to(self.model.device))
                text = getattr(out, "pooler_output", out).mean(0)
            self._texts.put((query, state), text)
        return text
