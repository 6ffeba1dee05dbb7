"""`sfp export`: a method and its words as one file that runs without this package."""

from __future__ import annotations

import argparse
from pathlib import Path

from sfp.cli import options

TEXT = """\
Writes a method as an ONNX model or a torch.export program: windows in, labels out.

Examples:
    sfp export sfp.onnx --classes "cat|kitten, sofa, wall"
    sfp export sfp.pt2 --weights mini --classes mini --method sclip
    sfp export small.onnx --classes voc20 --precision int8
    sfp export any.onnx --classes "cat, dog" --words-as-input

Beside the model it writes the text features (.safetensors) and a description of labels and inputs
(.json). docs/deploy.md shows how to run it with onnxruntime and numpy alone. Methods that branch on
values or need other models cannot be exported. ONNX needs: pip install 'sfp[export]'.

Exit codes: 0 done; 2 wrong command line, or a method that cannot be exported; 3 weights are
missing.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = options.add_command(
        commands, "export", run, help="write a method as an ONNX or torch.export file", text=TEXT
    )
    parser.add_argument("out", type=Path, help="the file: NAME.onnx or NAME.pt2")
    parser.add_argument("--classes", required=True, help=options.CLASSES)
    parser.add_argument(
        "--method",
        default="sfp",
        help="preset, with knobs as in sfp:purify=False,pm=lof (default: sfp)",
    )
    parser.add_argument(
        "--weights", default="ViT-B/16", help=f"{options.WEIGHTS} (default: ViT-B/16)"
    )
    parser.add_argument(
        "--side", type=options.positive, help="pixels of a window's side (default: 224)"
    )
    parser.add_argument(
        "--threshold",
        type=options.probability,
        default=0.0,
        help="pixels with a lower probability get label 0 (default: 0)",
    )
    parser.add_argument(
        "--words-as-input",
        action="store_true",
        help="make the text features an input, so that one file works with any words",
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        help="fp32, fp16 (for GPUs) or int8 (ONNX: 8-bit matrix products) (default: fp32)",
    )
    options.add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Exports."""
    from sfp.engine import Engine
    from sfp.export import check_format, check_method, export
    from sfp.method import build_method
    from sfp.vocabulary import as_vocabulary, check_threshold

    check_format(args.out, args.precision)  # raises before weights are loaded
    method = build_method(options.parse_method(args.method))
    check_method(method)
    vocabulary = as_vocabulary(options.parse_classes(args.classes))
    if not args.words_as_input:
        check_threshold(vocabulary, args.threshold)
        options.note_words(args.weights, vocabulary)
    files = export(
        Engine(args.weights, prob_thd=args.threshold),
        method,
        vocabulary,
        args.out,
        side=args.side,
        words_as_input=args.words_as_input,
        precision=args.precision,
    )
    for file in files:
        size = file.stat().st_size
        print(f"{file}: {size / 2**20:.1f} MiB" if size >= 2**20 else f"{file}: {size:,} bytes")
    return 0
