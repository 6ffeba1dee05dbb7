"""Every golden case of CorrCLIP, OV-Stitcher, GLA-CLIP, FSA and RADSeg, through the public path."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conformance import Case, cases
from torch import Tensor

import sfp
from sfp.clip.blocks import Block
from sfp.engine import Engine, Queries
from sfp.functional.attention import centred_softmax
from sfp.functional.regions import components, region_distances
from sfp.functional.windows import LogitSheet, WindowGrid, nearest
from sfp.guides import TransformersGuide
from sfp.methods import corrclip, fsa, gla_clip, ov_stitcher, radseg
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")

STEP = {"t4": 4, "t8": 8, "t16": 16, "t64": 64}


def stored(case: Case, name: str) -> list[tuple[str, int]]:
    """Outputs of a case by what they are of, with the step between the rows that they have."""
    found = [(o, STEP.get(o.rpartition("_")[2], 1)) for o in case.outputs]
    return [(o, n) for o, n in found if o in (name, f"{name}_t{n}")]


def check_rows(case: Case, **values: Tensor) -> None:
    """Values (rows, ...) against whichever rows the case stores."""
    for name, value in values.items():
        outputs = stored(case, name)
        assert outputs, f"{case.name} stores no {name}: {list(case.outputs)}"
        for output, step in outputs:
            case.check(output, value[::step])


def check_read(case: Case, method: sfp.Method, trace: sfp.Trace) -> None:
    """The features of a window, and its logits at its own size."""
    read = method.read(trace)
    check_rows(case, feats=read.data[0])
    height, width = case.entry["image_hw"]
    logits = torch.nn.functional.interpolate(
        method.compare(read, trace), (height, width), mode="bilinear"
    )
    case.check("logits_s8", logits[0, :, ::8, ::8])


class Playback(torch.nn.Module):
    """A guide whose outputs for the windows of one image are stored, in their order."""

    def __init__(self, case: Case, sides: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.case = case
        side = sides or [length // case.entry["guide_patch"] for length in window_size(case)]
        self.grid = (side[0], side[1])
        self.windows: Iterator[int] = itertools.count()

    def rewind(self) -> None:
        self.windows = itertools.count()

    def forward(self, image: Tensor, output: str | None = None) -> sfp.Tokens:
        parts = ["f"] if output is None else output.split("+")
        stored = [self.case.inputs[f"guide/{self.case.entry['input']}/{part}"] for part in parts]
        numbers = [next(self.windows) for _ in image]
        data = sum(x.float() for x in stored)[numbers]
        return sfp.Tokens(data, self.grid, prefix=0)


def window_size(case: Case) -> list[int]:
    """Rows and columns of the (padded) windows of a case."""
    sides = case.entry["image_hw"]
    if "crop" not in case.entry:
        return sides
    return [-(-min(case.entry["crop"], side) // 56) * 56 for side in sides]


def ids_of(case: Case) -> Tensor:
    return case.inputs[f"ids/{case.entry['input']}"].long()


def text_of(case: Case) -> Tensor:
    return case.inputs[case.entry["text"]]


def run_engine(
    case: Case, method: sfp.Method, guide: torch.nn.Module | None, **settings: object
) -> tuple[Engine, LogitSheet, Queries]:
    """An end-to-end case through the engine, as users run it."""
    index = case.manifest["query_class"][case.entry["query_class"]]
    engine = Engine(
        case.clip,
        precision="fp32",
        guides={} if guide is None else dict(dino=guide),
        slide_crop=case.entry["crop"],
        slide_stride=case.entry["stride"],
        logit_scale=case.hyper["logit_scale"],
        prob_thd=case.hyper.get("prob_thd", 0.0),
        pad_windows=56,
        window_batch=1,
        **settings,  # type: ignore[arg-type]
    )
    queries = Queries(text_of(case), tuple(index))
    regions = [ids_of(case)] if method.needs_regions else None
    ((sheet,),) = engine.logits(
        [method], case.image, [case.entry["ori_shape"]], queries, regions=regions
    )
    return engine, sheet, queries


def check_end(case: Case, engine: Engine, sheet: LogitSheet, queries: Queries) -> None:
    """Merged logits, probabilities, and labels before and after the vote of regions."""
    if "logits_s8" in case.outputs:
        case.check("logits_s8", sheet.rows(0, sheet.size[0])[:, ::8, ::8])
    found = engine.label(case.image[0], sheet, queries.index, scores=True)
    assert found.scores is not None
    case.check("probs_s16", found.scores[:, ::16, ::16])
    case.check("pred", found.labels)
    if "pred_before_vote" in case.outputs:
        before = replace(sheet, regions=None)
        case.check("pred_before_vote", engine.label(case.image[0], before, queries.index).labels)


# -- CorrCLIP ------------------------------------------------------------------------------------


def corrclip_of(case: Case) -> sfp.Method:
    return sfp.build_method("corrclip", unsegmented="smallest" if case.official else "zero")


def same_regions(found: Tensor, expected: Tensor, none: int) -> None:
    """Two maps of regions that differ in their numbers only; 0 in ours stands for `none`."""
    assert torch.equal(found == 0, expected == none)
    pairs = torch.stack([found, expected.long()], 1).unique(dim=0)
    assert len(pairs) == len(found.unique()) == len(expected.unique())


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("corrclip/window"))
def test_golden_corrclip_window(name):
    case = Case(name)
    guide = Playback(case)
    method = corrclip_of(case)
    trace = method.run(
        case.clip.visual,
        case.image,
        text=text_of(case),
        guides=dict(dino=lambda image, output: (guide.rewind(), guide(image, output))[1]),
        regions=ids_of(case)[None],
    )
    unsegmented = dict(method.readouts[0].attention.knobs)["unsegmented"]
    merging = dict(guide="dino", output="q+k", eps=0.2, unsegmented=unsegmented)
    ids = corrclip.merged_regions(trace, **merging)[0]
    on_guide = nearest(trace.regions, guide.grid).flatten(1)[0]
    assert torch.equal(on_guide, case.expected("ids_guide_grid").long())
    none = int(on_guide.min()) if case.official else 0
    same_regions(ids, case.expected("ids_merged"), none)
    own = corrclip.on_patches(trace, ids[None], guide.grid)
    same_regions(own[0], case.expected("ids_clip_grid"), none)

    features = corrclip.unit_guide(trace, guide="dino", output="q+k")[0]
    mean = (features @ features.T).mean()
    case.check("sim_mean", mean[None])
    weights = corrclip.scoped_rows(features, ids, slice(None), 4.0)
    check_rows(case, attn=weights, allowed_count=(weights > 0).sum(1))
    if "region_distance" in case.outputs:
        distances = region_distances(features, corrclip.known_regions(on_guide, unsegmented))
        case.check("region_distance", distances)
        case.check("region_cluster", components(distances <= 0.2))

    expected_ids = case.expected("ids_clip_grid").long()
    numbers = [int(own[0][expected_ids == i][0]) for i in case.expected("region_ids").tolist()]
    tokens = corrclip.tokens_of_regions(trace, own)[0]
    case.check("region_tokens_12", tokens[numbers])
    main, spatial, semantic = (readout(trace).data[0] for readout in method.readouts)
    check_rows(case, z_main=main, z_spatial=spatial, z_semantic=semantic)
    check_read(case, method, trace)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("corrclip/e2e"))
def test_golden_corrclip(name):
    case = Case(name)
    check_end(case, *run_engine(case, corrclip_of(case), Playback(case)))


# -- GLA-CLIP ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("glaclip/"))
def test_golden_gla_clip(name):
    case = Case(name)
    hyper = case.hyper
    knobs = dict(
        threshold=hyper["threshold"],
        rounds=hyper["iters"] if hyper["proxy_sim"] else 0,
        beta=None if hyper["dynamic_beta"] else 1.2,
        gamma=None if hyper["dynamic_gamma"] else 3.0,
        beta_share=hyper["beta_alpha"],
        gamma_share=hyper["gamma_alpha"],
        row_mean=hyper["token_norm"],
    )
    guide = Playback(case)
    method = sfp.build_method("gla_clip", **knobs)
    engine, sheet, queries = run_engine(case, method, guide)
    check_end(case, engine, sheet, queries)

    guide.rewind()
    whole = WholeImage(engine._grid(case.image[0]), case.image[0])
    windows = torch.stack([whole.cut(place)[0] for place in whole.grid.places])
    trace = method.run(
        case.clip.visual, windows, whole=whole, guides=dict(dino=guide), text=queries.features
    )
    keys = torch.nn.functional.normalize(trace.guide("dino").data, dim=-1).flatten(0, 1)
    looks, counts = gla_clip.proxies(keys, knobs["threshold"], knobs["rounds"])
    similarity = looks @ keys.T
    centre = similarity.mean(1, keepdim=True)
    case.check("row_mean", centre[:, 0])
    if knobs["rounds"]:
        case.check("proxy_count", counts)
        once = gla_clip.proxies(keys, knobs["threshold"], 1)[1]
        case.check("proxy_count_round1", once)
        check_rows(case, proxy_sim=similarity)
    beta = 1 + hyper["beta_alpha"] * math.log(1 + len(windows)) if knobs["beta"] is None else 1.2
    gamma = 1 + hyper["gamma_alpha"] / counts if knobs["gamma"] is None else 3 + 0 * counts
    mean = centre.clamp_min(0) if knobs["row_mean"] else similarity.mean()
    weights = gla_clip.anchored_softmax(similarity, mean, beta, gamma[:, None])
    check_rows(case, attn=weights, kept_count=(weights > 0).sum(1))
    check_rows(case, z=method.readouts[0](trace).data.flatten(0, 1))
    check_rows(case, feats=method.read(trace).data.flatten(0, 1))


# -- FSA -----------------------------------------------------------------------------------------


def fsa_of(case: Case) -> sfp.Method:
    hyper = case.hyper
    proxy = dict(beta=hyper["beta"], gamma=hyper["gamma"])
    if not hyper["fsa"]:
        return sfp.build_method("proxyclip", **proxy)
    return sfp.build_method("fsa", lam=hyper["lambda"], keep=hyper["keep"], **proxy)


@pytest.mark.parametrize("name", cases("fsa/window"))
def test_golden_fsa_window(name):
    case = Case(name)
    method = fsa_of(case)
    trace = method.run(
        case.clip.visual, case.image, text=text_of(case), guides=dict(dino=Playback(case))
    )
    similarity = trace.once(sfp.registry.bind(dict(type="guide_similarity", guide="dino")))
    first = centred_softmax(similarity, case.hyper["gamma"], case.hyper["beta"])
    check_rows(case, attn0=first[0])
    if case.hyper["fsa"]:
        last = case.clip.visual.blocks[-1]
        heads = last.heads(trace.entering(11).only_patches())
        p, u = (x[0] for x in fsa.first_looks(heads, trace, first, "dino"))
        check_rows(case, first_logits=20 * p)
        case.check("uniform_logits", 35 * u[0])
        kl = fsa.divergence((20 * p - 35 * u).softmax(-1)[None])[0]
        close = fsa.feedback_weights(1 / (1 + kl), case.hyper["lambda"], case.hyper["keep"])
        check_rows(case, kl=kl, kept_count=(close > 0).sum(1), attn_new=close)
    check_rows(case, z=method.readouts[0](trace).data[0])
    check_read(case, method, trace)


@pytest.mark.parametrize("name", cases("fsa/e2e"))
def test_golden_fsa(name):
    case = Case(name)
    check_end(case, *run_engine(case, fsa_of(case), Playback(case)))


# -- OV-Stitcher ---------------------------------------------------------------------------------


class StoredBlock(TransformersGuide):
    """A vision transformer of `transformers` with the stored last block and the tokens before it."""

    def __init__(self, case: Case) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=96,
            patch_size=case.entry["guide_patch"],
            layer_norm_eps=1e-6,
        )
        model = transformers.ViTModel(config, add_pooling_layer=False).eval()
        weights = {
            name.partition("/")[2]: x.float()
            for name, x in case.inputs.items()
            if name.startswith("dino_block/")
        }
        names = {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.proj": "attention.o_proj",
        }
        state = {}
        for name, value in weights.items():
            part, _, kind = name.rpartition(".")
            if part == "attn.qkv":
                for x, rows in zip("qkv", value.chunk(3), strict=True):
                    state[f"layers.0.attention.{x}_proj.{kind}"] = rows
            elif part == "norm":
                state[f"layernorm.{kind}"] = value
            else:
                state[f"layers.0.{names.get(part, part)}.{kind}"] = value
        unknown = model.load_state_dict(state, strict=False).unexpected_keys
        assert not unknown
        super().__init__(model=model)
        self.play = Playback(case)
        self.stored = case.inputs[f"guide/{case.entry['input']}/x"].float()

    def entering(self, image: Tensor) -> sfp.Tokens:
        numbers = [next(self.play.windows) for _ in image]
        return sfp.Tokens(self.stored[numbers], self.play.grid, prefix=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("ovstitcher/"))
def test_golden_ov_stitcher(name):
    case = Case(name)
    unsegmented = "smallest" if case.official else "zero"
    method = sfp.build_method("ov_stitcher", unsegmented=unsegmented)
    guide = StoredBlock(case)
    engine, sheet, queries = run_engine(case, method, guide)
    check_end(case, engine, sheet, queries)

    guide.play.rewind()
    ids = nearest(ids_of(case), tuple(case.image.shape[-2:]))
    whole = WholeImage(engine._grid(case.image[0]), case.image[0], regions=ids)
    cut = [whole.cut(place) for place in whole.grid.places]
    trace = method.run(
        case.clip.visual,
        torch.stack([window for window, _ in cut]),
        regions=torch.stack([part for _, part in cut if part is not None]),
        whole=whole,
        guides=dict(dino=guide),
        text=queries.features,
    )
    seen = method.seen(trace)
    source = dict(guide="dino", output="stitched")
    features = corrclip.unit_guide(seen, **source)[0]
    check_rows(case, guide=features)
    case.check("sim_mean", (features @ features.T).mean()[None])
    on_grid = nearest(seen.regions, seen.guide("dino", "stitched").grid).flatten(1)[0]
    assert torch.equal(on_grid, case.expected("ids_guide_grid").long())
    merged = corrclip.merged_regions(seen, eps=0.2, unsegmented=unsegmented, **source)[0]
    none = int(on_grid.min()) if case.official else 0
    same_regions(merged, case.expected("ids_merged"), none)
    distances = region_distances(features, corrclip.known_regions(on_grid, unsegmented))
    case.check("region_distance", distances)
    case.check("region_cluster", components(distances <= 0.2))
    weights = corrclip.scoped_rows(features, merged, slice(None), 4.0)
    check_rows(case, attn=weights, allowed_count=(weights > 0).sum(1))

    own = ov_stitcher.window_regions(
        trace, merged.unflatten(0, seen.guide("dino", "stitched").grid)
    )
    expected = case.expected("ids_merged").long()
    numbers = [int(merged[expected == i][0]) for i in case.expected("region_ids").tolist()]
    tokens = corrclip.tokens_of_regions(trace, own, int(merged.max()) + 1)
    case.check("region_tokens", tokens[:, numbers])
    spatial = method.readouts[1].source(seen)
    check_rows(case, spatial_tokens=spatial.data[0])
    z_main, z_spatial, z_semantic = (readout(seen).data[0] for readout in method.readouts)
    check_rows(case, z_main=z_main, z_spatial=z_spatial, z_semantic=z_semantic)
    check_rows(case, feats=method.read(trace).data[0])


# -- RADSeg --------------------------------------------------------------------------------------


def unit_mean(unit: Tensor) -> Tensor:
    return (unit @ unit.T).mean()


@pytest.mark.parametrize("name", cases("radseg/scra"))
def test_golden_radseg_scra(name):
    """A block of other widths, made of the stored weights."""
    case = Case(name)
    x, weights = case.inputs["scra/x"].float(), case.inputs
    heads = case.hyper["heads"]
    block = Block(48, heads)
    state = {
        "in_proj_weight": weights["scra/qkv.weight"],
        "in_proj_bias": weights["scra/qkv.bias"],
        "out_proj.weight": weights["scra/proj.weight"],
        "out_proj.bias": weights["scra/proj.bias"],
    }
    block.attn.load_state_dict({key: value.float() for key, value in state.items()})
    block.ln_1 = torch.nn.Identity()
    trace = SimpleNamespace(vit=SimpleNamespace(blocks=[block]))
    tokens = sfp.Tokens(x, (6, 6), prefix=1)
    own = radseg.self_correlating(block.heads(tokens), trace, gain=case.hyper["scale"])
    for output, step in stored(case, "attn"):
        case.check(output, own.flatten(0, 1)[:, ::step])
    case.check("kept_count", (own > 0).sum(-1).flatten(0, 1))
    rule = functools.partial(radseg.self_correlating, gain=case.hyper["scale"])
    out = block.read(tokens, residual=None, attention=rule, ffn=False, trace=trace)
    case.check("out", out.data)


@pytest.mark.parametrize("name", cases("radseg/clip_scra"))
def test_golden_radseg_clip(name):
    case = Case(name)
    rule = dict(type="self_correlating")
    method = sfp.build_method(dict(readouts=[dict(attention=rule)]))
    trace = method.run(case.clip.visual, case.image)
    last = case.clip.visual.blocks[-1]
    heads = last.heads(trace.entering(11))
    kept = (radseg.self_correlating(heads, trace) > 0).sum(-1)[0]
    case.check("kept_count", kept)
    reduced = sfp.build_method(dict(readouts=[dict(attention=rule, residual=None, ffn=False)]))
    check_rows(case, attention_out=reduced.readouts[0](trace).data[0])
    case.check("feats", method.read(trace).data[0])


def radseg_tokens(maps: Tensor) -> sfp.Tokens:
    return sfp.Tokens(maps.flatten(2).mT, (maps.shape[2], maps.shape[3]), prefix=0)


@pytest.mark.parametrize("name", cases("radseg/scga"))
def test_golden_radseg_scga(name):
    case = Case(name)
    tokens = radseg_tokens(case.inputs[f"rad/{case.entry['input']}"].float())
    knobs = {"gain": case.hyper["scale"]} if "scale" in case.hyper else {}
    case.check("out", radseg.global_aggregation(tokens, None, **knobs).as_map())
    unit = torch.nn.functional.normalize(tokens.data[0], dim=-1)
    case.check("sim_mean", unit_mean(unit)[None])
    weights = radseg.global_rows(unit, slice(None), unit_mean(unit), knobs.get("gain", 10.0))
    case.check("kept_count", (weights > 0).sum(1)[None])
    for output, step in stored(case, "attn"):
        case.check(output, weights[None, ::step])


@pytest.mark.parametrize("name", cases("radseg/e2e"))
def test_golden_radseg(name):
    """From the windows' features on: the tower, its text and its adaptor's head are given."""
    case = Case(name)
    entry, weights = case.entry, case.inputs
    source = f"rad/{entry['input']}"
    height, width = weights[f"img_hw/{entry['input']}"].tolist()
    size = radseg.stride_size((height, width), entry["crop"], entry["stride"])
    grid = WindowGrid.over(size, entry["crop"], entry["stride"])
    windows = weights[f"{source}/windows"].float()
    side = [length // entry["patch"] for length in grid.window]
    tokens = sfp.Tokens(windows, (side[0], side[1]), prefix=0)
    trace = SimpleNamespace(whole=WholeImage(grid, torch.zeros(3, *size)))
    joined = radseg.stitch(tokens, trace)
    case.check("stitched", joined.as_map()[0])
    mixed = radseg.global_aggregation(joined, trace)
    case.check("scga", mixed.as_map()[0])
    head = torch.nn.functional.linear(
        mixed.data, weights["rad/head.weight"].float(), weights["rad/head.bias"].float()
    )
    logits = sfp.tokens.cosine_logits(mixed.with_data(head), weights["rad/text"])
    probs = radseg.query_probabilities(logits, trace)
    case.check("patch_probs", probs[0])
    sheet = replace(grid.whole, direct=True).sheet(probs, tuple(entry["ori_shape"]))
    least = case.hyper.get("denoise", 0.5)
    case.check("query_max", sheet.rows(0, sheet.size[0]).amax((1, 2)))
    index = range(probs.shape[1])
    scores = radseg.denoised_scores(sheet, sheet.rows, index, least=least)
    found = scores(0, sheet.size[0])
    case.check("probs_s16", found[:, ::16, ::16])
    case.check("pred", found.argmax(0))
