"""Train the mini CLIP on generated scenes: `python -m sfp.mini.train --out DIR`.

A 12-layer CLIP of width 128 learns in two stages, each with a folder of its own below DIR that holds
its state, log and result; the command goes on where it was stopped.

1. "scenes" (`sfp.mini.learner`): from (scene, caption) pairs, with help from the generator's patch
   labels.
2. "outliers" (`sfp.mini.outliers`): outlier tokens, which large CLIPs have and one of this size has
   not, are trained in.

It knows the names in `sfp.mini.ALIASES` and no other words, and says nothing about how real CLIPs
behave. It trains as patch 8 at 112 px and is exported as patch 16 at 224 px, like OpenAI's ViT-B/16.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.model import CLIP
from sfp.mini.batches import (
    EVAL_TEMPLATES,
    GRID,
    SIDE,
    VOCABULARY,
    WINDOW,
    Scenes,
    Tokenizer,
    draw_batch,
    halve,
    normalise,
)
from sfp.mini.learner import Learner, Recipe
from sfp.mini.outliers import OutlierRecipe, Outliers
from sfp.mini.scenes import CLASSES, THINGS, fingerprint, scene


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
        self,
        recipe: Recipe,
        out: Path,
        device: str = "cpu",
        resume: bool = False,
        kind: type[Learner] = Learner,
        start: Path | None = None,
        cache: Path | None = None,
    ) -> None:
        """Prepares a run.

        Args:
            recipe: what `kind` takes.
            out: folder of the run.
            device: where to learn.
            resume: whether to go on from `out/state.pt`.
            kind: the stage.
            start: checkpoint of the stage before.
            cache: folder of the rendered scenes, `out/cache` by default.
        """
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(recipe.seed)
        self.recipe, self.out, self.device = recipe, out, device
        self.tokens = Tokenizer()
        self.learner = kind(recipe, self.tokens).to(device)
        if start is not None:
            self.learner.clip.load_state_dict(reload(start, self.tokens.used))
        self.optimiser = optimiser(self.learner)
        self.rng = np.random.default_rng(recipe.seed)
        self.step, self.seconds = 0, 0.0
        if resume:
            self._restore()
        self.data = Scenes(cache or out / "cache", recipe.scenes, recipe.first_seed)

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
        batch = draw_batch(
            self.data,
            self.tokens,
            side,
            self.rng,
            # whole scenes cost four windows, and half as many are enough company for the loss
            count=recipe.batch if side < GRID else recipe.batch // 2,
            pool=recipe.pool,
            visible=recipe.visible,
        )
        losses = self.learner.losses(batch.to(self.device), done, self.rng)
        self.optimiser.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        seen = {name: loss.item() for name, loss in losses.items()} | self.learner.seen
        return {**seen, "rate": rate, "scale": self.learner.clip.logit_scale.exp().item()}

    def run(
        self, log_every: int = 50, save_minutes: float = 5.0, exam_minutes: float = 20.0
    ) -> list[float]:
        """Train to the end of the schedule and return the caption losses of the steps."""
        exam = Exam(self.tokens)
        losses: list[float] = []
        recent: list[dict[str, float]] = []
        before, began = self.seconds, time.monotonic()
        saved = examined = began
        with Progress() as bar, (self.out / "train.log").open("a", buffering=1) as log:
            task = bar.add_task("training", total=1.0)
            while self.progress < 1:
                recent.append(self.advance())
                losses.append(recent[-1]["loss"])
                self.seconds = before + time.monotonic() - began
                bar.update(task, completed=self.progress, description=f"loss {losses[-1]:.2f}")
                if self.step % log_every == 0:
                    names = dict.fromkeys(name for each in recent for name in each)
                    mean = {n: np.mean([each.get(n, 0.0) for each in recent]) for n in names}
                    text = " ".join(f"{k} {v:.4g}" for k, v in mean.items())
                    log.write(f"step {self.step} minutes {self.seconds / 60:.1f} {text}\n")
                    recent.clear()
                if time.monotonic() - saved > 60 * save_minutes or self.progress >= 1:
                    saved = time.monotonic()
                    self.save()
                if saved - examined > 60 * exam_minutes or self.progress >= 1:
                    examined = saved
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

    Each pixel of the small kernel becomes 2x2 pixels with a quarter of its weight. This is exact, since
    the 2x2 means of a picture are the training picture of 112 px. Tokens outside `used` get zero rows.
    """
    state = {name: value.detach().float().cpu() for name, value in clip.state_dict().items()}
    kernel = state["visual.conv1.weight"]  # (D, 3, 8, 8)
    state["visual.conv1.weight"] = kernel.repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
    table = torch.zeros(VOCABULARY, state["token_embedding.weight"].shape[1])
    table[used] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    return {n: (v.half() if v.ndim > 1 else v).contiguous() for n, v in state.items()}


def reload(path: Path, used: Tensor) -> dict[str, Tensor]:
    """Converts what `export` wrote back to the learner's layout."""
    state = {name: value.float() for name, value in load_file(path).items()}
    state["visual.conv1.weight"] = state["visual.conv1.weight"][:, :, ::2, ::2] * 4
    state["token_embedding.weight"] = state["token_embedding.weight"][used]
    return state


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of states, logs, results")
    parser.add_argument(
        "--minutes", type=float, default=Recipe.minutes, help="length of the first stage"
    )
    parser.add_argument(
        "--steps", type=int, default=OutlierRecipe.steps, help="length of the second stage"
    )
    parser.add_argument("--start", type=Path, help="result of the first stage, to skip that stage")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=NUMBER",
        help="settings of the second stage, for ablations: selfself=0 drops that loss",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    second = OutlierRecipe(steps=args.steps, seed=args.seed)
    settings = {}
    for name, _, number in (word.partition("=") for word in args.set):
        kind = type(getattr(second, name, None))
        if kind not in (int, float):
            parser.error(f"--set {name}: {OutlierRecipe.__name__} has no such number")
        try:
            settings[name] = kind(number)
        except ValueError:
            parser.error(f"--set {name}={number}: expected a number")
    torch.set_num_threads(args.threads)
    start = args.start
    stages = [
        ("scenes", Learner, Recipe(minutes=args.minutes, seed=args.seed)),
        ("outliers", Outliers, replace(second, **settings)),
    ]
    for name, kind, recipe in stages if start is None else stages[1:]:
        folder, cache = args.out / name, args.out / "cache"
        goes_on = (folder / "state.pt").exists()
        training = Training(recipe, folder, args.device, goes_on, kind, start, cache)
        if shutil.which(os.environ.get("CXX", "g++")):  # without a compiler it only runs slower
            torch._dynamo.config.suppress_errors = True  # as if there were no compiler
            torch._dynamo.config.recompile_limit = 64  # two towers, windows, scenes
            training.learner.compile_blocks()
        training.run()
        start = folder / "mini.safetensors"
    print(f"wrote {start}")


if __name__ == "__main__":
    main()
