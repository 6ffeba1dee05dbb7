"""`sfp experts`: for FLOSS, the prompt templates with the most confident pixels of each class."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfp.cli.options import add_command, positive

if TYPE_CHECKING:
    from torch import Tensor

TEXT = """\
Ranks the prompt templates of each class on a folder of unlabelled images (FLOSS), and writes the
file that `method=dict(type="floss", experts=FILE)` reads.

Examples:
    sfp experts photos --classes voc21 --out voc21.json
    sfp experts photos --classes classes.txt --method naclip --count 4 --limit 200

Exit codes: 0 done; 1 unexpected error; 2 wrong command line; 3 weights or images are missing (the
message says which, and where they belong).
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "experts", run, help="choose FLOSS's templates on unlabelled images", text=TEXT
    )
    parser.add_argument("images", type=Path, help="folder of images; labels are not needed")
    parser.add_argument(
        "--classes", required=True, help="class file, or the name of a benchmark (voc21, ...)"
    )
    parser.add_argument("--out", type=Path, default="experts.json", help="default: experts.json")
    parser.add_argument(
        "--weights", default="ViT-B/16", help="name or path of CLIP weights (default: ViT-B/16)"
    )
    parser.add_argument(
        "--method", default="naclip", help="preset whose features are used (default: naclip)"
    )
    parser.add_argument(
        "--templates", default="imagenet", help="set of templates to rank (default: imagenet)"
    )
    parser.add_argument(
        "--count", type=positive, default=4, help="templates per class (default: 4)"
    )
    parser.add_argument("--limit", type=positive, help="use at most so many images (default: all)")
    parser.add_argument(
        "--short-side",
        type=positive,
        default=336,
        help="resize the short side to this many pixels (default: 336)",
    )
    parser.add_argument("--device", default="auto", help="default: auto")


def features(model: Any, folder: Path, limit: int | None) -> Iterator[Tensor]:
    """Unit-length patch features (N, C) of all windows, for each image of a folder."""
    import numpy as np
    import torch

    from sfp.data.images import read_image
    from sfp.data.listing import list_units

    units = [unit for unit in list_units([folder]) if not unit.is_archive]
    if not units:
        raise FileNotFoundError(f"{folder} holds only archives: `sfp experts` needs image files")
    for unit in units[:limit]:
        pixels = model.input(np.ascontiguousarray(read_image(unit.path)))
        with torch.inference_mode():
            yield model.engine.features(model.method, pixels)


def run(args: argparse.Namespace) -> int:
    """Ranks the templates and writes the file."""
    import sfp
    from sfp.clip.text import prompt_templates
    from sfp.methods import floss
    from sfp.vocabulary import as_vocabulary

    vocabulary = as_vocabulary(args.classes)
    templates = prompt_templates(args.templates)
    model = sfp.load(
        args.weights, args.method, device=args.device, short_side=args.short_side, memory_mb=0
    )
    index = list(vocabulary.index)
    banks = model.engine.template_banks(vocabulary.queries, templates)
    ranked = floss.fit(features(model, args.images, args.limit), banks, index)
    names = [vocabulary.queries[index.index(k)] for k in range(vocabulary.num_classes)]
    floss.write_experts(args.out, ranked, names, templates, args.count)
    unseen = sum(not column.isfinite().any() for column in ranked.T)
    print(f"{args.out}: {args.count} of {len(templates)} templates for {len(names)} classes")
    if unseen:
        print(f"{unseen} classes have no pixels in these images and keep all templates")
    return 0
