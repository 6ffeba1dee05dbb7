#!/usr/bin/env python
"""Compares exported ONNX files with the engine on scenes of the mini world, as a Markdown table.

Examples:
    python tools/export_check.py
    python tools/export_check.py --method gclip --scenes 20 --precisions fp32
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import sfp
from sfp import mini
from sfp.export import PRECISIONS, export
from sfp.tables import markdown

SIDE, FIRST = 224, 900_000  # the scenes of `sfp eval mini`
HEADER = ("precision", "file", "pixels with the engine's label", "pixels with the right label")


def agreement(
    model: sfp.Model, scenes: int, precisions: Sequence[str]
) -> Iterator[tuple[str, float, float, float]]:
    """Exports a model with the words of the mini world, and runs it.

    Yields:
        For each precision its name, the file's size in bytes, and the shares of the pixels with the
        engine's label and with the right one.
    """
    import onnxruntime

    words = sfp.load_vocabulary(list(mini.CLASSES))
    images, truths = zip(*(mini.scene(FIRST + i, SIDE) for i in range(scenes)), strict=True)
    ours = [model.segment(image, words).labels for image in images]
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions:
            out = Path(folder, f"{precision}.onnx")
            export(model.engine, model.method, words, out, precision=precision)
            session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
            labels = [session.run(["labels"], {"image": image[None]})[0][0] for image in images]
            same, right = (np.mean(np.equal(labels, those)) for those in (ours, truths))
            yield precision, out.stat().st_size, float(same), float(right)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", default="sfp", help="preset (default: sfp)")
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes (default: 200)")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="default: all"
    )
    args = parser.parse_args()
    rows = agreement(sfp.load("mini", args.method), args.scenes, args.precisions)
    cells = [
        [f"`{name}`", f"{size / 2**20:.1f} MiB", f"{same:.2%}", f"{right:.2%}"]
        for name, size, same, right in rows
    ]
    print(markdown(HEADER, cells), end="")


if __name__ == "__main__":
    main()
