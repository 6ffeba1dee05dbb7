"""`sfp demo`: a page in the browser to try methods on images."""

from __future__ import annotations

import argparse

from sfp.cli.options import WEIGHTS, add_command, add_guide, add_import, parse_guide

TEXT = """\
Opens a page in the browser: drop a photo or pick a scene of the mini world, type words, and see the
segmentation, the outliers of each layer, the attention of a patch, and two methods side by side.
Nothing leaves this machine unless you use --share. Needs: pip install 'sfp[demo]'

Without --weights it uses ViT-B/16 if that is already on this machine, otherwise the mini CLIP that
ships with the package and only knows the words of its own drawn scenes.

Examples:
    sfp demo
    sfp demo --weights ViT-B/16 --method sclip
    sfp demo --guide sam3=sam3:model=facebook/sam3        # adds the methods that need this guide
    sfp demo --host 0.0.0.0 --port 8080 --no-browser      # for other machines on the network
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(commands, "demo", run, help="try methods in the browser", text=TEXT)
    parser.add_argument("--weights", help=f"{WEIGHTS}; or mini (default: see above)")
    parser.add_argument("--method", default="sfp", help="preset selected at first (default: sfp)")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="create a public address, through gradio's servers"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    add_guide(parser)
    add_import(parser)


def run(args: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C."""
    try:
        from sfp.demo.page import Page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ModuleNotFoundError(
            "the demo needs gradio, which is not installed: pip install 'sfp[demo]'"
        ) from None
    import sfp
    from sfp.clip.checkpoints.published import NONE
    from sfp.demo.session import Session
    from sfp.method import self_contained_methods
    from sfp.registry import suggest

    weights = args.weights or default_weights()
    guides = dict(map(parse_guide, args.guide))
    if weights == NONE:
        raise ValueError("--weights none: the demo shows a CLIP's layers; name one, e.g. mini")
    if args.port is not None and not 0 < args.port < 2**16:
        raise ValueError(f"--port {args.port}: expected 1 to {2**16 - 1}")
    if args.method not in (valid := self_contained_methods(guides)):
        raise ValueError(f"--method {args.method}{suggest(args.method, valid)}")
    model = sfp.load(weights, args.method, device=args.device, guides=guides)
    page = Page(Session(model, weights), args.method)
    address = page.serve(
        host=args.host, port=args.port, share=args.share, browser=not args.no_browser
    )
    print(f"sfp demo: {address} (Ctrl-C to stop)", flush=True)
    page.blocks.block_thread()
    return 0


def default_weights() -> str:
    """ViT-B/16 if no download is needed, else the mini CLIP."""
    from sfp.clip.checkpoints.published import MINI, on_disk

    return "ViT-B/16" if on_disk("ViT-B/16") else MINI
