"""`sfp label`: label maps of very many images."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from sfp.cli import options

if TYPE_CHECKING:
    from sfp.bulk import Job

TEXT = """\
Segments a folder, a list or tar shards of images into PNG label maps.

Examples:
    sfp label photos --out labelled --classes "cat, sofa|couch, floor, wall"
    sfp label files.txt --out labelled --classes words.txt --overlay
    sfp label shards/*.tar --out labelled --config ade20k --confidence
    sfp label photos --out labelled --classes words.txt --engine ray
    sfp label photos --out labelled --classes words.txt --method proxyclip \\
        --guide dino=transformers:model=facebook/dino-vitb8
    sfp label shards --out labelled --classes words.txt --part $SLURM_ARRAY_TASK_ID/64

Writes OUT/labels/<name>.png (palette; 16 bits above 256 classes), OUT/failures.jsonl and
OUT/report.json; with --confidence and --overlay also OUT/confidence/<name>.png and
OUT/overlay/<name>.jpg. Run again, it skips finished images. <name> is the path relative to the
input folder or list; images of a shard go to a folder named after the shard.

Exit codes: 0 all done; 1 some images failed (failures.jsonl lists them with the reason); 2 wrong
command line or settings; 3 images, weights or Ray are missing.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands, "label", run, help="label very many images, on one or many machines", text=TEXT
    )
    parser.add_argument("inputs", nargs="+", help="folders, lists (.txt), shards (.tar) or images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--classes", help=options.CLASSES)
    parser.add_argument("--config", help="config for model, protocol and classes, e.g. ade20k")
    parser.add_argument("--method", help=options.METHOD)
    options.add_guide(parser)
    options.add_regions(parser)
    parser.add_argument("--weights", help=options.WEIGHTS)
    parser.add_argument(
        "--short-side",
        type=int,
        help="resize the short side to this many pixels (default: the config's, or 336; 224 for the "
        "mini CLIP)",
    )
    parser.add_argument("--confidence", action="store_true", help="also write probabilities")
    parser.add_argument(
        "--overlay", action="store_true", help="also write the labels drawn over each image"
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=4, help="images (default: 4)"
    )
    parser.add_argument(
        "--workers", type=options.positive, default=4, help="threads per process (default: 4)"
    )
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--part", help="I/N: only every N-th input, starting at I (0 to N-1)")
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument(
        "--processes", type=options.positive, help="with ray (default: one per GPU, or one)"
    )
    options.add_import(parser)
    options.add_cfg_options(parser)


def run(args: argparse.Namespace) -> int:
    """Labels the images; returns 1 if some failed."""
    from sfp import bulk
    from sfp.data.listing import list_units
    from sfp.files import atomic_write
    from sfp.terminal import progress

    if args.processes and args.engine == "local":
        raise ValueError(
            "--processes needs --engine ray; without it, start the command once for each part: "
            "--part 0/2 and --part 1/2"
        )
    job = _job(args)
    job.build_method()  # raises before anything is downloaded
    options.note_words(job.weights, job.classes)
    units, suffix = list_units(args.inputs), ""
    if args.part:
        number, count = _part(args.part)
        units, suffix = units[number::count], f"-{number}"
    knobs = dict(
        job=job,
        out=args.out,
        confidence=args.confidence,
        overlay=args.overlay,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
    )
    if args.engine == "ray":
        bulk.claim(args.out, job)
        outcomes = bulk.run_on_ray(units, knobs, processes=args.processes, modules=args.modules)
    else:
        labeller = bulk.Labeller(**knobs)  # raises before the folder is claimed
        bulk.claim(args.out, job)
        outcomes = labeller.run(units)

    statuses: Counter[str] = Counter()
    shards = any(unit.is_archive for unit in units)
    bar = progress("{task.fields[rate]}")
    start = time.perf_counter()
    with open(args.out / f"failures{suffix}.jsonl", "w", encoding="utf-8") as failures, bar:
        task = bar.add_task("labelling", total=None if shards else len(units), rate="")
        for outcome in outcomes:
            statuses[outcome.status] += 1
            rate = statuses["done"] / (time.perf_counter() - start)
            bar.update(task, advance=1, rate=f"{rate:.2f} images/s")
            if outcome.status == "failed":
                failures.write(json.dumps(dict(name=outcome.name, error=outcome.error)) + "\n")
                failures.flush()

    seconds = time.perf_counter() - start
    report: dict[str, float] = {key: statuses[key] for key in ("done", "skipped", "failed")}
    report.update(seconds=round(seconds, 3), images_per_second=statuses["done"] / seconds)
    with atomic_write(args.out / f"report{suffix}.json") as path:
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{report['done']} labelled, {report['skipped']} skipped, {report['failed']} failed in "
        f"{seconds:.1f} s: {report['images_per_second']:.2f} images/s; results in {args.out}"
        + (f", reasons in {failures.name}" if statuses["failed"] else "")
    )
    return 1 if statuses["failed"] else 0


def _job(args: argparse.Namespace) -> Job:
    """The model, words and size that the command line asks for.

    Raises:
        ValueError: if there are no words, or they are invalid.
    """
    from sfp import bulk
    from sfp.clip.checkpoints import published
    from sfp.data.images import check_short_side
    from sfp.vocabulary import as_vocabulary

    side = None if args.short_side is None else check_short_side(args.short_side)
    words = None if args.classes is None else as_vocabulary(options.parse_classes(args.classes))
    guides = dict(map(options.parse_guide, args.guide))
    regions = options.parse_regions(args.regions)
    method = None if args.method is None else options.parse_method(args.method)
    if args.config is None and not args.cfg_options:  # OpenMMLab's config reader is not needed
        if words is None:
            raise ValueError("no classes given: use --classes or --config")
        weights = args.weights or "ViT-B/16"
        side = published.short_side(weights) if side is None else side
        given = dict(guides=guides, regions=regions)
        settings = {name: node for name, node in given.items() if node}
        return bulk.Job(weights, words, method or "sfp", side, settings)
    from sfp.data.benchmarks import CONFIGS
    from sfp.evaluation.run import load_config

    config = load_config(
        args.config or CONFIGS / "base_config.py",
        method=method,
        weights=args.weights,
        options=args.cfg_options,
    )
    if args.config is None:
        config.pop("test_pipeline")  # use the weights' size, as without a config
    if guides:
        config.model.guides = dict(config.model.get("guides") or {}, **guides)
    if regions:
        config.model.pop("regions", None)  # assigning a dict would merge it
        config.model.regions = regions
    if words is not None:
        config.model.classes = words
    elif "classes" not in config.model:
        raise ValueError("no classes given: use --classes or --config")
    return bulk.job_from_config(config, side)


def _part(text: str) -> tuple[int, int]:
    """The numbers I and N of "I/N".

    Raises:
        ValueError: if they are not 0 <= I < N.
    """
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise ValueError(f"--part {text}: expected I/N with I from 0 to N-1, e.g. 0/64")
    return int(number), int(count)
