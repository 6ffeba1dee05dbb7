"""Benchmarks methods end to end against two references, run alternately in one process.

The *floor* is CLIP's own forward pass over the same windows in one batch, with fused attention and no
dense output, both with our image tower and with PyTorch's own linear layers. The *sequential reference*
(`sequential.py`) runs SFP the way its repository does: one window at a time, keeping the attention
weights of every block, with logits of every window at full resolution. Its labels are checked to be the
same. Weights are random and the image is drawn; nothing is downloaded.

Printed for each case: ms and images per second from JPEG bytes to the label map, the ratios, the
peak memory above the loaded model (resident set on a CPU, allocator on CUDA), the time from an image on
the device to labels there, which is what a GPU's floor is compared with, and where the time goes.

Examples:
    python tools/bench.py
    python tools/bench.py --methods all --classes 21
    python tools/bench.py --arch ViT-B/16 ViT-L/14 --image voc cityscapes --classes 21 847 --rounds 2
    python tools/bench.py --variants fp32 bf16 int8 compiled
    python tools/bench.py --text 12
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sequential import CROP, STRIDE, SequentialSFP
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.cli.options import parse_method
from sfp.clip import onednn, text
from sfp.engine import Engine, Queries
from sfp.files import atomic_write
from sfp.functional import windows as windows_module
from sfp.functional.windows import WindowGrid
from sfp.graphs import Graphs
from sfp.method import self_contained_methods

ARCHS = {
    "ViT-B/32": dict(patch=32, width=768, layers=12, embed_dim=512),
    "ViT-B/16": dict(patch=16, width=768, layers=12, embed_dim=512),
    "ViT-L/14": dict(patch=14, width=1024, layers=24, embed_dim=768),
}
TEXT = dict(context=77, vocab=512, text_width=64, text_layers=1)  # only --text encodes words
WORDS = dict(context=77, vocab=49408, text_width=512, text_layers=12)  # with this tower
IMAGES = {  # size, and the short side that it is resized to
    "tiny": ((64, 64), 64),
    "voc": ((375, 500), 336),
    "cityscapes": ((1024, 2048), 560),
}
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: dict(precision=name) for name in ("auto", "fp32", "bf16", "fp16", "int8")},
    "compiled": dict(compiled=True),
    "graphs": dict(graphs=True),
    "compiled graphs": dict(compiled=True, graphs=True),
}
STAGES = ("I/O", "trunk", "readout", "text", "merge", "post-processing", "rest")


def jpeg(height: int, width: int) -> bytes:
    """A picture with structure at several scales, as a JPEG file."""
    rng = np.random.default_rng(0)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (3, 12, 48):
        noise = rng.uniform(0, 85, (cells, cells, 3)).astype(np.float32)
        image += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", image.clip(0, 255).astype(np.uint8))[1].tobytes()


def load(data: bytes, short: int) -> Tensor:
    """Decodes and resizes as the evaluation pipeline does: (3, h, w) uint8, RGB."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    scale = short / min(image.shape[:2])
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return torch.from_numpy(cv2.resize(image, size)).permute(2, 0, 1)


@dataclass(frozen=True)
class Contender:
    """A method on an engine, with the text features that it is given."""

    engine: Engine
    method: sfp.Method
    queries: Queries


@dataclass(frozen=True)
class Case:
    """What is measured: a model, an image, how often it goes in at once, and a number of classes."""

    arch: str
    image: str
    classes: int
    device: str
    batch: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the image."""
        return IMAGES[self.image][0]

    @property
    def short(self) -> int:
        """The short side that it is resized to."""
        return IMAGES[self.image][1]

    def clip(self) -> sfp.CLIP:
        """A model with random weights, the same every time."""
        torch.manual_seed(0)
        with torch.device(self.device):
            clip = sfp.CLIP(image_size=224, **ARCHS[self.arch], **TEXT)
        return clip.requires_grad_(False).eval()

    def contender(self, clip: sfp.CLIP, method: str, variant: str) -> Contender:
        """A method with random text features; `clip` is converted to the variant's precision."""
        features = torch.randn(
            self.classes, clip.embed_dim, generator=torch.Generator().manual_seed(0)
        )
        queries = Queries(F.normalize(features, dim=-1).to(self.device), tuple(range(self.classes)))
        engine = Engine(clip, **VARIANTS[variant]).to(self.device)
        return Contender(engine, sfp.build_method(parse_method(method)), queries)


