"""The contract of all registered ops and methods. A new one is tested by its line in `EXAMPLES`.

A batch of two equals two singles, on grids of any shape; inputs stay as they were; shapes and types
are those of the kind; half precision gives finite numbers.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import sfp
from sfp.functional.windows import WindowGrid
from sfp.methods.region_memory import write_memory
from sfp.registry import METHODS, OPS, bind, needs, needs_words
from sfp.trace import Trace, Words
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")

GRIDS = [
    (5, 9),
    (16, 4),
]  # wide; as many tokens as the native one, on which test_methods.py has all
QUERIES = 5

SELF = dict(type="self_self", pairs=["kk"])
CUT = dict(layer=8, cut=0.2, fill=dict(type="neighbour_mean"))
SIMILARITY = dict(type="similarity", **CUT)
COSINES = dict(type="head_cosine", subtract_cls=True)
EXPERTS = str(Path(tempfile.mkdtemp()) / "experts.json")  # for `expert_probabilities`
Path(EXPERTS).write_text(
    json.dumps(dict(templates=["a {}.", "the {}."], experts={w: [int(w > "b")] for w in "abcde"}))
)
GENERAL = str(Path(EXPERTS).with_name("hypernyms.json"))  # for `active_maps`
Path(GENERAL).write_text(json.dumps(dict(a=["letter"], c=["letter", "sign"])))
MEMORY = Path(EXPERTS).with_name("memory.safetensors")  # for `remembered_regions`
write_memory(
    MEMORY,
    tiny.queries(9, seed=1, width=3),
    tiny.queries(9, seed=2),
    tiny.clip().visual,
    guide="colours",
    output="None",
)
REMEMBERED = dict(memory=str(MEMORY), guide="colours", output=None)
MEAN = dict(type="mean_of_blocks")
SPREAD = dict(type="sinkhorn", affinity=dict(type="mean_attention"))
FEEDBACK = dict(type="semantic_feedback", source=dict(type="read_last", attention=SELF))
GUIDED = dict(affinity=dict(type="guide_similarity", guide="colours"), guide="colours")

SCOPE = dict(type="region_scope", guide="colours")

# kind -> op -> settings to test it with. Knobs without a default have to be there.
EXAMPLES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "detector": {
        "overshadowed": [{}, dict(pairs=["qq", "kk", "vv"])],
        "som": [{}, dict(gain=1.5, top_k=10), dict(gain=0.0)],
        "l2_norm": [{}, dict(top_k=1)],
        "lof": [{}, dict(neighbours=5, contamination=0.2)],
        "attention_received": [{}, dict(above=1.5, top_k=5)],
        "channel_share": [
            dict(factor=2.5),
            dict(channels="loudest", count=2, factor=3.0),
            dict(channels=[3, 7], factor=1.5),
        ],
        "cls_attention": [{}, dict(top_k=2)],
        "cls_self_ratio": [{}, dict(above=1.5, top_k=5)],
        "dbscan": [{}, dict(eps=1.2, share=0.05)],
        "hdbscan": [{}, dict(share=0.05, selection="leaf")],
        "isolation_forest": [{}, dict(trees=20, contamination=0.1, seed=1)],
        "lof_textbook": [{}, dict(neighbours=5, contamination=0.1)],
        "optics": [{}, dict(xi=0.2, share=0.05)],
        "weight_norm_channel": [{}, dict(channels=2, above=2.0)],
    },
    "mitigator": {
        "neighbour_mean": [{}, dict(alone="keep"), dict(alone="zero")],
        "inpaint": [{}],
        "box_blend": [{}, dict(share=0.9)],
        "mask_attention": [{}],
        "median": [{}],
        "nearest": [{}],
        "zero": [{}],
    },
    "edit": {
        "reread": [
            dict(block=-2, attention=SELF),
            dict(block=3, attention=dict(type="identity")),
        ],
    },
    "affinity": {
        "guide_similarity": [dict(guide="colours"), dict(guide="bright")],
        "head_cosine": [
            {},
            dict(layer=-1),
            dict(subtract_cls=True),
            dict(unit_rows=True),
            dict(product=True),
            dict(concat=True, layer=-1, unit_rows=True),  # one head here: concat alone is no change
        ],
        "semantic_feedback": [
            dict(source=FEEDBACK["source"]),
            dict(source=FEEDBACK["source"], temp_thd=0.9, blur=2.0, logit_scale=80.0),
            dict(source=FEEDBACK["source"], blur=1.0, pamr_steps=2, pamr_dilations=[1]),
        ],
        "sinkhorn": [
            dict(affinity=dict(type="mean_attention")),
            dict(affinity=dict(type="mean_attention"), rounds=1, square=False),
        ],
        "source_similarity": [dict(source=MEAN), dict(source=MEAN, cut=0.4)],
        "similarity": [dict(layer=3), CUT, dict(CUT, fill_from=4)],
        "mean_attention": [{}, dict(first=5, last=8)],
    },
    "attention": {
        "aligned_keys": [{}, dict(alpha=0.5), dict(steps=5)],
        "feedback_keys": [
            dict(feedback=FEEDBACK),
            dict(feedback=FEEDBACK, share=0.2, gain=1.0, std=2.0),
        ],
        "cosine_attention": [dict(concat=True)],
        "word_feedback": [
            GUIDED,
            dict(GUIDED, lam=1.0, keep=0.9),
            dict(GUIDED, gain=1.0, centre=1.0, first_scale=5.0, uniform_scale=2.0),
        ],
        "self_correlating": [{}, dict(gain=2.0)],
        "region_scope": [
            dict(guide="colours"),
            dict(guide="bright", output=None, gain=2.0, eps=None),
            dict(guide="colours", eps=0.02, unsegmented="smallest"),
        ],
        "proxy_attention": [GUIDED, dict(GUIDED, gain=6.0, centre=1.0)],
        "scaled": [dict(rule=SELF, gain=2.0)],
        "self_self": [{}, dict(pairs=["qk"]), dict(pairs=["qq", "kk", "vv"])],
        "affinity_attention": [
            dict(affinity=SIMILARITY),
            dict(affinity=dict(type="mean_attention"), gain=2.0, centre=1.2),
        ],
        "unrotated": [dict(rule=SELF)],
        "average": [
            dict(rules=[dict(type="self_self", pairs=["vv"])]),
            dict(rules=[SELF, dict(type="affinity_attention", affinity=SIMILARITY)]),
        ],
        "fuse_layers": [
            dict(rule=SELF, layers=[6, 7], share=0.5),
            dict(rule=SELF, layers=[3], share=0.2, pairs=["qq", "vv"], head_average=True),
        ],
        "identity": [{}],
        "mean_of_layers": [{}, dict(pair="qk")],
        "neighbour": [{}, dict(std=1.5, pair="qk")],
        "neighbour_only": [{}, dict(std=1.5)],
        "normalised_self_self": [{}, dict(iterations=0, temperature=5.0)],
    },
    "source": {
        "read_last": [dict(attention=SELF), dict(attention=SELF, reduced=False)],
        "mean_of_blocks": [
            {},
            dict(detector=dict(type="l2_norm"), mitigator=dict(type="box_blend")),
        ],
        "stitched_blocks": [{}, dict(count=2), dict(count=3, one_head=False, floor=True)],
        "late_layers": [{}, dict(count=2)],
        "layer_sum": [dict(layers=[4]), dict(layers=range(3, 10))],
    },
    "smoother": {
        "aggregate": [dict(affinity=SIMILARITY), dict(affinity=dict(type="mean_attention"))],
        "native_cls": [{}],
        "global_aggregation": [{}, dict(gain=2.0)],
        "stitch": [dict(floor=True)],
        "weighted_sum": [dict(affinity=SIMILARITY)],
    },
    "image": {
        "canvas": [{}, dict(floor=True)],
    },
    "reader": {
        "embedded_patches": [{}],
        "region_pool": [
            {},
            dict(beta=0.3, threshold=None, ffn=True),
            dict(threshold=0.3, unit_values=True, halves=True, resample="bilinear"),
        ],
        "stitched_region_tokens": [
            dict(guide="colours"),
            dict(guide="bright", output=None, eps=2.0),
            dict(guide="colours", eps=None, unsegmented="smallest", floor=True),
        ],
        "stitched_values": [
            dict(attention=SELF),
            dict(attention=dict(type="proxy_attention", **GUIDED), layout="colours"),
            dict(attention=SCOPE, layout="colours", layout_output="q+k", floor=True),
        ],
        "last_of_layers": [{}],
        "sam_correlation": [
            dict(guide="colours", sam=None),
            dict(guide="colours", gain=6.0, centre=1.0, factor=0.5, sam="sam"),
            dict(guide="colours", negative=0.6, factor=3.0, halves=True, floor=True),
        ],
        "proxy_anchors": [
            dict(guide="colours", threshold=0.9, beta_share=1.0, gamma_share=5.0),
            dict(guide="bright", rounds=0, row_mean=False),
            dict(guide="colours", beta=1.2, gamma=3.0),
        ],
        "region_tokens": [
            dict(guide="colours"),
            dict(guide="bright", output=None, eps=2.0),
            dict(guide="colours", eps=None, unsegmented="smallest"),
        ],
    },
    "residual": {
        "own_tokens": [{}],
        "cls_token": [{}, dict(scale=0.0)],
    },
    "comparison": {
        "active_maps": [
            {},
            dict(prune_above=2, prune_side=None, prune_quantile=0.3, prune_most=2),
            dict(score=0.6, neighbours=0, names=False, windows=True),
            dict(guide="sam3", hypernyms=GENERAL),
        ],
        "cosines": [{}],
        "expert_probabilities": [
            dict(experts=EXPERTS, logit_scale=5.0),
            dict(experts=EXPERTS, cells=2),
        ],
        "layer_probabilities": [
            {},
            dict(cut=0.9, select=3, logit_scale=10.0, background=True),
        ],
        "region_logits": [
            {},
            dict(beta=0.3, threshold=None, scale=3.0, bias=0.1),
            dict(threshold=0.3, halves=True, resample="bilinear", attention=dict(type="identity")),
        ],
        "sam3_maps": [
            {},
            dict(guide="sam3", score=0.2, fuse="once", most=1),
            dict(fuse="twice", windows=True),
        ],
        "present_words": [
            {},
            dict(image_weight=0.5, move=0.5, height=0.9, linkage="ward", nearest=5, scope="window"),
        ],
    },
    "decision": {
        "as_scores": [{}, dict(rest=True)],
        "denoised_scores": [dict(least=-1.0), dict(least=0.9)],
        "margin_scores": [{}],
        "kept_classes": [
            dict(score_thd=0.05),
            dict(score_thd=-1.0, background_thd=0.0, background=True),
            dict(score_thd=0.1, background_thd=0.2, background=True, min_max=True),
        ],
    },
    "refiner": {
        "class_purification": [
            dict(affinity=SPREAD, redundant=0.0),
            dict(affinity=SPREAD, redundant=0.1, logit_scale=20.0, background=True),
            dict(affinity=SPREAD, redundant=-1.0, ambiguous=0.1, box_share=0.6, crop_side=32),
            dict(affinity=SPREAD, redundant=-1.0, edges="whole", crop_text=None),
        ],
        "cls_product": [dict(source=dict(type="read_last", attention=SELF))],
        "cluster_vote": [
            dict(affinity=COSINES),
            dict(affinity=COSINES, eps=1.5, min_samples=5, vote="mean"),
            dict(affinity=COSINES, noise=dict(type="som"), noise_layer=-2, cells=2),
            dict(affinity=GUIDED["affinity"], guide="colours", eps=1.0),
            dict(affinity=COSINES, source=dict(type="read_last", attention=SELF), min_samples=2),
        ],
        "text_aware_propagation": [
            {},
            dict(size=16, logit_scale=10.0, inter_class=False),
            dict(size=16, edge=1.0, tau=2.0, steps=5),
        ],
        "global_bias": [{}, dict(weight=0.5)],
        "key_smoothing": [{}, dict(ks_thresh=0.3, scale=40.0)],
        "propagate_patches": [
            dict(guide="colours", output=None),
            dict(guide="colours", neighbours=9, power=1.0, decay=0.1, alpha=0.5, steps=3),
        ],
        "propagate_pixels": [{}, dict(side=5, tau=0.2, alpha=0.5, steps=3)],
        "selected_classes": [
            dict(guide="clipseg"),
            dict(share=0.5, local=0.4, guided=0.3, overall="mean_logit", cells=2),
            dict(share=0.9, most=3, repair=False),
            dict(share=0.2, local=0.25, scale=400.0, sure=0.3),
        ],
        "query_probabilities": [{}, dict(scale=10.0)],
        "prompt_denoising": [{}, dict(pd_thresh=0.9, scale=10.0)],
        "region_mean": [{}, dict(least=1.5)],
        "remembered_regions": [
            dict(REMEMBERED, count=3),
            dict(REMEMBERED, count=5, share=0.9),
        ],
        "remove_redundancy": [{}, dict(temperature=5.0)],
    },
    "points": {
        "cluster_points": [
            dict(affinity=COSINES, eps=1.5),
            dict(affinity=COSINES, eps=1.5, min_samples=5, count=3),
            dict(affinity=COSINES, eps=1.6, noise=dict(type="som"), noise_layer=-2),
            dict(affinity=GUIDED["affinity"], guide="colours", eps=1.0),
        ],
        "grid_points": [{}, dict(side=3)],
    },
    "surgery": {
        "suppress_channel": [{}, dict(blocks=[2, 7], channel=3)],
    },
    "positions": {
        "resample_positions": [{}, dict(offset=0.0, antialias=True), dict(mode="bilinear")],
    },
}
OPERATIONS = [
    (kind, name, knobs)
    for kind, ops in EXAMPLES.items()
    for name, settings in ops.items()
    for knobs in settings
]
EACH = pytest.mark.parametrize(
    ("kind", "name", "knobs"),
    [pytest.param(*case, id=f"{case[1]}-{i}") for i, case in enumerate(OPERATIONS)],
)


def colours(images: Tensor, output: str | None = None, ones: float = 0.0) -> sfp.Tokens:
    """A stand-in for an external encoder: each patch's mean colour."""
    maps = torch.nn.functional.avg_pool2d(images, 8) + ones
    return sfp.Tokens(maps.flatten(2).mT, (maps.shape[2], maps.shape[3]), prefix=0)


