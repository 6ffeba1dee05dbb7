"""Evaluates several methods over one config in one go, and prints one table.

Weights and text features are loaded once, and methods that do not touch the trunk share its run.
Writes compare.json, compare.md and compare.png (side by side) into the work folder. Killed and started
again it continues, also with more methods; --no-resume starts over.

Examples:
    python tools/compare.py configs/cfg_mini.py
    python tools/compare.py configs/cfg_voc21.py --methods clip sclip sfp --work-dir work/three

Exit codes as in tools/test.py.
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction


def count(text: str) -> int:
    """A number of pictures, for argparse."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("pictures cannot be fewer than 0")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file, e.g. configs/cfg_mini.py")
    parser.add_argument(
        "--methods",
        nargs="+",
        help="presets (default: all that need no guide)",
    )
    parser.add_argument("--weights", help="name or path of CLIP weights")
    parser.add_argument("--work-dir", help="folder for the results (default: work/<config name>)")
    parser.add_argument(
        "--pictures", type=count, default=4, help="images on the sheet (default: 4)"
    )
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="forget what an earlier, killed start has done (by default it is continued)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="settings that replace the config's",
    )
    args = parser.parse_args()
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    import sfp
    from sfp import compare, evaluate

    evaluate.quiet()
    methods = args.methods or [m for m in sfp.list_methods() if m != "proxyclip"]
    try:
        config = evaluate.load_config(
            args.config, weights=args.weights, work_dir=args.work_dir, options=args.cfg_options
        )
        evaluate.check(config)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{len(methods)} methods", total=None)
            record = compare.compare(
                config,
                {name: name for name in methods},
                pictures=args.pictures,
                resume=not args.no_resume,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (OSError, sfp.WeightsError, sfp.DataError, FloatingPointError) as error:
        # from a data loader's process comes a whole traceback, which ends with the message
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table("method", *compare.COLUMNS, title=f"{args.config}, {record['images']} images")
    for row in compare.compare_rows(record):
        table.add_row(*row)
    Console().print(table)
    print(f"results in {config.work_dir}: compare.json, compare.md, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
