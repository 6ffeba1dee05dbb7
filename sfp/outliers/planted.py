"""Planted outliers: does a detector find them, and does a mitigator repair them?

After one block of a frozen ViT, a disturbance is added to the residual stream of known patches. It has
properties of real outliers: a large norm, a key that matches the class token's query, and a large value
in the channel that the weights amplify most. Detectors are then compared with the known patches, and
final features with those of the undisturbed run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.vit import VisionTransformer
from sfp.method import Detector, Mitigator
from sfp.ops.detectors import loud_channels
from sfp.registry import bind, list_ops, suggest
from sfp.tokens import Tokens, upcast
from sfp.trace import Trace

PATTERNS = ("scattered", "clustered")
TRUTH = "the truth"  # instead of a detector: the planted patches themselves
NONE = "none"  # instead of a mitigator: outliers are kept


@dataclass(frozen=True)
class Plant:
    """An edit of the trunk: adds the disturbance to some patches after one block.

    Attributes:
        layer: the block, absolute; not the last.
        mask: the patches, (B, N) bool.
        strength: norm of the disturbance, in median patch norms of the image.
        channel_share: share of its energy in the outlier channel.
    """

    layer: int
    mask: Tensor
    strength: float
    channel_share: float = 0.25

    def __call__(self, trace: Trace, i: int) -> Tokens:
        """The output of block `i` (absolute), disturbed if it is `layer`."""
        tokens = trace.outputs[i]
        if i != self.layer:
            return tokens
        usual = upcast(tokens.patches).norm(dim=-1).median(-1).values  # (B,)
        added = outlier_direction(trace, i, self.channel_share) * (self.strength * usual)[:, None]
        patches = tokens.patches + added[:, None].to(tokens.data.dtype) * self.mask[..., None]
        return tokens.with_patches(patches)


def outlier_direction(trace: Trace, layer: int, channel_share: float) -> Tensor:
    """The unit direction of each image's disturbance, (B, D).

    If a large vector u is added to a token, the output of the next block's `ln_1` is x ~ ln_1.weight *
    u, up to a factor and a mean. The class token's logit, the sum over heads of q_cls . W_k x, then
    grows fastest along u = ln_1.weight * W_k^T q_cls, minus its mean. To this is added the channel that
    `weight_norm_channel` uses, with its sign in the image.
    """
    tokens, block = trace.outputs[layer], trace.vit.blocks[layer + 1]
    query = upcast(block.heads(tokens.with_cls()).q[:, :, 0].flatten(1))  # (B, D)
    width = query.shape[1]
    keys = upcast(block.attn.in_proj_weight[width : 2 * width])  # (D, D): W_k
    wanted = query @ keys
    if isinstance(block.ln_1, nn.LayerNorm):  # not in post-norm blocks
        wanted = wanted * upcast(block.ln_1.weight)
    wanted = F.normalize(wanted - wanted.mean(-1, keepdim=True), dim=-1)
    channel = loud_channels(trace, layer)[0]
    loud = torch.zeros_like(wanted)
    loud[:, channel] = 1 - 2 * (upcast(tokens.patches)[..., channel].mean(-1) < 0).to(loud)
    mixed = (1 - channel_share) ** 0.5 * wanted + channel_share**0.5 * loud
    return F.normalize(mixed, dim=-1)


def choose(grid: tuple[int, int], count: int, pattern: str, rng: np.random.Generator) -> np.ndarray:
    """`count` random patches of a grid, (N,) bool.

    Args:
        grid: rows and columns.
        count: number of patches.
        pattern: "scattered": anywhere; "clustered": those nearest to a random one.
        rng: random generator.

    Raises:
        ValueError: for any other pattern.
    """
    pick_pattern(pattern)
    n = grid[0] * grid[1]
    order = rng.random(n)  # below 1, so that it only breaks ties between distances
    if pattern == "clustered":
        rows, cols = np.divmod(np.arange(n), grid[1])
        centre = rng.integers(n)
        order += (rows - rows[centre]) ** 2 + (cols - cols[centre]) ** 2
    mask = np.zeros(n, dtype=bool)
    mask[np.argsort(order)[:count]] = True
    return mask


def pick_pattern(pattern: str) -> None:
    """Raises a ValueError unless there is such a pattern."""
    if pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}{suggest(pattern, PATTERNS)}")


@dataclass(frozen=True)
class Setting:
    """What is planted, and where detectors and mitigators act.

    Attributes:
        layer: block after which outliers are planted; None for the middle of the model.
        detect: block at which detectors and mitigators act; None for the one after `layer`, the first
            whose attention sees the outliers.
        planted: mean number of outliers per image; below 1, a share of the patches.
        varied: whether the number varies between images, uniformly from 1 to twice the mean minus 1, so
            that a detector with a fixed budget is not right by chance.
        patterns: see `choose`.
        strengths: see `Plant`.
        at: the strength at which all pairs of detectors and mitigators are tried.
        channel_share: see `Plant`.
        seed: seed of the chosen patches.

    Raises:
        ValueError: if a number is out of its range.
    """

    layer: int | None = None
    detect: int | None = None
    planted: float = 0.05
    varied: bool = True
    patterns: Sequence[str] = PATTERNS
    strengths: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0)
    at: float = 4.0
    channel_share: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            pick_pattern(pattern)
        if (
            self.planted <= 0
            or min(*self.strengths, self.at) <= 0
            or not 0 <= self.channel_share <= 1
        ):
            raise ValueError(
                f"planted={self.planted}, strengths={self.strengths}, at={self.at} must be above 0, "
                f"channel_share={self.channel_share} from 0 to 1"
            )

    def count(self, n: int) -> int:
        """Mean number of outliers among `n` patches: at least 1, at most half of them."""
        wanted = self.planted * n if self.planted < 1 else self.planted
        return min(max(round(wanted), 1), max(n // 2, 1))

    def mask(self, grid: tuple[int, int], pattern: str, image: int) -> np.ndarray:
        """The patches of image number `image`, (N,) bool: the same in any batch, at any strength."""
        rng = np.random.default_rng((self.seed, image))
        count = self.count(grid[0] * grid[1])
        return choose(grid, int(rng.integers(1, 2 * count)) if self.varied else count, pattern, rng)

    def blocks(self, vit: VisionTransformer) -> tuple[int, int]:
        """`layer` and `detect` as block numbers of a model.

        Raises:
            ValueError: if the blocks do not exist, or one is the last, which only readouts run.
        """
        last = len(vit.blocks) - 2
        layer = len(vit.blocks) // 2 - 1 if self.layer is None else self.layer
        detect = min(layer + 1, last) if self.detect is None else self.detect
        if not 0 <= layer <= detect <= last:
            raise ValueError(
                f"planted behind block {layer}, detected at block {detect}: expected "
                f"0 <= planted <= detected <= {last} in a model of {len(vit.blocks)} blocks"
            )
        return layer, detect


def detectors(names: Iterable[str] | None = None) -> dict[str, Detector]:
    """Detectors by name with their default knobs; if None, all, and SOM with the release's too."""
    chosen = list_ops("detector") if names is None else names
    found = {name: bind(dict(type=name), "detector") for name in chosen}
    if names is None:
        found["som (release)"] = bind(dict(type="som", gain=1.5, top_k=10))
    return found