def bright(images: Tensor, output: str | None = None) -> sfp.Tokens:
    return colours(images, ones=1.0)


for guide in (colours, bright):
    guide.across = lambda entering, join: join(entering)


GUIDES = dict(
    sam=tiny.Sam(),
    sam3=tiny.Sam3(),
    clipseg=tiny.Scorer(),
    colours=colours,
    bright=bright,
    dino=colours,
)
"""What methods and ops may ask for besides the text; "dino" is proxyclip's default."""


def ids(images: Tensor) -> Tensor:
    """Regions: columns of 16 pixels; in images that are dark on the whole, none where it is dark."""
    numbers = torch.arange(images.shape[3]) // 16 + 1
    bright = images.mean((1, 2, 3)) > 0
    return numbers * (bright[:, None, None] | (images.mean(1) > 0))


def without_example() -> set[str]:
    """Registered ops that `EXAMPLES` leaves out, or has under another kind."""
    kinds = {name: OPS.module_dict[name].kind for name in sfp.list_ops()}
    return {name for name, kind in kinds.items() if not EXAMPLES.get(kind, {}).get(name)}


@dataclass
class Given:
    """All that an op can be called with, from one run of the trunk."""

    trace: sfp.Trace
    tokens: sfp.Tokens  # those entering the last block
    heads: dict[str, sfp.Heads]  # of the last block, with and without CLS
    mask: Tensor
    logits: Tensor

    def tensors(self) -> dict[str, Tensor]:
        trace, tokens, heads = self.trace, self.tokens, self.heads
        return {
            **{f"outputs[{i}]": tokens.data for i, tokens in enumerate(trace.outputs)},
            **{f"masks[{i}]": mask for i, mask in trace.masks.items()},
            **{f"{k}.{x}": getattr(h, x) for k, h in heads.items() for x in ("q", "k", "v", "x")},
            **{f"vit.{k}": v for k, v in trace.vit.state_dict().items()},
            "embedded": trace.embedded.data,
            "image": trace.image,
            "text": trace.text,
            "tokens": tokens.data,
            "mask": self.mask,
            "logits": self.logits,
        }


