"""Every golden case of CLIPtrase and ProxyCLIP, through the public path."""

from __future__ import annotations

import pytest
import torch
from conformance import Case, cases, inputs
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.functional.attention import mean_cosine
from sfp.functional.clusters import dbscan, mask_means, prototypes, resize, segments, smooth_maps
from sfp.methods.cliptrase import head_cosine

pytestmark = pytest.mark.usefixtures("no_grad")


def correlation(trace: sfp.Trace, i: int) -> Tensor:
    heads = trace.heads(i)
    return mean_cosine(heads.q, heads.k, heads.v)[0]


def text() -> Tensor:
    return F.normalize(inputs()["text7/64"], dim=-1)


@pytest.mark.parametrize("name", cases("cliptrase/encode"))
def test_golden_cliptrase_features(name):
    case = Case(name)
    tokens, trace = sfp.build_method("cliptrase").features(case.clip.visual, case.image)
    case.check_features(tokens)
    case.check("attn_0_sample", trace.heads(0).logits("q", "k").mean(1)[0, ::7, ::7])
    case.check("attn_m1_sample", correlation(trace, 11)[::7, ::7])
    case.check("attn_m2_sample", correlation(trace, 10)[::7, ::7])
    case.check("attn_m2_cls_row", correlation(trace, 10)[0])
    if "attn_m2" in case.outputs:
        case.check("attn_m2", correlation(trace, 10))
    if "feats_origin_forward_t4" in case.outputs:
        plain, _ = sfp.build_method("clip").features(case.clip.visual, case.image)
        case.check("feats_origin_forward_t4", plain.data[0, ::4])


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("cliptrase/PC", "cliptrase/VOC"))
def test_golden_cliptrase(name):
    case = Case(name)
    eps, min_samples = case.hyper["eps"], case.hyper["min_samples"]
    branch = case.hyper["dataset_branch"]
    method = sfp.build_method(
        "cliptrase", eps=eps, min_samples=min_samples, cls_logits=branch == "VOC20"
    )
    # PC60: names from the fifth on are background prompts of one class
    index = (0, 1, 2, 3, 4, 5, 5) if branch == "PC60" else tuple(range(7))
    logits, trace = method.logits(case.clip.visual, case.image, text(), index=index)
    assert logits.shape == (1, 7, *case.image.shape[-2:])
    case.check("pred_s2", torch.tensor(index)[logits[0].argmax(0)][::2, ::2])
    rows = head_cosine(trace, subtract_cls=True)[0]
    labels = dbscan(rows, eps=eps, min_samples=min_samples)
    case.check("labels", labels)
    if "cluster_maps_smoothed" in case.outputs:
        maps = prototypes(rows, labels).unflatten(1, trace.embedded.grid)
        case.check("cluster_maps_smoothed", smooth_maps(maps))


@pytest.mark.parametrize("name", cases("cliptrase_d2/"))
def test_golden_cliptrase_detectron2(name):
    """Its logits are products with features that are not normalised; the rest is `vote="mean"`."""
    case = Case(name)
    eps, min_samples = case.entry["eps_used"], case.entry["min_samples"]
    tokens, trace = sfp.build_method("cliptrase").features(case.clip.visual, case.image)
    rows = head_cosine(trace, subtract_cls=True)[0]
    labels = dbscan(rows, eps=eps, min_samples=min_samples)
    case.check("labels", labels)
    scores = case.clip.logit_scale.exp() * tokens.data[0] @ text().T  # (T, Q)
    patches = scores[1:].T.unflatten(1, tokens.grid)  # (Q, h, w)
    if case.hyper["dataset_name"] == "voc_x":
        patches = patches * scores[0][:, None, None]
    size = tuple(case.image.shape[-2:])
    pixels = resize(patches, size)
    means = mask_means(segments(rows, labels, tokens.grid, size), pixels)
    case.check("sem_seg_s8", means[:, ::8, ::8])
    case.check("pred_s2", means.argmax(0)[::2, ::2])


def proxyclip(case: Case) -> tuple[sfp.Method, dict]:
    ext = case.entry.get("ext")
    if ext is None:
        return sfp.build_method("proxyclip", guide=None, **case.hyper), {}
    maps = inputs()[f"ext/{ext}"]  # (1, 24, h, w)
    tokens = sfp.Tokens(maps.flatten(2).mT, tuple(maps.shape[-2:]), prefix=0)
    return sfp.build_method("proxyclip", guide="ext", **case.hyper), dict(
        guides=dict(ext=lambda image: tokens)
    )


@pytest.mark.parametrize("name", cases("proxyclip/"))
def test_golden_proxyclip(name):
    case = Case(name)
    method, context = proxyclip(case)
    tokens, trace = method.features(case.clip.visual, case.image, **context)
    rows, columns = tokens.grid
    if case.official and rows != columns and context:
        # the release swaps the sides of the token grid; `_hwfix` cases have them right
        with pytest.raises(AssertionError):
            case.check_features(tokens.only_patches())
    else:
        case.check_features(tokens.only_patches())
    if "mask_count" in case.outputs:
        similarity = trace.once(dict(method.readouts[0].attention.knobs)["affinity"])[0]
        above = similarity >= case.hyper["beta"] * similarity.mean()
        case.check("mask_count", above.sum(-1))