def fast(own: Contender, case: Case, data: bytes) -> Tensor:
    """End to end: a batch of JPEG bytes -> labels (B, H, W)."""
    images = [own.engine.input(load(data, case.short)) for _ in range(case.batch)]
    return labelled(own, case, images).cpu()


def labelled(own: Contender, case: Case, images: list[Tensor]) -> Tensor:
    """Without reading and writing: images on the device -> labels (B, H, W) there."""
    sizes = [case.size] * case.batch
    (sheets,) = own.engine.logits([own.method], images, sizes, own.queries)
    labels = [
        own.engine.label(image, sheet, own.queries.index).labels
        for image, sheet in zip(images, sheets, strict=True)
    ]
    return torch.stack(labels)


reference = lru_cache(maxsize=1)(SequentialSFP)


def sequential(own: Contender, case: Case, data: bytes) -> Tensor:
    """The same labels the way SFP's repository computes them, one image after the other."""
    images = [own.engine.input(load(data, case.short)) for _ in range(case.batch)]
    return labelled_one_by_one(own, case, images).cpu()


def labelled_one_by_one(own: Contender, case: Case, images: list[Tensor]) -> Tensor:
    """`labelled`, by the reference."""
    engine, run = own.engine, reference(own.engine.clip)
    labels = [
        run(
            image[None].to(engine.clip.visual.dtype),
            own.queries.features,
            case.size,
            engine.logit_scale,
        )
        for image in images
    ]
    return torch.stack(labels)


class Stopwatch:
    """Seconds by stage, each without the stages that run inside it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _switch(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time inside as stage `name`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def watched(self, name: str, function: Callable) -> Callable:
        """`function`, its time counted as stage `name`."""

        def timed(*args: Any, **knobs: Any) -> Any:
            with self.stage(name):
                return function(*args, **knobs)

        return timed


def stages(own: Contender, case: Case, data: bytes) -> dict[str, float]:
    """Seconds of one end-to-end run by stage."""
    watch = Stopwatch(case.device)
    places = [
        (sys.modules[__name__], "load", "I/O"),
        (Engine, "input", "I/O"),
        (sfp.Method, "run", "trunk"),
        (sfp.Method, "read", "readout"),
        (sfp.Method, "read_logits", "text"),  # what is left of it: similarities, refiners
        (windows_module.WindowGrid, "sheet", "merge"),
        (windows_module.LogitSheet, "rows", "merge"),
        (Engine, "label", "post-processing"),
    ]
    with ExitStack() as stack:
        for owner, name, stage in places:
            timed = watch.watched(stage, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, timed))
        with watch.stage("rest"):
            fast(own, case, data)
    return {stage: watch.seconds[stage] for stage in STAGES}


def take_turns(tasks: dict[str, Callable[[], Tensor]], rounds: int, device: str) -> dict:
    """Seconds of each task's fastest round, with tasks alternating; the first round is a warm-up.

    The fastest, because other work on a shared machine can only increase a time.
    """
    seconds = dict.fromkeys(tasks, math.inf)
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def peak_mib(task: Callable[[], Tensor], device: str) -> float | None:
    """Peak memory of a task above the memory in use before it; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        task()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        before_kib = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
        task()
        return (_resident("VmHWM") - before_kib) / 2**10
    except OSError:
        return None


