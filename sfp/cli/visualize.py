"""`sfp visualize`: pictures of the attention, outliers and features inside a model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfp.cli import options
from sfp.cli.options import WEIGHTS, add_command

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sfp.vocabulary import Vocabulary

TEXT = """\
Draws what happens inside a model: outliers, attention, norms, purification and the segmentation.

Writes one PNG file per picture and overview.png, which shows them all. Without an image it uses a
scene of the mini world.

Examples:
    sfp visualize
    sfp visualize --scene 900010 --layers 3 7 10 --patch 9 4
    sfp visualize photo.jpg --weights ViT-B/16 --classes "cat, sofa, wall"
    sfp visualize photo.jpg --weights clip.pt --classes names.txt --detectors som lof

Exit codes: 0 done; 1 unexpected error; 2 wrong command line; 3 the image or the weights are missing
or cannot be read (the message says which).
"""
LAYERS = (0, 5, 7, 10)  # of 12 blocks


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "visualize", run, help="draw outliers, attention and more for an image", text=TEXT
    )
    parser.add_argument("image", nargs="?", help="path of a picture")
    parser.add_argument("--scene", type=int, default=900_009, help="scene to use without an image")
    parser.add_argument("--out", type=Path, default=Path("work/visualize"), help="output folder")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="blocks to show, counted from 0, or negative from the end (default: 0 5 7 10, at the "
        "same relative depth in deeper models)",
    )
    parser.add_argument(
        "--detectors",
        nargs="+",
        default=["som", "l2_norm", "lof"],
        help="detectors whose outliers are shown (default: som l2_norm lof)",
    )
    parser.add_argument("--method", default="sfp", help=f"{options.METHOD} (default: sfp)")
    parser.add_argument("--weights", default="mini", help=f"{WEIGHTS} (default: mini)")
    parser.add_argument(
        "--classes",
        help=f"{options.CLASSES} (default: the mini world's with its weights; with others nothing "
        "is segmented)",
    )
    parser.add_argument(
        "--patch",
        type=int,
        nargs=2,
        metavar=("ROW", "COL"),
        help="patch to show (default: the middle)",
    )
    parser.add_argument(
        "--size",
        type=options.positive,
        help="short side in pixels (default: 336; 224 for scenes and for the mini CLIP)",
    )
    options.add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Draws all pictures."""
    import torch
    from matplotlib.image import imsave

    from sfp.files import atomic_write
    from sfp.visualize import contact_sheet

    args.out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        figures = dict(pictures(args))
    for name, figure in figures.items():
        with atomic_write(args.out / f"{name}.png") as path:
            figure.savefig(path, format="png")
    with atomic_write(args.out / "overview.png") as path:
        imsave(path, contact_sheet(list(figures.values())), format="png")
    print(f"{len(figures) + 1} pictures in {args.out}: overview.png, {', '.join(figures)}")
    return 0


def pictures(args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """The pictures with their file names, one at a time."""
    import sfp
    from sfp import visualize
    from sfp.clip.checkpoints import published

    if args.image:
        side, photo = args.size or published.short_side(args.weights), sfp.as_image(args.image)
    else:
        side = args.size or 224  # what scenes are drawn at
        photo = sfp.mini.scene(args.scene, side)[0]
    classes = class_names(args)
    model = sfp.load(args.weights, options.parse_method(args.method), short_side=side)
    image = model.resized(photo)

    # layers given by the user are absolute; the defaults are for twelve blocks
    plain = sfp.build_method("clip", depth=None if args.layers else 12)
    trace = model.trace(image, method=plain)
    layers = args.layers or LAYERS
    grid = trace.embedded.grid
    patch = tuple(args.patch) if args.patch else (grid[0] // 2, grid[1] // 2)
    yield "outliers", visualize.outliers(image, trace, layers, args.detectors)
    yield "norms", visualize.norm_maps(image, trace, layers)
    yield "class_attention", visualize.class_attention(image, trace, layers)
    yield "patch_attention", visualize.patch_attention(image, trace, layers, patch)
    yield "attention_matrices", visualize.attention_matrices(trace, layers)
    yield "profile", visualize.layer_profile(trace)

    purified = model.trace(image, classes=classes)
    if purified.masks:
        # counted from the end: the same block for every trace
        i = max(purified.masks) - len(model.clip.visual.blocks)
        yield "purification", visualize.purification(image, trace, purified, i, patch=patch)
    else:
        print(f"method {args.method} replaces no outliers: no purification.png")
    if classes is None:
        print('no segmentation.png: name classes to draw it, e.g. --classes "cat, sofa, wall"')
        return
    result = model.segment(image, classes)
    yield "segmentation", visualize.segmentation(image, {args.method: result}, result.names)


def class_names(args: argparse.Namespace) -> Vocabulary | None:
    """The classes of `--classes`, or the mini world's for its weights."""
    from sfp import mini
    from sfp.vocabulary import as_vocabulary

    if args.classes is None:
        return as_vocabulary(list(mini.CLASSES)) if args.weights == "mini" else None
    vocabulary = as_vocabulary(options.parse_classes(args.classes))
    options.note_words(args.weights, vocabulary)
    return vocabulary
