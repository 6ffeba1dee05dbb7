"""Every golden case of NACLIP, ClearCLIP, GEM, CLIP Surgery and SC-CLIP, through the public path."""

from __future__ import annotations

import pytest
import torch
from conformance import MANIFEST, Case, cases, clip, image, inputs
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.methods.clip_surgery import remove_redundancy
from sfp.ops.detectors import lof_scores

pytestmark = pytest.mark.usefixtures("no_grad")


def min_max(maps: Tensor) -> Tensor:
    """Each map scaled to 0..1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low)


def features(case: Case, **knobs) -> tuple[sfp.Tokens, sfp.Trace]:
    method = sfp.build_method(case.name.split("/")[0], **case.hyper, **knobs)
    return method.features(case.clip.visual, case.image)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("naclip/"))
def test_golden_naclip(name):
    case = Case(name)
    case.check_features(features(case)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("clearclip/"))
def test_golden_clearclip(name):
    case = Case(name)
    case.check_features(features(case)[0].only_patches())


@pytest.mark.parametrize("name", cases("clearclip/MaskCLIP"))
def test_golden_maskclip_as_clearclip_reports_it(name):
    case = Case(name)
    method = sfp.build_method("maskclip", ignore_residual=case.hyper["ignore_residual"])
    case.check_features(method.features(case.clip.visual, case.image)[0].only_patches())


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("clearclip_gem/"))
def test_golden_clearclip_gem(name):
    case = Case(name)
    gem = sfp.build_method("gem", **case.hyper)
    case.check_features(gem.features(case.clip.visual, case.image)[0].only_patches())
    residual = case.hyper["ignore_residual"]
    same = sfp.build_method("clearclip", model_type="GEM", ignore_residual=residual)
    case.check_features(same.features(case.clip.visual, case.image)[0].only_patches())


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("gem/"))
def test_golden_gem(name):
    case = Case(name)
    tokens, _ = features(case)
    case.check_features(tokens)
    if "feats_ori_t4" in case.outputs:
        plain = sfp.build_method("clip", positions=sfp.build_method("gem").positions)
        case.check("feats_ori_t4", plain.features(case.clip.visual, case.image)[0].data[0, ::4])
    if "sim_s8" in case.outputs:
        text = F.normalize(inputs()["text7/64"], dim=-1)
        gem = sfp.build_method("gem", **case.hyper)
        logits, _ = gem.logits(case.clip.visual, case.image, text)
        sim = F.interpolate(logits, case.image.shape[-2:], mode="bilinear", align_corners=False)
        case.check("sim_s8", sim[..., ::8, ::8])
        case.check("heatmap_s8", min_max(sim)[..., ::8, ::8])


@pytest.mark.parametrize("name", cases("clip_surgery/"))
def test_golden_clip_surgery(name):
    case = Case(name)
    tokens, _ = features(case)
    case.check_features(tokens)
    if "similarity" not in case.outputs:
        return
    text = F.normalize(inputs()["text7/64"], dim=-1)
    logits, trace = sfp.build_method("clip_surgery").logits(case.clip.visual, case.image, text)
    cls = F.normalize(tokens.cls, dim=-1) @ text.T  # (1, 1, Q)
    cls = remove_redundancy(cls.mT[..., None], trace)  # a grid of one
    case.check("similarity", torch.cat([cls.flatten(2), logits.flatten(2)], -1)[0].T)
    maps = F.interpolate(min_max(logits), (48, 60), mode="bilinear", align_corners=False)
    case.check("similarity_map", maps.permute(0, 2, 3, 1))

    # the release subtracts the embedding of an empty prompt from the text features
    less = text - case.expected("redundant_feats")
    case.check("similarity_redundant", (F.normalize(tokens.data, dim=-1) @ less.T)[0])


def test_clip_surgery_on_other_grids():
    """The release raises on a 14x21 grid; ours runs there and does not change the model."""
    table = clip().visual.positional_embedding.clone()
    assert "clip_surgery/cs/ns" in MANIFEST["cases_that_raise"]
    method = sfp.build_method("clip_surgery")
    tokens, _ = method.features(clip().visual, image("ns"))
    assert tokens.grid == (14, 21)
    assert tokens.data.isfinite().all()
    assert torch.equal(clip().visual.positional_embedding, table)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("scclip/"))
def test_golden_scclip(name):
    case = Case(name)
    tokens, trace = features(case)
    case.check_features(tokens)
    if "outlier_flat" not in case.outputs:
        return
    case.check("outlier_flat", trace.masks[10][0].nonzero()[:, 0])
    _, plain = sfp.build_method("clip").features(case.clip.visual, case.image)
    case.check("lof_scores", lof_scores(plain.outputs[10].patches, 30)[0])
    # the release's image feature is the first PATCH of its output, not CLS
    case.check("return_all_false", tokens.data[:, 0])
    sims = {
        affinity.knobs: value[0]
        for affinity, value in trace._once.items()
        if getattr(affinity, "fn", None) is sfp.OPS.get("similarity")
    }
    hyper = case.hyper
    for knobs, sim in sims.items():
        knobs = dict(knobs)
        if knobs.get("cut") is None:
            case.check("mid_mean", sim.mean()[None])
            case.check("mid_count", (sim >= sim.mean()).sum(-1))
        else:
            side = "pre" if "fill" in knobs else "post"
            assert knobs["layer"] == hyper[f"{side}_adjust_idx"]
            case.check(f"{side}_sim_count", (sim != 0).sum(-1))
            if side == "pre":
                case.check("pre_sim_rowsum", sim.sum(-1))
    assert len(sims) == 3


def test_scclip_keeps_lone_outliers_where_sfp_zeroes_them():
    """On `nan_sq` outliers in a corner have no neighbour; from a zero vector SFP's release gets NaN."""
    case = Case("scclip/default/nan_sq")
    assert case.expected("feats").isfinite().all()
    _, trace = features(case)
    zero = dict(type="neighbour_mean", alone="zero")
    edit = dict(layers=(-2,), detector=dict(type="lof"), mitigator=zero)
    _, zeroed = sfp.build_method(dict(edits=[edit])).features(case.clip.visual, case.image)
    assert torch.equal(zeroed.masks[10], trace.masks[10])
    assert (zeroed.outputs[10].patches == 0).all(-1).any()
    assert not (trace.outputs[10].patches == 0).all(-1).any()