def given(clip: sfp.CLIP, image: Tensor, *, seed: int = 0, index: Any = None) -> Given:
    edit = sfp.Purify(
        (4, -2), bind(dict(type="l2_norm", top_k=6)), bind(dict(type="neighbour_mean"))
    )
    text = tiny.queries(QUERIES, seed).to(torch.promote_types(image.dtype, torch.float32))
    names = tuple("edcba" if seed else "abcde")
    words = Words(names, lambda templates: torch.stack([text, 2 * text - text.roll(1, 0)]))
    context = dict(words=words, text=text, index=index, guides=GUIDES, regions=ids(image), depth=12)
    trace = clip.visual.trace(image, [edit], **context)
    tokens = trace.outputs[-1]
    last = clip.visual.blocks[-1]
    heads = {"all": last.heads(tokens), "patches": last.heads(tokens.only_patches())}
    logits = torch.einsum("bchw,qc->bqhw", clip.visual.project(tokens).as_map().to(text), text)
    return Given(trace, tokens, heads, trace.masks[10], logits)


def run(kind: str, op: Any, on: Given) -> dict[str, Any]:
    """The results of an op, by the way it was called."""
    if not needs(op, "whole"):
        return run_on_batch(kind, op, on)
    if kind == "image":
        seen = [op(twice(one)) for one in on.trace.alone()]
        layers = range(on.trace.depth_run)
        return {f"layer {i}": torch.cat([x.entering(i).data for x in seen]) for i in layers}
    alone = []
    for i, one in enumerate(on.trace.alone()):
        own = slice(i, i + 1)
        seen = replace(on, trace=one, logits=on.logits[own], tokens=on.tokens[own])
        alone.append(run_on_batch(kind, op, seen))
    return {name: _cat([x[name] for x in alone]) for name in alone[0]}


