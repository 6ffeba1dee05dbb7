"""The tabs of the page: each lays out its components and computes their contents.

A new tab is a subclass of `Tab`, listed in `Page`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr
import numpy as np
from matplotlib.ticker import PercentFormatter

from sfp.demo.pictures import SHOWN, caption, framed, heat, labelled, legend, marked, patch_at
from sfp.demo.session import OWN, Session, Timed, typed_vocabulary
from sfp.mini import unknown_words
from sfp.registry import list_ops
from sfp.vocabulary import Vocabulary

Values = dict[Any, Any]  # the value of each component


@dataclass(frozen=True)
class Inputs:
    """The inputs common to all tabs.

    Attributes:
        photo: path of a picture.
        words, background: text as typed.
        method: name of a preset.
    """

    photo: gr.Image
    words: gr.Textbox
    background: gr.Textbox
    method: gr.Dropdown


@dataclass(frozen=True)
class Drawing:
    """The contents of a tab.

    Attributes:
        values: values of its components.
        status: a line that says what was done.
        warning: a line that says why the result may be unreliable; empty if there is no warning.
    """

    values: Values
    status: str
    warning: str = ""


class Tab(ABC):
    """A tab; creating one adds it to the `gr.Tabs` being laid out.

    Attributes:
        title: its title and name.
        needs_words: whether it needs words.
        tab: the gradio component.
        controls: its own inputs; changing one redraws the tab.
        outputs: the components that it updates.
    """

    title: ClassVar[str]
    needs_words: ClassVar[bool] = False

    def __init__(self, session: Session, inputs: Inputs) -> None:
        self.session = session
        self.inputs = inputs
        self.controls: tuple[Any, ...] = ()
        self.outputs: tuple[Any, ...] = ()
        with gr.Tab(self.title, id=self.title) as self.tab:
            self._lay_out()

    @abstractmethod
    def _lay_out(self) -> None:
        """Creates the components; sets `controls` and `outputs`."""

    @abstractmethod
    def draw(self, values: Values) -> Drawing:
        """The contents for the values of all inputs and controls.

        Raises:
            ValueError: if one of them is invalid.
            OSError: if the photo cannot be read.
        """

    def vocabulary(self, values: Values) -> Vocabulary:
        """The words of both fields."""
        return typed_vocabulary(values[self.inputs.words], values[self.inputs.background])

    def segment(self, values: Values, vocabulary: Vocabulary, method: str) -> Timed:
        """The segmentation of the photo by a method."""
        return self.session.segment(values[self.inputs.photo], vocabulary, method)

    def warning(self, vocabulary: Vocabulary) -> str:
        """The words that the mini CLIP does not know, if it is in use."""
        unknown = unknown_words(self.session.weights, vocabulary)
        return f"{', '.join(unknown)}: unknown to the mini CLIP" if unknown else ""


class Segmentation(Tab):
    """The classes over the photo, and their shares."""

    title = "Segmentation"
    needs_words = True

    def _lay_out(self) -> None:
        self.picture = picture("segmented", 480)
        self.legend = gr.HTML(elem_id="legend")
        self.outputs = (self.picture, self.legend)

    def draw(self, values: Values) -> Drawing:
        """Labels the photo."""
        method = values[self.inputs.method]
        vocabulary = self.vocabulary(values)
        timed = self.segment(values, vocabulary, method)
        return Drawing(
            {
                self.picture: segmented(timed, method),
                self.legend: legend([timed.result]),
            },
            f"{method}: {timed}",
            self.warning(vocabulary),
        )


class Outliers(Tab):
    """The patches that a detector marks in a layer, and the norms of all patches."""

    title = "Outliers"

    def _lay_out(self) -> None:
        last = self.session.blocks - 2  # the last block's output is not kept in a trace
        with gr.Row():
            self.layer = gr.Slider(0, last, last, step=1, label="Layer", elem_id="outlier-layer")
            self.detector = gr.Dropdown(
                [OWN, *list_ops("detector")], value=OWN, label="Detector", elem_id="detector"
            )
        with gr.Row():
            self.found = picture("found", 420)
            self.norms = picture("norms", 420)
        self.caption = gr.HTML(elem_id="found-caption")
        self.controls = (self.layer, self.detector)
        self.outputs = (self.found, self.norms, self.caption)

    def draw(self, values: Values) -> Drawing:
        """Marks the outliers of the chosen layer."""
        photo, method = values[self.inputs.photo], values[self.inputs.method]
        layer, patch = int(values[self.layer]), self.session.patch
        image = self.session.resized(photo)
        found = self.session.outliers(photo, method, values[self.detector], layer)
        count = f"{int(found.mask.sum())} of {found.mask.size} patches"
        fate = "which the method replaces" if found.replaced else "which are not replaced"
        ratio = found.norms.max() / np.median(found.norms)
        return Drawing(
            {
                self.found: gr.Image(
                    marked(image, found.mask, patch),
                    alt_text=f"Outliers of layer {layer} over the photo: {count}",
                ),
                self.norms: gr.Image(
                    heat(image, found.norms, patch, "L2 norm of patch tokens", cmap="cividis"),
                    alt_text=f"Norms of the patch tokens of layer {layer}",
                ),
                self.caption: caption(
                    f"Left: {found.detector} finds {count} in layer {layer}, {fate}. Right: norms "
                    f"of plain CLIP's tokens; the largest is {ratio:.1f} x the median."
                ),
            },
            f"{method}: outliers of layer {layer}",
        )


class Attention(Tab):
    """The attention of the selected patch.

    Attributes:
        cell: (row, column) of that patch; None for the middle one.
    """

    title = "Attention"

    def _lay_out(self) -> None:
        self.cell = gr.State(None)
        last = self.session.blocks - 1
        self.layer = gr.Slider(0, last, last, step=1, label="Layer", elem_id="attention-layer")
        with gr.Row():
            self.clicked = picture("clicked", 420)
            self.share = picture("attention", 420)
        self.caption = gr.HTML(elem_id="attention-caption")
        self.controls = (self.layer,)
        self.outputs = (self.clicked, self.share, self.caption)

    def draw(self, values: Values) -> Drawing:
        """Shows the attention of the chosen patch."""
        photo, method = values[self.inputs.photo], values[self.inputs.method]
        layer, patch = int(values[self.layer]), self.session.patch
        image = self.session.resized(photo)
        height, width = (length // patch for length in image.shape[:2])
        cell = values[self.cell] or (height // 2, width // 2)
        share, to_class = self.session.attention(photo, method, layer, cell)
        place = f"row {cell[0]}, column {cell[1]}"
        return Drawing(
            {
                self.clicked: gr.Image(
                    framed(image, cell, patch),
                    alt_text=f"The photo; the patch at {place} is framed. Click to select another.",
                ),
                self.share: gr.Image(
                    heat(
                        image,
                        share,
                        patch,
                        "share of attention",
                        chosen=cell,
                        ticks=PercentFormatter(1),
                    ),
                    alt_text=f"Attention of the patch at {place} in layer {layer}",
                ),
                self.caption: caption(
                    f"The patch at {place} in layer {layer}, averaged over heads: {share[cell]:.1%} of "
                    f"its attention goes to itself, {to_class:.1%} to the class token. Click "
                    "another patch in the left picture to see its attention."
                ),
            },
            f"{method}: attention of the patch at {place}",
        )

    def choose(self, photo: str | None, event: gr.SelectData) -> tuple[int, int] | None:
        """The patch under a click in the left picture."""
        if not photo:
            return None
        shape = self.session.resized(photo).shape[:2]
        size = [SHOWN * length / max(shape) for length in shape]
        return patch_at(event.index, size, shape, self.session.patch)


class Compare(Tab):
    """Two methods side by side."""

    title = "Compare"
    needs_words = True

    def _lay_out(self) -> None:
        first = self.inputs.method.value
        self.second = gr.Dropdown(
            self.session.methods,
            value="sfp" if first == "clip" else "clip",
            label="Compare with",
            elem_id="second",
        )
        with gr.Row():
            self.left = picture("left", 400)
            self.right = picture("right", 400)
        self.legend = gr.HTML(elem_id="both")
        self.controls = (self.second,)
        self.outputs = (self.left, self.right, self.legend)

    def draw(self, values: Values) -> Drawing:
        """Labels the photo twice."""
        first, second = values[self.inputs.method], values[self.second]
        vocabulary = self.vocabulary(values)
        left = self.segment(values, vocabulary, first)
        right = self.segment(values, vocabulary, second)
        same = float((left.result.labels == right.result.labels).mean())
        return Drawing(
            {
                self.left: segmented(left, first),
                self.right: segmented(right, second),
                self.legend: caption(f"Left: {first}, right: {second}; {same:.0%} of pixels agree.")
                + legend([left.result, right.result]),
            },
            f"{first}: {left}; {second}: {right}",
            self.warning(vocabulary),
        )


def picture(name: str, height: int) -> gr.Image:
    """An image component, `height` pixels tall."""
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


def segmented(timed: Timed, method: str) -> gr.Image:
    """A segmentation for an image component."""
    alt = f"Segmentation by {method}: {timed.result.summary()}"
    return gr.Image(labelled(timed.result), alt_text=alt)
