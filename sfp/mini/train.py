"""Train the mini CLIP on generated scenes: `python -m sfp.mini.train --out DIR [--minutes 95]`.

A 12-layer CLIP of width 128 learns from (scene, caption) pairs, with help from the generator's patch
labels: they guide block 8 during the first half, and the kinship loss asks that patches of one class
resemble and attend to one another. It knows the names in `sfp.mini.ALIASES` and no other words, and
says nothing about how real CLIPs behave.

The shipped checkpoint's log, `train.log`, shows the kinship loss from minute 45 on, in its present
form from minute 60 on; the run was interrupted there to add it, and a few steps occur twice.

What makes a thing this small work on one CPU core:

* a sample is a window of 7x7 tokens with the position embeddings of its place, so a step costs a
  quarter of a whole scene; whole scenes follow in the last part;
* an image matches every caption whose names are all visible in it, and each caption of the batch
  weighs the same in a sigmoid loss, so rare things count as much as sky;
* in six of ten steps the class token joins only before the last block. It cannot collect the
  picture on the way then, and the patches have to carry the names in their values.

It trains as patch 8 at 112 px and is exported as patch 16 at 224 px, like OpenAI's ViT-B/16.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.model import CLIP
from sfp.clip.templates import IMAGENET
from sfp.clip.text import tokenize
from sfp.mini.scenes import ALIASES, CLASSES, SEVERAL, THINGS, caption, fingerprint, scene

GRID = 14  # tokens along a side of a scene
WINDOW = 7  # tokens along a side of a training window
PATCH = 8  # pixels, while training
SIDE = GRID * PATCH
VOCABULARY = 49408  # of OpenAI's tokenizer
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's pixel statistics
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATES = ("{}", "a {}", "the {}", "a photo of {}.", *IMAGENET)
EVAL_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a drawing of a {}.", "a {}", "{}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is learnt; either `steps` or `minutes` ends the training."""

    minutes: float = 95.0
    steps: int | None = None
    scenes: int = 16_000
    first_seed: int = 1_000
    layers: int = 12
    width: int = 128
    text_width: int = 64
    text_layers: int = 2
    batch: int = 32
    pool: int = 4  # extra captions per class, each with one name
    rate: float = 1.5e-3
    warmup: int = 100  # steps
    decay: float = 0.4  # last part of the training, with a linear descent of the rate
    whole: float = 0.3  # last part, on whole scenes
    late: float = 0.6  # share of steps in which the class token joins before the last block
    aux: float = 0.5  # first part, with patch labels at `aux_block`
    aux_block: int = 8
    attended: int = 3  # blocks whose attention the kinship loss looks at in a step
    kin_blocks: tuple[int, ...] = (3, 8)  # blocks whose patches it compares
    visible: float = 3.0  # area in tokens from which a class counts as visible
    seed: int = 0