def _cat(results: list[Any]) -> Any:
    cat = sfp.Tokens.cat if isinstance(results[0], sfp.Tokens) else torch.cat
    return cat(results)


def run_on_batch(kind: str, op: Any, on: Given) -> dict[str, Any]:
    trace, tokens = on.trace, on.tokens
    if kind == "detector":
        return {f"layer {i}": op(trace, i) for i in (0, 10)}
    if kind == "mitigator":
        corner = torch.zeros_like(on.mask).unflatten(1, tokens.grid)
        corner[:, :3, :3] = True  # the outermost of them has outliers around it only
        masks = dict(some=on.mask, none=on.mask & False, all=on.mask | True)
        masks["corner"] = corner.flatten(1)
        return {name: op(tokens, mask) for name, mask in masks.items()}
    if kind == "edit":
        return {f"layer {i}": op(trace, i) for i in (3, 10)}
    if kind in ("affinity", "source", "reader"):
        result = op(trace)
        return {"patches" if getattr(result, "prefix", 1) == 0 else "": result}
    if kind == "attention":
        return {name: op(heads, trace) for name, heads in on.heads.items()}
    if kind == "smoother":
        return {"all": op(tokens, trace), "patches": op(tokens.only_patches(), trace)}
    if kind == "residual":
        return {"all": op(tokens, tokens), "patches": op(tokens.only_patches(), tokens)}
    if kind in ("comparison", "decision", "refiner"):
        return {"": of_logits(kind, op, on)}
    if kind == "points":
        each = op(trace)
        assert len(each) == len(trace.image)
        return {"": torch.cat(each)}  # as many of each image as it has
    assert kind == "positions"
    return {"": op(torch.randn(8, 8, 64, dtype=tokens.data.dtype), tokens.grid)}


