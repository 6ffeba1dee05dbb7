"""Golden cases of the methods that choose classes, adapt words or propagate logits (goldens2_b)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conformance import OWN, Case, cases, clip
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.engine import Engine, Queries
from sfp.functional.graphs import PixelGraph, lab_of_rgb, neighbour_graph, propagate
from sfp.functional.labels import Labels, assign, decided
from sfp.functional.regions import components
from sfp.functional.windows import WindowGrid, window_starts
from sfp.methods import cliper, floss, freecp, trident
from sfp.methods.object_presence import hierarchy, moved_words, present_words, winners
from sfp.methods.rfclip import box_blend, channel_share
from sfp.registry import Op
from sfp.trace import native_last
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")


def rfclip(case: Case, **knobs) -> sfp.Method:
    hyper = case.hyper
    return sfp.build_method(
        "rfclip",
        channels=hyper["sink_channels"],
        factor=hyper["factor"],
        blend=hyper["blend"],
        sim_cut=hyper["sim_cut"],
        **knobs,
    )


@pytest.mark.parametrize("name", cases("rfclip/"))
def test_golden_rfclip(name):
    case = Case(name)
    method = rfclip(case, dataset=None)
    tokens, trace = method.features(case.clip.visual, case.image)
    case.check("feats", tokens.patches[0])
    case.check("cls", trace.global_embedding())
    edit = method.edits[0]
    outliers = [trace.masks[i][0] for i in range(11)]
    trace.outputs.append(trace.entering(11).with_data(trace.once(native_last)))
    outliers.append(edit.detector(trace, 11)[0])
    trace.outputs.pop()
    case.check("outliers", torch.stack(outliers))
    (similar,) = (smooth for smooth in method.readouts[0].before)
    weights = trace.once(dict(similar.knobs)["affinity"])[0]
    case.check("sim_cut_q16", weights[::16])
    case.check("sim_count", (weights > 0).sum(-1))
    last = case.clip.visual.blocks[-1]
    for letter, readout in zip("ab", method.readouts, strict=True):
        source = readout.source(trace) if readout.source else trace.entering(11)
        read = similar(source, trace)
        case.check(f"read_{letter}_t16", read.data[0, ::16])
        rule = readout.attention(last.heads(read), trace)
        case.check(f"attn_{letter}_q16", rule[0, :, 1::16, 1:])


@pytest.mark.parametrize("name", cases("unit/rf_denoise/"))
def test_golden_rf_denoise(name):
    case = Case(name)
    tokens = sfp.Tokens(case.inputs[case.entry["input"]][None], tuple(case.hyper["grid"]))
    trace = sfp.Trace(clip().visual, torch.zeros(1), tokens)
    trace.outputs.append(tokens)
    channels, factor = case.hyper["sink_channels"], case.hyper["factor"]
    mask = channel_share(trace, 0, channels=channels, factor=factor)
    case.check("outliers", mask[0])
    case.check("out", box_blend(tokens, mask, share=case.hyper["blend"]).data[0])


@pytest.mark.parametrize("name", cases("presence/"))
def test_golden_presence(name, monkeypatch):
    case, hyper = Case(name), Case(name).hyper
    text, patches, image = (
        case.inputs[f"presence/{x}"] for x in case.entry["input"].removeprefix("presence/").split()
    )
    text = F.normalize(text, dim=-1)
    clusters = hierarchy(text, hyper["height"], hyper["linkage"])
    expected = case.expected("clusters")
    assert torch.equal(clusters[:, None] == clusters, expected[:, None] == expected)
    present = F.normalize(image, dim=-1) @ text.T
    case.check("g", present[0])
    case.check("moved", winners(present, clusters)[0])
    moved = moved_words(text, patches[None], present, clusters, move=hyper["a"], nearest=2)
    case.check("text_adjusted", moved[0])
    trace = sfp.Trace(clip().visual, torch.zeros(1), None, text=text)
    monkeypatch.setattr(trace, "image_embedding", lambda: image)
    knobs = dict(height=hyper["height"], linkage=hyper["linkage"])
    features = sfp.Tokens(patches[None], (1, len(patches)), prefix=0)
    logits = present_words(features, trace, image_weight=hyper["w"], move=hyper["a"], **knobs)
    case.check("logits", logits[0, :, 0].T)


FREECP_BASES: dict[str, str | dict] = {
    "ClearCLIP": "clearclip",
    "SCLIP": dict(readouts=[dict(attention=dict(type="self_self"), residual=None)]),
    "MaskCLIP": dict(readouts=[dict(attention=dict(type="identity"), residual=None)]),
}


def freecp_method(case: Case, folder: Path) -> tuple[sfp.Method, dict]:
    """The method, and its context: words, and the class of each."""
    hyper, text = case.hyper, F.normalize(case.inputs[case.entry["text"]], dim=-1)
    words = hyper["background_words"]
    sentences = F.normalize(case.inputs[case.entry["text_llm"]], dim=-1)
    save_file(dict(queries=sentences), folder / "llm.safetensors")
    method = sfp.build_method(
        "freecp",
        base=FREECP_BASES[hyper["base"]],
        redundant=hyper["rp"],
        ambiguous=hyper["ap"],
        background=words > 0,
        box_share=hyper["box_thd"],
        crop_side=hyper["crop_side"],
        crop_text=str(folder / "llm.safetensors"),
        logit_scale=float(case.clip.logit_scale.exp()),
    )
    classes = len(text) - words
    index = (*[0] * words, *range(1, classes + 1)) if words else tuple(range(classes))
    return method, dict(text=text, index=index)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("freecp/"))
def test_golden_freecp(name, tmp_path):
    case, hyper = Case(name), Case(name).hyper
    method, context = freecp_method(case, tmp_path)
    (refiner,) = method.refiners
    trace = method.run(case.clip.visual, case.image, **context)
    features = method.read(trace)
    probs = (dict(refiner.knobs)["logit_scale"] * method.comparison(features, trace)).softmax(1)[0]
    scaled = (probs - probs.min()) / (probs.max() - probs.min())
    case.check("probs_minmax", scaled)
    affinity = dict(refiner.knobs)["affinity"]
    case.check("attn_mean_r16", trace.once(dict(affinity.knobs)["affinity"])[0, ::16])
    case.check("affinity_r16", trace.once(affinity)[0, ::16])
    shown = slice(hyper["background_words"], None)
    mask = torch.zeros_like(scaled[shown], dtype=torch.uint8)
    for own, activation in zip(mask, scaled[shown], strict=True):
        for left, top, right, bottom in freecp.boxes(activation, hyper["box_thd"]):
            own[top:bottom, left:right] = 1
    case.check("box_mask", mask)
    refined = freecp.spread(scaled[shown], trace.once(affinity)[0], hyper["box_thd"])
    case.check("refined", refined)
    redundancy = freecp.redundancy(probs[shown], refined)
    case.check("redundancy", redundancy)
    kept = (redundancy > hyper["rp"]).nonzero()[:, 0]
    case.check("kept_1", kept)
    overlap = freecp.soft_iou(refined[kept])
    case.check("soft_iou", overlap)
    labels = components(overlap >= hyper["ap"])
    found = [
        box
        for group in ((labels == i).nonzero()[:, 0] for i in labels.unique())
        if len(group) > 1
        for box in freecp.boxes(refined[kept][group].mean(0), hyper["box_thd"])
    ]
    expected = {tuple(row) for row in case.expected("comp_boxes").tolist() if row[0] >= 0}
    assert set(found) == expected
    logits, _ = method.logits(case.clip.visual, case.image, **context)
    left = logits[0, shown].flatten(1).amax(1).nonzero()[:, 0]
    case.check("kept_2", left)
    out = F.interpolate(logits, case.image.shape[-2:], mode="bilinear", align_corners=False)
    case.check("out_s8", out[0, :, ::8, ::8])


def segmented(
    method: sfp.Method, case: Case, text: Tensor, index: tuple[int, ...], **settings
) -> tuple[Tensor, Labels]:
    """Merged logits (Q, H, W) at the original size and the labels, by the engine."""
    hyper, pixels = case.hyper, case.image[0]
    size = case.entry["ori_shape"] or pixels.shape[-2:]
    engine = Engine(
        case.clip,
        precision="fp32",
        slide_crop=hyper["crop"],
        slide_stride=hyper["stride"],
        logit_scale=hyper.get("logit_scale", 40),
        prob_thd=hyper.get("prob_thd", 0.0),
        **settings,
    )
    queries = Queries(F.normalize(text, dim=-1), index)
    ((sheet,),) = engine.logits([method], [pixels], [size], queries)
    labels = engine.label(pixels, sheet, index, method=method, scores=True)
    return sheet.rows(0, sheet.size[0]), labels


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("e2e/freecp/"))
def test_golden_freecp_end_to_end(name, tmp_path):
    case, hyper = Case(name), Case(name).hyper
    method, context = freecp_method(case, tmp_path)
    _, labels = segmented(method, case, context["text"], context["index"])
    case.check("scores_s16", labels.scores[:, ::16, ::16])
    case.check("pred", labels.labels.to(torch.uint8))
    grid = WindowGrid.over(case.image.shape[-2:], hyper["crop"], hyper["stride"])
    windows = torch.stack([grid.cut(case.image[0], place) for place in grid.places])
    logits, _ = method.logits(case.clip.visual, windows, **context)
    kept = logits[:, hyper["background_words"] :].flatten(2).amax(2) > 0
    case.check("kept_per_window", kept.to(torch.uint8))


@pytest.mark.parametrize("name", cases("unit/lposs_patch/"))
def test_golden_lposs_patch(name):
    case, hyper = Case(name), Case(name).hyper
    prefix = "lposs/" + name.rsplit("/", 1)[1]
    features, values, origins = (case.inputs[f"{prefix}_{x}"] for x in ("feats", "Y", "origins"))
    rows, columns = hyper["grid"]
    side = hyper["patch"]
    centres = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) * side + side / 2
    positions = (origins[:, None] + centres).flatten(0, 1)
    unit = F.normalize(features, dim=-1)
    graph = neighbour_graph(
        unit, positions, neighbours=hyper["k"], power=hyper["gamma"], decay=hyper["sigma"]
    )
    dense = graph.to_dense()
    case.check("Wn_r8", dense[::8])
    case.check("Wn_rowsum", dense.sum(1))
    alpha = hyper["alpha"]
    wide = graph.double()
    found = propagate(lambda x: wide @ x, values.double(), alpha=alpha, steps=hyper["maxiter"])
    case.check("F", found.float())
    exact = torch.linalg.solve(torch.eye(len(dense)) - alpha * dense.double(), values.double())
    case.check("F_dense", exact.float())
    torch.testing.assert_close(
        propagate(lambda x: wide @ x, values.double(), alpha=alpha, steps=1000, tolerance=1e-12),
        exact,
    )


@pytest.mark.parametrize("name", cases("unit/lposs_pixel/"))
def test_golden_lposs_pixel(name):
    case, hyper = Case(name), Case(name).hyper
    prefix = "lposs/" + name.rsplit("/", 1)[1]
    image = case.inputs[f"{prefix}_img"].permute(2, 0, 1).float() / 255
    lab = lab_of_rgb(image)
    case.check("lab", lab)
    scaled = lab / torch.tensor([100.0, 128.0, 128.0])[:, None, None]
    graph = PixelGraph.of_colours(scaled, side=hyper["side"], tau=hyper["tau"])
    size = image.shape[1:]
    dense = graph.spread(torch.eye(size.numel()).unflatten(1, size)).flatten(1)
    case.check(
        "Wn_r16", dense[::16, :40] if case.expected("Wn_r16").shape[1] == 40 else dense[::16]
    )
    case.check("Wn_rowsum", dense.sum(1))
    values = case.inputs[f"{prefix}_Y"]  # (pixels, Q)

    def spread(x: Tensor) -> Tensor:
        return graph.spread(x.T.unflatten(1, size)).flatten(1).T

    found = propagate(spread, values, alpha=hyper["alpha"], steps=hyper["maxiter"])
    case.check("F", found)


@pytest.mark.parametrize("name", cases("lposs/maskclip/"))
def test_golden_lposs_base(name):
    case = Case(name)
    text = F.normalize(case.inputs[case.hyper["text"]], dim=-1)
    method = replace(sfp.build_method("lposs"), refiners=())
    features, trace = method.features(case.clip.visual, case.image, text=text)
    case.check("feats", features.patches[0])
    case.check("Y", method.compare(features, trace)[0].flatten(1).T)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("e2e/lposs"))
def test_golden_lposs_end_to_end(name):
    """Windows that are no multiple of the patch are padded with black below and right, as released."""
    case, hyper = Case(name), Case(name).hyper
    step = hyper["image_step"]
    pixels = case.image[0, :, ::step, ::step]
    text = F.normalize(case.inputs[hyper["text"]], dim=-1)[: hyper["queries"]]
    guide = case.inputs[hyper["guide"].split()[0]]  # (windows, h, w, D)
    tokens = sfp.Tokens(guide.flatten(1, 2), guide.shape[1:3], prefix=0)
    grid = WindowGrid.over(pixels.shape[1:], hyper["crop"], hyper["stride"])
    short = -grid.window[0] % 16
    padded = replace(grid, window=tuple(side + short for side in grid.window))
    black = -torch.tensor(case.clip.mean) / torch.tensor(case.clip.std)
    windows = torch.stack(
        [
            F.pad(grid.cut(pixels, place) - black[:, None, None], (0, short, 0, short))
            + black[:, None, None]
            for place in grid.places
        ]
    )
    knobs = {k: hyper[k] for k in ("alpha",)}
    method = sfp.build_method(
        "lposs",
        neighbours=hyper["k"],
        power=hyper["gamma"],
        decay=hyper["sigma"],
        **knobs,
    )
    context = dict(
        guides=dict(dino=lambda image, output: tokens),
        whole=WholeImage(padded, pixels),
        normalisation=(case.clip.mean, case.clip.std),
    )
    logits, trace = method.logits(case.clip.visual, windows, text, **context)
    case.check("F_t8", logits.permute(0, 2, 3, 1).flatten(0, 2)[::8])
    size = tuple(case.entry["ori_shape"])
    if "lposs_plus" in name:
        plus = sfp.build_method(
            "lposs_plus", base=dict(refiners=[]), side=hyper["side"], tau=hyper["tau"]
        )
        trace.whole = WholeImage(grid, pixels)
        (refine,) = plus.refiners
        logits = refine(logits, trace)
        grid = replace(grid.whole, direct=False)
    merged = grid.sheet(logits, size).rows(0, size[0])
    words = hyper["background_words"]
    scores = torch.cat([merged[:words].amax(0, keepdim=True), merged[words:]])
    (sparse,) = (x for x in case.outputs if x.startswith("logits_s"))
    every = int(sparse.removeprefix("logits_s"))
    case.check(sparse, scores[:, ::every, ::every])
    case.check("pred", scores.argmax(0).to(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("e2e/rfclip/"))
def test_golden_rfclip_end_to_end(name):
    case, hyper = Case(name), Case(name).hyper
    names = json.loads((OWN[0] / "manifest.json").read_text())["names"]["multi"]
    index = tuple(i for i, synonyms in enumerate(names) for _ in synonyms)
    method = rfclip(
        case,
        image_weight=hyper["presence_w"],
        move=hyper["presence_a"],
        height=hyper["height"],
        scope="window" if hyper["global_cls"] == "window" else "image",
    )
    logits, labels = segmented(method, case, case.inputs[case.entry["text"]], index)
    case.check("logits_s16", logits[:, ::16, ::16])
    case.check("probs_s16", labels.scores[:, ::16, ::16])
    case.check("pred", labels.labels.to(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("cliper/"))
def test_golden_cliper(name):
    case, hyper = Case(name), Case(name).hyper
    post = hyper["post"] or dict(score_thd=0.0, bkg_thd=0.0, min_max=False)
    text = F.normalize(case.inputs[case.entry["text"].split()[0]], dim=-1)
    count, words = hyper["classes"], hyper["background_words"]
    text = torch.cat([text[count:], text[:count]])  # background first, as class 0
    index = (*[0] * words, *range(1, count + 1)) if words else tuple(range(count))
    pixels = case.image[..., : case.entry["size"][0], : case.entry["size"][1]]
    window, stride = hyper["window"] or 0, hyper["stride"] or 1
    grid = WindowGrid.over(pixels.shape[2:], window, stride)
    whole = WholeImage(grid, pixels[0])
    windows = torch.stack([whole.cut(place)[0] for place in grid.places])
    method = sfp.build_method(
        "cliper",
        cut=hyper["cut"],
        select=hyper["select_readout"],
        logit_scale=float(hyper["logit_scale"]),
        background=words > 0,
        score_thd=post["score_thd"],
        background_thd=post["bkg_thd"],
        min_max=post["min_max"],
    )
    context = dict(text=text, index=index, whole=whole)
    trace = method.run(case.clip.visual, windows, **context)
    logits = method.read_logits(trace)
    image = trace.of_image()
    total = sum(image.attention(i) for i in range(11))
    fused = []
    for _ in range(12):
        total, weights = cliper.fused_attention(total)
        fused.append(weights)
    case.check("fused_first_q16", fused[0][0, :, ::16])
    case.check("fused_last_q16", fused[-1][0, :, ::16])
    read, attention = image.once(Op(cliper.readouts))
    features = torch.stack([image.vit.project(x).patches[0] for x in read])
    case.check("readout_feats_t16", features[:, ::16])
    case.check("fused_mean_last_r16", attention[0, ::16])
    case.check("map", logits[0, words:])
    if hyper["post"] is None:
        return
    sheet = replace(grid.whole, direct=method.direct).sheet(logits, tuple(case.entry["ori_shape"]))
    case.check("scores", sheet.tiles.amax((0, 1))[words:])
    scores = method.decision(sheet, sheet.rows, index)(0, sheet.size[0])
    case.check("pred", scores.argmax(0).to(torch.uint8))


@pytest.mark.parametrize("name", cases("unit/floss_fusion/"))
def test_golden_floss_fusion(name):
    case, scale = Case(name), Case(name).hyper["logit_scale"]
    number = name.rsplit("/f", 1)[1]
    features, banks = (case.inputs[f"floss/{x}{number}"] for x in ("feats", "banks"))
    size = features.shape[1:]
    unit = F.normalize(features.flatten(1), dim=0)  # (C, P)
    logits = scale * (F.normalize(banks, dim=-1) @ unit)  # (K + 1, K, P)
    index = torch.arange(case.hyper["classes"])
    probs, claims = floss.fuse_experts(logits[:-1], logits[-1], index)
    case.check("claims", claims.unflatten(0, size))
    case.check("probs", probs.unflatten(1, size))
    case.check("pred", probs.argmax(0).unflatten(0, size).to(torch.uint8))
    found = floss.fit([unit.T], F.normalize(banks, dim=-1), index.tolist(), logit_scale=scale)
    case.check("mean_entropy", found.float().masked_fill(found.isinf(), 0))


class GivenSam(torch.nn.Module):
    """Stands in for SAM's guide: stored attention and values, in the order of calls."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.parts = parts

    def last_attention(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.parts.pop(0)


@pytest.mark.parametrize("name", cases("trident/"))
def test_golden_trident(name):
    case, hyper = Case(name), Case(name).hyper
    size = tuple(case.entry["network_size"])
    pixels = case.image
    if pixels.shape[2:] != size:
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
    guide = case.inputs[case.entry["guide"].split()[0]]  # (windows, D, h, w)
    tokens = sfp.Tokens(guide.flatten(2).mT, tuple(hyper["guide_grid"]), prefix=0)
    stored = case.entry["sam"]
    halves = "right half" in stored
    prefixes = [stored.split("_attn")[0]]
    if halves:
        prefixes.append("trident/" + stored.rsplit(" ", 1)[1])
    parts = [(case.inputs[f"{p}_attn"], case.inputs[f"{p}_v"]) for p in prefixes]
    negative = None if hyper["negative_threshold"] == "kept" else 0.6
    mixing = trident.agreeing_attention(
        parts[0][0], parts[0][1].flatten(1, 2), factor=hyper["cos_factor"], negative=negative
    )
    case.check("sam_affinity_r8", mixing[::8])
    crop = hyper["crop"] if isinstance(hyper["crop"], list) else [hyper["crop"]] * 2
    starts = [
        window_starts(side, part, hyper["stride"]) for side, part in zip(size, crop, strict=True)
    ]
    grid = WindowGrid(size, tuple(crop), *starts)
    whole = WholeImage(grid, pixels[0])
    windows = torch.stack([whole.cut(place)[0] for place in grid.places])
    text = F.normalize(case.inputs[case.entry["text"]], dim=-1)[: case.entry["queries"]]
    method = sfp.build_method(
        "trident",
        beta=hyper["beta"],
        gamma=hyper["gain"],
        factor=hyper["cos_factor"],
        negative=negative,
        halves=halves,
    )
    context = dict(
        guides=dict(dino=lambda image: tokens, sam=GivenSam(list(parts))), whole=whole, text=text
    )
    trace = method.run(case.clip.visual, windows, **context)
    (reader,) = method.readouts
    read = reader(trace)
    case.check("z_sam_t4", read.data[0, ::4])
    case.check("feats", trace.vit.project(read).data[0])
    logits = method.compare(trace.vit.project(read), trace)
    original = tuple(case.entry["ori_shape"])
    sheet = replace(grid.whole, direct=method.direct).sheet(logits, original)
    case.check("logits_s8", sheet.rows(0, original[0])[:, ::8, ::8])
    words = hyper["background_queries"]
    index = (*[0] * words, *range(1, len(text) - words + 1))
    reading = decided(sheet, None, index, hyper["logit_scale"], None)
    labels = assign(**reading, prob_thd=hyper["prob_thd"])
    case.check("pred", labels.labels.to(torch.uint8))
