"""Runs an ablation study over one config and prints its table, with published numbers beside ours.

Studies: modules, self_attention, layers (SFP's poster); detectors (SFP as released); backbones (CLIP
and SFP by weights); cliptrase; gclip. Variants that do not touch the trunk share its run on every
image. Writes ablate_<study>.md, .json and .png into the work folder. Killed and started again it
continues; --no-resume starts over.

Examples:
    python tools/ablate.py configs/cfg_mini.py --study modules
    python tools/ablate.py configs/cfg_voc21.py --study layers --work-dir work/voc21_layers
    python tools/ablate.py configs/cfg_ade20k.py --study backbones --weights ViT-B/16 ViT-L/14
    python tools/ablate.py configs/cfg_mini.py --study detectors --no-resume

Exit codes as in tools/test.py.
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="config file, e.g. configs/cfg_mini.py")
    parser.add_argument("--study", required=True, help="which, e.g. modules")
    parser.add_argument(
        "--weights", nargs="+", help="names or paths of CLIP weights; several for backbones"
    )
    parser.add_argument("--work-dir", help="folder for the results (default: work/<config name>)")
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
    from sfp import ablate, evaluate

    evaluate.quiet()
    weights = args.weights or []
    try:
        study = ablate.find_study(args.study)
        for source in weights or [None]:  # all are looked for before the first runs for hours
            config = evaluate.load_config(
                args.config, weights=source, work_dir=args.work_dir, options=args.cfg_options
            )
            evaluate.check(config)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"{len(study.rows)} variants", total=None)
            result = ablate.ablate(
                config,
                args.study,
                weights=weights if len(weights) > 1 else (),
                resume=not args.no_resume,
                progress=lambda what, done, total: bar.update(
                    task, description=what, completed=done, total=total
                ),
            )
    except (OSError, sfp.WeightsError, sfp.DataError, FloatingPointError) as error:
        # from a data loader's process comes a whole traceback, which ends with the message
        print(f"error: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    header, rows = ablate.sheet(result)
    table = Table(title=result["title"], caption=ablate.caption(result))
    for column in header:
        table.add_column(column, justify="left" if column == header[0] else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    base = f"ablate_{args.study}"
    print(f"results in {config.work_dir}: {base}.md, {base}.json, {base}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