def of_logits(kind: str, op: Any, on: Given) -> Tensor:
    """What is between features and class scores."""
    trace, (height, width) = on.trace, on.logits.shape[-2:]
    if kind == "refiner":
        return op(on.logits, trace)
    if kind == "comparison":
        pooled = op.fn.__name__ == "region_logits"  # features of regions, not of patches
        tokens = bind(dict(type="region_pool"))(trace) if pooled else on.tokens
        return op(trace.vit.project(tokens), trace)
    index = trace.index or range(QUERIES)
    size = (2 * height, 2 * width)
    sheets = [WindowGrid.over(size, 0, 1).sheet(own, size) for own in on.logits.split(1)]
    return torch.stack([op(sheet, sheet.rows, index)(0, size[0]) for sheet in sheets])


def twice(trace: sfp.Trace) -> sfp.Trace:
    """Two windows, a part of a patch apart, that look alike."""
    height, width = trace.image.shape[-2:]
    both = Trace.joined([trace, trace])
    both.whole = WholeImage(
        WindowGrid((height, width + 5), (height, width), [0], [0, 5]),
        torch.nn.functional.pad(trace.image[0], (0, 5)),
        regions=torch.nn.functional.pad(trace.regions[0], (0, 5)),
    )
    return both


def values(result: Any) -> Tensor:
    return result.data if isinstance(result, sfp.Tokens) else result


