"""`sfp eval`: evaluates one config."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sfp.cli import options

TEXT = """\
Evaluates a config and writes metrics.json, card.json, card.md and sheet.png into its work folder.

An interrupted run resumes when started again and ends with the same numbers, also with another
number of processes; --no-resume starts over.

Examples:
    sfp eval mini
    sfp eval voc21 --method sclip --work-dir work/voc21_sclip
    sfp eval voc21 --cfg-options model.method.pm=lof
    torchrun --nproc_per_node=2 -m sfp eval ade20k --launcher pytorch

Exit codes: 0 evaluated; 1 unexpected error; 2 wrong command line or config; 3 data or weights are
missing or damaged (the message names the file and says what to do).
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands, "eval", run, help="evaluate a benchmark or your own config", text=TEXT
    )
    options.add_evaluation(parser)
    parser.add_argument("--method", help=f"replaces the config's: {options.METHOD}")
    parser.add_argument("--show-dir", help="folder for pictures of every image with its labels")
    options.add_pictures(parser, default=6)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="launcher of a distributed run",
    )
    parser.add_argument(
        "--check", action="store_true", help="only check that config, data and weights are there"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Evaluates the config."""
    from sfp.evaluation import run as evaluate
    from sfp.terminal import console

    if args.local_rank is not None:  # launchers older than torchrun pass it here
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    method = None if args.method is None else options.parse_method(args.method)
    config = options.load(args, weights=args.weights, method=method)
    config.launcher = args.launcher
    if args.check:
        return 0
    result = evaluate.evaluate(
        config, pictures=args.pictures, show_dir=args.show_dir, resume=not args.no_resume
    )
    if result:
        console().print(evaluate.per_class_table(result))
        files = [name for name in evaluate.RESULTS if Path(config.work_dir, name).is_file()]
        print(f"results in {config.work_dir}: {', '.join(files)}")
    return 0