def _resident(field: str) -> int:
    """A field of Linux' process status, in KiB."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def first_peak(run: Callable, case: Case, method: str, variant: str, data: bytes) -> float | None:
    """`peak_mib` of a first run in a separate process, where the allocator is still empty."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(
            _first_peak, (run.__name__, case, method, variant, data, torch.get_num_threads())
        )


def _first_peak(
    run: str, case: Case, method: str, variant: str, data: bytes, threads: int
) -> float | None:
    torch.set_num_threads(threads)
    own = case.contender(case.clip(), method, variant)
    tiny = Case(case.arch, "tiny", case.classes, case.device)
    globals()[run](own, tiny, jpeg(*tiny.size))  # libraries load, thread pools start
    return peak_mib(lambda: globals()[run](own, case, data), case.device)


def floors(engine: Engine, windows: Tensor) -> dict[Any, Callable[[], Tensor]]:
    """CLIP's own forward pass: as it is, and otherwise."""
    plain = engine.clip.visual
    parts = windows.to(plain.dtype).split(engine.windows_at_once)
    graphs = Graphs()

    @torch.inference_mode()
    def floor() -> Tensor:
        return torch.cat([plain(part) for part in parts])

    def pytorch_floor() -> Tensor:
        with patch.object(onednn, "works", lambda: False):
            return floor()

    @torch.inference_mode()
    def graph_floor() -> Tensor:
        return torch.cat([graphs(0, lambda part: [plain(part)], part)[0] for part in parts])

    if windows.is_cuda:
        return dict(floor=floor, graph_floor=graph_floor)
    return dict(floor=floor, pytorch_floor=pytorch_floor)


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """All contenders of one case."""
    data = jpeg(*case.size)
    models = {variant: case.clip() for variant in args.variants}
    contenders = {
        (method, variant): case.contender(models[variant], method, variant)
        for method, variant in product(args.methods, args.variants)
    }
    engine = next(iter(contenders.values())).engine
    image = engine.input(load(data, case.short))
    grid = WindowGrid.over(image.shape[1:], CROP, STRIDE)
    windows = torch.stack([grid.cut(image, place) for place in grid.places] * case.batch)

    tasks: dict[Any, Callable[[], Tensor]] = floors(engine, windows)
    images = [image] * case.batch
    for key, own in contenders.items():
        tasks[key] = partial(fast, own, case, data)
        tasks["inside", key] = partial(labelled, own, case, images)
    # which has float weights to share
    followed = next((contenders[k] for k in contenders if k[0] == "sfp" and k[1] != "int8"), None)
    if args.sequential and followed is not None:
        tasks["sequential"] = partial(sequential, followed, case, data)
        tasks["inside", "sequential"] = partial(labelled_one_by_one, followed, case, images)
    if case.device == "cpu":  # where reading is a small part
        tasks = {name: task for name, task in tasks.items() if name[0] != "inside"}
    times = take_turns(tasks, args.rounds, case.device)

    def peak(run: Callable, method: str, variant: str) -> float | None:
        if not args.memory:
            return None
        if case.device == "cpu":
            return first_peak(run, case, method, variant, data)
        # CUDA's allocator counts what is asked of it, whatever ran before
        return peak_mib(partial(run, contenders[method, variant], case, data), case.device)

    record: dict[str, Any] = dict(
        arch=case.arch,
        image=case.image,
        size=case.size,
        short=case.short,
        classes=case.classes,
        batch=case.batch,
        windows=len(windows),
        device=case.device,
        floor_seconds=times["floor"],
        pytorch_floor_seconds=times.get("pytorch_floor"),
        graph_floor_seconds=times.get("graph_floor"),
        rows=[],
    )
    expected = None
    if "sequential" in tasks:
        variant = next(v for (m, v), own in contenders.items() if own is followed)
        record["sequential"] = dict(
            variant=variant,
            seconds=times["sequential"],
            device_seconds=times.get(("inside", "sequential")),
            peak_mib=peak(sequential, "sfp", variant),
        )
        expected = tasks["sequential"]()
    for (method, variant), own in contenders.items():
        row: dict[str, Any] = dict(
            method=method,
            variant=variant,
            seconds=times[method, variant],
            device_seconds=times.get(("inside", (method, variant))),
            peak_mib=peak(fast, method, variant),
            stages=stages(own, case, data),
        )
        if variant != args.variants[0]:
            row["feature_error"] = feature_error(
                own, contenders[method, args.variants[0]], windows[: len(grid.places)]
            )
        if method == "sfp" and expected is not None:
            same = fast(own, case, data) == expected
            row["equal_labels"] = same.double().mean().item()
        record["rows"].append(row)
    return record


