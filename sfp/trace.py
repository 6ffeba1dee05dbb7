"""What one run of the trunk leaves behind for a method to look at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sfp.functional import attention
from sfp.tokens import Heads, Tokens, cosine_logits

if TYPE_CHECKING:
    from sfp.clip.vit import VisionTransformer


class GuideError(LookupError, ValueError):
    """An external encoder that a method asks for and nobody gave."""


class LayerError(LookupError, ValueError):
    """A layer number that the model does not have: a wrong setting, found when it is looked up."""


def absolute_layer(index: int, blocks: int, depth: int | None) -> int:
    """The number, from 0, of a method's layer in a model of `blocks` blocks (see `Trace.layer`).

    Raises:
        LookupError: if there is no such block.
    """
    reference = blocks if depth is None else depth
    if not -blocks <= index < reference:
        raise LayerError(f"layer {index} of a model with {blocks} blocks (numbers for {reference})")
    if index < 0:
        return index + blocks
    return max((index + 1) * blocks // reference - 1, 0)


class Trace:
    """The tokens between the blocks of one forward pass, and attention evaluated on demand.

    Ops read it and never write it; only edits of the trunk record their `masks`. Methods that take a
    layer number pass it through `layer`, so that a number written for 12 blocks means the same
    relative depth in a model with 24.

    Attributes:
        vit: the model that ran.
        image: the normalised input, (B, 3, H, W).
        embedded: the tokens that entered the first block.
        outputs: the tokens that left block i, after its edits, for every block but the last.
        masks: outliers by absolute layer, (B, N) bool, written by edits.
        text: text features (Q, C) where the caller has them, else None.
        index: class of each query, or None if every query is a class of its own.
        asked_words: whether anything so far came from `text` or `index`; what did not serves other
            words too (`with_words`).
        guides: external encoders by name: images as `image` -> Tokens.
        depth: number of blocks that layer numbers are written for; None takes them literally.
        keep: absolute layers whose projections stay at hand after the block has run. A layer that is
            asked for without being among them is added: whoever passes the set again saves the second
            product.
    """

    def __init__(
        self,
        vit: VisionTransformer,
        image: Tensor,
        embedded: Tokens,
        *,
        text: Tensor | None = None,
        index: Sequence[int] | None = None,
        guides: Mapping[str, Callable[[Tensor], Tokens]] | None = None,
        depth: int | None = None,
        keep: set[int] | None = None,
    ) -> None:
        self.vit = vit
        self.image = image
        self.embedded = embedded
        self.outputs: list[Tokens] = []
        self.masks: dict[int, Tensor] = {}
        self._text = text
        self._index = index
        self.asked_words = False
        self.guides = {} if guides is None else guides
        self.depth = depth
        self.keep = set() if keep is None else keep
        self._running: tuple[int, Heads] | None = None
        self._kept: dict[int, Heads] = {}
        self._once: dict[Hashable, Any] = {}
        self._worded: set[Hashable] = set()  # those of `_once` that came from the words

    @property
    def text(self) -> Tensor | None:
        """The text features, or None; who asks depends on the words."""
        self.asked_words = True
        return self._text

    @property
    def index(self) -> Sequence[int] | None:
        """The class of each query, or None; who asks depends on the words."""
        self.asked_words = True
        return self._index

    def with_words(self, text: Tensor | None, index: Sequence[int] | None) -> Trace:
        """The same run of the trunk with other words; what came from the words is left behind.

        Right only if `asked_words` was False when the trunk had run: no edit of it asked for them.
        """
        other = copy.copy(self)
        other._text, other._index, other.asked_words = text, index, False
        other._once = {k: v for k, v in self._once.items() if k not in self._worded}
        other._worded = set()
        other._kept = dict(self._kept)  # what the others ask for shall not add to this one
        return other

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds, for counting."""
        heads = [*self._kept.values(), *([self._running[1]] if self._running else [])]
        tokens = [self.embedded, *self.outputs]
        tokens += [value for value in self._once.values() if isinstance(value, Tokens)]
        yield self.image
        yield from (each.data for each in tokens)
        yield from (x for each in heads for x in each.tensors())
        yield from self.masks.values()
        yield from (value for value in self._once.values() if isinstance(value, Tensor))

    def layer(self, index: int) -> int:
        """The absolute number of a method's layer.

        Negative numbers count from the last block. The others are block numbers from 0 in a model of
        `depth` blocks and are moved to the same relative depth of this one.

        Raises:
            LookupError: if there is no such block.
        """
        return absolute_layer(index, len(self.vit.blocks), self.depth)

    def output(self, index: int) -> Tokens:
        """The tokens that left a method's layer `index` (see `layer`)."""
        i = self.layer(index)
        if i >= len(self.outputs):
            raise LookupError(
                f"layer {i} has not run: the trace holds layers 0 to {len(self.outputs) - 1}; "
                "the last block runs only inside readouts"
            )
        return self.outputs[i]

    def entering(self, i: int) -> Tokens:
        """The tokens that entered block `i` (absolute)."""
        return self.outputs[i - 1] if i else self.embedded

    def start(self, i: int) -> Heads:
        """Called by the trunk before block `i`: its projections stay at hand while edits run."""
        heads = self.vit.blocks[i].heads(self.entering(i))
        self._running = (i, heads)
        if i in self.keep:
            self._kept[i] = heads
        return heads

    def heads(self, i: int) -> Heads:
        """Block `i`'s projections (absolute): at hand while it runs or if kept, else made again."""
        if self._running is not None and self._running[0] == i:
            return self._running[1]
        if i not in self._kept:
            self._kept[i] = self.vit.blocks[i].heads(self.entering(i))
            self.keep.add(i)
        return self._kept[i]

    def once(self, op: Callable[[Trace], Tensor]) -> Tensor:
        """`op(trace)`, computed the first time that an equal op is asked for."""
        return self._noted(op, lambda: op(self))

    def _noted(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """`compute()`, the first time; and a note whether the words had a part in it."""
        if key not in self._once:
            before, self.asked_words = self.asked_words, False
            try:
                self._once[key] = compute()
                if self.asked_words:
                    self._worded.add(key)
            finally:
                self.asked_words |= before
        self.asked_words |= key in self._worded
        return self._once[key]

    def guide(self, name: str) -> Tokens:
        """What an external encoder sees in the image, without its prefix; computed once.

        Raises:
            LookupError: if no guide of that name was given.
        """
        if name not in self.guides:
            known = ", ".join(self.guides) or "none"
            raise GuideError(f"the method asks for the guide {name!r}; given: {known}")
        return self._noted(("guide", name), lambda: self.guides[name](self.image).only_patches())

    def query_features(self) -> Tensor:
        """The text features, (Q, C), for ops that cannot do without.

        Raises:
            LookupError: if the caller gave none.
        """
        text = self.text
        if text is None:
            raise LookupError("this method needs the text features: pass text=, (Q, C)")
        return text

    def guess(self, source: Callable[[Trace], Tokens]) -> Tensor:
        """First-pass logits (B, Q, h, w) of tokens read from this trace; computed once."""

        def read() -> Tensor:
            return cosine_logits(self.vit.project(source(self)), self.query_features())

        return self._noted(("guess", source), read)

    def attention(self, i: int) -> Tensor:
        """Block `i`'s attention weights, (B, H, T, T)."""
        return self.heads(i).logits("q", "k").softmax(-1)

    def mean_attention(self, i: int) -> Tensor:
        """Block `i`'s attention weights averaged over heads, (B, T, T); computed once if small."""
        if not self._small_map(i):
            return self.attention(i).mean(1)
        return self._noted(("mean_attention", i), lambda: self.attention(i).mean(1))

    def mean_row_and_diagonal(self, i: int) -> tuple[Tensor, Tensor]:
        """`cls_row` and `self_weight` averaged over heads, (B, N) each.

        Out of the map where that is small, which others may ask for too; else without it.
        """
        if not self._small_map(i):
            return self.cls_row(i).mean(1), self.self_weight(i).mean(1)
        prefix = self.embedded.prefix
        weights = self.mean_attention(i)
        return weights[:, 0, prefix:], weights.diagonal(dim1=-2, dim2=-1)[:, prefix:]

    def _small_map(self, i: int) -> bool:
        batch, tokens, _ = self.entering(i).data.shape
        return batch * self.vit.blocks[i].attn.num_heads * tokens**2 <= attention.CHUNK

    def cls_row(self, i: int) -> Tensor:
        """How much the class token attends to each patch in block `i`, (B, H, N)."""
        heads = self.heads(i)
        row = heads.similar(heads.q[:, :, :1], heads.k)  # (B, H, 1, T)
        return row.softmax(-1)[:, :, 0, heads.prefix :]

    def self_weight(self, i: int) -> Tensor:
        """How much each patch attends to itself in block `i`, (B, H, N); no full map is kept."""
        heads = self.heads(i)
        own = attention.diagonal_weights(heads.q, heads.k, heads.scale, heads.hidden_keys)
        return own[..., heads.prefix :]

    def global_embedding(self) -> Tensor:
        """CLIP's image embedding, (B, C): the class token through the native last block."""
        return self.vit.ln_post(self.once(native_last)[:, 0]) @ self.vit.proj


def native_last(trace: Trace) -> Tensor:
    """What the last block puts out when it runs as it was trained, (B, T, D)."""
    tokens = trace.entering(len(trace.vit.blocks) - 1)
    last = trace.vit.blocks[-1]
    return last.advance(tokens, last.heads(tokens)).data  # not `last(...)`: patches may be hidden
