"""The first stage of the mini CLIP's training: its settings, the model, the losses.

These choices make training feasible on one CPU core:

* a sample is a window of 7x7 tokens with the position embeddings of its position, so a step costs a
  quarter of a whole scene; whole scenes follow in the last part;
* an image matches every caption whose names are all visible in it, and all captions of a batch have
  the same weight in a sigmoid loss, so rare objects count as much as sky;
* in six of ten steps the class token joins only before the last block. It then cannot collect the
  picture in earlier blocks, so the patches must carry the names in their values.

The generator's patch labels guide block 8 during the first half, and the kinship loss makes patches of
one class resemble and attend to one another. The shipped log, `train.log`, contains that loss from
minute 45 on, and in its current form from minute 60 on, where the run was interrupted to add it; a few
steps occur twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.model import CLIP
from sfp.mini.batches import EVAL_TEMPLATES, PATCH, SIDE, Batch, Tokenizer
from sfp.mini.scenes import CLASSES


@dataclass(frozen=True)
class Recipe:
    """The training settings; training ends after either `steps` or `minutes`."""

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
    attended: int = 3  # number of blocks whose attention the kinship loss uses in a step
    kin_blocks: tuple[int, ...] = (3, 8)  # blocks whose patches it compares
    visible: float = 3.0  # area in tokens from which a class counts as visible
    bias: float = -4.0  # initial bias of the caption loss
    seed: int = 0


def initialise(clip: CLIP) -> None:
    """OpenAI's initial weights, whose depth scaling keeps twelve blocks trainable at this rate."""
    nn.init.normal_(clip.token_embedding.weight, std=0.02)
    for tower in (clip.visual.transformer, clip.transformer):
        width = tower.resblocks[0].get_parameter("ln_1.weight").numel()
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


