"""The result for one image: labels, probabilities, pictures, files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageShow
from torch import Tensor

from sfp.data.coco import coco_document
from sfp.files import atomic_write
from sfp.functional.labels import assign, decided
from sfp.functional.pamr import Refinement
from sfp.functional.windows import LogitSheet
from sfp.kinds import Decision
from sfp.overlay import Panel, label_picture, overlay
from sfp.palette import class_palette
from sfp.registry import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 640  # pixels of the long side in notebooks
SLAB = 2**24  # number of scores computed at a time


@dataclass(frozen=True)
class Scores:
    """Class probabilities of an image, rendered from its merged logits on demand.

    Attributes:
        sheet: the logits, at patch resolution.
        index: class of each query.
        scale: inverse temperature of the softmax.
        background: whether a background class without words precedes the others.
        refine: the refinement of the logits, if any.
        decision: the method's replacement for the softmax, if any.
    """

    sheet: LogitSheet
    index: tuple[int, ...]
    scale: float
    background: bool
    refine: Refinement | None
    decision: Decision | None = None

    def slabs(self) -> Iterator[NDArray[np.float32]]:
        """The probabilities, one slab of rows (K, rows, W) at a time."""
        height, width = self.sheet.size
        step = max(SLAB // ((self.index[-1] + 2) * width), 1)
        with torch.inference_mode():
            reading = decided(self.sheet, self.refine, self.index, self.scale, self.decision)
        for start in range(0, height, step):
            stop = min(start + step, height)
            with torch.inference_mode():
                own = dict(
                    rows=partial(_shifted, reading["rows"], start), size=(stop - start, width)
                )
                scores = assign(**{**reading, **own}, keep_scores=True).scores
            assert scores is not None  # because of keep_scores
            known = scores.float().numpy()
            yield np.pad(known, ((1, 0), (0, 0), (0, 0))) if self.background else known


def _shifted(rows: Callable[[int, int], Tensor], by: int, start: int, stop: int) -> Tensor:
    """Rows counted from row `by`."""
    return rows(start + by, stop + by)


@dataclass(frozen=True, repr=False, eq=False)
class Result:
    """A segmented image, at its original size.

    Attributes:
        labels: class of each pixel, (H, W) int32; `names[label]` is its name.
        confidence: probability of the best class, (H, W) float32; for pixels that a threshold made
            background, that of the class below the threshold.
        names: names of the classes.
        image: the picture, (H, W, 3) uint8 RGB.
        _scores: renders the class probabilities.
    """

    labels: NDArray[np.int32]
    confidence: NDArray[np.float32]
    names: tuple[str, ...]
    image: NDArray[np.uint8]
    _scores: Scores = field(repr=False)

    @property
    def scores(self) -> NDArray[np.float32]:
        """Class probabilities, (K, H, W): softmax over all queries, then each class's best synonym.

        They sum to 1 if no class has synonyms, otherwise to less. A background that comes from a
        threshold has no words and gets 0. They are recomputed at every access, since K maps of a large
        image take much memory; `score` computes a single one.
        """
        return self._read(slice(None))

    def score(self, which: str | int) -> NDArray[np.float32]:
        """Probability of one class, by name or label, (H, W), without maps of the other classes."""
        return self._read(slice(self._label(which), self._label(which) + 1))[0]

    def _read(self, classes: slice) -> NDArray[np.float32]:
        """Some rows of `scores`, filled slab by slab."""
        count = len(range(len(self.names))[classes])
        scores = np.empty((count, *self.labels.shape), np.float32)
        start = 0
        for slab in self._scores.slabs():
            stop = start + slab.shape[1]
            scores[:, start:stop] = slab[classes]
            start = stop
        return scores

    def mask(self, which: str | int) -> NDArray[np.bool_]:
        """The pixels of a class, by name or label, (H, W)."""
        return self.labels == self._label(which)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of the image's pixels for each class that occurs, largest first."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.names))
        order = np.argsort(-counts, kind="stable").tolist()
        return {self.names[i]: counts[i] / counts.sum() for i in order if counts[i]}

    def _label(self, which: str | int) -> int:
        if isinstance(which, str):
            if which not in self.names:
                raise ValueError(f"no class {which!r} in this result{suggest(which, self.names)}")
            return self.names.index(which)
        if not 0 <= which < len(self.names):
            raise ValueError(f"no label {which}: expected 0 to {len(self.names) - 1}")
        return which

    # -- pictures --------------------------------------------------------------------------------

    @cached_property
    def palette(self) -> list[tuple[int, int, int]]:
        """RGB colour of each class; the background is black."""
        return class_palette(self.names)

    def overlay(self, opacity: float = 0.7) -> Image.Image:
        """The classes' colours drawn over the picture, with white borders between them."""
        return Image.fromarray(self._overlay(self.image, self.labels, opacity))

    def _overlay(
        self, image: NDArray[Any], labels: NDArray[Any], opacity: float
    ) -> NDArray[np.uint8]:
        # renumber the labels that occur: `overlay` distinguishes at most 255
        present, ranks = np.unique(labels, return_inverse=True)
        ranks = ranks.reshape(labels.shape) % 255
        return overlay(Panel(image, ranks), [self.palette[i] for i in present[:255]], opacity)

    def figure(self) -> Figure:
        """The overlay, with a legend of the classes that occur and their shares."""
        from matplotlib.patches import Patch

        from sfp.visualize.canvas import Picture

        height, width = self.labels.shape
        scale = min(SHOWN / max(height, width), 1)
        size = (max(round(width * scale), 1), max(round(height * scale), 1))
        image = cv2.resize(self.image, size, interpolation=cv2.INTER_AREA)
        labels = cv2.resize(self.labels, size, interpolation=cv2.INTER_NEAREST)
        longest = max(map(len, self.shares))
        figure = Picture(max(4.5 * width / max(height, width), 1.5) + 1.2 + 0.08 * longest, 4.5, "")
        axes = figure.subplots()
        axes.imshow(self._overlay(image, labels, 0.7))
        axes.set_axis_off()
        handles = [
            Patch(
                color="#{:02x}{:02x}{:02x}".format(*self.palette[self.names.index(name)]),
                label=f"{name}, {share:.0%}",
            )
            for name, share in list(self.shares.items())[:20]
        ]
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            fontsize=9,
            frameon=False,
        )
        return figure

    def show(self) -> None:
        """Shows the figure in the notebook or in the system's image viewer.

        Raises:
            RuntimeError: if there is neither.
        """
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = lambda: None  # noqa: E731
        if get_ipython() is not None:
            display(self)
        elif not ImageShow.show(Image.open(io.BytesIO(self._repr_png_()))):
            raise RuntimeError(
                "no image viewer found: use result.save('file.jpg', overlay=True) instead"
            )

    def _repr_png_(self) -> bytes:
        """The figure as a PNG, for notebooks."""
        return self.figure()._repr_png_()  # type: ignore[attr-defined]

    def summary(self) -> str:
        """The eight largest classes with their shares, as text."""
        shares = ", ".join(f"{name} {share:.1%}" for name, share in list(self.shares.items())[:8])
        return shares + (f" and {len(self.shares) - 8} more" if len(self.shares) > 8 else "")

    def __repr__(self) -> str:
        height, width = self.labels.shape
        return f"Result({width} x {height}: {self.summary()})"

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overlay: bool = False) -> None:
        """Writes a picture file, complete or not at all; creates folders as needed.

        Args:
            path: a `.png` file for the label of each pixel, in the colours of `palette` (16 bits
                without colours above 256 classes).
            overlay: write the overlay instead, in the format given by the path's suffix.

        Raises:
            ValueError: if the suffix is unknown, or its format could change the labels.
        """
        path = Path(path)
        form = Image.registered_extensions().get(path.suffix.lower())
        if form not in Image.SAVE:
            raise ValueError(f"{path}: unknown image format {path.suffix!r}; use .png")
        if not overlay and path.suffix.lower() != ".png":
            raise ValueError(
                f"{path}: labels can only be saved as .png, since {path.suffix} may change them; pass "
                "overlay=True to save them drawn over the image"
            )
        dtype = np.uint8 if len(self.names) <= 256 else np.uint16
        picture = (
            self.overlay() if overlay else label_picture(self.labels.astype(dtype), self.palette)
        )
        with atomic_write(path) as temporary:
            picture.save(temporary, form)

    def to_coco(self, file_name: str = "", *, parts: bool = False) -> dict[str, Any]:
        """The labels as a COCO document for one image, see `sfp.coco_document`.

        Args:
            file_name: the image's file name in the document.
            parts: one annotation per connected region instead of per class.
        """
        return coco_document({file_name: self}, parts=parts)
