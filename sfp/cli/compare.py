"""`sfp compare`: evaluates several methods on one config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sfp.cli import options

PICTURES = 4  # images on the sheet by default

TEXT = """\
Evaluates several methods on one config and prints one table.

Weights and text features are loaded once, and methods that do not edit the trunk share its run.
Below the table are published numbers for this benchmark and these weights, and how their protocol
differs from the config's. Writes compare.json, compare.md and compare.png (label maps side by side)
into the work folder. An interrupted run resumes when started again, also with more methods;
--no-resume starts over.

--paired adds each method's difference from the one named, with the 95 % interval of a paired
bootstrap over images: if the interval contains 0, the difference may be due to the choice of
images.

--classes runs every method with each of several vocabularies. Other settings stay those of the
config, also thresholds that were tuned for its own words.

Several --weights give one table of towers by methods, matrix.json and matrix.md, with the training
data of towers and other models if that is more than images and captions, and why methods do not run
on a tower. This resumes too, also with more weights.

Examples:
    sfp compare mini
    sfp compare voc21 --methods clip sclip sfp --work-dir work/three
    sfp compare voc21 --methods sclip sfp --classes shipped names my_words.txt
    sfp compare voc21 --weights ViT-B/16 tipsv2-l14 siglip2-b16-256 --methods maskclip naclip
    sfp compare mini --methods sclip sfp:purify=False sfp --paired sfp:purify=False

Exit codes are those of `sfp eval`; 1 also if no method runs on any of several weights.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands, "compare", run, help="evaluate several methods into one table", text=TEXT
    )
    options.add_evaluation(parser, many_weights=True)
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="presets, with knobs as in sfp:purify=False,pm=lof (default: all that need neither "
        "a guide nor regions)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=[],
        metavar="WORDS",
        help="vocabularies to compare: shipped (the benchmark's file), names (the dataset's class "
        "names) or a class file, one line per class (default: the config's only)",
    )
    options.add_paired(parser, "one of the methods")
    options.add_pictures(parser, default=PICTURES)
    parser.set_defaults(pictures=None)  # to notice the option


def run(args: argparse.Namespace) -> int:
    """Compares."""
    from sfp.evaluation import compare
    from sfp.method import self_contained_methods
    from sfp.terminal import print_table, progress

    methods = args.methods or self_contained_methods()
    if len(args.weights or ()) > 1:
        return _matrix(args, methods)
    pictures = PICTURES if args.pictures is None else args.pictures
    config = options.load(args, weights=args.weights[0] if args.weights else None)
    with progress() as bar:
        task = bar.add_task(f"{len(methods)} methods", total=None)
        record = compare.compare(
            config,
            {name: options.parse_method(name) for name in methods},
            words=args.classes,
            pictures=pictures,
            resume=not args.no_resume,
            paired=args.paired,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    title = f"{args.config}, {record['images']} images"
    print_table(*compare.compare_sheet(record), title=title)
    for line in compare.published_lines(record):
        print(line)
    files = "compare.json, compare.md" + ", compare.png" * bool(pictures)
    print(f"results in {config.work_dir}: {files}")
    return 0


def _matrix(args: argparse.Namespace, methods: Sequence[str]) -> int:
    """Compares methods on several weights."""
    from sfp.evaluation.matrix import matrix, matrix_lines, matrix_sheet
    from sfp.terminal import print_table, progress

    if args.paired or args.classes or args.pictures:
        raise ValueError("--paired, --classes and --pictures need a single value of --weights")
    configs = {weights: options.load(args, weights=weights) for weights in args.weights}
    folder = Path(next(iter(configs.values())).work_dir)
    with progress() as bar:
        task = bar.add_task(f"{len(configs)} weights, {len(methods)} methods", total=None)
        record = matrix(
            configs,
            {name: options.parse_method(name) for name in methods},
            folder,
            resume=not args.no_resume,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_table(*matrix_sheet(record), title=args.config)
    for line in matrix_lines(record):
        print(line)
    print(f"results in {folder}: matrix.json, matrix.md")
    return int(not any("scores" in row for row in record["rows"]))