@pytest.fixture(scope="module")
def clip() -> sfp.CLIP:
    return tiny.clip()


@pytest.fixture(scope="module")
def exact() -> sfp.CLIP:
    return tiny.clip().double()


@pytest.fixture(scope="module")
def pictures(exact) -> dict[tuple[int, int], list[Given]]:
    """Per grid: two images as one batch, and each of them alone, in float64."""
    sets = {}
    with torch.no_grad():
        for rows, columns in GRIDS:
            pair = tiny.images(2, rows * 8, columns * 8).double()
            pair[1] *= 3
            sets[rows, columns] = [given(exact, x) for x in (pair, pair[:1], pair[1:])]
    return sets


def test_every_op_has_an_example():
    assert not without_example(), "name them, with knobs, in EXAMPLES of this file"
    registered = {(OPS.module_dict[name].kind, name) for name in sfp.list_ops()}
    listed = {(kind, name) for kind, ops in EXAMPLES.items() for name in ops}
    assert listed == registered


@pytest.mark.parametrize("kind", [kind for kind, ops in EXAMPLES.items() if ops])
def test_no_kind_is_empty(kind):
    names = sfp.list_ops(kind)
    assert names == sorted(EXAMPLES[kind])
    assert set(names) < set(sfp.list_ops())


def test_an_op_shows_up_once_it_is_registered():
    assert "brightest" not in sfp.list_ops()
    try:

        @sfp.op("detector")
        def brightest(trace: sfp.Trace, layer: int, *, above: float) -> Tensor:
            return trace.outputs[layer].patches.mean(-1) > above

        assert "brightest" in sfp.list_ops("detector")
        assert "brightest" not in sfp.list_ops("mitigator")
        assert without_example() == {"brightest"}  # so the test above tells its author
        fill = dict(type="neighbour_mean")
        edits = [dict(layers=[3], detector=dict(type="brightest", above=0.0), mitigator=fill)]
        tokens, trace = sfp.build_method(dict(edits=edits)).features(
            tiny.clip().visual, tiny.images(1)
        )
        assert trace.masks[3].any()
        assert tokens.data.isfinite().all()
    finally:
        OPS.module_dict.pop("brightest", None)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_a_batch_of_two_is_two_singles(kind, name, knobs, grid, pictures):
    if kind in ("surgery", "positions"):
        return  # weights have no batch
    if name == "optics":
        return  # its order hangs on ties that the last bit decides; test_detectors.py has equal input
    op = bind(dict(type=name, **knobs), kind)
    batch, *singles = (run(kind, op, on) for on in pictures[grid])
    for call, both in batch.items():
        each = [values(single[call]) for single in singles]
        torch.testing.assert_close(values(both), torch.cat(each), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", sfp.list_ops())
def test_every_knob_is_tried(name):
    fn = OPS.module_dict[name]
    parameters = inspect.signature(fn).parameters.values()
    knobs = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    tried = {knob for setting in EXAMPLES[fn.kind][name] for knob in setting}
    assert tried == knobs, "a knob has to appear in one of the settings of EXAMPLES"


@pytest.mark.slow
@pytest.mark.parametrize("name", sfp.list_ops())
def test_settings_differ_in_what_they_give(name, pictures, exact):
    """So no knob is dead; a setting that changes nothing tests nothing."""
    kind = OPS.module_dict[name].kind
    ops = [bind(dict(type=name, **knobs), kind) for knobs in EXAMPLES[kind][name]]
    on = pictures[5, 9][0]
    results = []
    for op in ops:
        if kind == "surgery":
            weights = sfp.Method(surgery=(op,)).operate(exact.visual).state_dict()
            results.append(torch.cat([x.flatten() for x in weights.values()]))
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                given = run(kind, op, on)
            results.append(torch.cat([values(x).double().flatten() for x in given.values()]))
    for a, b in itertools.combinations(results, 2):
        assert a.shape != b.shape or (a - b).abs().max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", sfp.list_ops())
def test_words_change_what_says_that_it_needs_them_and_nothing_else(name, pictures, exact):
    """What says that it does not is kept when words change: were that wrong, answers would be."""
    kind = OPS.module_dict[name].kind
    if kind in ("surgery", "positions", "residual", "mitigator", "decision"):
        assert not OPS.module_dict[name].words  # they see no trace
        return
    one = pictures[5, 9][0]
    two = given(exact, one.trace.image, seed=1, index=(0, 1, 1, 2, 2))
    two.logits = one.logits  # what a refiner is given comes from the words, of course
    changed = []
    for knobs in EXAMPLES[kind][name]:
        op = bind(dict(type=name, **knobs), kind)
        before, after = run(kind, op, one), run(kind, op, two)
        same = [torch.equal(values(before[k]), values(after[k])) for k in before]
        assert needs_words(op) or all(same)
        changed += [not each for each in same]
    assert any(changed) == needs_words(op)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def typed(request, clip) -> tuple[sfp.CLIP, Given, dict[str, Tensor]]:
    """A model of a precision, a run of it, and copies of what no op may change."""
    clip = copy.deepcopy(clip).to(request.param)
    with torch.no_grad():
        on = given(clip, tiny.images(2, 40, 72))
    return clip, on, {key: value.clone() for key, value in on.tensors().items()}


@pytest.mark.slow
@EACH
def test_shapes_types_and_inputs(kind, name, knobs, typed):
    clip, on, before = typed
    op = bind(dict(type=name, **knobs), kind)
    if kind == "surgery":
        check_surgery(clip, op, on.trace.image)
    else:
        for call, result in run(kind, op, on).items():
            check_result(kind, call, result, on)
    for key, value in on.tensors().items():
        assert torch.equal(value, before[key]), f"{name} changed {key}"


def check_result(kind: str, call: str, result: Any, on: Given) -> None:
    """The declared type, shape and precision of a kind, and finite numbers."""
    batch, patches, width = on.tokens.patches.shape
    dtype = on.tokens.data.dtype
    if kind in ("edit", "mitigator", "source", "smoother"):
        assert isinstance(result, sfp.Tokens)
        prefix = 0 if call == "patches" else 1
        assert (result.grid, result.prefix) == (on.tokens.grid, prefix)
    elif kind in ("reader", "image"):
        assert isinstance(result, (sfp.Tokens, Tensor))  # on any grid
        data = values(result)
        assert data.shape[2] == width
        assert data.dtype == dtype
        assert data.isfinite().all()
        return
    else:
        assert isinstance(result, Tensor)
    data = values(result)
    if kind == "detector":
        assert data.dtype == torch.bool
        assert data.shape == (batch, patches)
        return
    assert data.is_floating_point()
    assert data.isfinite().all()
    if kind == "points":
        assert data.ndim == 3
        assert data.shape[2] == 2
        assert len(data)  # or the example tests nothing
        assert ((data > 0) & (data < 1)).all()
        return
    tokens = patches + (call != "patches")
    if kind == "affinity":
        assert data.dtype == torch.float32  # whatever the weights are
        assert data.shape == (batch, patches, patches)
    elif kind == "attention":
        heads = on.heads[call].q.shape[1]
        assert data.dtype in (torch.float32, dtype)
        rows = (tokens, patches)  # a guide's grid has no prefix
        assert data.shape in [(batch, h, n, tokens) for h in (1, heads) for n in rows]
    elif kind in ("comparison", "decision", "refiner"):
        assert data.dtype == torch.float32
        assert data.shape[:2] == on.logits.shape[:2]
        assert data.ndim == 4
    elif kind == "positions":
        assert data.dtype == dtype
        assert data.shape == (*on.tokens.grid, width)
    elif kind == "residual":
        assert data.dtype == dtype
        assert data.shape in [(batch, n, width) for n in (1, tokens)]
    else:
        assert data.dtype == dtype
        assert data.shape == (batch, tokens, width)


def check_surgery(clip: sfp.CLIP, op: Any, image: Tensor) -> None:
    """Surgery replaces weights of a copy; `Method.operate` keeps the original as it was."""
    before = {key: value.clone() for key, value in clip.visual.state_dict().items()}
    method = sfp.Method(surgery=(op,))
    operated = method.operate(clip.visual).state_dict()
    assert any(not torch.equal(operated[key], value) for key, value in before.items())
    assert all(torch.equal(clip.visual.state_dict()[k], value) for k, value in before.items())
    assert method.features(clip.visual, image)[0].data.isfinite().all()


# discrete choices (outliers, cuts) may fall otherwise in half precision: most must agree
PRECISIONS = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.15}


