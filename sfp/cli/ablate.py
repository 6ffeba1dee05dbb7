"""`sfp ablate`: an ablation study on one config."""

from __future__ import annotations

import argparse

from sfp.cli import options

TEXT = """\
Runs an ablation study on one config and prints its table, with published numbers beside ours.

Studies: modules, self_attention, layers (SFP's poster); detectors (SFP as released); backbones
(methods by weights); cliptrase (its paper's tables 2, 4 and 5); cliptrase_release; gclip. Numbers
from another protocol or backbone are marked. Variants that do not edit the trunk share its run on
each image. Writes ablate_<study>.md, .json and .png into the work folder. An interrupted study
resumes when started again; --no-resume starts over. --paired adds each variant's difference from
another, with the 95 % interval of a paired bootstrap over images. To vary knobs of your own choice,
use sfp compare: --methods sfp:beta=0.2 sfp:beta=0.4 --paired sfp:beta=0.4

Examples:
    sfp ablate mini --study modules --paired previous
    sfp ablate voc21 --study layers --work-dir work/voc21_layers
    sfp ablate ade20k --study backbones --weights ViT-B/16 ViT-L/14
    sfp ablate mini --study detectors --no-resume

Exit codes are those of `sfp eval`.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(commands, "ablate", run, help="run an ablation study", text=TEXT)
    options.add_evaluation(parser, many_weights=True)
    parser.add_argument("--study", required=True, help="name of the study, e.g. modules")
    options.add_paired(parser, "the label of a variant")


def run(args: argparse.Namespace) -> int:
    """Runs the study."""
    from sfp.evaluation import ablate
    from sfp.terminal import print_table, progress

    study = ablate.find_study(args.study)
    weights = args.weights or []
    for source in weights or [None]:  # check all of them before hours of running the first
        config = options.load(args, weights=source)
    with progress() as bar:
        task = bar.add_task(f"{len(study.rows)} variants", total=None)
        result = ablate.ablate(
            config,
            args.study,
            weights=weights if len(weights) > 1 else (),
            resume=not args.no_resume,
            paired=args.paired,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    header, rows = ablate.sheet(result)
    print_table(header, rows, title=result["title"], caption=ablate.caption(result))
    base = f"ablate_{args.study}"
    print(f"results in {config.work_dir}: {base}.md, {base}.json, {base}.png")
    return 0