def segmentor_of(case: Case, **options) -> sfp.OpenVocabSegmentor:
    hyper = case.hyper
    method = dict(type=case.name.split("/")[1])
    if "model_type" in hyper:
        method["model_type"] = hyper.pop("model_type")
    return sfp.OpenVocabSegmentor(
        case.clip,
        MANIFEST["names"][case.entry["names"]],
        method,
        query_features=inputs()[f"e2e_text/{case.entry['text']}"],
        **{**options, **hyper},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("e2e/scclip", "e2e/naclip"))
def test_golden_end_to_end(name):
    structures = pytest.importorskip("mmseg.structures")
    case = Case(name)
    picture = image(case.entry["input"])[0]
    defaults = dict(pamr_steps=10, whole_via_input=True) if "naclip" in name else {}
    segmentor = segmentor_of(case, **defaults)
    assert list(segmentor.vocabulary.index) == case.expected("query_idx").tolist()
    sample = structures.SegDataSample(metainfo=dict(ori_shape=case.entry["ori_shape"]))
    (result,) = segmentor([picture], [sample], mode="predict")
    probs = result.seg_logits.data
    if "naclip" in name:  # stored after a renormalisation that changes no label
        assert (probs.sum(0) - 1).abs().max() > 0.01
        probs = probs / probs.sum(0)
    case.check("probs_s16", probs[:, ::16, ::16])
    case.check("pred", result.pred_sem_seg.data[0])
    if not segmentor.engine.pamr_steps:
        sheet = logits(segmentor, picture, case.entry["ori_shape"])
        case.check("logits_s16", sheet.rows(0, sheet.size[0])[:, ::16, ::16])


def logits(segmentor, picture, size):
    """The merged logits of a picture."""
    return segmentor.engine.logits([segmentor.method], [picture], [size], segmentor.queries)[0][0]


@pytest.mark.parametrize("name", cases("e2e/clearclip"))
def test_golden_clearclip_end_to_end(name):
    """Its windows are padded to whole patches: 300 rows to 304, two on either side."""
    structures = pytest.importorskip("mmseg.structures")
    case = Case(name)
    picture = image(case.entry["input"])[0]
    sizes = dict(slide_crop=448, slide_stride=224, pad_windows=True)
    segmentor = segmentor_of(case, logit_scale=50, **sizes)
    sample = structures.SegDataSample(metainfo=dict(ori_shape=case.entry["ori_shape"]))
    (result,) = segmentor([picture], [sample], mode="predict")
    case.check("probs_s16", result.seg_logits.data[:, ::16, ::16])
    case.check("pred", result.pred_sem_seg.data[0])
    sheet = logits(segmentor, picture, case.entry["ori_shape"])
    case.check("logits_s16", sheet.rows(0, sheet.size[0])[:, ::16, ::16])