def mitigators(names: Iterable[str] | None = None) -> dict[str, Mitigator]:
    """Mitigators by name with their default knobs; all if None."""
    chosen = list_ops("mitigator") if names is None else names
    return {name: bind(dict(type=name), "mitigator") for name in chosen}


class Tally:
    """Sums of per-image values under a key, to be averaged."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, *key: Any, value: Tensor) -> None:
        """Adds the sum over images, the first dimension of `value`."""
        self._sums[key] = self._sums[key] + value.double().sum(0).cpu()

    def __getitem__(self, key: tuple) -> Tensor:
        return self._sums[key]


@torch.no_grad()
def benchmark(
    vit: VisionTransformer,
    batches: Iterable[Tensor],
    setting: Setting,
    detectors: Mapping[str, Detector],
    mitigators: Mapping[str, Mitigator],
) -> dict[str, Any]:
    """Plants, detects, mitigates and compares; every figure is over all images.

    Args:
        vit: the frozen image tower.
        batches: normalised images, (B, 3, H, W) each, all of one size.
        setting: what is planted, and where detectors and mitigators act.
        detectors, mitigators: by name.

    Returns:
        Numbers only, ready for JSON:
        "undisturbed": detector -> share of the patches marked without planted outliers;
        "patterns": for each pattern
        "disturbance", one entry per strength: "norm" (planted patches', in medians of the others) and
        "drawn" (share of the class token's attention that they receive in the next block);
        "detection": detector -> one entry per strength: "precision" (None if nothing was marked),
        "recall", "f1";
        "restoration": mitigator, given the true mask -> one entry per strength: mean cosine of the
        final features with the undisturbed run's, "planted" and "others";
        "pairs": detector -> mitigator -> the same at strength `at`.
    """
    study = _Study(vit, setting, detectors, mitigators)
    for batch in batches:
        study.add(batch)
    if not study.images:
        raise ValueError("no images to plant outliers into")
    return study.results()


class _Study:
    """The sums of `benchmark` over all batches, and its results."""

    def __init__(
        self,
        vit: VisionTransformer,
        setting: Setting,
        detectors: Mapping[str, Detector],
        mitigators: Mapping[str, Mitigator],
    ) -> None:
        self.vit, self.setting = vit, setting
        self.detectors, self.mitigators = detectors, mitigators
        self.layer, self.detect = setting.blocks(vit)
        self.strengths = sorted({*setting.strengths, setting.at})
        self.tally = Tally()
        self.images, self.grid, self.planted = 0, (0, 0), 0

    def add(self, batch: Tensor) -> None:
        """Plants outliers in a batch of images, (B, 3, H, W), in every pattern and strength."""
        clean = self.vit.trace(batch)
        self.grid = clean.embedded.grid
        target = _finish(self.vit, clean.outputs[self.detect], self.detect + 1)
        for name, detector in self.detectors.items():
            marked = detector(clean, self.detect).float().mean(-1)
            self.tally.add("undisturbed", name, value=marked)
        for pattern in self.setting.patterns:
            numbers = range(self.images, self.images + len(batch))
            masks = np.stack([self.setting.mask(self.grid, pattern, i) for i in numbers])
            self.planted += int(masks.sum())
            truth = torch.from_numpy(masks).to(batch.device)
            for strength in self.strengths:
                self._add_planted(batch, truth, target, pattern, strength)
        self.images += len(batch)

    def _add_planted(
        self, batch: Tensor, truth: Tensor, target: Tokens, pattern: str, strength: float
    ) -> None:
        """Detects and mitigates the outliers planted at `truth`, (B, N)."""
        plant = Plant(self.layer, truth, strength, self.setting.channel_share)
        trace = self.vit.trace(batch, [plant])
        key = (pattern, strength)
        self.tally.add(*key, "disturbance", value=_disturbance(trace, self.layer, truth))
        found = {name: detector(trace, self.detect) for name, detector in self.detectors.items()}
        tokens = trace.outputs[self.detect]
        for name, mask in {TRUTH: truth, **found}.items():
            counts = [mask & truth, mask & ~truth, ~mask & truth]
            self.tally.add(*key, name, value=torch.stack([c.sum(-1) for c in counts], -1))
            if name != TRUTH and strength != self.setting.at:
                continue
            repaired = {m: repair(tokens, mask) for m, repair in self.mitigators.items()}
            if name == TRUTH:
                repaired[NONE] = tokens
            for mitigator, each in repaired.items():
                alike = _alike(_finish(self.vit, each, self.detect + 1), target, truth)
                self.tally.add(*key, name, mitigator, value=alike)

    def results(self) -> dict[str, Any]:
        """What `benchmark` returns."""
        shares = {d: self._mean(("share",), "undisturbed", d)["share"] for d in self.detectors}
        return dict(
            setting={
                **asdict(self.setting),
                "layer": self.layer,
                "detect": self.detect,
                "strengths": self.strengths,
            },
            images=self.images,
            grid=list(self.grid),
            outliers_per_image=round(self.planted / self.images / len(self.setting.patterns), 3),
            undisturbed=shares,
            patterns={pattern: self._of_pattern(pattern) for pattern in self.setting.patterns},
        )

    def _of_pattern(self, pattern: str) -> dict[str, Any]:
        kept = ("planted", "others")

        def per_strength(names: Sequence[str], *key: Any) -> list[dict[str, float]]:
            return [dict(strength=s, **self._mean(names, pattern, s, *key)) for s in self.strengths]

        return dict(
            disturbance=per_strength(("norm", "drawn"), "disturbance"),
            detection={
                d: [dict(strength=s, **self._detection(pattern, s, d)) for s in self.strengths]
                for d in self.detectors
            },
            restoration={m: per_strength(kept, TRUTH, m) for m in (NONE, *self.mitigators)},
            pairs={
                d: {m: self._mean(kept, pattern, self.setting.at, d, m) for m in self.mitigators}
                for d in (TRUTH, *self.detectors)
            },
        )

    def _detection(self, *key: Any) -> dict[str, float | None]:
        hit, false, missed = self.tally[key].tolist()
        return dict(
            precision=round(hit / (hit + false), 4) if hit + false else None,
            recall=round(hit / (hit + missed), 4),
            f1=round(2 * hit / (2 * hit + false + missed), 4),
        )

    def _mean(self, names: Sequence[str], *key: Any) -> dict[str, float]:
        values = (self.tally[key] / self.images).reshape(-1).tolist()
        return {n: round(v, 4) for n, v in zip(names, values, strict=True)}


def _finish(vit: VisionTransformer, tokens: Tokens, start: int) -> Tokens:
    """Plain CLIP from block `start` on: dense features in the joint space."""
    for block in vit.blocks[start:]:
        tokens = block.advance(tokens, block.heads(tokens))
    return vit.project(tokens)


def _disturbance(trace: Trace, layer: int, truth: Tensor) -> Tensor:
    """Planted patches' norm over the others' median, and their share of CLS's attention: (B, 2)."""
    norms = upcast(trace.outputs[layer].patches).norm(dim=-1)  # (B, N)
    usual = norms.masked_fill(truth, torch.nan).nanmedian(-1).values  # (B,)
    drawn = (trace.cls_row(layer + 1).mean(1) * truth).sum(-1)
    return torch.stack([(norms * truth).sum(-1) / truth.sum(-1) / usual, drawn], dim=-1)


def _alike(final: Tokens, target: Tokens, truth: Tensor) -> Tensor:
    """Mean cosine of the features of planted patches, and of the others, with the target's: (B, 2)."""
    cosine = F.cosine_similarity(upcast(final.patches), upcast(target.patches), dim=-1)  # (B, N)
    parts = [(cosine * part).sum(-1) / part.sum(-1).clamp_min(1) for part in (truth, ~truth)]
    return torch.stack(parts, dim=-1)
