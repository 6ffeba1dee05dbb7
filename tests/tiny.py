"""A small random CLIP for tests: 12 blocks of width 64, patch 8, 64 pixels (an 8 x 8 grid)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

import sfp
from sfp.guides.sam3 import Detections, Prompts
from sfp.trace import Words

SIZE = dict(
    embed_dim=32,
    image_size=64,
    patch=8,
    width=64,
    layers=12,
    context=77,
    vocab=512,
    text_width=64,
    text_layers=2,
)
WORDS = dict(SIZE, vocab=49408, text_layers=1)  # reads the tokens of the real tokenizer


def clip(seed: int = 0, **size: int) -> sfp.CLIP:
    """Seeded weights whose attention is as uneven as that of a trained model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = sfp.CLIP(**{**SIZE, **size}).requires_grad_(False).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("in_proj_weight"):
                parameter.mul_(2.5)
            elif name.endswith("positional_embedding"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.digest = f"tiny {seed} {sorted(size.items())}"
    return model


def save(path: Path, seed: int = 0, **size: int) -> Path:
    """The same weights as a safetensors file."""
    state = clip(seed, **size).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def images(count: int, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Normalised pictures with large and small structures: (count, 3, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 6, generator=generator)
    fine = torch.randn(count, 3, height, width, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") + 0.5 * fine


def queries(count: int, seed: int = 0, width: int = 32) -> Tensor:
    """Unit text features, (count, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=-1)


class Sam:
    """A stand-in for SAM's attention: that of mean colours in cells of 10 pixels."""

    def last_attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        maps = torch.nn.functional.avg_pool2d(image[0], 10, ceil_mode=True)  # (3, h, w)
        rows = torch.stack([maps, maps.flip(0).cumsum(0)]).flatten(2).mT  # (2, M, 3)
        return (rows @ rows.mT).softmax(-1), rows.unflatten(1, maps.shape[1:])


class Scorer:
    """A stand-in for CLIPSeg: for each query another mixture of the colours, as probabilities."""

    def scores(self, image: Tensor, queries: Sequence[str], size: tuple[int, int]) -> Tensor:
        mixture = torch.arange(3 * len(queries), device=image.device).view(-1, 3).mul(1.7).sin()
        image = image.double()  # sums of batches and of single images agree
        maps = torch.nn.functional.interpolate(image, size, mode="bilinear")
        return torch.einsum("qc,bchw->bqhw", mixture.double(), maps).sigmoid()


class Sam3:
    """A stand-in for SAM 3: a word is a mixture of colours; scores of instances are its presence's."""

    def encode(self, queries: Sequence[str]) -> Prompts:
        return self.encode_in_context(queries, 0, {}, 0)

    def encode_in_context(
        self, queries: Sequence[str], neighbours: int, related: Mapping, most: int
    ) -> Prompts:
        codes = [
            sum(map(ord, query)) + 7 * neighbours + len(related.get(query, ())) for query in queries
        ]
        mixtures = [[math.sin(code * x) for x in (1.7, 2.9, 4.3)] for code in codes]
        tokens = torch.tensor(mixtures, dtype=torch.float64, device="cpu")[:, None]
        return Prompts(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool))

    def embed(self, image: Tensor, side: int | None = None) -> tuple[Tensor, ...]:
        image = image.double().roll(int(side is not None), 1)  # another side shows other colours
        return (torch.nn.functional.adaptive_avg_pool2d(image, 16),)

    def presence(self, embedded: Sequence[Tensor], prompts: Prompts) -> Tensor:
        return (prompts.tokens[:, 0] @ embedded[0][0].flatten(1)).amax(1).float()

    def detect(self, embedded: Sequence[Tensor], prompts: Prompts) -> Iterator[Detections]:
        presence = self.presence(embedded, prompts) + 1
        maps = torch.einsum("qc,chw->qhw", prompts.tokens[:, 0], embedded[0][0]).float()
        masks = torch.stack([maps - 1, maps.flip(1), maps.abs() + 3, maps.abs() + 4], 1)
        scores = torch.tensor([2.0, 0.5, -0.3, -1.0], dtype=torch.float32, device="cpu")
        for i in range(len(presence)):
            own = slice(i, i + 1)
            yield Detections(scores[None], masks[own], presence[own], maps[own])


def words(count: int) -> Words:
    """As many queries, without banks."""
    return Words(tuple(f"word {i}" for i in range(count)), lambda templates: torch.empty(0))
