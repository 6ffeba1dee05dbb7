"""The record of one run of the trunk, which methods read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.functional import attention
from sfp.functional.grid import resample_positions
from sfp.functional.precision import upcast
from sfp.functional.windows import WindowGrid
from sfp.registry import Op, needs_words
from sfp.tokens import Heads, Tokens, cosine_logits
from sfp.whole import WholeImage

if TYPE_CHECKING:
    from sfp.clip.vit import VisionTransformer

NO_REGIONS = (
    "the method needs regions of the image: pass an id map (regions=), or configure a proposer "
    "(regions=dict(propose=dict(type=...)), in a config model.regions, or "
    "--regions; see docs/methods.md); overlapping masks (regions= with three dimensions, paint='none') "
    "work only with textregion and lavg"
)
# guides by their usual names: type and model
GUIDES = dict(
    dino=("transformers", "facebook/dino-vitb8"),
    sam=("sam", "facebook/sam-vit-base"),
    sam3=("sam3", "facebook/sam3"),
    clipseg=("clipseg", "CIDAS/clipseg-rd64-refined"),
)
ONE_BY_ONE = (
    "it works window by window, but the readouts of this method join the windows of an image: use it "
    "with another preset"
)
GUIDE_PIXELS = 2**20  # pixels in one batch of a guide, nine windows of 336 pixels
T = TypeVar("T")


@dataclass(frozen=True)
class Words:
    """The queries of a trace, as words.

    Attributes:
        queries: the words, in the order of the text features.
        banks: prompt templates -> unit text features for each template separately, (M, Q, C).
    """

    queries: tuple[str, ...]
    banks: Callable[[Sequence[str]], Tensor]


class GuideError(LookupError, ValueError):
    """Raised when a method needs an external encoder that was not given."""


class RegionsError(LookupError, ValueError):
    """Raised when a method needs regions that were not given."""


class LayerError(LookupError, ValueError):
    """Raised for a layer that the model does not have or that cannot be used this way."""


def no_guide(name: str, given: Iterable[str]) -> GuideError:
    """The error for a method that needs a guide of a name, with what to do."""
    kind, model = GUIDES.get(name, ("TYPE", "MODEL"))
    return GuideError(
        f"the method needs the guide {name!r}; given: {', '.join(given) or 'none'}. Pass guides="
        f"dict({name}=dict(type='{kind}', model='{model}')) (in a config: model.guides), or "
        f"--guide {name}={kind}:model={model}, and pip install 'sfp[guides]': see "
        "docs/methods.md"
    )


def absolute_layer(index: int, blocks: int, depth: int | None) -> int:
    """Converts a method's layer number to a model with `blocks` blocks, from 0 (see `Trace.layer`).

    Raises:
        LayerError: if there is no such block.
    """
    reference = blocks if depth is None else depth
    if not -blocks <= index < reference:
        raise LayerError(f"layer {index} of a model with {blocks} blocks (numbers for {reference})")
    if index < 0:
        return index + blocks
    return max((index + 1) * blocks // reference - 1, 0)


class Trace:
    """The tokens between the blocks of one forward pass, and attention computed on demand.

    Ops only read it; only edits of the trunk write to it, their `masks`. Ops that take a layer number
    pass it through `layer`, so that a number written for 12 blocks means the same relative depth in a
    model with 24.

    Attributes:
        vit: the model that ran.
        image: the normalised input, (B, 3, H, W).
        embedded: the tokens that entered the first block.
        outputs: the tokens that left block i, after its edits, for every block but the last.
        masks: outliers by absolute layer, (B, N) bool, written by edits.
        text: text features (Q, C) if the caller has them, else None.
        index: class of each query, or None if every query is a class of its own.
        guides: external encoders by name: images like `image` -> Tokens.
        whole: the image, if the batch consists of all of its windows; None if each is a separate image.
        words: the queries as words if the caller has them, else None.
        normalisation: mean and standard deviation of the images, RGB in 0..255.
        windows: the trace of the windows, if this is their canvas (`sfp.ops.image`); else None.
        depth: number of blocks that layer numbers refer to; None takes them literally.
        pool_mlp: whether features go through the MLP of the tower's pool, if there is one.
        edits, positions: as passed to `VisionTransformer.trace`.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        image: Tensor,
        embedded: Tokens,
        *,
        text: Tensor | None = None,
        index: Sequence[int] | None = None,
        guides: Mapping[str, Callable[..., Tokens]] | None = None,
        regions: Tensor | None = None,
        whole: WholeImage | None = None,
        words: Words | None = None,
        normalisation: tuple[Sequence[float], Sequence[float]] = (CLIP_MEAN, CLIP_STD),
        depth: int | None = None,
        pool_mlp: bool = True,
    ) -> None:
        self.vit = vit
        self.image = image
        self.embedded = embedded
        self.outputs: list[Tokens] = []
        self.masks: dict[int, Tensor] = {}
        self.text = text
        self.index = index
        self.guides = {} if guides is None else guides
        self.whole = whole
        self.words = words
        self.normalisation = normalisation
        self.depth = depth
        self.pool_mlp = pool_mlp
        self.edits: tuple[Callable[[Trace, int], Tokens], ...] = ()
        self.positions: Callable[[Tensor, tuple[int, int]], Tensor] | None = resample_positions
        self.windows: Trace | None = None
        self._regions = regions
        self._running: tuple[int, Heads] | None = None
        self._heads: dict[int, Heads] = {}
        self._once: dict[Hashable, Any] = {}
        self._of_words: dict[Hashable, Any] = {}  # likewise, for values that depend on the words

    def with_words(
        self, text: Tensor | None, index: Sequence[int] | None, words: Words | None = None
    ) -> Trace:
        """The same run of the trunk with other words, without values computed from the old ones.

        The two share no mutable state. Not valid for methods whose trunk depends on the words
        (`Method.words_in_trunk`).
        """
        other = copy.copy(self)
        other.text, other.index, other.words = text, index, words
        other._once, other._of_words = dict(self._once), {}
        other._heads = dict(self._heads)
        return other

    @staticmethod
    def joined(traces: Sequence[Trace]) -> Trace:
        """Joins the traces of several batches, run with the same method, into one."""
        first = traces[0]
        if len(traces) == 1:
            return first
        regions = [trace._regions for trace in traces if trace._regions is not None]
        return first.like(
            torch.cat([trace.image for trace in traces]),
            [Tokens.cat([trace.entering(i) for trace in traces]) for i in range(first.depth_run)],
            {i: torch.cat([trace.masks[i] for trace in traces]) for i in first.masks},
            regions=torch.cat(regions) if regions else None,
            whole=first.whole,
        )

    def alone(self) -> list[Trace]:
        """A separate trace for each image, with the image as its only window (`whole`)."""

        def one(i: int) -> Trace:
            own = slice(i, i + 1)
            regions = None if self._regions is None else self._regions[own]
            return self.like(
                self.image[own],
                [self.entering(layer)[own] for layer in range(self.depth_run)],
                {layer: mask[own] for layer, mask in self.masks.items()},
                regions=regions,
                whole=WholeImage(
                    WindowGrid.over(self.image.shape[-2:], 0, 1),
                    self.image[i],
                    regions=None if regions is None else regions[0],
                ),
            )

        return self._compute_once(
            "alone", lambda: [one(i) for i in range(len(self.image))], words=True
        )

    def like(
        self,
        image: Tensor,
        tokens: Sequence[Tokens],
        masks: Mapping[int, Tensor],
        *,
        regions: Tensor | None,
        whole: WholeImage | None,
    ) -> Trace:
        """A trace with the same model, words and guides for other images, without cached values.

        Args:
            image: (B, 3, H, W).
            tokens: the tokens that entered the first block, then those that left each block.
            masks, regions, whole: as the attributes.
        """
        other = copy.copy(self)
        other.image, other.embedded, other.outputs = image, tokens[0], list(tokens[1:])
        other.masks, other.whole, other._regions = dict(masks), whole, regions
        other.windows = None
        other._running, other._heads, other._once, other._of_words = None, {}, {}, {}
        return other

    @property
    def depth_run(self) -> int:
        """The number of layers of tokens, including those that entered the first block."""
        return 1 + len(self.outputs)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that it holds, to measure memory; also those inside values computed once."""
        # without `windows`, which hold this trace among their values
        yield from _tensors([value for name, value in vars(self).items() if name != "windows"])

    def layer(self, index: int) -> int:
        """Converts a method's layer number to an absolute block number of this model.

        Negative numbers count from the last block. Others are block numbers from 0 in a model with
        `depth` blocks and are moved to the same relative depth in this one.

        Raises:
            LayerError: if there is no such block.
        """
        return absolute_layer(index, len(self.vit.blocks), self.depth)

    def output(self, index: int) -> Tokens:
        """The tokens that left a method's layer `index` (see `layer`).

        Raises:
            LayerError: if there is no such block, or if it has not run.
        """
        i = self.layer(index)
        if i >= len(self.outputs):
            raise LayerError(
                f"layer {i} has not run: the trace holds layers 0 to {len(self.outputs) - 1}; "
                "the last block runs only inside readouts"
            )
        return self.outputs[i]

    def entering(self, i: int) -> Tokens:
        """The tokens that entered block `i` (absolute)."""
        return self.outputs[i - 1] if i else self.embedded

    def leaving(self) -> Tokens:
        """The output of the unmodified last block."""
        last = self.entering(len(self.vit.blocks) - 1)
        return last.with_data(self.once(native_last))

    def start(self, i: int) -> Heads:
        """Called before block `i` runs; keeps its projections while its edits run."""
        heads = self.vit.blocks[i].heads(self.entering(i))
        self._running = (i, heads)
        return heads

    def heads(self, i: int) -> Heads:
        """Block `i`'s projections (absolute), kept while its edits run and recomputed afterwards."""
        if self._running is not None and self._running[0] == i:
            return self._running[1]
        if i not in self._heads:
            self._heads[i] = self.vit.blocks[i].heads(self.entering(i))
        return self._heads[i]

    def once(self, op: Callable[..., T], **knobs: Hashable) -> T:
        """`op(trace, **knobs)`, computed once for equal ops and knobs."""
        if knobs:
            op = Op(op, tuple(sorted(knobs.items())))
        return self._compute_once(op, lambda: op(self), words=needs_words(op))

    def _compute_once(self, key: Hashable, compute: Callable[[], T], *, words: bool = False) -> T:
        computed = self._of_words if words else self._once
        if key not in computed:
            computed[key] = compute()
        return computed[key]

    @property
    def regions(self) -> Tensor:
        """The region of each pixel, (B, H, W) int64; 0 is no region, `PADDING` is a separate region.

        Raises:
            LookupError: if no regions were given.
        """
        if self._regions is None or self._regions.ndim == 4:
            raise RegionsError(NO_REGIONS)
        return self._regions

    def region_masks(self) -> Tensor:
        """Masks of the regions of the whole image, (R, h, w) float32, which may overlap.

        Raises:
            LookupError: if no regions were given.
        """
        masks = None if self.whole is None else self.whole.masks
        if masks is None:
            raise RegionsError(NO_REGIONS)
        return masks

    def guide(self, name: str, output: str | None = None) -> Tokens:
        """The patch tokens of an external encoder for the image; computed once.

        Args:
            name: name of the guide.
            output: one of the guide's outputs; its default one if None.

        Raises:
            LookupError: if no guide of that name was given.
        """
        return self._compute_once(
            ("guide", name, output), lambda: self._look(name, output, self.image)
        )

    def guide_of_image(self, name: str, output: str | None = None) -> Tokens:
        """`guide`, but of the whole image that windows were cut from, seen at once."""
        if self.whole is None or (len(self.whole.grid.places) == 1 and self.windows is None):
            return self.guide(name, output)
        source, pixels = self.windows or self, self.whole.pixels[None]
        return self._compute_once(
            ("guide_of_image", name, output), lambda: source._look(name, output, pixels)
        )

    def _look(self, name: str, output: str | None, images: Tensor) -> Tokens:
        if name not in self.guides:
            raise no_guide(name, self.guides)
        options = {} if output is None else {"output": output}
        # in batches, because an image may have many windows
        step = max(GUIDE_PIXELS // images[0, 0].numel(), 1)
        parts = [self.guides[name](part, **options) for part in images.split(step)]
        return parts[0].with_data(torch.cat([part.data for part in parts])).only_patches()

    def query_features(self) -> Tensor:
        """The text features, (Q, C), for ops that require them.

        Raises:
            LookupError: if the caller gave none.
        """
        if self.text is None:
            raise LookupError("this method needs the text features: pass text=, (Q, C)")
        return self.text

    def guess(self, source: Callable[[Trace], Tokens]) -> Tensor:
        """First-pass logits (B, Q, h, w) of tokens read from this trace; computed once."""

        def read() -> Tensor:
            return cosine_logits(self.project(source(self)), self.query_features())

        return self._compute_once(("guess", source), read, words=True)

    def project(self, tokens: Tokens) -> Tokens:
        """`VisionTransformer.project` with the method's `pool_mlp`."""
        return self.vit.project(tokens, self.pool_mlp)

    def attention(self, i: int) -> Tensor:
        """Block `i`'s attention weights, (B, H, T, T)."""
        return self.heads(i).logits("q", "k").softmax(-1)

    def mean_attention(self, i: int) -> Tensor:
        """Block `i`'s attention weights averaged over heads, (B, T, T); computed once if small."""
        if not self._small_map(i):
            return self.attention(i).mean(1)
        return self._compute_once(("mean_attention", i), lambda: self.attention(i).mean(1))

    def mean_row_and_diagonal(self, i: int) -> tuple[Tensor, Tensor]:
        """`cls_row` and `self_weight` averaged over heads, (B, N) each.

        Read from the full attention map if that is small, since other ops may need it too; otherwise
        computed without it.
        """
        prefix = self.embedded.prefix
        if not prefix or not self._small_map(i):
            return self.cls_row(i).mean(1), self.self_weight(i).mean(1)
        weights = self.mean_attention(i)
        return weights[:, 0, prefix:], weights.diagonal(dim1=-2, dim2=-1)[:, prefix:]

    def _small_map(self, i: int) -> bool:
        if torch.compiler.is_exporting():  # an exported file must work for batches of any size
            return True
        batch, tokens, _ = self.entering(i).data.shape
        return batch * self.vit.blocks[i].attn.num_heads * tokens**2 <= attention.CHUNK

    def cls_row(self, i: int) -> Tensor:
        """How much the class token attends to each patch in block `i`, (B, H or 1, N).

        In a tower without a class token, how much the pool's query would attend to the input of the
        block, averaged over heads.

        Raises:
            ValueError: if there is no pool either.
        """
        heads = self.heads(i)
        if not heads.prefix:
            return self.vit.gathering(self.entering(i)).mean(1, keepdim=True)
        row = heads.similar(heads.q[:, :, :1], heads.k)  # (B, H, 1, T)
        return row.softmax(-1)[:, :, 0, heads.prefix :]

    def self_weight(self, i: int) -> Tensor:
        """How much each patch attends to itself in block `i`, (B, H, N), without the full map."""
        heads = self.heads(i)
        own = attention.diagonal_weights(heads.q, heads.k, heads.scale, heads.hidden_keys)
        return own[..., heads.prefix :]

    def one_by_one(self, maps: Tensor, part: str) -> None:
        """Checks that there is a map for each window, for a part of a method that works on both.

        Raises:
            ValueError: if the readouts have joined the windows.
        """
        given, windows = maps.shape[0], self.image.shape[0]
        if given != windows:
            raise ValueError(f"{part}: got {given} maps of {windows} windows; {ONE_BY_ONE}")

    def global_logits(self) -> Tensor:
        """Cosine of CLIP's image embedding with every query, (B, Q).

        Raises:
            LookupError: if the caller gave no text features.
        """
        image = F.normalize(upcast(self.global_embedding()), dim=-1)  # (B, C)
        return image @ self.query_features().to(image).T

    def of_image(self) -> Trace:
        """A run of the trunk, including edits, over the whole image from which windows were cut.

        The trace itself if the image is its only window.
        """
        whole = self.whole
        if whole is None or len(whole.grid.places) == 1:
            return self

        def run() -> Trace:
            return self.over(
                whole.pixels[None],
                regions=None if whole.ids is None else whole.ids[None],
                whole=WholeImage(whole.grid.whole, whole.source, whole.prepare, whole.regions),
            )

        return self._compute_once("of_image", run, words=needs_words(self.edits))

    def over(self, image: Tensor, **context: Any) -> Trace:
        """A run of the trunk, including edits, over other images.

        Args:
            image: normalised, (B, 3, H, W).
            **context: `regions` and `whole` of the new trace.
        """
        worded = needs_words(self.edits)
        return self.vit.trace(
            image,
            self.edits,
            positions=self.positions,
            text=self.text if worded else None,
            index=self.index if worded else None,
            words=self.words if worded else None,
            guides=self.guides,
            normalisation=self.normalisation,
            depth=self.depth,
            pool_mlp=self.pool_mlp,
            **context,
        )

    def rgb(self, image: Tensor) -> Tensor:
        """Normalised pixels (..., 3, H, W) as colours in 0..1."""
        mean, std = (image.new_tensor(list(x))[:, None, None] for x in self.normalisation)
        return (image * std + mean) / 255

    def known_words(self) -> Words:
        """The queries as words, for ops that require them.

        Raises:
            LookupError: if the caller gave only features.
        """
        if self.words is None:
            raise LookupError(
                "this method needs the words, not only their features: pass classes= instead of "
                "query_features="
            )
        return self.words

    def image_embedding(self) -> Tensor:
        """CLIP's embedding of the whole image from which the windows were cut, (B, C).

        If each window is a separate image, its `global_embedding`.
        """
        return self.of_image().global_embedding().expand(len(self.image), -1)

    def global_embedding(self) -> Tensor:
        """The image's embedding, (B, C): the pooled output of the unmodified last block."""
        vit = self.vit
        if vit.pool is not None or vit.averages:
            return vit.embedding(self.leaving())
        entering = self.entering(len(vit.blocks) - 1)
        # the class token needs only the keys and values of the patches
        token = vit.blocks[-1].look(entering.cls, entering)  # (B, 1, D)
        return vit.joint(vit.ln_post(token[:, 0]))


def native_last(trace: Trace) -> Tensor:
    """The output of the unmodified last block, (B, T, D)."""
    tokens = trace.entering(len(trace.vit.blocks) - 1)
    last = trace.vit.blocks[-1]
    return last.advance(tokens, last.heads(tokens)).data  # not `last(...)`: patches may be hidden


def _tensors(part: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings, dataclasses and traces."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Trace):
        yield from part.tensors()
    elif isinstance(part, Mapping):
        yield from _tensors([*part.values()])
    elif is_dataclass(part) and not isinstance(part, type):
        yield from _tensors([getattr(part, field.name) for field in fields(part)])
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from _tensors(item)
