"""`sfp hubs`: which detectors find the patches that all others attend to."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sfp.cli.options import WEIGHTS, add_command, add_import, positive

TEXT = """\
Tests which outlier detectors find hubs, the patches that all others attend to, and prints one
table.

A patch is a hub at a block if it receives at least --times an even share of the other patches'
attention in the next block. Each cell shows a detector's precision / recall at a block.

Examples:
    sfp hubs
    sfp hubs --layers 8 10 --detectors som l2_norm lof --count 40
    sfp hubs --weights ViT-B/16 --images photos

Exit codes: 0 done; 1 unexpected error; 2 wrong command line; 3 weights or images are missing (the
message says which, and where they belong).
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "hubs", run, help="see which detectors find hubs in the attention", text=TEXT
    )
    parser.add_argument("--weights", default="mini", help=f"{WEIGHTS} (default: mini)")
    parser.add_argument(
        "--images", type=Path, help="folder of images (default: drawn scenes of the mini world)"
    )
    parser.add_argument("--count", type=positive, default=40, help="number of images (default: 40)")
    parser.add_argument(
        "--size", type=positive, help="side of the square crops (default: the model's)"
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", help="blocks, from 0 (default: the deeper half)"
    )
    parser.add_argument("--detectors", nargs="+", help="default: all")
    parser.add_argument(
        "--times", type=float, default=3.0, help="even shares that make a hub (default: 3)"
    )
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the comparison."""
    import sfp
    from sfp.cli.plant import normalised_crops
    from sfp.files import atomic_write
    from sfp.outliers import hubs, planted
    from sfp.terminal import print_table

    clip = sfp.load_clip(args.weights)
    pixels = normalised_crops(clip, args.images, args.count, args.size)
    layers = args.layers or range(len(clip.visual.blocks) // 2, len(clip.visual.blocks) - 1)
    found = hubs.study(
        clip.visual, pixels.split(1), planted.detectors(args.detectors), layers, args.times
    )
    title = f"{Path(args.weights).name}, {found['images']} images: precision / recall for hubs"
    print_table(*hubs.sheet(found), title=title)
    if args.out:
        with atomic_write(args.out) as path:
            path.write_text(json.dumps(dict(found, weights=str(args.weights)), indent=1) + "\n")
        print(f"numbers in {args.out}")
    return 0
