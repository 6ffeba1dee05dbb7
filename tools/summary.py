"""One table from the metrics.json files of several evaluations, printed and written.

Example:
    python tools/summary.py work/all/cfg_voc21 work/all/cfg_ade20k --out work/all/summary
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sfp.evaluation.scores import COLUMNS
from sfp.files import atomic_write
from sfp.tables import cell, markdown
from sfp.terminal import print_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="work folders of tools/test.py")
    parser.add_argument("--out", type=Path, help="write <out>.md and <out>.json as well")
    args = parser.parse_args()

    rows = {}
    for folder in args.folders:
        file = folder / "metrics.json"
        rows[folder.name.removeprefix("cfg_")] = (
            json.loads(file.read_text()) if file.is_file() else None
        )
    done = [row for row in rows.values() if row]
    cells = [
        [
            name,
            *(cell(row[c] if row else None) for c in COLUMNS),
            str(row["images"] if row else "-"),
        ]
        for name, row in rows.items()
    ]
    if len(done) > 1:
        means = (sum(row[c] for row in done) / len(done) for c in COLUMNS)
        cells.append([f"mean of {len(done)}", *map(cell, means), ""])

    header = ["benchmark", *COLUMNS, "images"]
    print_table(header, cells)
    if args.out:
        texts = {".md": markdown(header, cells), ".json": json.dumps(rows, indent=2) + "\n"}
        for suffix, text in texts.items():
            with atomic_write(args.out.with_suffix(suffix)) as path:
                path.write_text(text)


if __name__ == "__main__":
    main()
