"""`sfp weights`: which weights there are, getting them, and looking whether a file is sound."""

from __future__ import annotations

import argparse
from collections import Counter

from sfp.clip.checkpoints.published import ARCHITECTURES, OPENAI_MEAN, PUBLISHED, Published, on_disk

TEXT = """\
Published weights by name, and files of one's own.

Examples:
    sfp weights list
    sfp weights get ViT-B/16 ViT-B-16:laion2b_s34b_b88k
    sfp weights check ViT-B/16
    sfp weights check runs/epoch_32.pt@gelu
"""
COLUMNS = (
    "name",
    "patch",
    "image",
    "width x blocks",
    "embedding",
    "activation",
    "mean, std",
    "from",
)


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
        "list", help="published weights, and which of them are on this machine"
    )
    listing.add_argument(
        "--markdown", action="store_true", help="print the table of docs/weights.md"
    )
    listing.set_defaults(run=list_weights)
    get = actions.add_parser(
        "get", help="download weights; what was interrupted is continued by the next get"
    )
    get.add_argument("names", nargs="+", metavar="NAME", help="as `sfp weights list` prints them")
    get.set_defaults(run=get_weights)
    check = actions.add_parser(
        "check", help="read a file and say what it is; exit code 3 if it is damaged or unknown"
    )
    check.add_argument("source", metavar="FILE|NAME", help="a file, or the name of weights on disk")
    check.set_defaults(run=check_weights)


def rows() -> list[list[str]]:
    """The table of published weights, in words."""
    result = []
    for name, row in PUBLISHED.items():
        assert row.architecture is not None
        sizes = ARCHITECTURES[row.architecture]
        result.append(
            [
                name,
                str(sizes.patch),
                str(sizes.image_size),
                f"{sizes.width} x {sizes.layers}",
                str(sizes.embed_dim),
                row.activation,
                "OpenAI's" if row.mean == OPENAI_MEAN else f"{row.mean[0]:g}",
                ("openaipublic.azureedge.net, " if row.sha256 else "")
                + f"huggingface.co/{row.repo}",
            ]
        )
    return result


def _sources(row: Published) -> str:
    if row.shipped:
        return "this package"
    hub = f"huggingface.co/{row.repo}"
    return f"openaipublic.azureedge.net, {hub}" if row.sha256 else hub


def weights_markdown() -> str:
    """The generated part of docs/weights.md."""
    from sfp.tables import markdown

    return markdown(COLUMNS, [[f"`{row[0]}`", *row[1:]] for row in rows()])


def list_weights(args: argparse.Namespace) -> int:
    """Prints the table."""
    if args.markdown:
        print(weights_markdown(), end="")
        return 0
    from rich.table import Table

    from sfp.cli.terminal import console

    table = Table(caption="sfp weights get NAME downloads")
    for column in (*COLUMNS, "on disk"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "on disk"))
    for row in rows():
        path = on_disk(row[0])
        table.add_row(*row, _size(path.stat().st_size) if path else "-")
    console(200).print(table)
    return 0


def get_weights(args: argparse.Namespace) -> int:
    """Downloads what is not on disk yet, and verifies all of it."""
    from sfp.clip.checkpoints.loading import known_names, locate, verify

    for name in args.names:
        if name not in PUBLISHED:
            raise ValueError(f"no published weights {name!r}{known_names(name)}")
    for name in args.names:
        path = locate(name)
        sha256, verified = verify(name, path)
        state = "verified" if verified else "no published hash to compare with"
        print(f"{name}: {path} ({_size(path.stat().st_size)}), SHA-256 {sha256}, {state}")
    return 0


def check_weights(args: argparse.Namespace) -> int:
    """Reads weights to the last number and prints what they are; damage is raised."""
    from rich.table import Table
    from rich.text import Text

    from sfp.cli.terminal import console
    from sfp.clip.checkpoints.loading import (
        WeightsError,
        open_weights,
        split_activation,
    )

    name = str(split_activation(args.source)[0])
    if name in PUBLISHED and on_disk(name) is None:
        raise WeightsError(f"{name} is not on this machine: sfp weights get {name} downloads it")
    checkpoint = open_weights(args.source)
    clip = checkpoint.build()
    assert checkpoint.path is not None
    vit, known = clip.visual, checkpoint.facts
    types = Counter(str(x.dtype).removeprefix("torch.") for x in checkpoint.state.values())
    heads, text_heads = (
        tower.resblocks[0].attn.num_heads  # type: ignore[union-attr]
        for tower in (vit.transformer, clip.transformer)
    )
    table = Table(show_header=False)
    for key, value in {
        "file": f"{checkpoint.path} ({_size(checkpoint.path.stat().st_size)})",
        "SHA-256": f"{checkpoint.sha256}, "
        + ("as published" if checkpoint.verified else "no published hash to compare with"),
        "layout": checkpoint.layout,
        "stored as": ", ".join(f"{n} tensors of {kind}" for kind, n in types.most_common()),
        "image tower": f"patch {vit.patch}, {vit.native_grid[0] * vit.patch} pixels, width "
        f"{vit.conv1.out_channels}, {len(vit.blocks)} blocks, {heads} heads",
        "text tower": f"width {clip.ln_final.weight.shape[0]}, {len(clip.transformer.resblocks)} "
        f"blocks, {text_heads} heads, context {clip.context}, "
        f"vocabulary {clip.token_embedding.num_embeddings}",
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


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{x:g}" for x in values)
