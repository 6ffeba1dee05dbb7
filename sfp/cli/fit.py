"""`sfp fit`: passes over unlabelled images that write a file for a method."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfp.cli import options

if TYPE_CHECKING:
    from torch import Tensor

    from sfp.tokens import Tokens
    from sfp.trace import Trace

TEXT = """\
Runs over a folder of unlabelled images and writes a file for a method.

Examples:
    sfp fit templates photos --classes voc21 --out voc21.json
    sfp fit memory photos --out memory.safetensors --regions files:folder=maps \\
        --guide dino=transformers:model=facebook/dino-vitb8
"""
TEMPLATES = """\
Ranks the prompt templates of each class by the entropy of the pixels that they assign to it (FLOSS),
and writes a small file for `method=dict(type="floss", experts=FILE)`.

Examples:
    sfp fit templates photos --classes voc21 --out voc21.json
    sfp fit templates photos --classes classes.txt --method naclip --count 4 --limit 200
"""
MEMORY = """\
Stores two vectors for every region of the images: a guide's, by which similar regions are found, and
the method's own. The file is for `method=dict(type="region_memory", base=METHOD, memory=FILE)`, the
second version of CorrCLIP. Damaged images, and images without regions, are left out.

Examples:
    sfp fit memory photos --method corrclip:eps=None --out memory.safetensors \\
        --guide dino=transformers:model=facebook/dino-vitb8 \\
        --regions universal:model=facebook/mask2former-swin-large-coco-panoptic,paint=score
    sfp fit memory photos --regions files:folder=maps \\
        --guide dino=transformers:model=facebook/dino-vitb8

