"""The page: its layout, and which input leads to which picture."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # also for who imports this module alone
import gradio as gr
from gradio.utils import get_upload_folder
from matplotlib.ticker import PercentFormatter

from sfp.demo.pictures import (
    SHOWN,
    caption,
    framed,
    heat,
    labelled,
    legend,
    marked,
    patch_at,
    status,
)
from sfp.demo.session import OWN, Desk, Timed, usable_methods
from sfp.demo.words import parse_words, unknown_to_mini
from sfp.mini import scene
from sfp.registry import list_ops

SCENES = {  # seed: words for it, one of them without a place in the picture
    900_047: "house, mushroom, cat|kitten, sand, boat",
    900_060: "box|crate, cat, water, night, ball",
    900_032: "ball, house, sand, brick wall, car",
    900_031: "ball, box|crate, car, sand, night, fish",
    900_005: "ball, tree, sun, car, sky, boat",
}
TABS = ("segmentation", "outliers", "attention", "compare")
MAX_FILE = "100mb"
CSS = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")  # of the system: none is fetched
MONO = ("ui-monospace", "Consolas", "monospace")
START = "Drop a photo, or pick a scene below it, then type words and press Segment."
OURS = (ValueError, OSError, FloatingPointError)  # errors whose message tells what to do

Values = dict[Any, Any]  # of components


def launch(page: gr.Blocks, *, host: str, port: int | None, share: bool, browser: bool) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        OSError: if the port is taken.
    """
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=browser,
        prevent_thread_lock=True,
        **look(),
    )
    print(f"sfp demo: {public or local} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def look() -> dict[str, Any]:
    """What makes the page look as it does, and keeps it on this machine: arguments of `launch`."""
    theme = gr.themes.Base(
        primary_hue="blue", font=FONTS, font_mono=MONO, spacing_size="sm", text_size="sm"
    )
    return dict(
        theme=theme,
        css=CSS,
        footer_links=[],
        max_file_size=MAX_FILE,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        quiet=True,
    )


def build(desk: Desk, *, weights: str, method: str) -> gr.Blocks:
    """The page around a model.

    Args:
        desk: has it.
        weights: their name, for the title line.
        method: that is chosen at first.
    """
    methods = usable_methods()
    other = "clip" if method != "clip" else "sfp"
    middle = desk.blocks - 2  # the last layer that has an output
    with gr.Blocks(title="sfp", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            "<header><h1>sfp</h1><span>Training-free open-vocabulary segmentation with frozen CLIP"
            f"</span><code>{weights}</code></header>"
        )
        tab = gr.State(TABS[0])
        patch = gr.State(None)
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300, elem_id="inputs"):
                photo = gr.Image(
                    type="filepath",
                    label="Photo",
                    sources=["upload", "clipboard"],
                    format="png",
                    height=185,
                    buttons=[],
                    elem_id="photo",
                    alt_text="The photo to segment",
                )
                scenes = gr.Dataset(
                    label="Scenes of the mini world",
                    components=["image"],
                    samples=[[scene(seed)[0]] for seed in SCENES],
                    type="index",
                    layout="gallery",
                    elem_id="scenes",
                )
                words = gr.Textbox(
                    label="Words",
                    info='separated by commas, synonyms by "|"',
                    placeholder="cat|kitten, sky, grass",
                    max_lines=4,
                    elem_id="words",
                )
                rest = gr.Textbox(
                    label="Everything else (optional)",
                    placeholder="words for the background: wall, floor",
                    elem_id="rest",
                )
                chosen = gr.Dropdown(methods, value=method, label="Method", elem_id="method")
                button = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=8, min_width=500, elem_id="results"):
                told = gr.HTML(status(START), elem_id="told")
                with gr.Tabs(selected=TABS[0]) as tabs:
                    with gr.Tab("Segmentation", id=TABS[0]) as tab_segmentation:
                        segmented = _picture("segmented", 480)
                        classes = gr.HTML(elem_id="legend")
                    with gr.Tab("Outliers", id=TABS[1]) as tab_outliers:
                        with gr.Row():
                            outlier_layer = gr.Slider(
                                0, middle, middle, step=1, label="Layer", elem_id="outlier-layer"
                            )
                            detector = gr.Dropdown(
                                [OWN, *list_ops("detector")],
                                value=OWN,
                                label="Detector",
                                elem_id="detector",
                            )
                        with gr.Row():
                            found = _picture("found", 420)
                            norms = _picture("norms", 420)
                        found_caption = gr.HTML(elem_id="found-caption")
                    with gr.Tab("Attention", id=TABS[2]) as tab_attention:
                        attention_layer = gr.Slider(
                            0,
                            desk.blocks - 1,
                            desk.blocks - 1,
                            step=1,
                            label="Layer",
                            elem_id="attention-layer",
                        )
                        with gr.Row():
                            clicked = _picture("clicked", 420)
                            attention = _picture("attention", 420)
                        attention_caption = gr.HTML(elem_id="attention-caption")
                    with gr.Tab("Compare", id=TABS[3]) as tab_compare:
                        second = gr.Dropdown(
                            methods, value=other, label="Compare with", elem_id="second"
                        )
                        with gr.Row():
                            left = _picture("left", 400)
                            right = _picture("right", 400)
                        both = gr.HTML(elem_id="both")

        shown = {
            TABS[0]: (segmented, classes),
            TABS[1]: (found, norms, found_caption),
            TABS[2]: (clicked, attention, attention_caption),
            TABS[3]: (left, right, both),
        }
        everything = [x for several in shown.values() for x in several]

        # -- what each tab shows; `values` has all inputs by component -------------------------

        def segment(values: Values, method: str) -> Timed:
            background = parse_words(values[rest]) if (values[rest] or "").strip() else []
            return desk.segment(
                values[photo],
                parse_words(values[words]),
                [word for synonyms in background for word in synonyms] or None,
                method,
            )

        def draw_segmentation(values: Values) -> Values:
            timed = segment(values, values[chosen])
            alt = f"Segmentation by {values[chosen]}: {timed.result.summary()}"
            return {
                segmented: gr.Image(labelled(timed.result), alt_text=alt),
                classes: legend([timed.result]),
                told: status(f"{values[chosen]}: {timed}{_hint(desk, values[words])}"),
            }

        def draw_outliers(values: Values) -> Values:
            layer = int(values[outlier_layer])
            seen = desk.seen(values[photo])
            its = desk.outliers(values[photo], values[chosen], values[detector], layer)
            count = f"{int(its.mask.sum())} of {its.mask.size} patches"
            who = "which the method replaces" if its.replaced else "which stay as they are"
            ratio = its.norms.max() / np.median(its.norms)
            return {
                found: gr.Image(
                    marked(seen, its.mask, desk.patch),
                    alt_text=f"Outliers of layer {layer} over the photo: {count}",
                ),
                norms: gr.Image(
                    heat(seen, its.norms, desk.patch, "L2 norm of patch tokens", cmap="cividis"),
                    alt_text=f"Norms of the patch tokens of layer {layer}",
                ),
                found_caption: caption(
                    f"Left: {its.detector} finds {count} in layer {layer}, {who}. Right: norms of "
                    f"plain CLIP's tokens; the largest is {ratio:.1f} x the median."
                ),
                told: status(f"{values[chosen]}: outliers of layer {layer}"),
            }

        def draw_attention(values: Values) -> Values:
            layer = int(values[attention_layer])
            seen = desk.seen(values[photo])
            grid = [length // desk.patch for length in seen.shape[:2]]
            cell = values[patch] or (grid[0] // 2, grid[1] // 2)
            share, to_class = desk.attention(values[photo], values[chosen], layer, cell)
            place = f"row {cell[0]}, column {cell[1]}"
            return {
                clicked: gr.Image(
                    framed(seen, cell, desk.patch),
                    alt_text=f"The photo; the patch at {place} is framed. Click another one.",
                ),
                attention: gr.Image(
                    heat(
                        seen,
                        share,
                        desk.patch,
                        "share of attention",
                        chosen=cell,
                        ticks=PercentFormatter(1),
                    ),
                    alt_text=f"Where the patch at {place} looks in layer {layer}",
                ),
                attention_caption: caption(
                    f"The patch at {place} in layer {layer}, heads averaged: {share[cell]:.1%} of its "
                    f"attention goes to itself, {to_class:.1%} to the class token. Click another "
                    "patch in the left picture."
                ),
                told: status(f"{values[chosen]}: attention of the patch at {place}"),
            }

        def draw_compare(values: Values) -> Values:
            pair = [values[chosen], values[second]]
            first, then = (segment(values, name) for name in pair)
            same = float((first.result.labels == then.result.labels).mean())
            return {
                **{
                    place: gr.Image(
                        labelled(timed.result),
                        alt_text=f"Segmentation by {name}: {timed.result.summary()}",
                    )
                    for place, timed, name in zip((left, right), (first, then), pair, strict=True)
                },
                both: caption(f"Left: {pair[0]}, right: {pair[1]}; same class in {same:.0%}.")
                + legend([first.result, then.result]),
                told: status(f"{pair[0]}: {first}; {pair[1]}: {then}{_hint(desk, values[words])}"),
            }

        drawers = dict(
            zip(TABS, (draw_segmentation, draw_outliers, draw_attention, draw_compare), strict=True)
        )

        def draw(values: Values, *, asked: bool = False) -> Values:
            """The pictures of the tab that is open; words may be missing unless they are asked for."""
            name = values[tab]
            if not values[photo]:
                if asked:
                    raise ValueError("first drop a photo, or pick a scene")
                return {told: gr.skip()}  # which may say why
            if name in (TABS[0], TABS[3]) and not asked and not (values[words] or "").strip():
                return {told: status("Now type words and press Segment.")}
            return drawers[name](values)

        # -- events ----------------------------------------------------------------------------

        def on(listen: Callable[..., Any], fn: Callable[[Values], Values]) -> None:
            """Runs `fn` with all inputs; an error of ours becomes a line, and old pictures go."""

            @functools.wraps(fn)
            def told_of(values: Values) -> Values:
                try:
                    return fn(values)
                except OURS as error:
                    blank = dict.fromkeys(shown[values[tab]])
                    return blank | {told: status(str(error), error=True)}

            listen(
                told_of,
                inputs=set(inputs),
                outputs=outputs,
                show_progress="minimal",
                show_progress_on=told,
                api_visibility="private",
                concurrency_id="model",
                trigger_mode="always_last",  # a slider on its way asks often
            )

        inputs = [photo, words, rest, chosen, tab, patch, outlier_layer, detector]
        inputs += [attention_layer, second]
        outputs = [*everything, told, photo, words, tab, patch, tabs]

        def take(payload: dict[str, Any]) -> Values:
            """A new photo: what cannot be read goes, what can comes back as the server read it."""
            blank = dict.fromkeys([*everything, patch])
            try:
                return blank | {photo: desk.photo(_uploaded(payload))}
            except OURS as error:
                return blank | {photo: None, told: status(str(error), error=True)}

        def clear(_: Values) -> Values:
            return dict.fromkeys(everything) | {patch: None, told: status(START)}

        def ask(values: Values) -> Values:
            """The button: from a tab without words to the one that has them."""
            if values[tab] in (TABS[1], TABS[2]):
                values = values | {tab: TABS[0]}
                return {tab: TABS[0], tabs: gr.Tabs(selected=TABS[0]), **draw(values, asked=True)}
            return draw(values, asked=True)

        def pick(number: int) -> tuple[np.ndarray, str, None]:
            seed, its_words = list(SCENES.items())[number]
            return scene(seed)[0], its_words, None

        def click(path: str | None, event: gr.SelectData) -> tuple[int, int] | None:
            if not path:
                return None
            seen = desk.seen(path).shape[:2]
            size = [SHOWN * length / max(seen) for length in seen]
            return patch_at(event.index, size, seen, desk.patch)

        quietly: Values = dict(api_visibility="private", show_progress="hidden")
        # not preprocessed: gradio's Pillow knows fewer files, and does not name what is wrong
        taken = photo.upload(
            take, photo, [*everything, photo, patch, told], preprocess=False, **quietly
        )
        on(taken.then, draw)
        on(photo.clear, clear)
        asking = [button.click, words.submit, rest.submit]
        changing = [chosen.input, outlier_layer.input, detector.input]
        changing += [attention_layer.input, second.input]
        on(functools.partial(gr.on, asking), ask)
        on(functools.partial(gr.on, changing), draw)
        every_tab = (tab_segmentation, tab_outliers, tab_attention, tab_compare)
        for name, each in zip(TABS, every_tab, strict=True):
            on(each.select(lambda name=name: name, outputs=tab, **quietly).then, draw)
        on(scenes.click(pick, scenes, [photo, words, patch], **quietly).then, draw)
        on(clicked.select(click, photo, patch, **quietly).then, draw)
    return page


def _uploaded(payload: dict[str, Any]) -> str:
    """The path of an upload.

    Raises:
        ValueError: if it is another file of this machine.
    """
    path = Path(payload["path"]).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("this is no uploaded file")
    return str(path)


def _picture(name: str, height: int) -> gr.Image:
    return gr.Image(
        show_label=False,
        interactive=False,
        format="png",
        height=height,
        buttons=["download", "fullscreen"],
        elem_id=name,
        elem_classes="picture",
        container=False,
    )


def _hint(desk: Desk, words: str) -> str:
    """What the mini CLIP cannot know."""
    if not desk.mini:
        return ""
    asked = [word for synonyms in parse_words(words) for word in synonyms]
    unknown = unknown_to_mini(asked)
    return f"; the mini CLIP does not know {', '.join(unknown)}" if unknown else ""