# ------------------------------------------------------------------------------------------- data


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
    with Progress() as progress:
        for i in progress.track(range(count), description="drawing scenes"):
            image, labels = scene(first_seed + i, 2 * SIDE)
            images[i], areas[i] = halve(image), token_areas(labels)
    partial = home.with_name(f"{home.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    np.save(partial / "images.npy", images)
    np.save(partial / "areas.npy", areas)
    try:
        partial.rename(home)
    except OSError:  # another process was faster
        shutil.rmtree(partial)


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
    """OpenAI's tokens, renumbered so that only those that captions can contain have a row.

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
        places: Row of each token in the position table, (B, h*w).
        cells: Class that covers most of each token, (B, h*w).
        ids: Captions, (T, L).
        match: Whether all that a caption names is visible in the image, (B, T).
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
    data: Scenes, tokens: Tokenizer, recipe: Recipe, side: int, rng: np.random.Generator
) -> Batch:
    """Windows of `side` x `side` tokens with their captions and the pool's captions."""
    # whole scenes cost four windows, and half as many are enough company for the loss
    count = recipe.batch if side < GRID else recipe.batch // 2
    pixels, places, areas = [], [], []
    for index in rng.integers(len(data.images), size=count):
        # the better of two windows: things are rare, stuff is everywhere
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
    visible = area.sum(1, dtype=int) >= recipe.visible * (2 * PATCH) ** 2  # (B, 18)
    texts, named = [], []
    for row in visible:
        seen = np.flatnonzero(row)
        if len(seen):
            chosen = rng.choice(seen, min(len(seen), rng.choice([1, 1, 2, 3])), replace=False)
            named.append(chosen)
    named += [np.array([c]) for c in range(len(CLASSES)) for _ in range(recipe.pool)]
    texts = [caption([CLASSES[c] for c in chosen], rng, TEMPLATES) for chosen in named]
    names = np.zeros((len(named), len(CLASSES)), bool)
    for row, chosen in zip(names, named, strict=True):
        row[chosen] = True
    missing = (~visible).astype(int) @ names.T.astype(int)  # (B, T)
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


# ------------------------------------------------------------------------------------------ model


def initialise(clip: CLIP) -> None:
    """OpenAI's initial weights, whose depth scaling keeps twelve blocks trainable at this rate."""
    nn.init.normal_(clip.token_embedding.weight, std=0.02)
    for tower in (clip.visual.transformer, clip.transformer):
        width = tower.resblocks[0].ln_1.weight.numel()
        narrow = width**-0.5 * (2 * len(tower.resblocks)) ** -0.5
        spread = {
            "attn.in_proj_weight": width**-0.5,
            "attn.out_proj.weight": narrow,
            "mlp.c_fc.weight": (2 * width) ** -0.5,
            "mlp.c_proj.weight": narrow,
        }
        for name, parameter in tower.named_parameters():
            kind = name.split(".", 2)[-1]  # without "resblocks.<i>."
            if kind in spread:
                nn.init.normal_(parameter, std=spread[kind])
            elif kind.endswith("bias"):
                nn.init.zeros_(parameter)


def compile_blocks(clip: CLIP) -> None:
    """Fuse the blocks' small operations, which halves a CPU's step; a no-op without a compiler."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return
    torch._dynamo.config.suppress_errors = True  # a compiler that fails is as good as none
    torch._dynamo.config.recompile_limit = 64  # two towers, windows, scenes, with and without class
    for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
        block.compile()


class Learner(nn.Module):
    """The CLIP and what is thrown away after the training: loss bias and patch classifier."""

    def __init__(self, recipe: Recipe, vocab: int) -> None:
        super().__init__()
        self.clip = CLIP(
            embed_dim=recipe.width,
            image_size=SIDE,
            patch=PATCH,
            width=recipe.width,
            layers=recipe.layers,
            context=77,
            vocab=vocab,
            text_width=recipe.text_width,
            text_layers=recipe.text_layers,
        )
        initialise(self.clip)
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.probe = nn.Sequential(
            nn.LayerNorm(recipe.width), nn.Linear(recipe.width, len(CLASSES))
        )
        self.aux_block = min(recipe.aux_block, recipe.layers - 1)
        self.kin_blocks = [min(i, recipe.layers - 2) for i in recipe.kin_blocks]

    def forward(
        self, batch: Batch, late: bool, aux: bool, attended: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The caption, patch and kinship losses, three scalars.

        Args:
            batch: What to learn from.
            late: Whether the class token joins before the last block only.
            aux: Whether there is a patch loss.
            attended: Blocks whose attention the kinship loss looks at.
        """
        image, entering = self.look(batch.pixels, batch.places, late)
        text = F.normalize(self.clip.encode_text(batch.ids), dim=-1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ text.T + self.bias  # (B, T)
        loss = -2 * (per_caption(logits, batch.match) + per_caption(-logits, ~batch.match))
        patch_loss = loss.new_zeros(())
        if aux:
            patches = entering[self.aux_block + 1][:, -batch.cells.shape[1] :]
            guess = self.probe(patches).flatten(0, 1)
            patch_loss = F.cross_entropy(guess, batch.cells.flatten())
        return loss, patch_loss, self.kinship(entering, batch.cells, attended)

    def kinship(self, entering: list[Tensor], cells: Tensor, attended: Sequence[int]) -> Tensor:
        """Patches of one class should resemble and attend to one another, as in middle layers of CLIP.

        Without it the mini model's middle layers attend anywhere, and methods that read similarity or
        attention from there (SFP, SC-CLIP, ResCLIP) have nothing to read.

        Args:
            entering: Tokens (B, P + N, D) that entered each block.
            cells: Class of each patch, (B, N).
            attended: Blocks whose attention is looked at.
        """
        kin = (cells[:, :, None] == cells[:, None]).float()  # (B, N, N)
        share = 1 / kin.sum(-1)  # so that each class of an image counts the same, however small
        share = share / share.sum()
        n = cells.shape[1]
        maps, weights = [], []
        for i in self.kin_blocks:
            unit = F.normalize(entering[i + 1][:, -n:], dim=-1)
            cosine = unit @ unit.mT
            # about what methods do that set cosines below 0.4 to zero, with a slope to learn from
            maps.append(cosine.clamp_min(0) * torch.sigmoid((cosine - 0.3) / 0.05))
            weights.append(1.0)
        for i in attended:
            block, x = self.clip.visual.blocks[i], entering[i]
            q, k, _ = block.attn.project(block.ln_1(x))
            scores = q[:, :, -n:] @ k[:, :, -n:].mT * q.shape[-1] ** -0.5
            maps.append(scores.softmax(-1).mean(1))
            weights.append(0.1)
        losses = []
        for weight, each in zip(weights, maps, strict=True):
            purity = (each * kin).sum(-1) / each.sum(-1)  # (B, N)
            losses.append(-weight * (share * purity.clamp_min(1e-4).log()).sum())
        return torch.stack(losses).sum()

    def look(self, pixels: Tensor, places: Tensor, late: bool) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (B, C), and the tokens (B, T, D) that entered each block."""
        visual = self.clip.visual
        patches = visual.conv1(pixels).flatten(2).mT + visual.positional_embedding[places]
        first = visual.class_embedding + visual.positional_embedding[0]
        cls = visual.ln_pre(first).expand(len(patches), 1, -1)
        x = visual.ln_pre(patches)  # (B, N, D)
        if not late:
            x = torch.cat([cls, x], 1)  # (B, 1 + N, D)
        entering = []
        for i, block in enumerate(visual.blocks):
            if late and i == len(visual.blocks) - 1:
                x = torch.cat([cls, x], 1)
            entering.append(x)
            x = block(x)
        entering.append(x)
        return visual.ln_post(x[:, 0]) @ visual.proj, entering


def per_caption(logits: Tensor, where: Tensor) -> Tensor:
    """Mean log-sigmoid over the chosen images of each caption, then over captions that have any."""
    chosen = where.sum(0)  # (T,)
    mean = (F.logsigmoid(logits) * where).sum(0) / chosen.clamp(min=1)
    return mean.sum() / (chosen > 0).sum().clamp(min=1)


def optimiser(learner: nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no embedding, position, bias or norm."""
    free = ("embedding", "logit_scale")
    parameters = dict(learner.named_parameters())
    decayed = {n for n, p in parameters.items() if p.ndim > 1 and not any(f in n for f in free)}
    groups = [
        {"params": [p for n, p in parameters.items() if n in decayed], "weight_decay": 0.05},
        {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


# ------------------------------------------------------------------------------------- evaluation


class Exam:
    """A few held-out scenes, read out in several ways (its seeds are not the benchmark's)."""

    def __init__(self, tokens: Tokenizer, count: int = 40, first_seed: int = 800_000) -> None:
        drawn = [scene(first_seed + i, 2 * SIDE) for i in range(count)]
        self.pixels = normalise(np.stack([halve(image) for image, _ in drawn]))
        self.labels = torch.from_numpy(np.stack([labels[::2, ::2] for _, labels in drawn])).long()
        self.prompts = tokens([t.format(c) for c in CLASSES for t in EVAL_TEMPLATES])

    @torch.no_grad()
    def __call__(self, clip: CLIP) -> dict[str, np.ndarray]:
        """Intersection over union of every class in percent, (18,), per readout."""
        device = clip.logit_scale.device
        text = F.normalize(clip.encode_text(self.prompts.to(device)), dim=-1)
        text = F.normalize(text.unflatten(0, (len(CLASSES), -1)).mean(1), dim=-1)  # (18, C)
        counts: dict[str, Tensor] = {}
        for pixels, labels in zip(self.pixels.split(10), self.labels.split(10), strict=True):
            for name, patches in readouts(clip, pixels.to(device)).items():
                logits = (F.normalize(patches, dim=-1) @ text.T).mT.unflatten(-1, (GRID, GRID))
                guess = F.interpolate(logits, size=(SIDE, SIDE), mode="bilinear").argmax(1).cpu()
                pairs = (labels * len(CLASSES) + guess).flatten().bincount(minlength=18 * 18)
                counts[name] = counts.get(name, 0) + pairs.view(18, 18)
        return {name: _iou(table) for name, table in counts.items()}


def readouts(clip: CLIP, pixels: Tensor) -> dict[str, Tensor]:
    """Patch embeddings (B, N, C) by plain CLIP, SCLIP, MaskCLIP and bare self-self attention."""
    visual = clip.visual
    x = visual.embed(pixels).data
    for block in visual.blocks[:-1]:
        x = block(x)
    last = visual.blocks[-1]
    q, k, v = last.attn.project(last.ln_1(x))  # each (B, H, T, d)
    scale = q.shape[-1] ** -0.5
    selfself = (q @ q.mT * scale).softmax(-1) + (k @ k.mT * scale).softmax(-1)
    mixed = last.attn.out_proj((selfself @ v).transpose(1, 2).flatten(2))
    sclip = x + mixed
    sclip = sclip + last.mlp(last.ln_2(sclip))
    values = last.attn.out_proj(v.transpose(1, 2).flatten(2))
    read = {"plain": last(x), "sclip": sclip, "selfself": mixed, "maskclip": values}
    return {name: visual.ln_post(y[:, 1:]) @ visual.proj for name, y in read.items()}


def _iou(table: Tensor) -> np.ndarray:
    hit = table.diagonal()
    return (100 * hit / (table.sum(0) + table.sum(1) - hit).clamp(min=1)).numpy()


def _report(scores: dict[str, np.ndarray]) -> str:
    things = len(THINGS)
    lines = [
        f"  {name:9s} mIoU {iou.mean():5.1f} things {iou[:things].mean():5.1f} "
        f"stuff {iou[things:].mean():5.1f}"
        for name, iou in scores.items()
    ]
    best = max(scores, key=lambda name: scores[name].mean())
    each = " ".join(f"{c} {v:.0f}" for c, v in zip(CLASSES, scores[best], strict=True))
    return "\n".join([*lines, f"  {best}: {each}"])


# --------------------------------------------------------------------------------------- training


class Training:
    """A run that can stop and go on: everything it needs lies in `out/state.pt`."""

    def __init__(
        self, recipe: Recipe, out: Path, device: str = "cpu", resume: bool = False
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.device = recipe, out, device
        self.tokens = Tokenizer()
        self.learner = Learner(recipe, len(self.tokens.used)).to(device)
        self.optimiser = optimiser(self.learner)
        self.rng = np.random.default_rng(recipe.seed)
        self.step, self.seconds = 0, 0.0
        if resume:
            self._restore()
        self.data = Scenes(out / "cache", recipe.scenes, recipe.first_seed)

    @property
    def progress(self) -> float:
        """Share of the schedule that is done; with a longer budget a resumed run steps back."""
        if self.recipe.steps:
            return self.step / self.recipe.steps
        return self.seconds / (60 * self.recipe.minutes)

    def advance(self) -> dict[str, float]:
        """Take one step and return its losses."""
        recipe, done = self.recipe, self.progress
        rate = recipe.rate * min(1, (self.step + 1) / recipe.warmup, (1 - done) / recipe.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = max(rate, 0.0)
        side = GRID if done >= 1 - recipe.whole else WINDOW
        batch = draw_batch(self.data, self.tokens, recipe, side, self.rng)
        late = bool(self.rng.random() < recipe.late)
        blocks = recipe.layers - 1  # the last one keeps its own ways
        attended = self.rng.choice(blocks, min(recipe.attended, blocks), replace=False).tolist()
        loss, aux, kinship = self.learner(batch.to(self.device), late, done < recipe.aux, attended)
        self.optimiser.zero_grad()
        (loss + aux + kinship).backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return {
            "loss": loss.item(),
            "aux": aux.item(),
            "kinship": kinship.item(),
            "rate": rate,
        }

    def run(self, log_every: int = 50, save_minutes: float = 5.0) -> list[float]:
        """Train to the end of the schedule and return the caption losses of the steps."""
        exam = Exam(self.tokens)
        losses: list[float] = []
        recent: list[dict[str, float]] = []
        before, began, saved = self.seconds, time.monotonic(), time.monotonic()
        with Progress() as bar, (self.out / "train.log").open("a", buffering=1) as log:
            task = bar.add_task("training", total=1.0)
            while self.progress < 1:
                recent.append(self.advance())
                losses.append(recent[-1]["loss"])
                self.seconds = before + time.monotonic() - began
                bar.update(task, completed=self.progress, description=f"loss {losses[-1]:.2f}")
                if self.step % log_every == 0:
                    mean = {k: np.mean([r[k] for r in recent]) for k in recent[0]}
                    text = " ".join(f"{k} {v:.4g}" for k, v in mean.items())
                    scale = self.learner.clip.logit_scale.exp().item()
                    when = f"step {self.step} minutes {self.seconds / 60:.1f}"
                    log.write(f"{when} {text} scale {scale:.1f}\n")
                    recent.clear()
                if time.monotonic() - saved > 60 * save_minutes or self.progress >= 1:
                    saved = time.monotonic()
                    self.save()
                    log.write(f"exam at step {self.step}\n{_report(exam(self.learner.clip))}\n")
        return losses

    def save(self) -> None:
        """Write the state for `resume` and the exported checkpoint, each in one rename."""
        state = {
            "learner": self.learner.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "rng": json.dumps(self.rng.bit_generator.state),
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        partial = self.out / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.out / "state.pt")
        partial = self.out / "mini.safetensors.partial"
        about = {"generator": fingerprint(), "step": str(self.step), "classes": ", ".join(CLASSES)}
        save_file(export(self.learner.clip, self.tokens.used), partial, metadata=about)
        partial.replace(self.out / "mini.safetensors")

    def _restore(self) -> None:
        state = torch.load(self.out / "state.pt", weights_only=True, map_location=self.device)
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]


def export(clip: CLIP, used: Tensor) -> dict[str, Tensor]:
    """OpenAI's layout at patch 16 and 224 px, matrices in half precision.

    Each pixel of the small kernel becomes 2x2 pixels of a quarter of its weight. That is exact for
    a picture whose 2x2 means are the picture of 112 px. Tokens outside `used` get zero rows.
    """
    state = {name: value.detach().float().cpu() for name, value in clip.state_dict().items()}
    kernel = state["visual.conv1.weight"]  # (D, 3, 8, 8)
    state["visual.conv1.weight"] = kernel.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    table = torch.zeros(VOCABULARY, state["token_embedding.weight"].shape[1])
    table[used] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    return {n: (v.half() if v.ndim > 1 else v).contiguous() for n, v in state.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and result")
    parser.add_argument(
        "--minutes", type=float, default=Recipe.minutes, help="length of the schedule"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    training = Training(Recipe(minutes=args.minutes), args.out, args.device, args.resume)
    compile_blocks(training.learner.clip)
    training.run()
    print(f"wrote {args.out / 'mini.safetensors'}")


if __name__ == "__main__":
    main()