class Learner(nn.Module):
    """The CLIP, with a loss bias and a patch classifier that are used only in training."""

    def __init__(self, recipe: Recipe, tokens: Tokenizer) -> None:
        super().__init__()
        self.recipe = recipe
        self.seen: dict[str, float] = {}  # further values of a step, for the log
        self.clip = CLIP(
            embed_dim=recipe.width,
            image_size=SIDE,
            patch=PATCH,
            width=recipe.width,
            layers=recipe.layers,
            context=77,
            vocab=len(tokens.used),
            text_width=recipe.text_width,
            text_layers=recipe.text_layers,
        )
        initialise(self.clip)
        self.bias = nn.Parameter(torch.tensor(recipe.bias))
        self.probe = nn.Sequential(
            nn.LayerNorm(recipe.width), nn.Linear(recipe.width, len(CLASSES))
        )
        self.aux_block = min(recipe.aux_block, recipe.layers - 1)
        self.kin_blocks = [min(i, recipe.layers - 2) for i in recipe.kin_blocks]
        self.prompts = tokens([t.format(c) for c in CLASSES for t in EVAL_TEMPLATES])

    def compile_blocks(self) -> None:
        """Fuse the blocks' small operations, which halves a CPU's step."""
        for block in (*self.clip.visual.transformer.resblocks, *self.clip.transformer.resblocks):
            block.compile()

    def losses(self, batch: Batch, done: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """The losses of one step, whose sum is minimised, by name.

        Args:
            batch: the training batch.
            done: completed share of the schedule.
            rng: random generator.
        """
        recipe = self.recipe
        late = bool(rng.random() < recipe.late)
        blocks = recipe.layers - 1  # the last one is not constrained
        attended = rng.choice(blocks, min(recipe.attended, blocks), replace=False).tolist()
        image, entering = self.look(batch.pixels, batch.places, late)
        text = F.normalize(self.clip.encode_text(batch.ids), dim=-1)
        scale = self.clip.logit_scale.exp().clamp(max=100)
        logits = scale * F.normalize(image, dim=-1) @ text.T + self.bias  # (B, T)
        losses = dict(loss=caption_loss(logits, batch.match))
        if done < recipe.aux:
            patches = entering[self.aux_block + 1][:, -batch.cells.shape[1] :]
            guess = self.probe(patches).flatten(0, 1)
            losses["aux"] = F.cross_entropy(guess, batch.cells.flatten())
        losses["kinship"] = self.kinship(entering, batch.cells, attended)
        return losses

    def kinship(self, entering: list[Tensor], cells: Tensor, attended: Sequence[int]) -> Tensor:
        """Makes patches of one class resemble and attend to one another, as in CLIP's middle layers.

        Without this loss the attention of the mini model's middle layers is arbitrary, and methods that
        use their similarity or attention (SFP, SC-CLIP, ResCLIP) cannot work.

        Args:
            entering: Input tokens of each block, (B, P + N, D).
            cells: Class of each patch, (B, N).
            attended: Blocks whose attention is used.
        """
        kin = (cells[:, :, None] == cells[:, None]).float()  # (B, N, N)
        share = 1 / kin.sum(-1)  # so that each class of an image counts the same, however small
        share = share / share.sum()
        n = cells.shape[1]
        maps = [likeness(entering[i + 1][:, -n:]) for i in self.kin_blocks]
        weights = [1.0] * len(maps)
        for i in attended:
            block, x = self.clip.visual.blocks[i], entering[i]
            q, k, _ = block.attn.project(block.ln_1(x))
            scores = q[:, :, -n:] @ k[:, :, -n:].mT * q.shape[-1] ** -0.5
            maps.append(scores.softmax(-1).mean(1))
            weights.append(0.1)
        losses = [
            w * impurity(m, m.sum(-1), kin, share) for w, m in zip(weights, maps, strict=True)
        ]
        return torch.stack(losses).sum()

    def patches(self, pixels: Tensor, places: Tensor) -> Tensor:
        """The patch tokens that enter the first block, (B, N, D)."""
        visual = self.clip.visual
        patches = visual.conv1(pixels).flatten(2).mT + visual.positional_embedding[places]
        return visual.ln_pre(patches)

    def class_token(self, count: int) -> Tensor:
        """The class token that enters the first block, (count, 1, D)."""
        visual = self.clip.visual
        first = visual.class_embedding + visual.positional_embedding[0]
        return visual.ln_pre(first).expand(count, 1, -1)

    def look(self, pixels: Tensor, places: Tensor, late: bool) -> tuple[Tensor, list[Tensor]]:
        """Image embeddings (B, C), and the tokens (B, T, D) that entered each block.

        The class token joins before the last block only if it is `late`.
        """
        visual = self.clip.visual
        x = self.patches(pixels, places)  # (B, N, D)
        cls = self.class_token(len(x))
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

    def joint(self, x: Tensor) -> Tensor:
        """Unit embeddings of the last block's outputs: (..., D) -> (..., C)."""
        visual = self.clip.visual
        return F.normalize(visual.ln_post(x) @ visual.proj, dim=-1)

    @torch.no_grad()
    def name_features(self) -> Tensor:
        """Unit embeddings of the eighteen names, (18, C)."""
        text = self.clip.encode_text(self.prompts.to(self.bias.device))
        return F.normalize(
            F.normalize(text, dim=-1).unflatten(0, (len(CLASSES), -1)).mean(1), dim=-1
        )


def likeness(x: Tensor) -> Tensor:
    """Cosines of patches (B, N, D), softly cut below 0.3: (B, N, N).

    A differentiable approximation of methods that set cosines below 0.4 to zero.
    """
    unit = F.normalize(x, dim=-1)
    cosine = unit @ unit.mT
    return cosine.clamp_min(0) * torch.sigmoid((cosine - 0.3) / 0.05)


def impurity(weights: Tensor, total: Tensor, kin: Tensor, share: Tensor) -> Tensor:
    """Mean negative log of the share of each patch's weight on patches of its class.

    Args:
        weights: (..., B, N, N).
        total: sum of a patch's weights, (..., B, N).
        kin: which patches are of the same class, (B, N, N).
        share: weight of each patch in the mean, (B, N).
    """
    purity = (weights * kin).sum(-1) / total.clamp_min(1e-6)
    return -(share * purity.clamp_min(1e-4).log()).sum()


def caption_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Sigmoid loss of images and captions, (B, T) each, with equal weights for all captions."""
    return -2 * (per_caption(logits, match) + per_caption(-logits, ~match))


def per_caption(logits: Tensor, where: Tensor) -> Tensor:
    """Mean log-sigmoid over the chosen images of each caption, then over captions that have any."""
    chosen = where.sum(0)  # (T,)
    mean = (F.logsigmoid(logits) * where).sum(0) / chosen.clamp(min=1)
    return mean.sum() / (chosen > 0).sum().clamp(min=1)
