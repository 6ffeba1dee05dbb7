"""Runs the tests' numerical checks on a GPU, and benchmarks it. Called by `gpu_check.sh`.

* goldens: the official implementations' numbers, on the device in float32, within their tolerances;
* methods: every preset that needs no other model, in half precision against float32, and whether it
  synchronises with the GPU between an image and its logits;
* process group: an evaluation's sums over one process, by NCCL;
* bench: SFP against CLIP's forward pass and the sequential reference (`bench.py`), as time permits.

OpenMMLab's packages are not needed; without them the end-to-end goldens of the segmentor are skipped,
and counted in the summary. Results are written to a JSON file, from which `--markdown` prints the
tables of docs/gpu.md.

Examples:
    python tools/gpu_check.py --out gpu.json
    python tools/gpu_check.py --device cpu --small --out cpu.json
    python tools/gpu_check.py --markdown gpu.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bench
import torch
import torch.distributed

import sfp
from sfp import mini
from sfp.engine import Engine, Queries
from sfp.files import atomic_write
from sfp.functional.windows import LogitSheet
from sfp.tables import markdown

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/methods", "tests/ops")
COUNTS = ("tests", "failures", "errors", "skipped")  # of pytest's report
SCENES = 4
MODES = (
    "compiled",
    "graphs",
    "compiled graphs",
)  # in fp16; compiled variants only for the first kind of case
# in order of priority if there is not enough time for all: (arch, image, classes, batch)
CASES = [
    *product(["ViT-B/16"], ["voc"], [21, 171, 847], [1, 16]),
    *product(["ViT-L/14"], ["voc"], [171], [1, 16]),
    *product(["ViT-B/16"], ["cityscapes"], [21, 171], [1]),
    *product(["ViT-L/14"], ["voc"], [21, 847], [1, 16]),
    *product(["ViT-B/16"], ["cityscapes"], [847], [1]),
    *product(["ViT-L/14"], ["cityscapes"], [21, 171, 847], [1]),
    *product(["ViT-B/16", "ViT-L/14"], ["cityscapes"], [21, 171, 847], [16]),
]


def machine(device: str) -> dict[str, Any]:
    """The hardware and software versions."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return dict(
        gpu=gpu,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        sfp=sfp.__version__,
        python=platform.python_version(),
        threads=torch.get_num_threads(),
    )


