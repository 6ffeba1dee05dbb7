"""The page: its inputs, its tabs and its event handlers."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder

from sfp.demo.pictures import status
from sfp.demo.session import Session
from sfp.demo.tabs import Attention, Compare, Inputs, Outliers, Segmentation, Tab, Values
from sfp.mini import scene, vocabulary_note

SCENES = {  # seed: words, one of which is not in the picture
    900_047: "house, mushroom, cat|kitten, sand, boat",
    900_060: "box|crate, cat, water, night, ball",
    900_032: "ball, house, sand, brick wall, car",
    900_031: "ball, box|crate, car, sand, night, fish",
    900_107: "sun, ball, sky, grass, tree",
}
MAX_FILE = "100mb"
CSS = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")  # system fonts: no download
MONO = ("ui-monospace", "Consolas", "monospace")
START = "Drop a photo, or pick a scene below it, then type words and press Segment."
EXPECTED = (ValueError, OSError, FloatingPointError)  # errors whose message says what to do


class Page:
    """The demo page for a model.

    Args:
        session: holds the model.
        method: the method selected at first.

    Attributes:
        blocks: the page, for gradio.
    """

    def __init__(self, session: Session, method: str) -> None:
        self.session = session
        # otherwise gradio reports the launch to its developers
        with gr.Blocks(
            title="sfp", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.blocks:
            gr.HTML(_header(session.weights))
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=300, elem_id="inputs"):
                    self._add_inputs(method)
                with gr.Column(scale=8, min_width=500, elem_id="results"):
                    self._add_tabs()
            self._add_events()

    def serve(
        self,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        share: bool = False,
        browser: bool = False,
    ) -> str:
        """Serves the page in background threads.

        Args:
            host, port: where to listen; None takes the first free port from 7860.
            share: whether to get a public address through gradio's servers.
            browser: whether to open a browser.

        Returns:
            The address.

        Raises:
            OSError: if the host is no address of this machine, or the port is taken.
        """
        try:  # gradio would try all its ports, with a message for each
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            socket.create_server((host, 0), family=family).close()
        except OSError as error:
            raise OSError(f"cannot listen at host {host}: {error.strerror}") from error
        theme = gr.themes.Base(
            primary_hue="blue", font=FONTS, font_mono=MONO, spacing_size="sm", text_size="sm"
        )
        _, local, public = self.blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=browser,
            prevent_thread_lock=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            max_file_size=MAX_FILE,
            enable_monitoring=False,
            pwa=False,
            ssr_mode=False,
            quiet=True,
        )
        return public or local

    # -- layout ----------------------------------------------------------------------------------

    def _add_inputs(self, method: str) -> None:
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
        self.scenes = gr.Dataset(
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
        background = gr.Textbox(
            label="Everything else (optional)",
            placeholder="words for the background: wall, floor",
            elem_id="rest",
        )
        chosen = gr.Dropdown(self.session.methods, value=method, label="Method", elem_id="method")
        self.button = gr.Button("Segment", variant="primary", elem_id="segment")
        self.inputs = Inputs(photo, words, background, chosen)

    def _add_tabs(self) -> None:
        self.status = gr.HTML(status(START), elem_id="told")
        with gr.Tabs(selected=Segmentation.title) as self.bar:
            segmentation = Segmentation(self.session, self.inputs)
            outliers = Outliers(self.session, self.inputs)
            self.attention = Attention(self.session, self.inputs)
            compare = Compare(self.session, self.inputs)
        self.tabs: dict[str, Tab] = {
            tab.title: tab for tab in (segmentation, outliers, self.attention, compare)
        }
        self.open = gr.State(segmentation.title)

    # -- events ----------------------------------------------------------------------------------

    def _add_events(self) -> None:
        photo, words, cell = self.inputs.photo, self.inputs.words, self.attention.cell
        quiet: Values = dict(api_visibility="private", show_progress="hidden")
        # not preprocessed: gradio reads fewer kinds of files and gives no useful errors
        taken = photo.upload(
            self._take,
            photo,
            [*self._outputs(), photo, cell, self.status],
            preprocess=False,
            **quiet,
        )
        self._on(taken.then, self._draw)
        self._on(photo.clear, self._clear)
        submitted = [self.button.click, words.submit, self.inputs.background.submit]
        self._on(functools.partial(gr.on, submitted), self._submit)
        controls = [control for tab in self.tabs.values() for control in tab.controls]
        changed = [control.input for control in (self.inputs.method, *controls)]
        self._on(functools.partial(gr.on, changed), self._draw)
        for title, tab in self.tabs.items():
            opened = tab.tab.select(lambda title=title: title, outputs=self.open, **quiet)
            self._on(opened.then, self._draw)
        picked = self.scenes.click(self._pick, self.scenes, [photo, words, cell], **quiet)
        self._on(picked.then, self._draw)
        clicked = self.attention.clicked.select(self.attention.choose, photo, cell, **quiet)
        self._on(clicked.then, self._draw)

    def _outputs(self) -> list[Any]:
        return [output for tab in self.tabs.values() for output in tab.outputs]

    def _on(self, listen: Callable[..., Any], fn: Callable[[Values], Values]) -> None:
        """Runs `fn` with all inputs; an error becomes the status line and empties the open tab."""
        inputs = self.inputs
        controls = [control for tab in self.tabs.values() for control in tab.controls]

        @functools.wraps(fn)
        def run(values: Values) -> Values:
            try:
                return fn(values)
            except EXPECTED as error:
                blank = dict.fromkeys(self.tabs[values[self.open]].outputs)
                return blank | {self.status: status(str(error), error=True)}

        listen(
            run,
            inputs={
                inputs.photo,
                inputs.words,
                inputs.background,
                inputs.method,
                self.open,
                self.attention.cell,
                *controls,
            },
            outputs=[
                *self._outputs(),
                self.status,
                inputs.photo,
                inputs.words,
                self.open,
                self.attention.cell,
                self.bar,
            ],
            show_progress="minimal",
            show_progress_on=self.status,
            api_visibility="private",
            concurrency_id="model",
            trigger_mode="always_last",  # dragging a slider triggers many events
        )

    def _draw(self, values: Values, *, submitted: bool = False) -> Values:
        """Draws the open tab; missing inputs are an error only once the button is pressed."""
        tab = self.tabs[values[self.open]]
        if not values[self.inputs.photo]:
            if submitted:
                raise ValueError("first drop a photo, or pick a scene")
            return {self.status: gr.skip()}  # it may say why there is no photo
        if tab.needs_words and not submitted and not (values[self.inputs.words] or "").strip():
            return {self.status: status("Now type words and press Segment.")}
        drawing = tab.draw(values)
        return drawing.values | {self.status: status(drawing.status, warning=drawing.warning)}

    def _submit(self, values: Values) -> Values:
        """Handles the button; from a tab that does not use words it goes to the segmentation."""
        if self.tabs[values[self.open]].needs_words:
            return self._draw(values, submitted=True)
        title = Segmentation.title
        drawn = self._draw(values | {self.open: title}, submitted=True)
        return {self.open: title, self.bar: gr.Tabs(selected=title), **drawn}

    def _take(self, upload: dict[str, Any]) -> Values:
        """Handles a new photo: removes it if unreadable, else shows it as the server read it."""
        photo = self.inputs.photo
        blank = dict.fromkeys([*self._outputs(), self.attention.cell])
        try:
            return blank | {photo: self.session.photo(_uploaded(upload))}
        except EXPECTED as error:
            return blank | {photo: None, self.status: status(str(error), error=True)}

    def _clear(self, _: Values) -> Values:
        blank = dict.fromkeys([*self._outputs(), self.attention.cell])
        return blank | {self.status: status(START)}

    def _pick(self, number: int) -> tuple[np.ndarray, str, None]:
        """The picture and words of a scene, with no patch selected."""
        seed, words = list(SCENES.items())[number]
        return scene(seed)[0], words, None


def _header(weights: str) -> str:
    note = re.sub("`(.+?)`", r"<code>\1</code>", escape(vocabulary_note(weights)))
    return (
        "<header><h1>sfp</h1><span>Training-free open-vocabulary segmentation with frozen CLIP"
        f"</span><code>{escape(weights)}</code></header>"
        + (f'<p class="note">{note[0].upper()}{note[1:]}.</p>' if note else "")
    )


def _uploaded(upload: dict[str, Any]) -> str:
    """The path of an upload.

    Raises:
        ValueError: if it is not in gradio's upload folder.
    """
    path = Path(upload["path"]).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()):
        raise ValueError("this is not an uploaded file")
    return str(path)
