"""Evaluates a config and writes metrics.json, card.json, card.md and sheet.png into its work folder.

Killed at any moment and started again it continues, with the same numbers in the end, also with
another number of processes; --no-resume starts over.

Examples:
    python tools/test.py configs/cfg_mini.py
    python tools/test.py configs/cfg_voc21.py --method sclip --work-dir work/voc21_sclip
    python tools/test.py configs/cfg_voc21.py --cfg-options model.method.pm=lof
    torchrun --nproc_per_node=2 tools/test.py configs/cfg_ade20k.py --launcher pytorch

Exit codes: 0 evaluated; 1 unexpected error; 2 wrong command line or config; 3 data or weights are
missing or damaged (the message names the file and says what to do).
"""

from __future__ import annotations

import argparse
import os
import sys

from mmengine.config import DictAction


def count(text: str) -> int:
    """A number of pictures, for argparse."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("pictures cannot be fewer than 0")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file, e.g. configs/cfg_voc21.py")
    parser.add_argument("--method", help="preset that replaces the config's method, e.g. sclip")
    parser.add_argument("--weights", help="name or path of CLIP weights, e.g. ViT-L/14")
    parser.add_argument("--work-dir", help="folder for the results (default: work/<config name>)")
    parser.add_argument("--show-dir", help="folder for a picture of each image with its labels")
    parser.add_argument(
        "--pictures", type=count, default=6, help="images on the sheet (default: 6)"
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="forget what an earlier, killed start has done (by default it is continued)",
    )
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm"],
        default="none",
        help="what started the processes of a distributed run",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that replace the config's, e.g. model.prob_thd=0.2",
    )
    parser.add_argument(
        "--check", action="store_true", help="only look whether config, data and weights are there"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.local_rank is not None:  # launchers older than torchrun pass it here
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return args


def main() -> int:
    args = parse_args()
    from rich.console import Console

    import sfp
    from sfp import evaluate

    evaluate.quiet()
    try:
        config = evaluate.load_config(
            args.config,
            method=args.method,
            weights=args.weights,
            work_dir=args.work_dir,
            options=args.cfg_options,
        )
        config.launcher = args.launcher
        evaluate.check(config)
        if args.check:
            return 0
        result = evaluate.evaluate(
            config, pictures=args.pictures, show_dir=args.show_dir, resume=not args.no_resume
        )
    except (OSError, sfp.WeightsError, sfp.DataError, FloatingPointError) as error:
        # from a data loader's process comes a whole traceback, which ends with the message
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result:
        Console().print(evaluate.per_class_table(result))
        files = "metrics.json, card.md" + ", sheet.png" * bool(args.pictures)
        print(f"results in {config.work_dir}: {files}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
