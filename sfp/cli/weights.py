"""`sfp weights`: lists published weights, downloads them and checks files."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from sfp.clip.checkpoints.published import (
    ARCHITECTURES,
    OPENAI_MEAN,
    PUBLISHED,
    Published,
    on_disk,
    split_place,
)

if TYPE_CHECKING:
    from sfp.clip.tokenizers import Tokenizer

TEXT = """\
Lists and downloads published weights, and checks weights in files, yours included.

Examples:
    sfp weights list
    sfp weights get ViT-B/16 ViT-B-16:laion2b_s34b_b88k
    sfp weights check ViT-B/16
    sfp weights check runs/epoch_32.pt@gelu
    sfp weights check google/siglip2-base-patch16-256
"""
COLUMNS = (
    "name",
    "patch",
    "image",
    "width x blocks",
    "embedding",
    "activation",
    "mean, std",
    "licence",
    "gated",
    "tokenizer",
    "from",
)
LISTED = tuple(name for name in COLUMNS if name not in ("activation", "tokenizer"))  # in terminals


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its three actions."""
    parser = commands.add_parser(
        "weights",
        help="list, download and check weights",
        description=TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="{list,get,check}", required=True)
    listing = actions.add_parser(
        "list", help="list published weights, and which of them are on this machine"
    )
    listing.add_argument(
        "--markdown", action="store_true", help="print the table of docs/weights.md"
    )
    listing.set_defaults(run=list_weights)
    get = actions.add_parser("get", help="download weights; an interrupted download is resumed")
    get.add_argument("names", nargs="+", metavar="NAME", help="as `sfp weights list` prints them")
    get.set_defaults(run=get_weights)
    check = actions.add_parser(
        "check", help="read a file and describe it; exit code 3 if it is damaged or unknown"
    )
    check.add_argument("source", metavar="FILE|NAME", help="a file, or the name of weights on disk")
    check.set_defaults(run=check_weights)


def families() -> dict[str, list[list[str]]]:
    """The rows of the table of published weights, by family."""
    result: dict[str, list[list[str]]] = {}
    for name, row in PUBLISHED.items():
        assert row.architecture is not None
        sizes = ARCHITECTURES[row.architecture]
        result.setdefault(row.family, []).append(
            [
                name,
                str(sizes.patch),
                str(sizes.image_size),
                f"{sizes.width} x {sizes.layers}",
                str(sizes.embed_dim),
                row.activation or "by layout",
                "OpenAI's" if row.mean == OPENAI_MEAN else f"{row.mean[0]:g}",
                row.licence or "see its page",
                {None: "not known", False: "no", True: "yes"}[row.gated],
                _texts(row),
                _sources(row),
            ]
        )
    return result


def _texts(row: Published) -> str:
    if row.texts:
        return f"text tower of {row.texts}"
    return "CLIP's" if row.tokenizer is None else row.tokenizer


def _sources(row: Published) -> str:
    if row.shipped:
        return "this package"
    hub = f"huggingface.co/{split_place(str(row.repo))[0]}"
    return f"openaipublic.azureedge.net, {hub}" if row.sha256 else hub


def weights_markdown() -> str:
    """The generated part of docs/weights.md."""
    from sfp.tables import markdown

    tables = (
        f"### {family}\n\n" + markdown(COLUMNS, [[f"`{row[0]}`", *row[1:]] for row in rows])
        for family, rows in families().items()
    )
    return "\n".join(tables)


def list_weights(args: argparse.Namespace) -> int:
    """Prints the table."""
    if args.markdown:
        print(weights_markdown(), end="")
        return 0
    from rich.table import Table
    from rich.text import Text

    from sfp.terminal import console

    table = Table(
        caption="`sfp weights get NAME` downloads one; --weights also takes Hub repositories"
    )
    columns = [COLUMNS.index(name) for name in LISTED]
    for name in (*LISTED, "on disk"):
        table.add_column(name, overflow="fold", no_wrap=name in ("name", "on disk"))
    for family, rows in families().items():
        table.add_section()
        table.add_row(Text(family, style="bold"))
        for row in rows:
            path = on_disk(row[0])
            size = _size(path.stat().st_size) if path else "-"
            table.add_row(*(row[i] for i in columns), size)
    console(200).print(table)
    return 0


def get_weights(args: argparse.Namespace) -> int:
    """Downloads missing weights and verifies all that were named."""
    from sfp.clip.checkpoints.loading import complete, known_names, locate, verify

    for name in args.names:
        if name not in PUBLISHED:
            raise ValueError(f"no published weights {name!r}{known_names(name)}")
    shared = (PUBLISHED[name].texts for name in args.names)
    for name in dict.fromkeys([*args.names, *filter(None, shared)]):
        path = locate(name)
        complete(PUBLISHED[name])
        sha256, verified = verify(name, path)
        state = "verified" if verified else "no published hash to compare with"
        print(f"{name}: {path} ({_size(path.stat().st_size)}), SHA-256 {sha256}, {state}")
    return 0


def check_weights(args: argparse.Namespace) -> int:
    """Reads weights completely and describes them; raises if they are damaged."""
    from rich.table import Table
    from rich.text import Text

    from sfp.clip.checkpoints.loading import (
        WeightsError,
        open_weights,
        split_activation,
    )
    from sfp.terminal import console

    name = str(split_activation(args.source)[0])
    for part in (name, PUBLISHED[name].texts) if name in PUBLISHED else ():
        if part and on_disk(part) is None:
            raise WeightsError(f"{part} is not on this machine: run `sfp weights get {part}` first")
    checkpoint = open_weights(args.source)
    clip = checkpoint.build()
    assert checkpoint.path is not None
    image, text, known = checkpoint.image, checkpoint.text, checkpoint.facts
    types = Counter(str(x.dtype).removeprefix("torch.") for x in checkpoint.state.values())
    table = Table(show_header=False)
    for key, value in {
        "file": f"{checkpoint.path} ({_size(checkpoint.path.stat().st_size)})",
        "SHA-256": f"{checkpoint.sha256}, "
        + ("as published" if checkpoint.verified else "no published hash to compare with"),
        "layout": checkpoint.layout,
        "stored as": ", ".join(f"{n} tensors of {kind}" for kind, n in types.most_common()),
        "image tower": f"patch {image.patch}, {image.image_size} pixels, width {image.width}, "
        f"{image.layers} blocks, {image.width // image.head_width} heads",
        "text tower": f"width {text.width}, {text.layers} blocks, "
        f"{text.width // text.head_width} heads, context {text.context}, vocabulary {text.vocab}",
        **({"its weights": checkpoint.texts} if checkpoint.texts else {}),
        "tokenizer": _tokenizer(checkpoint.tokenizer),
        "embedding": str(clip.embed_dim),
        "activation": f"{known.activation} ({known.because}"
        + ("" if known.certain else "; a guess: append @gelu or @quick_gelu to settle it")
        + ")",
        "normalisation": f"mean {_numbers(known.mean)}, std {_numbers(known.std)}",
        "numbers": f"{sum(p.numel() for p in clip.parameters()):,}, all finite",
    }.items():
        table.add_row(key, Text(value))
    console(200).print(table)
    return 0


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    from sfp.clip.tokenizers import FileTokenizer

    if tokenizer is None:
        return "CLIP's byte pairs"
    if isinstance(tokenizer, FileTokenizer):
        return str(tokenizer.path)
    return "not found: texts cannot be encoded"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{x:g}" for x in values)
