"""Draws COCO's instances into label maps for the COCO-Object benchmark, of either split.

Reads ROOT/annotations/instances_<split>.json and writes, for each image listed there,
ROOT/annotations/<split>/<image>_instanceTrainIds.png. Maps that exist already are kept, so an
interrupted run goes on where it stopped; --force draws them again. The smaller one is drawn on top
where instances overlap, crowd regions lie below. For val2017 below DATA_ROOT,
`sfp data prepare coco_object` does the same.

Example:
    python tools/dataset_converters/coco_object.py data/coco_object --split train2017 --nproc 8

Exit codes: 0 drawn; 2 wrong command line; 3 the annotations are missing or damaged.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sfp.data.coco_object import object_jobs
from sfp.data.convert import WORKERS, run
from sfp.data.images import DataError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "root", type=Path, metavar="ROOT", help="folder of COCO-Object, such as data/coco_object"
    )
    parser.add_argument("--split", default="val2017", help="val2017 (default) or train2017")
    parser.add_argument("--nproc", type=int, default=WORKERS, help="threads (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite existing maps")
    args = parser.parse_args(argv)
    if args.nproc < 1:
        parser.error(f"--nproc {args.nproc} is not a positive number")
    try:
        written, kept = run(
            object_jobs(args.root, args.split),
            f"COCO-Object {args.split}",
            workers=args.nproc,
            force=args.force,
        )
    except (OSError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    folder = args.root / "annotations" / args.split
    print(f"{written} label maps written, {kept} already there, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
