"""A method: edits of the trunk, and readouts of its tokens with the last block(s)."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sfp.clip.fingerprint import state_key
from sfp.clip.vit import VisionTransformer
from sfp.kinds import (
    Comparison,
    Decision,
    Detector,
    Edit,
    Mitigator,
    Positions,
    Reader,
    Refiner,
    Residual,
    Rule,
    Smoother,
    Source,
    Stage,
    Surgery,
)
from sfp.ops.comparisons import cosines
from sfp.ops.integrators import embedded_patches, own_tokens
from sfp.registry import (
    Some,
    build_dataclass,
    composition,
    fit,
    guides_of,
    list_methods,
    needs,
    needs_words,
    parameter_types,
)
from sfp.tokens import Tokens
from sfp.trace import NO_REGIONS, ONE_BY_ONE, LayerError, RegionsError, Trace, no_guide

COPIES_KEPT = 4  # operated copies per model; each holds only the weights that its surgery replaced
_OPERATED: WeakKeyDictionary[VisionTransformer, OrderedDict] = WeakKeyDictionary()
_OPERATED_LOCK = threading.Lock()


class _Fields:
    """A dataclass whose fields are always built and checked according to their annotations."""

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, hint in parameter_types(cls).items():
            object.__setattr__(self, name, fit(getattr(self, name), hint, cls.__name__, name))


@dataclass(frozen=True)
class Purify(_Fields):
    """An edit of the trunk: find outlier patches after certain blocks and replace them.

    Attributes:
        layers: method layers (see `Trace.layer`), or "all" for every block but the last.
        detector: (trace, absolute layer) -> (B, N) bool.
        mitigator: (tokens, mask) -> tokens.

    Raises:
        ValueError: if `layers` is neither "all" nor a list of layers, or an op is of the wrong kind.
    """

    layers: Some[int] | Literal["all"]
    detector: Detector
    mitigator: Mitigator

    def __call__(self, trace: Trace, i: int) -> Tokens:
        """The output of block `i` (absolute), purified if it is one of `layers`.

        Raises:
            LayerError: if a layer does not exist, or is the last block, which the trunk does not run.
        """
        tokens = trace.outputs[i]
        if self.layers != "all":
            chosen = {trace.layer(layer) for layer in self.layers}
            if len(trace.vit.blocks) - 1 in chosen:
                raise LayerError(
                    f"layers={self.layers!r} names the last block, which runs only inside readouts; "
                    "the last layer that can be purified is -2"
                )
            if i not in chosen:
                return tokens
        mask = self.detector(trace, i)
        trace.masks[i] = mask
        return self.mitigator(tokens, mask)


@dataclass(frozen=True)
class Readout(_Fields):
    """One pass of tokens through certain blocks, with a different attention or residual.

    Attributes:
        blocks: method layers whose blocks are used, in order.
        source: the tokens to read; None for those that entered the first of `blocks`.
        keep_cls: whether the class token takes part.
        before: smoothers applied to the tokens first.
        attention: rule for the attention weights; None for the block's own, fused.
        residual: (tokens, source) -> (B, T or 1, D), to which the first block's output is added.
        ffn: whether the MLP follows.
        after: smoothers applied to the output.
        layout: guide whose patch grid the output has; the attention rule of the (single) block then
            gives one row per patch of the guide.
        layout_output: the guide's output that the rule reads (`Trace.guide`), so that the guide does
            not have to run for another one.
        block: "pool" reads in the attention pool of a tower that has one (SigLIP, PE, CoCa) instead of
            its last block: the rule's weights mix the pool's values of the last block's output. A pool
            has no residual; a residual other than the default is applied to what single tokens
            contribute to the pool.
        pool_keys: the q and k for the rule in a pool: "pool" uses the pool's keys for both, because its
            only query is learned; "last" uses those of the last block.

    Raises:
        ValueError: for a pool without a rule, or in place of blocks other than the last.
    """

    blocks: Some[int] = (-1,)
    source: Source | None = None
    keep_cls: bool = True
    before: Sequence[Smoother] = ()
    attention: Rule | None = None
    residual: Residual | None = own_tokens
    ffn: bool = True
    after: Sequence[Smoother] = ()
    layout: str | None = None
    layout_output: str | None = None
    block: Literal["last", "pool"] = "last"
    pool_keys: Literal["pool", "last"] = "pool"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block == "last":
            return
        if self.attention is None:
            raise ValueError(
                "block='pool' needs an attention rule: the pool's own query gives only one vector for "
                "the whole image"
            )
        if tuple(self.blocks) != (-1,):
            raise ValueError(
                f"block='pool' replaces only the last block: expected blocks=(-1,), got {self.blocks}"
            )

    def __call__(self, trace: Trace) -> Tokens:
        """The tokens read, (B, T or N, D), before the final projection."""
        if self.block == "pool":
            return self._in_pool(trace)
        blocks = [trace.layer(i) for i in self.blocks]
        source = self.source(trace) if self.source else trace.entering(blocks[0])
        x = source if self.keep_cls else source.only_patches()
        for smooth in self.before:
            x = smooth(x, trace)
        carry = self.residual(x, source) if self.residual else None
        layout = trace.guide(self.layout, self.layout_output) if self.layout else None
        for i in blocks:
            if i != blocks[0]:
                x = trace.entering(i)
                x = x if self.keep_cls else x.only_patches()
            y = trace.vit.blocks[i].read(
                x,
                residual=carry,
                attention=self.attention,
                ffn=self.ffn,
                trace=trace,
                layout=layout,
            )
            carry = y.data
        for smooth in self.after:
            y = smooth(y, trace)
        return y

    def _in_pool(self, trace: Trace) -> Tokens:
        vit, rule = trace.vit, self.attention
        if vit.pool is None or rule is None:
            raise ValueError(
                "block='pool': this tower has no attention pool (those of SigLIP, PE and CoCa have "
                "one); use block='last'"
            )
        source = self.source(trace) if self.source else trace.leaving()
        x = source if self.keep_cls else source.only_patches()
        for smooth in self.before:
            x = smooth(x, trace)
        heads = residual = None
        if self.pool_keys == "last":
            last = len(vit.blocks) - 1
            entered = trace.entering(last)
            heads = vit.blocks[last].heads(entered if self.keep_cls else entered.only_patches())
        if self.residual and getattr(self.residual, "fn", self.residual) is not own_tokens:
            residual = self.residual(vit.pooled(x), vit.pooled(source))
        y = vit.pool.read(
            x.with_data(vit.ln_post(x.data)),
            attention=rule,
            trace=trace,
            heads=heads,
            residual=residual,
            layout=trace.guide(self.layout, self.layout_output) if self.layout else None,
        )
        for smooth in self.after:
            y = smooth(y, trace)
        return replace(y, pooled=True)


@dataclass(frozen=True)
class Method(_Fields):
    """Everything that distinguishes one training-free method from another.

    Attributes:
        edits: edits of the trunk, in order.
        image: stage that transforms the tokens of all windows of an image before they are read.
        readouts: `Readout`s, or ops of the kind "reader"; their outputs are summed.
        weights: factors for the readouts' outputs, which are then normalised, projected and summed; by
            default they are summed, normalised and projected.
        comparison: (features, trace) -> query logits; cosines with the text bank by default.
        refiners: refiners of the query logits (B, Q, h, w), in order.
        decision: (merged logits, size, classes) -> class scores; None for the engine's softmax over
            queries and the best query of each class.
        surgery: edits of the weights, made once per model on a copy that shares all other weights.
        positions: rule that resamples the position embedding for another grid; None for the tower's
            own.
        pool_mlp: whether features go through the MLP of the tower's attention pool (SigLIP, PE), if it
            has one; TextRegion leaves it out.
        depth: number of blocks that the layer numbers refer to; they are moved to the same relative
            depth in a deeper model. None takes them literally, as the released codes do.
        direct: whether logits on a grid of the whole image are resized directly to the output size,
            not via the size of the network's input.
        vote: "regions" finally gives all pixels of a region their most frequent label;
            "all_but_smallest" excludes the region with the smallest id instead of id 0.
    """

    edits: Sequence[Purify | Edit] = ()
    image: Stage | None = None
    readouts: Some[Readout | Reader] = field(default_factory=lambda: (Readout(),))
    weights: Sequence[float] = ()
    comparison: Comparison = cosines
    refiners: Sequence[Refiner] = ()
    decision: Decision | None = None
    surgery: Sequence[Surgery] = ()
    positions: Positions | None = None
    depth: int | None = 12
    pool_mlp: bool = True
    direct: bool = False
    vote: Literal["no", "regions", "all_but_smallest"] = "no"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({getattr(readout, "block", "last") for readout in self.readouts}) > 1:
            raise ValueError("readouts of the last block and of the pool cannot be summed")
        if self.weights and len(self.weights) != len(self.readouts):
            raise ValueError(
                f"weights={self.weights}: expected one for each of the {len(self.readouts)} readouts"
            )
        if needs(self.edits, "whole"):
            raise ValueError(
                f"edits={self.edits}: one of their ops declares whole=True, but the trunk runs on only "
                "some of the windows at a time: use it in `image`, `readouts`, `comparison` or "
                "`refiners`"
            )

    def features(
        self, vit: VisionTransformer, image: Tensor, **context: Any
    ) -> tuple[Tokens, Trace]:
        """Dense features in CLIP's joint space.

        Args:
            vit: the frozen image tower.
            image: normalised images, (B, 3, H, W).
            **context: further fields of the `Trace`, e.g. `text`.

        Returns:
            Tokens of width C, not normalised, and the trace of the run.
        """
        trace = self.run(vit, image, **context)
        return self.read(trace), trace

    def logits(
        self, vit: VisionTransformer, image: Tensor, text: Tensor, **context: Any
    ) -> tuple[Tensor, Trace]:
        """Refined query logits of every patch.

        Args:
            vit, image, **context: as in `features`.
            text: unit query features, (Q, C) float32.

        Returns:
            (B, Q, h, w) float32, and the trace of the run.
        """
        trace = self.run(vit, image, text=text, **context)
        return self.read_logits(trace), trace

    def run(
        self, vit: VisionTransformer, image: Tensor, *, portion: int | None = None, **context: Any
    ) -> Trace:
        """Runs only the trunk, with edits; arguments as in `features`.

        Args:
            portion: number of images that go through the network together; all by default.
        """
        if not self.pool_mlp and (vit.pool is None or vit.pool.mlp is None):
            raise ValueError("pool_mlp=False: this tower has no MLP in an attention pool")
        if self.reads_clip and not vit.blocks:
            raise LayerError(
                "weights='none', but this method uses CLIP: name weights, e.g. 'ViT-B/16' (methods "
                "without CLIP: sam3, segearth_ov3, activesam)"
            )
        vit, regions = self.operate(vit), context.pop("regions", None)

        def parts(of: Tensor) -> Sequence[Tensor]:
            return [of] if portion is None else of.split(portion)

        images = parts(image)
        traces = [
            vit.trace(
                each,
                self.edits,
                positions=self.positions,
                depth=self.depth,
                pool_mlp=self.pool_mlp,
                regions=ids,
                **context,
            )
            for each, ids in zip(
                images, [None] * len(images) if regions is None else parts(regions), strict=True
            )
        ]
        return Trace.joined(traces)

    def read(self, trace: Trace) -> Tokens:
        """Applies the readouts to a trace that this method, or one with an equal `trunk`, has run.

        Returns tokens of the trace's windows or, if the method reads the whole image, of the image,
        (1, T, C).
        """
        if self.needs_whole and trace.whole is None:
            return Tokens.cat([self.read(image) for image in trace.alone()])
        seen = self.seen(trace)
        first, *rest = (readout(seen) for readout in self.readouts)
        if self.weights:
            projected = (trace.project(x).data for x in (first, *rest))
            terms = [w * x for w, x in zip(self.weights, projected, strict=True)]
            return first.with_data(torch.stack(terms).sum(0))
        for other in rest:
            first = first.with_data(first.data + other.data)
        return trace.project(first)

    def seen(self, trace: Trace) -> Trace:
        """The trace that readouts and refiners use: `trace`, transformed by `image` if that is set."""
        stage = self.image
        if stage is None:
            return trace
        return trace._compute_once(("image", stage), lambda: stage(trace), words=True)

    def read_logits(self, trace: Trace) -> Tensor:
        """Refined query logits (B, Q, h, w) of a trace (see `read`), which needs text features."""
        if self.needs_whole and trace.whole is None:
            return torch.cat([self.read_logits(image) for image in trace.alone()])
        return self.compare(self.read(trace), trace)

    def compare(self, features: Tokens, trace: Trace) -> Tensor:
        """Refined query logits (B, Q, h, w) of features that `read` has returned for a trace."""
        if self.needs_whole and trace.whole is None:
            alone = enumerate(trace.alone())
            return torch.cat([self.compare(features[i : i + 1], image) for i, image in alone])
        trace = self.seen(trace)
        logits = _maps(self.comparison, self.comparison(features, trace), features.data.shape[0])
        for refine in self.refiners:
            logits = _maps(refine, refine(logits, trace), logits.shape[0])
        return logits

    @cached_property
    def reads_clip(self) -> bool:
        """Whether it uses CLIP's tokens; if not, it also runs with weights "none"."""
        return any(getattr(each, "fn", each) is not embedded_patches for each in self.readouts)

    @cached_property
    def words_in_trunk(self) -> bool:
        """Whether the run of the trunk depends on words; if not, `Trace.with_words` can change them."""
        return needs_words(self.edits)

    @cached_property
    def words_in_readouts(self) -> bool:
        """Whether the result of `read` depends on words."""
        return needs_words((self.image, self.readouts))

    @cached_property
    def needs_whole(self) -> bool:
        """Whether it needs all windows of an image in one trace."""
        return self.image is not None or needs(
            (self.readouts, self.comparison, self.refiners), "whole"
        )

    @cached_property
    def needs_regions(self) -> bool:
        """Whether it needs an id map of the image's regions."""
        return self.vote != "no" or needs(
            (self.edits, self.image, self.readouts, self.comparison, self.refiners), "regions"
        )

    @property
    def trunk(self) -> Hashable:
        """A key: methods with equal trunks produce the same trace and can share a run."""
        return self.edits, self.surgery, self.positions, self.depth, self.pool_mlp

    def operate(self, vit: VisionTransformer) -> VisionTransformer:
        """The model with this method's surgery, or `vit` itself if there is none.

        The latest copies of each model are cached until its weights change.

        Raises:
            ValueError: if the weights are 8-bit.
        """
        if not self.surgery:
            return vit
        if vit.is_int8:
            raise ValueError(
                "this method edits float weights, which an int8 model lacks: use precision='fp32'"
            )
        key = (self.surgery, self.depth)
        with _OPERATED_LOCK:
            copies = _OPERATED.setdefault(vit, OrderedDict())
            state = state_key(vit)
            made_for, operated = copies.pop(key, (None, None))
            if operated is None or made_for != state:
                # the copy shares all parameters except those that the surgery replaces
                operated = copy.deepcopy(vit, {id(p): p for p in vit.parameters()})
                for operation in self.surgery:
                    operation(operated, self.depth)
            copies[key] = (state, operated)
            if len(copies) > COPIES_KEPT:
                copies.popitem(last=False)
        return operated