@pytest.fixture(scope="module")
def halves(clip) -> dict[torch.dtype, sfp.CLIP]:
    return {dtype: copy.deepcopy(clip).to(dtype) for dtype in PRECISIONS}


@pytest.mark.slow
@pytest.mark.parametrize("name", sfp.list_methods())
def test_methods_in_half_precision(name, halves, clip, exact):
    image, text = tiny.images(2, 40, 72), tiny.queries(QUERIES)
    before = image.clone()
    method = sfp.build_method(name)
    context = dict(guides=GUIDES, regions=ids(image), words=tiny.words(QUERIES))
    reference, _ = method.logits(exact.visual, image.double(), text.double(), **context)
    scale = max(float(reference.abs().max()), 1.0)  # more than 1 where logits have propagated
    for dtype, tolerance in PRECISIONS.items():
        visual = halves[dtype].visual
        logits, trace = method.logits(visual, image, text, **context)
        assert logits.dtype == torch.float32, dtype
        assert logits.isfinite().all(), dtype
        assert trace.outputs[-1].data.dtype == dtype
        assert torch.equal(image, before), f"{name} changed the image"
        state = visual.state_dict()
        for key, value in clip.visual.state_dict().items():
            assert torch.equal(state[key], value.to(dtype)), f"{name} changed {key}"
        assert (logits - reference).abs().median() < tolerance * scale, dtype


