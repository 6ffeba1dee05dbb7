"""`sfp demo`: a page in the browser to try methods on pictures."""

from __future__ import annotations

import argparse

from sfp.cli.options import WEIGHTS, add_command, add_guide, add_import, parse_guide

TEXT = """\
Opens a page in the browser: drop a photo or pick a scene of the mini world, type words, and see the
segmentation, the outliers of each layer, where a patch looks, and two methods side by side. Nothing
leaves this machine, unless --share asks for it. Needs: pip install 'sfp[demo]'

Without --weights it takes ViT-B/16 if its file is there already, else the mini CLIP that ships with
the package and knows the words of its own drawn scenes only.

Examples:
    sfp demo
    sfp demo --weights ViT-B/16 --method sclip
    sfp demo --guide sam3=sam3:model=facebook/sam3        # offers the methods that need it too
    sfp demo --host 0.0.0.0 --port 8080 --no-browser      # for others in the network
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(commands, "demo", run, help="try methods in the browser", text=TEXT)
    parser.add_argument("--weights", help=f"{WEIGHTS}; or mini (default: see above)")
    parser.add_argument("--method", default="sfp", help="preset to begin with (default: sfp)")
    parser.add_argument("--device", default="auto", help="default: a GPU if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument(
        "--share", action="store_true", help="a public address, through gradio's servers"
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
        raise ValueError("--weights none: the page looks into a CLIP; name one, e.g. mini")
    if args.method not in (valid := self_contained_methods(guides)):
        raise ValueError(f"--method {args.method}{suggest(args.method, valid)}")
    model = sfp.load(weights, args.method, device=args.device, guides=guides)
    page = Page(Session(model, weights), args.method)
    address = page.serve(
        host=args.host, port=args.port, share=args.share, browser=not args.no_browser
    )
    print(f"sfp demo: {address} (Ctrl-C ends it)", flush=True)
    page.blocks.block_thread()
    return 0


def default_weights() -> str:
    """ViT-B/16 if no download is needed, else the mini CLIP."""
    from sfp.clip.checkpoints.published import MINI, on_disk

    return "ViT-B/16" if on_disk("ViT-B/16") else MINI