def goldens(device: str) -> dict[str, Any]:
    """Runs the golden tests on the device, in processes of their own, and counts them."""
    environment = dict(os.environ, SFP_DEVICE=device)
    command = [sys.executable, "-m", "pytest", "-k", "golden", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [*command, f"--junitxml={report}", *TESTS],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        suite = next(ElementTree.parse(report).iter("testsuite")).attrib if report.exists() else {}
    ran, failures, errors, skipped = (int(suite.get(name, 0)) for name in COUNTS)
    failed = failures + errors
    passed = ran - failed - skipped
    ok = done.returncode == 0 and passed > 0
    lines = [*done.stdout.splitlines()[-400:], *done.stderr.splitlines()[-20:]]
    return dict(
        ok=ok,
        summary=f"{passed} passed, {skipped} skipped, {failed} failed",
        passed=passed,
        skipped=skipped,
        failed=failed,
        output=[] if ok else lines,
    )


def methods(device: str, names: list[str], precisions: list[str]) -> dict[str, Any]:
    """Share of pixels with the same label as in float32, by method and precision."""
    words = list(mini.CLASSES)
    images = [
        torch.from_numpy(mini.scene(920_000 + i, 224)[0].copy()).permute(2, 0, 1)
        for i in range(SCENES)
    ]
    found: dict[str, Any] = {}
    expected: dict[str, torch.Tensor] = {}
    for precision in ["fp32", *precisions]:
        engine = Engine("mini", precision=precision).to(device)
        queries = engine.queries(sfp.load_vocabulary(words))
        inputs = [engine.input(image) for image in images]
        for name in names:
            try:
                (sheets,) = engine.logits(
                    [sfp.build_method(name)], inputs, [(224, 224)] * SCENES, queries
                )
            except LookupError as error:  # a guide or regions, which are other models
                found[name] = dict(left_out=str(error))
                continue
            if device == "cuda" and precision == precisions[0]:
                found[name]["waits"] = waits(engine, sfp.build_method(name), inputs[0], queries)
                found[name]["graph"] = recorded(
                    engine, sfp.build_method(name), inputs, queries, sheets
                )
            labels = torch.stack(
                [
                    engine.label(image, sheet, queries.index).labels
                    for image, sheet in zip(inputs, sheets, strict=True)
                ]
            ).cpu()
            finite = all(bool(sheet.tiles.isfinite().all()) for sheet in sheets)
            if precision == "fp32":
                expected[name] = labels
                found[name] = dict(finite=finite)
            else:
                same = (labels == expected[name]).double().mean().item()
                found[name][precision] = dict(same_labels=same, finite=finite)
    return found


def waits(engine: Engine, method: sfp.Method, image: torch.Tensor, queries: Queries) -> str | None:
    """Where a method synchronises with the GPU between windows and logits; None if it never does."""
    engine.logits([method], [image], [(224, 224)], queries)  # fills caches
    context = dict(text=queries.features, index=queries.index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            method.logits(engine.clip.visual, image[None], **context)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        places = traceback.extract_tb(error.__traceback__)
        own = [place for place in places if "sfp" in Path(place.filename).parts]
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def recorded(
    engine: Engine,
    method: sfp.Method,
    images: list[torch.Tensor],
    queries: Queries,
    expected: list[LogitSheet],
) -> float | None:
    """Largest difference of a CUDA graph's logits from `expected`; None without a graph."""
    graphs = Engine(engine.clip, precision=engine.precision, graphs=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        other = [image.flip(-1) for image in images]  # recorded with these
        for inputs in (other, images):
            (sheets,) = graphs.logits([method], inputs, [(224, 224)] * len(inputs), queries)
    if method.needs_whole or any("graphs=True" in str(each.message) for each in caught):
        return None
    pairs = zip(sheets, expected, strict=True)
    return max((found.tiles - own.tiles).abs().max().item() for found, own in pairs)


def process_group(device: str) -> dict[str, Any]:
    """Sums counts over a group of one process, by NCCL on a GPU."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            backend, init_method=f"file://{folder}/meet", rank=0, world_size=1
        )
        try:
            counts = torch.arange(5, device=device)
            torch.distributed.all_reduce(counts)
            ok = counts.tolist() == [0, 1, 2, 3, 4]
        finally:
            torch.distributed.destroy_process_group()
    return dict(backend=backend, ok=ok)


def measured(device: str, cases: list[tuple], variants: list[str], until: float) -> Iterator[dict]:
    """Cases of `bench.py`, as long as there is time."""
    for arch, image, classes, batch in cases:
        name = f"{arch}, {image}, {classes} classes, batch of {batch}"
        if time.monotonic() > until:
            yield dict(name=name, left_out="no time left")
            continue
        # compiled variants take a long time to start
        first = (arch, image) == cases[0][:2]
        chosen = [variant for variant in variants if first or not variant.startswith("compiled")]
        settings = argparse.Namespace(
            methods=["sfp"],
            variants=chosen,
            rounds=5,
            memory=True,
            sequential=batch == 1,  # it processes images one by one, so a batch adds nothing
        )
        try:
            yield dict(
                bench.measure(bench.Case(arch, image, classes, device, batch), settings), name=name
            )
        except torch.OutOfMemoryError as error:
            yield dict(name=name, left_out=str(error).splitlines()[0])


def rows(record: dict[str, Any]) -> Iterator[list[str]]:
    """The rows of the benchmark table, one per case and variant."""
    for case in record["bench"]:
        if "left_out" in case:
            yield [case["name"], "-", "not measured: " + case["left_out"], *[""] * 7]
            continue
        slow, graph = case.get("sequential"), case["graph_floor_seconds"]
        for row in case["rows"]:
            inside = row["device_seconds"] or row["seconds"]
            peak = row["peak_mib"]
            faster = "-"
            if slow:
                faster = f"{(slow['device_seconds'] or slow['seconds']) / inside:.1f}x"
            yield [
                case["name"],
                row["variant"],
                f"{1e3 * case['floor_seconds']:.1f}",
                "-" if graph is None else f"{1e3 * graph:.1f}",
                f"{1e3 * inside:.1f}",
                f"{inside / case['floor_seconds']:.2f}",
                faster,
                f"{1e3 * row['seconds']:.1f}",
                "-" if peak is None else f"{peak:.0f}",
                "-" if not slow or slow["peak_mib"] is None else f"{slow['peak_mib']:.0f}",
            ]


def tables(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    header = [
        *("case", "variant", "floor ms", "floor as a graph ms", "SFP ms", "x floor"),
        *("sequential / SFP", "SFP from JPEG ms", "peak MiB", "sequential's peak MiB"),
    ]
    precisions = record["precisions"]
    agreement = [
        [
            f"`{name}`",
            *(f"{100 * each[p]['same_labels']:.2f} %" for p in precisions),
            each.get("waits") or "no",
            "-" if each.get("graph") is None else f"{each['graph']:.1e}",
        ]
        for name, each in record["methods"].items()
        if "left_out" not in each
    ]
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    goldens, group = record["goldens"], record["process_group"]
    return (
        f"Machine: {machine}\n\nGolden tests: {'pass' if goldens['ok'] else 'FAIL'} "
        f"({goldens['summary']}). Sum over a process group of size one with {group['backend']}: "
        f"{'correct' if group['ok'] else 'WRONG'}.\n\n"
        + markdown(
            [
                "method",
                *(f"{p}: labels as in fp32" for p in precisions),
                *("synchronises with the GPU", "largest difference of a graph's logits"),
            ],
            agreement,
        )
        + "\n"
        + markdown(header, rows(record))
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"))
    parser.add_argument(
        "--seconds", type=float, default=330, help="start no further case after this time"
    )
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"])
    parser.add_argument(
        "--small", action="store_true", help="two methods, one small case, no goldens"
    )
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="only print a saved record")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.markdown:
        print(tables(json.loads(args.markdown.read_text())), end="")
        return 0
    start = time.monotonic()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cases = [("ViT-B/32", "tiny", 3, 1)] if args.small else CASES
    names = ["clip", "sfp"] if args.small else sfp.list_methods()
    variants = ["fp32"] if args.small else [*args.precisions, *MODES]
    steps: dict[str, Callable[[], Any]] = {
        "goldens": lambda: (
            dict(ok=True, summary="left out") if args.small else goldens(args.device)
        ),
        "methods": lambda: methods(args.device, names, args.precisions),
        "process_group": lambda: process_group(args.device),
        "bench": lambda: list(measured(args.device, cases, variants, start + args.seconds)),
    }
    record: dict[str, Any] = dict(machine=machine(args.device), precisions=args.precisions)
    for name, step in steps.items():
        record[name] = step()
        record[f"{name}_seconds"] = round(time.monotonic() - start, 1)
        print(f"{time.monotonic() - start:6.1f} s  {name}", flush=True)
        with atomic_write(args.out) as path:  # after each step, in case of a time limit
            path.write_text(json.dumps(record, indent=1) + "\n")
    print(tables(record), end="")
    finite = [
        each[precision]["finite"]
        for each in record["methods"].values()
        if "left_out" not in each
        for precision in args.precisions
    ]
    return 0 if record["goldens"]["ok"] and record["process_group"]["ok"] and all(finite) else 1


if __name__ == "__main__":
    sys.exit(main())