@pytest.mark.slow
@pytest.mark.parametrize("name", sfp.list_methods())
def test_methods_compare_grids_not_token_counts(name, exact):
    """The peers add the 8x8 position embedding to a 16x4 grid, since both have 64 tokens."""
    image = tiny.images(1, 128, 32).double()
    method = sfp.build_method(name, **(dict(beta=0) if name == "textregion" else {}))  # no square
    context = dict(text=tiny.queries(QUERIES).double(), guides=GUIDES, regions=ids(image))
    ours, _ = method.features(exact.visual, image, **context)
    resampled = copy.deepcopy(exact.visual)
    table = resampled.positional_embedding
    rule = method.positions or bind(dict(type="resample_positions"), "positions")
    grid = rule(table[1:].unflatten(0, (8, 8)), (16, 4)).flatten(0, 1)
    resampled.positional_embedding = torch.nn.Parameter(torch.cat([table[:1], grid]), False)
    resampled.native_grid = (16, 4)
    expected, _ = method.features(resampled, image, **context)
    torch.testing.assert_close(ours.data, expected.data, atol=1e-9, rtol=1e-9)
    raw = copy.deepcopy(exact.visual)
    raw.native_grid = (16, 4)  # what the peers do
    peers, _ = method.features(raw, image, **context)
    assert (peers.data - ours.data).abs().max() > 1e-2


MAY_BE_EMPTY = {  # a list of no layers, which leaves a part of the method out
    ("suppress_channel", "blocks"),
    ("gclip", "blocks"),
    ("gclip", "cs_blocks"),
    ("itaclip", "layers"),
}


def test_empty_lists_are_refused_by_name_when_a_method_is_built():
    empty = set()
    for kind, ops in EXAMPLES.items():
        for name, settings in ops.items():
            for knob in lists(OPS.get(name)):
                if (name, knob) in MAY_BE_EMPTY:
                    empty.add((name, knob))
                    continue
                with pytest.raises(ValueError, match=rf"{name}.*{knob}=.*at least 1 item"):
                    bind(dict(settings[-1], type=name, **{knob: []}), kind)
    for name, preset in METHODS.module_dict.items():
        for knob in lists(preset):
            if (name, knob) in MAY_BE_EMPTY:
                empty.add((name, knob))
                method = sfp.build_method(name, **{knob: []})
                assert method.features(tiny.clip().visual, tiny.images(1))[0].data.isfinite().all()
                continue
            with pytest.raises(ValueError, match=rf"{name}.*{knob}=.*at least 1 item"):
                sfp.build_method(name, **{knob: []})
    assert empty == MAY_BE_EMPTY


def lists(fn: Any) -> list[str]:
    """The knobs of an op or preset that take a list."""
    types = {name: fn.__annotations__[name] for name in sfp.registry.knobs(fn)}
    return [name for name, hint in types.items() if re.search("Sequence|Some|list", hint)]
