"""`sfp segment`: label maps of a few images."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfp.cli import options

if TYPE_CHECKING:
    from sfp.data.listing import Unit
    from sfp.result import Result

TEXT = """\
Segments images with your own words and prints the classes found in each.

Examples:
    sfp segment photo.jpg --classes "cat, grass, sky" --out out
    sfp segment photos --classes "cat|kitten, sofa|couch" --background "wall, floor" \\
        --out out --overlay
    sfp segment street.jpg --classes cityscapes --short-side 560 --method sclip --out out --coco
    sfp segment a.jpg --classes car --method sam3 --weights none \\
        --guide sam3=sam3:model=facebook/sam3

With --out it writes the labels as palette PNGs, OUT/labels/<name>.png; with --overlay also the
labels drawn over each image, OUT/overlay/<name>.jpg; with --coco also COCO annotations of all
images, OUT/coco.json. For very many images use `sfp label`, which resumes where it was interrupted.

Exit codes: 0 done; 1 some images could not be read or written; 2 wrong command line or settings; 3
the weights, or the only image, are missing or damaged.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands, "segment", run, help="segment images with your own words", text=TEXT
    )
    parser.add_argument("images", nargs="+", help="images, folders of them, lists of paths (.txt)")
    parser.add_argument(
        "--classes",
        required=True,
        help=options.CLASSES,
    )
    parser.add_argument("--out", type=Path, help="folder for the results (default: only print)")
    parser.add_argument(
        "--overlay", action="store_true", help="also write the labels drawn over each image"
    )
    parser.add_argument("--coco", action="store_true", help="write coco.json")
    parser.add_argument(
        "--parts", action="store_true", help="in coco.json, one annotation per connected region"
    )
    parser.add_argument(
        "--background",
        help="words for everything else, separated by commas; or a threshold: pixels whose best "
        "probability is lower become background (default: every pixel gets a class)",
    )
    parser.add_argument("--method", default="sfp", help=f"{options.METHOD} (default: sfp)")
    options.add_guide(parser)
    options.add_regions(parser)
    parser.add_argument(
        "--weights", default="ViT-B/16", help=f"{options.WEIGHTS} (default: ViT-B/16)"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        help="resize the short side to this many pixels (default: 336; 224 for the mini CLIP)",
    )
    parser.add_argument(
        "--pamr",
        type=options.count,
        default=0,
        metavar="STEPS",
        help="steps of PAMR, which sharpens edges",
    )
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "half", "fp32", "fp16", "bf16", "int8"],
        help="default: auto, which is fp16 on a GPU and fp32 on a CPU; half: bf16 on CPUs that "
        "have instructions for it",
    )
    options.add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Segments the images; returns 1 if some failed."""
    import sfp
    from sfp.cli import message
    from sfp.files import atomic_write
    from sfp.functional.room import RoomError
    from sfp.method import build_method, check_needs
    from sfp.vocabulary import as_vocabulary, background_threshold, check_threshold

    units = _units(args)
    classes, background = options.parse_classes(args.classes), parse_background(args.background)
    vocabulary = as_vocabulary(classes, background)  # raises before weights are loaded
    threshold = background_threshold(background)
    method = build_method(options.parse_method(args.method))
    if method.decision is None:
        check_threshold(vocabulary, threshold)
    guides = dict(map(options.parse_guide, args.guide))
    regions = options.parse_regions(args.regions)
    check_needs(method, guides, regions)
    if method.reads_clip:
        options.note_words(args.weights, vocabulary)
    model = sfp.load(
        args.weights,
        method,
        device=args.device,
        precision=args.precision,
        short_side="auto" if args.short_side is None else args.short_side,
        pamr_steps=args.pamr,
        guides=guides,
        regions=regions,
        memory_mb=0,  # each image is seen once
    )
    failures: list[Exception] = []
    bad = (sfp.ImageError, RoomError, OSError, FloatingPointError)

    def results() -> Iterator[tuple[str, Result]]:
        for unit in units:
            try:
                result = model.segment(unit.path, vocabulary, background=threshold)
                if args.out:
                    _write(args, unit, result)
            except bad as error:  # continue with the others
                if len(units) == 1:
                    raise
                print(f"failed: {message(error)}", file=sys.stderr)
                failures.append(error)
                continue
            print(f"{unit.path}: {result.summary()}")
            yield unit.path, result

    if args.coco:
        document = sfp.coco_document(results(), parts=args.parts)
        with atomic_write(args.out / "coco.json") as path:
            path.write_text(json.dumps(document), encoding="utf-8")
    else:
        for _ in results():
            pass
    if args.out:
        print(
            f"{len(units) - len(failures)} of {len(units)} images segmented; results in {args.out}"
        )
    return 1 if failures else 0


def _units(args: argparse.Namespace) -> list[Unit]:
    """The images to segment, after checking that the options are compatible."""
    from sfp.data.listing import list_units

    if args.out is None and (args.overlay or args.coco):
        raise ValueError("--overlay and --coco write files: add --out FOLDER")
    if args.parts and not args.coco:
        raise ValueError("--parts applies to coco.json: add --coco")
    units = list_units(args.images)
    shards = [unit.path for unit in units if unit.is_archive]
    if shards:
        raise ValueError(f"{shards[0]} is an archive: use `sfp label` for archives")
    return units


def _write(args: argparse.Namespace, unit: Unit, result: Result) -> None:
    result.save(args.out / "labels" / f"{unit.name}.png")
    if args.overlay:
        result.save(args.out / "overlay" / f"{unit.name}.jpg", overlay=True)


def parse_background(text: str | None) -> list[str] | float | None:
    """A threshold, or words separated by commas.

    Example:
        >>> parse_background("wall, floor"), parse_background("0.3")
        (['wall', 'floor'], 0.3)
    """
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return [word.strip() for word in text.split(",")]
