"""`sfp data`: lists datasets, says what to download, converts label maps and checks files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from sfp.cli.options import add_command, positive

if TYPE_CHECKING:
    from sfp.data.benchmarks import Benchmark

TEXT = """\
Lists, prepares and checks the datasets (docs/data.md); see also `sfp data ACTION --help`.

Examples:
    sfp data list
    sfp data prepare coco_stuff164k
    sfp data check coco_stuff164k
"""
LIST = """\
Lists the datasets, where each is expected, and whether it is there.

Examples:
    sfp data list
    sfp data list --data-root /path/to/data
"""
PREPARE = """\
Says what to download from where, under which terms, and how to lay it out on disk; then writes the
label maps that evaluation reads. Existing files are kept, so an interrupted conversion resumes.

Examples:
    sfp data prepare voc21                   # nothing to convert: only says what to download
    sfp data prepare coco_stuff164k coco27
    sfp data prepare context60 --force       # writes the label maps again

Exit codes: 0 complete; 2 no such dataset; 3 files are missing or damaged.
"""
CHECK = """\
Reads every image and label map and checks their number, pairing, sizes, ids and integrity. Each
kind of problem is shown with its first examples.

A manifest holds the SHA-256 hashes of an evenly spaced sample: of the bytes of images, and of the
values in label maps. Written on one machine and compared on another, it tells whether both have the
same data.

Examples:
    sfp data check voc21
    sfp data check voc21 --write-manifest    # to DATA_ROOT/voc21.manifest.json
    sfp data check voc21 --manifest voc21.manifest.json

A manifest found at this path in DATA_ROOT is always compared.

Exit codes: 0 no problems; 2 no such dataset; 3 something is missing, damaged or different.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds `data` and its own commands."""
    parser = commands.add_parser(
        "data",
        help="list, prepare and check the datasets",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    add = partial(add_command, actions)
    listed = add("list", _list, help="show which datasets are there", text=LIST)
    prepared = add(
        "prepare", _prepare, help="say what to download, and write label maps", text=PREPARE
    )
    checked = add("check", _check, help="read every file and report problems", text=CHECK)
    for action in (listed, prepared, checked):
        action.add_argument(
            "--data-root", type=Path, help="folder of all data (default: $DATA_ROOT, or data)"
        )
    for action in (prepared, checked):
        action.add_argument("datasets", nargs="+", metavar="NAME", help="as in `sfp data list`")
        action.add_argument(
            "--workers", type=positive, help="threads (default: one per core, up to 8)"
        )
    prepared.add_argument("--force", action="store_true", help="overwrite existing label maps")
    files = checked.add_mutually_exclusive_group()
    files.add_argument(
        "--write-manifest", action="store_true", help="write hashes, to compare on another machine"
    )
    files.add_argument("--manifest", type=Path, metavar="FILE", help="compare with this manifest")


def _root(args: argparse.Namespace) -> Path:
    return args.data_root or Path(os.environ.get("DATA_ROOT") or "data")


def _entries(names: Iterable[str]) -> dict[str, Benchmark]:
    """Benchmarks by name; raises for an unknown name before anything runs."""
    from sfp.data.benchmarks import DOWNLOADED
    from sfp.registry import pick

    return {name: pick("dataset", name, DOWNLOADED) for name in names}


def _list(args: argparse.Namespace) -> int:
    from rich.table import Table
    from rich.text import Text

    from sfp.data.benchmarks import DOWNLOADED
    from sfp.terminal import console

    root = _root(args)
    table = Table("name", "dataset", "images", "classes", "expected in", "state")
    for name, entry in DOWNLOADED.items():
        _, what = entry.state(root)
        style = {"ready": "green", "missing": "dim"}.get(what, "yellow")
        images = " or ".join(map(str, entry.images))
        where = str(root / entry.folder)
        state = Text(what, style=style)
        table.add_row(name, entry.title, images, str(entry.classes), where, state)
    console().print(table)
    print("`sfp data prepare NAME` says how to get one, `sfp data check NAME` checks every file")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from sfp.data.convert import WORKERS, run

    root = _root(args)
    complete = True
    for name, entry in _entries(args.datasets).items():
        print(_card(name, entry, root))
        for step in entry.steps:
            written, kept = run(
                step.jobs(entry, root),
                f"{entry.title}: {step.what}",
                workers=args.workers or WORKERS,
                force=args.force,
            )
            print(f"{step.what}: {written} written, {kept} already there")
        entry.build(root).load_data_list()  # raises if something is still missing
        images, what = entry.state(root)
        print(f"{name}: {images} images, {what}; `sfp data check {name}` checks every file\n")
        complete &= what == "ready"
    return 0 if complete else 3


def _card(name: str, entry: Benchmark, root: Path) -> str:
    """A description of a dataset: downloads, terms and layout."""
    lines = [f"{entry.title} ({name}): {entry.images[0]} images, {entry.classes} classes"]
    lines += ["", "Download and unpack:"]
    for file in entry.downloads:
        folder = os.path.normpath(root / file.into)
        lines.append(f"  {file.file} from {file.url}\n    into {folder}")
    lines += ["", *wrap(f"Terms: {entry.terms} Read them where you download.", 100), ""]
    lines.append(f"Resulting layout of {root / entry.folder}:")
    width = max(map(len, entry.layout))
    lines += [f"  {path:{width}}  {what}".rstrip() for path, what in entry.layout.items()]
    if entry.note:
        lines += ["", *wrap(f"Note: {entry.note}", 100)]
    return "\n".join(lines) + "\n"


def _check(args: argparse.Namespace) -> int:
    from sfp.data import check
    from sfp.data.convert import WORKERS

    root, workers = _root(args), args.workers or WORKERS
    entries = _entries(args.datasets)
    if args.manifest and len(entries) > 1:
        raise ValueError("--manifest FILE belongs to one dataset: check a single dataset with it")
    wrong = False
    for name, entry in entries.items():
        report = check.check(entry, root, workers=workers)
        problems = dict(report.problems)
        known = root / f"{name}.manifest.json"
        other = args.manifest or (known if known.is_file() else None)
        if problems:
            if args.write_manifest or other:
                print(f"{name}: no hashes were computed; solve the problems below first")
        elif args.write_manifest:
            check.write_manifest(known, check.manifest(entry, root, workers=workers))
            print(f"{name}: wrote {known}")
        elif other:
            differ = check.compare(other, check.manifest(entry, root, workers=workers))
            if differ:
                problems[f"differs from {other}"] = differ
            else:
                print(f"{name}: agrees with {other}")
        print(
            f"{name}: {report.images} images; {report.occurring} of {entry.classes} classes occur, "
            f"{report.ignored:.1%} of the pixels are ignored"
        )
        _print_problems(name, problems)
        wrong |= bool(problems)
    return 3 if wrong else 0


def _print_problems(name: str, problems: Mapping[str, list[str]], examples: int = 3) -> None:
    if not problems:
        print(f"{name}: no problems")
    for kind, lines in problems.items():
        print(f"{name}: {kind}: {len(lines)}")
        for line in lines[:examples]:
            print(f"    {line}")
        if len(lines) > examples:
            print(f"    and {len(lines) - examples} more")
    if any("missing" in kind for kind in problems):
        print(f"{name}: `sfp data prepare {name}` says what to download and writes the label maps")