@torch.inference_mode()
def feature_error(own: Contender, other: Contender, windows: Tensor) -> float:
    """|f - g| / |g| of the dense features of two contenders, over all patches of the windows."""
    ours, exact = (c.engine.tokens(c.method, windows, c.queries).data.float() for c in (own, other))
    return ((ours - exact).norm() / exact.norm()).item()


def text_bank(classes: int) -> dict[str, Any]:
    """Seconds for the prompts of some of ADE20K's classes, by the bank and as official codes do.

    The reference pads every prompt to 77 tokens and encodes one class at a time. The text tower is
    ViT-B/16's, with random weights.
    """
    torch.manual_seed(0)
    clip = sfp.CLIP(image_size=224, **ARCHS["ViT-B/16"], **WORDS).requires_grad_(False).eval()
    tower = clip.text
    every = sfp.load_vocabulary(Path(__file__).parents[1] / "configs" / "cls_ade20k.txt").names
    step = len(every) / classes
    queries = [every[int(i * step)] for i in range(classes)]
    templates = text.prompt_templates("imagenet")

    @torch.inference_mode()
    def class_by_class() -> Tensor:
        rows = []
        for query in queries:
            ids = text.tokenize([template.format(query) for template in templates])
            ids = F.pad(ids, (0, 77 - ids.shape[1]))
            x = tower.token_embedding(ids) + tower.positional_embedding
            for block in tower.transformer.resblocks:
                x = block(x, causal=True)
            x = x[torch.arange(len(x)), ids.argmax(-1)]
            features = tower.ln_final(x) @ tower.text_projection
            rows.append(F.normalize(F.normalize(features, dim=-1).mean(0), dim=-1))
        return torch.stack(rows)

    tasks = {"bank": lambda: text.encode_queries(clip, queries, templates)}
    tasks["class_by_class"] = class_by_class
    difference = (tasks["bank"]() - class_by_class()).abs().max().item()
    clip.digest = "bench"
    with TemporaryDirectory() as folder:
        cached = Path(folder)
        text.text_bank(clip, queries, templates, folder=cached)
        tasks["second_start"] = lambda: text.text_bank(clip, queries, templates, folder=cached)
        times = take_turns(tasks, 1, "cpu")
    prompts = classes * len(templates)
    return dict(classes=classes, prompts=prompts, max_difference=difference, **times)


