"""Measures a method against the plain CLIP forward over the same windows, in one run.

Random weights and a random photo-like image; no download. Each round times the floor (CLIP's own
forward of the image's windows in one batch, fused attention, no dense output) and each method end to
end (JPEG bytes to label map), one after the other, so that a busy machine slows them alike; the
medians are compared.

Examples:
    python tools/bench.py
    python tools/bench.py --arch ViT-L/14 --size 1024 2048 --short 560 --classes 19 --methods sfp clip
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from mmseg.structures import SegDataSample
from rich.console import Console
from rich.table import Table

import sfp
from sfp.cache import atomic_write
from sfp.functional.windows import WindowGrid

ARCHS = {
    "ViT-B/32": dict(patch=32, width=768, layers=12, embed_dim=512),
    "ViT-B/16": dict(patch=16, width=768, layers=12, embed_dim=512),
    "ViT-L/14": dict(patch=14, width=1024, layers=24, embed_dim=768),
}
TEXT = dict(context=77, vocab=512, text_width=64, text_layers=1)  # not measured here


def jpeg(height: int, width: int) -> bytes:
    """A picture with structure at several scales, as a JPEG file."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (3, 12, 48):
        noise = rng.uniform(0, 85, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8))[1].tobytes()


def load(data: bytes, short: int) -> torch.Tensor:
    """Decodes and resizes as the evaluation pipeline does: (3, h, w) uint8, BGR."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    scale = short / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return torch.from_numpy(cv2.resize(image, size)).permute(2, 0, 1)


def median_times(tasks: dict[str, Callable[[], object]], rounds: int, device: str) -> dict:
    """Median seconds of each task, the tasks taking turns; the first round only warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=ARCHS, default="ViT-B/16")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), metavar=("H", "W"))
    parser.add_argument("--short", type=int, default=336, help="short side after resizing")
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--methods", nargs="+", default=["sfp"], help="presets to measure")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    clip = sfp.CLIP(image_size=224, **ARCHS[args.arch], **TEXT).requires_grad_(False).eval()
    features = torch.randn(args.classes, clip.text_projection.shape[1])
    segmentors = {
        name: sfp.OpenVocabSegmentor(
            clip,
            [f"class {i}" for i in range(args.classes)],
            name,
            query_features=features,
            precision=args.precision,
            scores=False,
        ).to(args.device)
        for name in args.methods
    }
    data = jpeg(*args.size)
    any_segmentor = next(iter(segmentors.values()))
    image = any_segmentor.data_preprocessor(dict(inputs=[load(data, args.short)]))["inputs"][0]
    grid = WindowGrid.over(image.shape[1:], 224, 112)
    windows = torch.stack([grid.cut(image, place) for place in grid.places])

    def end_to_end(segmentor: sfp.OpenVocabSegmentor) -> Callable[[], object]:
        def run() -> object:
            sample = SegDataSample(metainfo=dict(ori_shape=tuple(args.size)))
            batch = dict(inputs=[load(data, args.short)], data_samples=[sample])
            return segmentor.test_step(batch)[0].pred_sem_seg.data.cpu()

        return run

    def floor() -> torch.Tensor:
        with torch.inference_mode():
            return clip.visual(windows).cpu()

    tasks = {"floor": floor} | {name: end_to_end(s) for name, s in segmentors.items()}
    times = median_times(tasks, args.rounds, args.device)
    if args.device == "cuda":
        peak, kind = torch.cuda.max_memory_allocated() / 2**20, "allocator peak"
    else:
        peak, kind = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "process RSS peak"

    table = Table(
        title=f"{args.arch}, {args.size[0]}x{args.size[1]} image, {len(windows)} windows, "
        f"{args.classes} classes, {args.device}, {args.threads} threads"
    )
    for column in ("", "ms / image", "x floor", "images / s", "windows / s"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in times.items():
        label = "floor: plain CLIP forward" if name == "floor" else f"{name}, end to end"
        ratio = seconds / times["floor"]
        rates = (1 / seconds, len(windows) / seconds)
        table.add_row(label, f"{1e3 * seconds:.0f}", f"{ratio:.2f}", *(f"{r:.2f}" for r in rates))
    Console().print(table)
    print(f"{kind}: {peak:.0f} MiB (all of the above in one process)")
    if args.out:
        record = dict(
            vars(args),
            out=str(args.out),
            seconds=times,
            peak_mib=peak,
            windows=len(windows),
            torch=torch.__version__,
            machine=platform.machine(),
        )
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