def _maps(part: object, logits: Tensor, given: int) -> Tensor:
    """Checks that a part returns as many maps as it was given, or one of the image.

    Otherwise it has combined windows with the features of an image that was joined from them.
    """
    count = logits.shape[0]  # not `len`, which an export with a dynamic batch cannot have
    if count != given and count != 1:
        raise ValueError(f"{part}: got {given} maps and returned {count}; {ONE_BY_ONE}")
    return logits


def build_method(method: str | Mapping[str, Any] | Method, **knobs: Any) -> Method:
    """Builds a method from a preset's name or a config.

    Args:
        method: name of a preset; `dict(type=name, knob=value, ...)`; a composition
            `dict(type="Method", readouts=[...], ...)`; or a `Method`, returned as it is.
        **knobs: knobs of the preset. Every preset that has no knob of that name itself also takes
            `depth`, `positions`, `pool_mlp` and `comparison` (see `Method`), `block` and `pool_keys` of
            its readouts (see `Readout`), `refiners` to apply after its own, and `stitched`, which
            joins the windows of an image into one grid before they are read (`sfp.ops.image.canvas`).

    Raises:
        ValueError: for unknown presets, ops or knobs; the message names the valid ones.

    Example:
        >>> build_method("sclip").readouts[0].attention
        self_self(pairs=('qq', 'kk'))
    """
    if isinstance(method, Method):
        if knobs:
            raise ValueError(
                f"knobs {sorted(knobs)} cannot be set on a method that is already built"
            )
        return method
    return build_dataclass(Method, composition(method, **knobs))


def check_needs(method: Method, guides: Collection[str] | None, regions: Any) -> None:
    """Checks that the guides and regions that a method needs are given, before anything is loaded.

    Args:
        method: the method.
        guides: names of the given external encoders.
        regions: the source of regions, or None.

    Raises:
        GuideError, RegionsError: if they are not; the message says what to pass.
    """
    given = () if guides is None or isinstance(guides, str) else guides
    for name in sorted(guides_of(method) - {*given}):
        raise no_guide(name, given)
    if method.needs_regions and regions is None:
        raise RegionsError(NO_REGIONS)


def self_contained_methods(guides: Collection[str] = ()) -> list[str]:
    """Names of the presets that by default need no regions, and no external encoder but `guides`.

    Args:
        guides: names of the available encoders.
    """
    methods = {name: build_method(name) for name in list_methods()}
    return [n for n, m in methods.items() if guides_of(m) <= set(guides) and not m.needs_regions]