A memory of n regions takes 2 (D + C) n bytes: 2.6 kB per region with DINO ViT-B and CLIP ViT-B/16.
"""
EXIT = """
Exit codes: 0 done; 1 unexpected error; 2 wrong command line; 3 weights or images are missing (the
message says what to put where).
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `fit` and its own commands."""
    parser = commands.add_parser(
        "fit",
        help="passes over unlabelled images, for methods that need one",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="WHAT", required=True)
    add = partial(options.add_command, actions)
    templates = add("templates", _templates, help="FLOSS's templates", text=TEMPLATES + EXIT)
    memory = add("memory", _memory, help="regions, for region_memory", text=MEMORY + EXIT)
    for action in (templates, memory):
        action.add_argument("images", type=Path, help="folder of images; labels are not needed")
        action.add_argument(
            "--weights", default="ViT-B/16", help=f"{options.WEIGHTS} (default: ViT-B/16)"
        )
        action.add_argument(
            "--limit", type=options.positive, help="largest number of images (default: all)"
        )
        action.add_argument("--device", default="auto", help="default: auto")
        options.add_guide(action)
        options.add_regions(action)
        options.add_import(action)
    templates.add_argument(
        "--classes", required=True, help="class file, or the name of a benchmark (voc21, ...)"
    )
    templates.add_argument("--out", type=Path, default="experts.json", help="default: experts.json")
    templates.add_argument(
        "--method",
        default="naclip",
        help="method that gives the features, NAME:KNOB=VALUE (default: naclip)",
    )
    templates.add_argument(
        "--templates", default="imagenet", help="set of templates to rank (default: imagenet)"
    )
    templates.add_argument(
        "--count", type=options.positive, default=4, help="templates per class (default: 4)"
    )
    memory.add_argument(
        "--out", type=Path, default="memory.safetensors", help="default: memory.safetensors"
    )
    memory.add_argument(
        "--method",
        default="corrclip:eps=None",
        help="method that gives the features, NAME:KNOB=VALUE (default: corrclip:eps=None)",
    )
    memory.add_argument(
        "--find-by",
        default="dino",
        metavar="GUIDE",
        help="guide whose features are the keys of regions (default: dino)",
    )
    memory.add_argument(
        "--find-output",
        type=options.parse_value,
        default="q+k",
        metavar="OUTPUT",
        help="output of the guide; None for its last layer (default: q+k)",
    )
    for action, side, crop in ((templates, 336, 224), (memory, 448, 336)):
        action.add_argument(
            "--short-side", type=options.positive, default=side, help=f"default: {side} pixels"
        )
        action.add_argument(
            "--slide-crop", type=int, default=crop, help=f"side of windows (default: {crop})"
        )
        action.add_argument(
            "--slide-stride", type=int, default=112, help="stride of windows (default: 112)"
        )


def _model(args: argparse.Namespace) -> Any:
    """The model of a command line."""
    import sfp
    from sfp.method import build_method, check_needs

    method = build_method(options.parse_method(args.method))
    guides = dict(map(options.parse_guide, args.guide))
    regions = options.parse_regions(args.regions)
    check_needs(method, guides, regions)
    return sfp.load(
        args.weights,
        method,
        device=args.device,
        short_side=args.short_side,
        slide_crop=args.slide_crop,
        slide_stride=args.slide_stride,
        guides=guides,
        regions=regions,
        memory_mb=0,  # each image is seen once
    )


def _reads(args: argparse.Namespace, model: Any) -> Iterator[tuple[Tokens, Trace]]:
    """The method's features of all windows of each image of a folder, and their trace.

    Raises:
        DataError: if no image can be used.
    """
    import sys

    import numpy as np

    from sfp.data.images import DataError, read_image
    from sfp.data.listing import list_units
    from sfp.terminal import progress

    units = [unit for unit in list_units([args.images]) if not unit.is_archive][: args.limit]
    if not units:
        raise FileNotFoundError(f"{args.images} holds only archives: this command needs images")
    read = 0
    with progress() as bar:
        for unit in bar.track(units, description="images"):
            try:
                pixels = model.input(np.ascontiguousarray(read_image(unit.path)))
                regions = None
                if args.regions is not None:
                    regions = _regions(model.engine, unit.name, pixels)
            except DataError as error:  # continue with the other images
                print(f"left out: {error}", file=sys.stderr)
                continue
            yield model.engine.read(model.method, pixels, regions=regions)
            read += 1
    if not read:
        raise DataError(f"{args.images}: none of the {len(units)} images could be used")


def _regions(engine: Any, name: str, pixels: Tensor) -> Tensor:
    """The regions of an image, from a file or from a proposer."""
    if stored := engine.stored_regions([name]):
        return stored[0].to(engine.device)
    return engine.propose_regions(pixels, pixels.shape[-2:])


def _templates(args: argparse.Namespace) -> int:
    """Ranks templates and writes the best of each class."""
    from torch.nn import functional as F

    from sfp.clip.text import prompt_templates
    from sfp.methods import floss
    from sfp.vocabulary import as_vocabulary

    vocabulary = as_vocabulary(args.classes)
    templates = prompt_templates(args.templates)
    model = _model(args)
    index = list(vocabulary.index)
    banks = model.engine.template_banks(vocabulary.queries, templates)
    features = (
        F.normalize(tokens.patches.float(), dim=-1).flatten(0, 1)
        for tokens, _ in _reads(args, model)
    )
    ranked = floss.fit(features, banks, index)
    names = [vocabulary.queries[index.index(k)] for k in range(vocabulary.num_classes)]
    floss.write_experts(args.out, ranked, names, templates, args.count)
    unseen = sum(not column.isfinite().any() for column in ranked.T)
    print(f"{args.out}: {args.count} of {len(templates)} templates for {len(names)} classes")
    if unseen:
        print(f"{unseen} classes have no pixel in these images, and keep all templates")
    return 0


def _memory(args: argparse.Namespace) -> int:
    """Collects the regions of the images and writes them."""
    from sfp.methods import region_memory

    model = _model(args)
    keys, values = region_memory.remember(
        _reads(args, model), guide=args.find_by, output=args.find_output
    )
    made = dict(
        guide=args.find_by,
        output=str(args.find_output),
        weights=args.weights,
        method=args.method,
    )
    region_memory.write_memory(args.out, keys, values, model.clip.visual, **made)
    print(f"{args.out}: {len(keys)} regions")
    return 0
