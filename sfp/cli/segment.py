"""`sfp segment`: a few pictures and words in, label maps out."""

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
Segments images with your own words and prints what is in them.

Examples:
    sfp segment photo.jpg --classes "cat, grass, sky" --out out
    sfp segment photos --classes "cat|kitten, sofa|couch" --background "wall, floor" --out out --overlay
    sfp segment street.jpg --classes cityscapes --short-side 560 --method sclip --out out --coco
    sfp segment a.jpg --classes car --method sam3 --weights none --guide sam3=sam3:model=facebook/sam3

With --out it writes OUT/labels/<name>.png, the label of each pixel as a palette picture; with --overlay
also OUT/overlay/<name>.jpg, a picture to look at; with --coco also OUT/coco.json, all images as COCO
annotations. Very many images: `sfp label`, which continues where it was stopped.

Exit codes: 0 done; 1 some images could not be read or written; 2 wrong command line or settings; 3 the
only image, or the weights, are missing or damaged.
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
    parser.add_argument("--out", type=Path, help="folder of the results (default: only print)")
    parser.add_argument("--overlay", action="store_true", help="write pictures to look at")
    parser.add_argument("--coco", action="store_true", help="write coco.json")
    parser.add_argument(
        "--parts", action="store_true", help="in coco.json, one annotation per connected region"
    )
    parser.add_argument(
        "--background",
        help="words for what is none of the classes, separated by commas; or a number: pixels whose "
        "best probability is less are background (default: every pixel gets a class)",
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
        help="pixels (default: 336; 224 for the mini CLIP)",
    )
    parser.add_argument("--pamr", type=int, default=0, metavar="STEPS", help="refinement at edges")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "fp16", "bf16", "int8"],
        help="default: auto",
    )
    options.add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Segments the images of a command line: 0, or 1 if some failed."""
    import sfp
    from sfp.files import atomic_write
    from sfp.functional.room import RoomError
    from sfp.method import build_method
    from sfp.mini import vocabulary_note
    from sfp.vocabulary import as_vocabulary, background_threshold, check_threshold

    units = _units(args)
    classes, background = options.parse_classes(args.classes), parse_background(args.background)
    vocabulary = as_vocabulary(classes, background)  # errors show before weights are loaded
    threshold = background_threshold(background)
    method = build_method(options.parse_method(args.method))
    if method.decision is None:
        check_threshold(vocabulary, threshold)
    if method.reads_clip and (note := vocabulary_note(args.weights, vocabulary)):
        print(f"note: {note}", file=sys.stderr)
    model = sfp.load(
        args.weights,
        method,
        device=args.device,
        precision=args.precision,
        short_side="auto" if args.short_side is None else args.short_side,
        pamr_steps=args.pamr,
        guides=dict(map(options.parse_guide, args.guide)),
        regions=options.parse_regions(args.regions),
        memory_mb=0,  # each image is seen once
    )
    failures: list[Exception] = []

    def results() -> Iterator[tuple[str, Result]]:
        for unit in units:
            try:
                result = model.segment(unit.path, vocabulary, background=threshold)
                if args.out:
                    _write(args, unit, result)
            except (
                sfp.ImageError,
                RoomError,
                OSError,
                FloatingPointError,
            ) as error:  # the others go on
                if len(units) == 1:
                    raise
                print(f"failed: {error}", file=sys.stderr)
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
    """The images, if the options go together."""
    from sfp.data.listing import list_units

    if args.out is None and (args.overlay or args.coco):
        raise ValueError("--overlay and --coco write files: say where with --out FOLDER")
    if args.parts and not args.coco:
        raise ValueError("--parts says how coco.json is written: give --coco too")
    units = list_units(args.images)
    shards = [unit.path for unit in units if unit.is_archive]
    if shards:
        raise ValueError(f"{shards[0]} is an archive: `sfp label` reads those")
    return units


def _write(args: argparse.Namespace, unit: Unit, result: Result) -> None:
    result.save(args.out / "labels" / f"{unit.name}.png")
    if args.overlay:
        result.save(args.out / "overlay" / f"{unit.name}.jpg", overlay=True)


def parse_background(text: str | None) -> list[str] | float | None:
    """A threshold, or words by commas.

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
