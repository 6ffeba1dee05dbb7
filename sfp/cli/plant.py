"""`sfp plant`: scores detectors and mitigators on outliers at known positions."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sfp.cli.options import add_command, add_import, positive

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from sfp.clip.model import CLIP

TEXT = """\
Plants outliers in a frozen CLIP and scores every detector and mitigator on them.

Writes OUT.json, OUT.png and OUT.md. If OUT.md exists, only the part between its two "plant" markers
is replaced.

Examples:
    sfp plant --weights mini --out docs/measured/planted
    sfp plant --weights mini --detectors som l2_norm --strengths 2 --at 2 --count 4
    sfp plant --weights ViT-B/16 --images photos --planted 10 --layer 6

Exit codes: 0 done; 1 unexpected error; 2 wrong command line; 3 weights or images are missing (the
message says which, and where they belong).
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "plant", run, help="plant outliers and see which detectors find them", text=TEXT
    )
    parser.add_argument(
        "--weights", default="mini", help="name or path of CLIP weights (default: mini)"
    )
    parser.add_argument(
        "--images", type=Path, help="folder of images (default: drawn scenes of the mini world)"
    )
    parser.add_argument("--count", type=positive, default=16, help="number of images (default: 16)")
    parser.add_argument(
        "--size", type=positive, help="side of the square crops (default: the model's)"
    )
    parser.add_argument("--out", type=Path, default="work/plant", help="default: work/plant")
    parser.add_argument(
        "--layer", type=int, help="block after which to plant, from 0 (default: the middle)"
    )
    parser.add_argument(
        "--detect", type=int, help="block at which to detect and mitigate (default: the next)"
    )
    parser.add_argument(
        "--planted",
        type=float,
        default=0.05,
        help="mean number of outliers per image, or a share of the patches if below 1 "
        "(default: 0.05)",
    )
    parser.add_argument(
        "--fixed", action="store_true", help="the same number of outliers in every image"
    )
    parser.add_argument(
        "--patterns", nargs="+", default=["scattered", "clustered"], help="default: both"
    )
    parser.add_argument(
        "--strengths",
        nargs="+",
        type=float,
        default=[0.5, 1, 2, 4, 8],
        help="norms of the disturbance, in median patch norms (default: 0.5 1 2 4 8)",
    )
    parser.add_argument(
        "--at",
        type=float,
        default=4,
        help="strength for the table of detectors by mitigators (default: 4)",
    )
    parser.add_argument(
        "--channel-share",
        type=float,
        default=0.25,
        help="share of the disturbance's energy in the outlier channel (default: 0.25)",
    )
    parser.add_argument("--detectors", nargs="+", help="default: all")
    parser.add_argument("--mitigators", nargs="+", help="default: all")
    parser.add_argument("--batch", type=positive, default=8, help="images per batch (default: 8)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the planted patches (default: 0)"
    )
    add_import(parser)


def crops(folder: Path, count: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Centre crops of the images in a folder, ordered by name: (size, size, 3) RGB each."""
    from sfp.data.images import read_image, resize_short_side
    from sfp.data.listing import list_units

    units = [unit for unit in list_units([folder]) if not unit.is_archive]
    if not units:
        raise FileNotFoundError(f"{folder} holds only archives: `sfp plant` needs image files")
    for unit in units[:count]:
        image = resize_short_side(read_image(unit.path), size, long_side=2**31)
        top, left = ((n - size) // 2 for n in image.shape[:2])
        yield image[top : top + size, left : left + size]


def normalised_crops(clip: CLIP, folder: Path | None, count: int, size: int | None) -> Tensor:
    """Square images, normalised for a model: (n, 3, size, size).

    Args:
        clip: the model.
        folder: folder of images, see `crops`; None for drawn scenes of the mini world.
        count: largest number of images.
        size: side in pixels; None for the model's own.
    """
    import numpy as np
    import torch

    from sfp.mini import scene

    size = size or clip.visual.usual_grid[0] * clip.visual.patch
    if folder:
        pictures = list(crops(folder, count, size))
    else:
        pictures = [scene(900_000 + i, size)[0] for i in range(count)]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (clip.mean, clip.std))
    return (pixels - mean) / std


def run(args: argparse.Namespace) -> int:
    """Plants outliers and scores detectors and mitigators."""
    import torch
    from rich.console import Console
    from rich.progress import track

    import sfp
    from sfp.files import atomic_write
    from sfp.outliers import planted as plant
    from sfp.outliers import report as plant_report
    from sfp.terminal import print_table

    paths = {kind: args.out.with_name(f"{args.out.name}.{kind}") for kind in ("json", "png", "md")}
    plant_report.frame(paths["md"])  # a page that cannot be updated fails here, not at the end
    setting = plant.Setting(
        layer=args.layer,
        detect=args.detect,
        planted=args.planted,
        varied=not args.fixed,
        patterns=args.patterns,
        strengths=args.strengths,
        at=args.at,
        channel_share=args.channel_share,
        seed=args.seed,
    )
    detectors = plant.detectors(args.detectors)
    mitigators = plant.mitigators(args.mitigators)
    clip = sfp.load_clip(args.weights)
    vit = clip.visual.to(args.device)
    setting.blocks(vit)
    pixels = normalised_crops(clip, args.images, args.count, args.size)
    batches = track(
        pixels.to(torch.device(args.device)).split(args.batch),
        description="planting",
        console=Console(stderr=True),
    )
    result = plant.benchmark(vit, batches, setting, detectors, mitigators)
    what = f"images of {args.images.name}" if args.images else "drawn scenes"
    source = f"{Path(args.weights).name}, {result['images']} {what}"
    command = shlex.join(["sfp", "plant", *args.words[1:]])
    text = plant_report.report(result, source, command, paths["png"].name)
    plant_report.write_page(paths["md"], text)
    with atomic_write(paths["json"]) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    plant_report.plot(result, paths["png"])
    for pattern in setting.patterns:
        sheets = {
            "detection": plant_report.detection_sheet(result, pattern),
            "restoration given the true mask": plant_report.restoration_sheet(result, pattern),
        }
        for title, (header, rows) in sheets.items():
            print_table(header, rows, title=f"{pattern}: {title}")
    print("results in " + ", ".join(map(str, paths.values())))
    return 0