def show(console: Console, record: dict[str, Any], threads: int) -> None:
    """A case's table and where the time of each contender goes."""
    floor, windows = record["floor_seconds"], record["windows"]
    table = Table(
        title=f"{record['arch']}, {'x'.join(map(str, record['size']))} image, batch of "
        f"{record['batch']}, {windows} windows, {record['classes']} classes, {record['device']}, "
        f"{threads} threads"
    )
    columns = (
        "",
        "ms",
        "x floor",
        "images/s",
        "windows/s",
        "peak MiB",
        "x sequential",
    )
    if record["device"] != "cpu":
        columns += ("without I/O",)
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    slow = record.get("sequential")

    def add(
        name: str,
        seconds: float,
        peak: float | None = None,
        compare: bool = False,
        inside: float | None = None,
    ) -> None:
        rates = (record["batch"] / seconds, windows / seconds)
        faster = f"{slow['seconds'] / seconds:.2f} faster" if slow and compare else ""
        cells = [
            name,
            f"{1e3 * seconds:.0f}",
            f"{seconds / floor:.2f}",
            *(f"{rate:.2f}" for rate in rates),
            "" if peak is None else f"{peak:.0f}",
            faster,
        ]
        if inside is not None:
            cells.append(f"{1e3 * inside:.1f} ms, {inside / floor:.2f} x floor")
        table.add_row(*cells)

    add("floor", floor)
    if record["pytorch_floor_seconds"]:
        add("floor, PyTorch's linear layers", record["pytorch_floor_seconds"])
    if record["graph_floor_seconds"]:
        add("floor as a CUDA graph", record["graph_floor_seconds"])
    if slow:
        add(
            "sequential reference", slow["seconds"], slow["peak_mib"], inside=slow["device_seconds"]
        )
    for row in record["rows"]:
        name = row["method"] + f" {row['variant']}" * (row["variant"] != "auto")
        add(name, row["seconds"], row["peak_mib"], row["method"] == "sfp", row["device_seconds"])
    console.print(table)
    for row in record["rows"]:
        whole = sum(row["stages"].values())
        parts = [f"{name} {100 * s / whole:.1f} %" for name, s in row["stages"].items()]
        console.print(f"  {row['method']} {row['variant']}: {', '.join(parts)}", highlight=False)
        if "feature_error" in row:
            error = 100 * row["feature_error"]
            console.print(f"  its features differ from the first variant's by {error:.2f} % (norm)")
        if "equal_labels" in row:
            equal = 100 * row["equal_labels"]
            console.print(f"  labels equal to the sequential reference's: {equal:.3f} %")


def without_out(words: list[str]) -> list[str]:
    """A command line without `--out FILE`."""
    if "--out" not in words:
        return words
    at = words.index("--out")
    return words[:at] + words[at + 2 :]


def processor() -> str:
    """Its name, as Linux gives it, and the instructions that PyTorch uses of it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"(?m)^model name\s*: (.*)$", info.read_text() if info.is_file() else "")
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=["ViT-B/16"])
    parser.add_argument("--image", nargs="+", choices=IMAGES, default=["voc"])
    parser.add_argument("--classes", type=int, nargs="+", default=[21, 171])
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1], help="how many images go in at once"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["sfp"],
        help="presets, with knobs as in sfp:stitched=True; or all",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["auto"],
        help="precisions, or compiled; the floor runs in the first (auto: fp32, fp16 on CUDA)",
    )
    parser.add_argument(
        "--no-sequential", dest="sequential", action="store_false", help="without the reference"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument(
        "--text",
        type=int,
        metavar="CLASSES",
        help="measure the text bank with so many classes only",
    )
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    if args.methods == ["all"]:
        args.methods = self_contained_methods()
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 140)  # a table that goes into a file keeps its columns
    record: dict[str, Any] = dict(
        torch=torch.__version__,
        sfp=sfp.__version__,
        machine=platform.machine(),
        processor=processor(),
        command=shlex.join(without_out(sys.argv[1:])),
        threads=args.threads,
        cases=[],
    )
    if args.text:
        record["text"] = bank = text_bank(args.text)
        console.print(
            f"{bank['prompts']} prompts of {bank['classes']} ADE20K classes: text bank "
            f"{bank['bank']:.2f} s, 77 tokens class by class {bank['class_by_class']:.2f} s "
            f"({bank['class_by_class'] / bank['bank']:.1f}x), from the cache "
            f"{1e3 * bank['second_start']:.1f} ms; largest difference of unit features "
            f"{bank['max_difference']:.1e}"
        )
    else:
        for arch, image, classes, batch in product(args.arch, args.image, args.classes, args.batch):
            record["cases"].append(measure(Case(arch, image, classes, args.device, batch), args))
            show(console, record["cases"][-1], args.threads)
    if args.out:
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
