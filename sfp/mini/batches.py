"""Training batches of the mini CLIP: windows of drawn scenes, captions, and which of them match."""

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from sfp.clip.templates import IMAGENET
from sfp.clip.text import tokenize
from sfp.mini.scenes import ALIASES, CLASSES, SEVERAL, THINGS, caption, fingerprint, scene

GRID = 14  # tokens along a side of a scene
WINDOW = 7  # tokens along a side of a training window
PATCH = 8  # pixels, while training
SIDE = GRID * PATCH
VOCABULARY = 49408  # size of OpenAI's vocabulary
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = ("{}", "a {}", "the {}", "a photo of {}.", *IMAGENET)
EVAL_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a {}", "{}")


class Scenes:
    """Rendered scenes at 112 px, cached on disk and mapped into memory.

    Attributes:
        images: (N, 112, 112, 3) uint8.
        areas: Pixels per token and class, at most 255, (N, 14, 14, 18) uint8.
    """

    def __init__(self, folder: Path, count: int, first_seed: int) -> None:
        home = folder / f"scenes-{fingerprint()}-{first_seed}-{count}"
        if not home.exists():
            _render(home, count, first_seed)
        self.images = np.load(home / "images.npy", mmap_mode="r")
        self.areas = np.load(home / "areas.npy", mmap_mode="r")


def _render(home: Path, count: int, first_seed: int) -> None:
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    areas = np.empty((count, GRID, GRID, len(CLASSES)), np.uint8)
    with Progress() as progress, ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        drawn = pool.map(_drawn, range(first_seed, first_seed + count), chunksize=50)
        for i, each in enumerate(progress.track(drawn, count, description="drawing scenes")):
            images[i], areas[i] = each
    partial = home.with_name(f"{home.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", images)
    np.save(partial / "areas.npy", areas)
    try:
        partial.rename(home)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


def _drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    image, labels = scene(seed, 2 * SIDE)
    return halve(image), token_areas(labels)


def halve(image: np.ndarray) -> np.ndarray:
    """Mean of each 2x2 pixels: (2H, 2W, 3) -> (H, W, 3), uint8."""
    h, w, _ = image.shape
    return (image.reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8)


def token_areas(labels: np.ndarray) -> np.ndarray:
    """Pixels of each class under each token: labels (224, 224) -> (14, 14, 18) uint8."""
    cell = len(labels) // GRID
    onehot = labels.reshape(GRID, cell, GRID, cell)[..., None] == np.arange(len(CLASSES))
    return onehot.sum((1, 3)).clip(0, 255).astype(np.uint8)


class Tokenizer:
    """OpenAI's tokens, renumbered so that only tokens that occur in captions have a row.

    Attributes:
        used: Original ids in ascending order, (V,); the end-of-text token stays the highest.
    """

    def __init__(self) -> None:
        spoken = [name for own in CLASSES for name in (own, *ALIASES[own])]
        texts = [t.format(name) for t in (*TEMPLATES, *SEVERAL) for name in spoken]
        texts.append("a and a with on by")
        self.used = tokenize(texts).unique()
        self._row = {int(token): row for row, token in enumerate(self.used)}
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Row numbers of the texts, zero-padded to the longest: (B, T)."""
        rows = [self._rows(text) for text in texts]
        length = max(map(len, rows))
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def _rows(self, text: str) -> list[int]:
        if text not in self._known:
            ids = tokenize([text])[0].tolist()
            ids = ids[: ids.index(max(ids)) + 1]
            self._known[text] = [self._row[token] for token in ids]
        return self._known[text]


@dataclass
class Batch:
    """One step's data.

    Attributes:
        pixels: Normalised windows, (B, 3, 8h, 8w).
        places: Row of each token in the position embedding, (B, h*w).
        cells: Class that covers most of each token, (B, h*w).
        ids: Captions, (T, L).
        match: Whether everything named in a caption is visible in the image, (B, T).
    """

    pixels: Tensor
    places: Tensor
    cells: Tensor
    ids: Tensor
    match: Tensor

    def to(self, device: str) -> "Batch":
        """The batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def draw_batch(
    data: Scenes,
    tokens: Tokenizer,
    side: int,
    rng: np.random.Generator,
    *,
    count: int,
    pool: int,
    visible: float,
) -> Batch:
    """Windows of scenes with their captions and the pool's captions.

    Args:
        data: the scenes.
        tokens: tokenizer of the captions.
        side: side of a window, in tokens.
        rng: random generator for scenes, windows, flips and captions.
        count: number of windows.
        pool: further captions per class, each with one name.
        visible: area in tokens from which a class counts as visible.
    """
    pixels, places, areas = [], [], []
    for index in rng.integers(len(data.images), size=count):
        # the better of two windows, since objects are rare and stuff is everywhere
        corners = rng.integers(0, GRID - side + 1, (2, 2))
        views = [data.areas[index, y : y + side, x : x + side] for y, x in corners]
        best = int(np.argmax([view[..., : len(THINGS)].sum(dtype=int) for view in views]))
        (y, x), area = corners[best], views[best]
        view = data.images[index, PATCH * y : PATCH * (y + side), PATCH * x : PATCH * (x + side)]
        if rng.random() < 0.5:
            view, area = view[:, ::-1], area[:, ::-1]
        rows = (y + np.arange(side))[:, None] * GRID + x + np.arange(side) + 1  # row 0: class token
        pixels.append(view)
        places.append(rows.ravel())
        areas.append(area.reshape(side * side, len(CLASSES)))

    area = np.stack(areas)
    there = area.sum(1, dtype=int) >= visible * (2 * PATCH) ** 2  # (B, 18)
    texts, named = [], []
    for row in there:
        seen = np.flatnonzero(row)
        if len(seen):
            chosen = rng.choice(seen, min(len(seen), rng.choice([1, 1, 2, 3])), replace=False)
            named.append(chosen)
    named += [np.array([c]) for c in range(len(CLASSES)) for _ in range(pool)]
    texts = [caption([CLASSES[c] for c in chosen], rng, TEMPLATES) for chosen in named]
    names = np.zeros((len(named), len(CLASSES)), bool)
    for row, chosen in zip(names, named, strict=True):
        row[chosen] = True
    missing = (~there).astype(int) @ names.T.astype(int)  # (B, T)
    return Batch(
        pixels=normalise(np.stack(pixels)),
        places=torch.from_numpy(np.stack(places)),
        cells=torch.from_numpy(area.argmax(-1)),
        ids=tokens(texts),
        match=torch.from_numpy(missing == 0),
    )


def normalise(images: np.ndarray) -> Tensor:
    """RGB pictures (B, H, W, 3) uint8 -> CLIP's input (B, 3, H, W)."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
