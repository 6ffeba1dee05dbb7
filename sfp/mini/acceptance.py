"""Tests whether a mini CLIP shows SFP's phenomenon: `python -m sfp.mini.acceptance --weights FILE`.

The criteria concern the phenomenon, not the ranking of methods, on scenes that no choice was based on:
purification matters, outliers resemble those of large CLIPs, plain CLIP suffers from them, and scores
remain high. Differences have 95 % intervals of a paired bootstrap over scenes.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.checkpoints.loading import load_clip
from sfp.clip.model import CLIP
from sfp.clip.text import text_bank
from sfp.evaluation.paired import cell, class_iou, paired
from sfp.files import atomic_write
from sfp.method import build_method
from sfp.mini.scenes import CLASSES, scene
from sfp.trace import Trace

ROWS: Mapping[str, Mapping[str, Any]] = dict(  # the poster's rows, by their modules SOM, SAE, HAI
    none=dict(purify=False, enhancer="qk", integrator=False),
    som=dict(enhancer="qk", integrator=False),
    sae=dict(purify=False, integrator=False),
    som_sae=dict(integrator=False),
    sae_hai=dict(purify=False),
    som_sae_hai={},
)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "clip": dict(type="clip"),
    "maskclip": dict(type="maskclip"),
    "sclip": dict(type="sclip"),
    "clearclip": dict(type="clearclip"),
    "naclip": dict(type="naclip"),
    "scclip": dict(type="scclip"),
    "sfp": dict(type="sfp"),
    "sfp_unpurified": dict(type="sfp", purify=False),
    **{f"paper_{name}": dict(type="sfp_paper", **knobs) for name, knobs in ROWS.items()},
}
DIFFERENCES = (
    ("sfp", "sfp_unpurified"),
    ("paper_som_sae", "paper_sae"),
    ("paper_som_sae_hai", "paper_sae_hai"),
    ("paper_som", "paper_none"),
    ("paper_som_sae", "paper_som"),
    ("paper_som_sae_hai", "paper_som_sae"),
    ("sclip", "clip"),
    ("sfp", "sclip"),
    ("sfp", "clearclip"),
    ("sfp", "scclip"),
)
BLOCKS = range(5, 12)
VISIBLE = 768  # pixels from which a class counts as visible: three tokens
STRONGEST = 5


@dataclass(frozen=True)
class Point:
    """A criterion and its measurement.

    Attributes:
        name: its name.
        value: the measured value.
        low, high: 95 % interval, NaN if there is none.
        wanted: the requirement, in words.
        holds: whether it is met.
    """

    name: str
    value: float
    low: float
    high: float
    wanted: str
    holds: bool


def measure(
    clip: CLIP, scenes: int, first_seed: int, methods: Mapping[str, Mapping[str, Any]] = METHODS
) -> dict[str, Any]:
    """Measures methods' scores on scenes, and statistics of the model's attention and norms.

    Args:
        clip: the model.
        scenes: number of scenes.
        first_seed: seed of the first scene; the others follow.
        methods: arguments of `build_method`, by name.

    Returns:
        "counts": by method the correct, predicted and true pixels of each class, (scenes, 3, 18) int64.
        "blocks": for each statistic (see `look`), its mean over scenes for each of `BLOCKS`. "top_k":
        share of the visible classes among the k names closest to the class token, where k is the number
        of visible classes.
    """
    text = text_bank(clip, CLASSES)
    built = {name: build_method(method) for name, method in methods.items()}
    counts: dict[str, list[np.ndarray]] = {name: [] for name in built}
    looks, found, visible = [], 0, 0
    for image, labels in _draw(clip, scenes, first_seed):
        traces: dict[Any, Trace] = {}
        for name, method in built.items():
            if method.trunk not in traces:  # methods with equal trunks share a run
                traces[method.trunk] = method.run(clip.visual, image, text=text)
            logits = method.read_logits(traces[method.trunk])
            guess = F.interpolate(logits, labels.shape, mode="bilinear").argmax(1)[0]
            counts[name].append(_count(guess, labels))
        trace = next(trace for trace in traces.values() if not trace.masks)
        looks.append(look(trace))
        first = (F.normalize(trace.global_embedding(), dim=-1) @ text.T)[0].argsort(descending=True)
        there = labels.flatten().bincount(minlength=len(CLASSES)) >= VISIBLE
        found += int(there[first[: int(there.sum())]].sum())
        visible += int(there.sum())
    return dict(
        counts={name: np.stack(each) for name, each in counts.items()},
        blocks={key: np.nanmean([each[key] for each in looks], 0).tolist() for key in looks[0]},
        top_k=100 * found / visible,
    )


def _draw(clip: CLIP, scenes: int, first_seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    mean, std = (torch.tensor(x)[:, None, None] for x in (clip.mean, clip.std))
    for seed in range(first_seed, first_seed + scenes):
        image, labels = scene(seed)
        pixels = torch.from_numpy(image).permute(2, 0, 1).float()
        yield ((pixels - mean) / std)[None], torch.from_numpy(labels).long()


def _count(guess: Tensor, labels: Tensor) -> np.ndarray:
    size = len(CLASSES)
    right = labels[guess == labels].bincount(minlength=size)
    pixels = [
        right,
        guess.flatten().bincount(minlength=size),
        labels.flatten().bincount(minlength=size),
    ]
    return torch.stack(pixels).numpy()


def look(trace: Trace) -> dict[str, list[float]]:
    """Statistics of one image for each of `BLOCKS`.

    Returns:
        "norm": ratio of the largest to the median norm in the block's output (NaN for the last).
        "class": share of the class token's attention to patches that its strongest patches receive.
        "patches": share of the patches' attention to patches that their strongest patches receive.
        "both": share of the former patches that are among the latter.
    """
    figures: dict[str, list[float]] = {"norm": [], "class": [], "patches": [], "both": []}
    for i in BLOCKS:
        if i < len(trace.outputs):
            norms = trace.outputs[i].patches.norm(dim=-1)[0]
            figures["norm"].append(float(norms.max() / norms.median()))
        else:
            figures["norm"].append(np.nan)
        weights = trace.mean_attention(i)[0, :, 1:]  # (1 + N, N)
        row, column = weights[0], weights[1:].mean(0)
        top_row, top_column = row.topk(STRONGEST), column.topk(STRONGEST)
        figures["class"].append(float(top_row.values.sum() / row.sum()))
        figures["patches"].append(float(top_column.values.sum() / column.sum()))
        both = torch.isin(top_row.indices, top_column.indices)
        figures["both"].append(float(both.float().mean()))
    return figures


def points(measured: Mapping[str, Any]) -> list[Point]:
    """The acceptance criteria of the shipped checkpoint, applied to `measured`."""
    counts = measured["counts"]
    iou = {name: class_iou(each.sum(0)) for name, each in counts.items()}
    level = {name: float(np.nanmean(each)) for name, each in iou.items()}
    nan = float("nan")

    def gain(name: str, base: str, least: float) -> Point:
        value, low, high = paired(counts[name], counts[base]).values()
        wanted = f"at least {least:g}, interval above 0"
        return Point(f"{name} - {base}", value, low, high, wanted, value >= least and low > 0)

    def no_loss(name: str, base: str) -> Point:
        value, low, high = paired(counts[name], counts[base]).values()
        return Point(f"{name} - {base}", value, low, high, "interval reaches 0", high >= 0)

    norm = min(measured["blocks"]["norm"][1:6])
    both = float(np.mean(measured["blocks"]["both"][1:6]))
    worst = float(np.nanmin(iou["sfp"]))
    return [
        gain("sfp", "sfp_unpurified", 1.0),
        gain("paper_som_sae", "paper_sae", 3.0),
        no_loss("paper_som", "paper_none"),
        no_loss("paper_som_sae", "paper_som"),
        no_loss("paper_som_sae_hai", "paper_som_sae"),
        Point("norm / median, blocks 6-10", norm, nan, nan, "at least 3", norm >= 3),
        Point("class token's top are patches' top", both, nan, nan, "at least 0.5", both >= 0.5),
        Point(
            "visible in top k", measured["top_k"], nan, nan, "at least 95", measured["top_k"] >= 95
        ),
        Point("clip", level["clip"], nan, nan, "at most 45", level["clip"] <= 45),
        Point("sfp", level["sfp"], nan, nan, "at least 75", level["sfp"] >= 75),
        Point("sfp, worst class", worst, nan, nan, "at least 40", worst >= 40),
    ]


def report(measured: Mapping[str, Any]) -> str:
    """All measurements and criteria as text."""
    counts = measured["counts"]
    lines = [f"{len(counts['sfp'])} scenes", "", "mIoU"]
    for name, each in counts.items():
        iou = class_iou(each.sum(0))
        worst = CLASSES[int(np.nanargmin(iou))]
        lines.append(f"  {name:18s} {np.nanmean(iou):5.1f}   worst {np.nanmin(iou):4.1f} {worst}")
    lines += ["", "differences, 95 % intervals of a paired bootstrap over scenes"]
    for name, base in DIFFERENCES:
        lines.append(f"  {name:18s} - {base:18s} {cell(paired(counts[name], counts[base]))}")
    lines += ["", "by block         " + "".join(f"{i:7d}" for i in BLOCKS)]
    for key, values in measured["blocks"].items():
        lines.append(f"  {key:15s}" + "".join(f"{value:7.2f}" for value in values))
    lines += ["", "accepted if"]
    for point in points(measured):
        within = "" if np.isnan(point.low) else f"[{point.low:+.2f}, {point.high:+.2f}]"
        verdict = "yes" if point.holds else "NO"
        lines.append(
            f"  {point.name:34s} {point.value:7.2f} {within:17s} {point.wanted:29s} {verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--weights", default="mini", help='a checkpoint, or "mini"')
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=900_000)
    parser.add_argument("--json", type=Path, help="file for the points")
    args = parser.parse_args()
    with torch.inference_mode():
        measured = measure(load_clip(args.weights), args.scenes, args.first_seed)
    print(report(measured))
    if args.json:
        record = dict(vars(args), json=None, points=[asdict(p) for p in points(measured)])
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
