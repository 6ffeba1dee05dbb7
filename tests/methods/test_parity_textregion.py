"""Every golden case of TextRegion, and its parts against loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from conformance import Case, cases
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.clip.pool import AttentionPool, PoolConfig
from sfp.clip.vit import ImageConfig, VisionTransformer
from sfp.engine import Engine
from sfp.functional.labels import assign, decided
from sfp.functional.windows import WindowGrid, squeezed
from sfp.methods import textregion
from sfp.trace import RegionsError
from sfp.whole import WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")


def masks_of(case: Case) -> Tensor:
    """Mask logits, (R, h, w); stored in eighths."""
    return case.inputs[case.entry["masks"].split()[0]].float() / 8


def given_tiles(case: Case) -> WindowGrid:
    """As many equal parts as the case names, next to one another."""
    size, counts = case.image.shape[2:], case.hyper["tiles"]
    window = [length // n for length, n in zip(size, counts, strict=True)]
    assert [n * side for n, side in zip(counts, window, strict=True)] == list(size)
    ys, xs = ([i * side for i in range(n)] for n, side in zip(counts, window, strict=True))
    return WindowGrid(tuple(size), tuple(window), ys, xs)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("textregion/"))
def test_golden_textregion(name):
    case, hyper = Case(name), Case(name).hyper
    method = sfp.build_method(
        "textregion",
        beta=hyper["beta"],
        threshold=hyper["threshold"] if hyper["remove_global"] else None,
        ffn=hyper["ffn"],
        unit_values=hyper["values"] != "as they are",
        halves=hyper["global_map"] != "one",
        resample="bilinear",
    )
    grid, side = given_tiles(case), (224, 224)
    windows = torch.stack([grid.cut(case.image[0], place) for place in grid.places])
    windows = squeezed(windows, side, "bilinear")
    whole = WholeImage(grid, case.image[0], regions=masks_of(case))
    text = F.normalize(case.inputs[case.entry["text"]], dim=-1)[: case.entry["queries"]]
    trace = method.run(case.clip.visual, windows, whole=whole, text=text)

    (reader,) = method.readouts
    knobs = {k: dict(reader.knobs)[k] for k in ("beta", "halves", "resample")}
    maps = textregion.two_scales(trace, **knobs)
    values = maps[0].flatten(1).T
    case.check("values_r16", values[::16])
    own = F.interpolate(masks_of(case)[None], maps.shape[2:], mode="bilinear")[0].clamp(0, 1)
    score = textregion.foreignness(values, own.flatten(1) > 0)
    if "difference_score" in case.outputs:
        case.check("difference_score", score)
    threshold = dict(reader.knobs)["threshold"]
    if "dropped" in case.outputs:
        dropped = torch.zeros_like(score) if threshold is None else score < threshold
        case.check("dropped", dropped.to(torch.uint8))
    kept = textregion.region_weights(trace, threshold=threshold, **knobs).gt(0).any(1)
    case.check("mask_kept", kept.to(torch.uint8))
    features = method.read(trace)
    cosines = sfp.tokens.cosine_logits(features, text)[0, :, 0].T[kept]
    case.check("region_logits", cosines)
    if "region_features" in case.outputs:
        case.check("region_features", F.normalize(features.data[0], dim=-1)[kept])
    if "pred" not in case.outputs:
        return
    covered = masks_of(case).clamp(0, 1)[kept].sum(0) > 0
    case.check("uncovered", (~covered).to(torch.uint8))
    rule = dict(method.comparison.knobs).get("attention", textregion.self_self)
    outside = textregion.outside(trace, rule, halves=knobs["halves"], resample="bilinear")
    case.check("clip_logits_s2", outside[0, :, ::2, ::2])
    logits = method.compare(features, trace)
    size = tuple(case.entry["ori_shape"] or case.image.shape[2:])
    words = hyper["background_queries"]
    index = (*[0] * words, *range(1, len(text) - words + 1))
    sheet = replace(grid.whole, direct=method.direct).sheet(logits, size)
    reading = decided(sheet, None, index, hyper["logit_scale"], None)
    labels = assign(**reading, prob_thd=hyper["prob_thd"], keep_scores=True)
    case.check("probs_s8", labels.scores[:, ::8, ::8])
    case.check("pred", labels.labels.to(torch.uint8))


@pytest.mark.parametrize("name", cases("unit/textregion_siglip/", "unit/textregion_pe/"))
def test_golden_textregion_of_a_pool(name):
    case, hyper = Case(name), Case(name).hyper
    tower, number = name.split("/")[1].removeprefix("textregion_"), name.rsplit("/m", 1)[1]
    given = {
        part: case.inputs[f"textregion/{tower}{number}_{part}"]
        for part in ("feats", "kv_w", "kv_b", "proj_w", "proj_b", "out", "text")
    }
    dim, side, (rows, columns) = hyper["dim"], hyper["tile_side"], hyper["tiles"]
    pool = AttentionPool(PoolConfig(dim, hyper["heads"]), dim, hyper["heads"], "gelu", 1e-5)
    pool.in_proj_weight.data, pool.in_proj_bias.data = given["kv_w"], given["kv_b"]
    pool.out_proj.weight.data, pool.out_proj.bias.data = given["proj_w"], given["proj_b"]
    maps = given["feats"].mT.unflatten(2, (side, side))  # the whole image, then the tiles
    grid = WindowGrid(
        (rows * side, columns * side),
        (side, side),
        [i * side for i in range(rows)],
        [i * side for i in range(columns)],
    )
    fine = grid.stitch(maps[1:])
    coarse = F.interpolate(maps[:1], fine.shape[2:], mode="bilinear")
    features = (fine + hyper["beta"] * coarse)[0].flatten(1).T
    masks = case.inputs[f"textregion/masks{number}"].float() / 8
    weights = masks.clamp(0, 1).flatten(1)
    score = textregion.foreignness(features, weights > 0)
    left = (score < hyper["threshold"]) & weights.gt(0).any(0)  # patches that were in a mask
    case.check("dropped", left.to(torch.uint8))
    weights = textregion.kept_patches(features, weights, hyper["threshold"])
    kept = weights.gt(0).any(1)
    case.check("mask_kept", kept.to(torch.uint8))
    pooled = pool.values(textregion.region_means(features, weights)[kept])
    if tower == "pe":
        pooled = pooled @ given["out"]
    logits = F.normalize(pooled, dim=-1) @ F.normalize(given["text"], dim=-1).T
    if hyper["exp_scale_of"] is not None:
        scale = torch.tensor(hyper["exp_scale_of"]).exp().item()
        logits = logits * scale + hyper["bias"]
    case.check("region_logits", logits)


def test_foreignness_against_loops():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=generator)
    member = torch.rand(4, 12, generator=generator) > 0.5
    member[3] = False
    unit = F.normalize(features, dim=-1).double()

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    for j, found in enumerate(textregion.foreignness(features, member).tolist()):
        to = [mean([float(unit[j] @ unit[i]) for i in range(12) if own[i]]) for own in member]
        near = mean([x for x, own in zip(to, member, strict=True) if own[j]])
        far = mean([x for x, own in zip(to, member, strict=True) if not own[j]])
        assert found == pytest.approx(near - far, abs=1e-5)


def model(**settings) -> sfp.Model:
    defaults = dict(method="textregion", short_side=None, slide_crop=40, slide_tiles=True)
    return sfp.load(tiny.clip(**tiny.WORDS), **{**defaults, **settings})


def picture(height: int = 90, width: int = 130) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 9, generator=generator)
    pixels = F.interpolate(coarse, (height, width), mode="bilinear")[0] * 255
    return pixels.permute(1, 2, 0).byte()


WORDS = ["cat", "dog", "tree"]


def test_tiles_reach_the_network():
    """Equal parts of the image, each as the tower was trained: 8 x 8 patches for 45 x 44 pixels."""
    grid = WindowGrid.tiles((90, 130), 40, (64, 64))
    assert (grid.window, grid.ys, grid.xs) == ((45, 44), [0, 45], [0, 43, 86])
    assert WindowGrid.tiles((30, 130), 40, (64, 64)).window == (30, 44)
    engine = Engine(tiny.clip(), slide_crop=40, slide_tiles=True)
    pixels = tiny.images(1, 90, 130)[0]
    whole = WholeImage(engine._grid(pixels), pixels)
    windows, _ = engine._windows(whole)
    assert windows.shape == (6, 3, 64, 64)
    part = F.interpolate(
        pixels[None, :, 45:90, 43:87], (64, 64), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(windows[4], part[0])
    with pytest.raises(ValueError, match="slide_crop > 0"):
        Engine(tiny.clip(), slide_crop=0, slide_tiles=True)


def test_ids_are_masks_that_do_not_overlap():
    image = picture().numpy()
    ids = torch.zeros(90, 130, dtype=torch.int64)
    ids[:50, 20:70], ids[40:, 90:] = 7, 3
    masks = torch.stack([ids == 3, ids == 7])
    found, same = (model().segment(image, WORDS, regions=x) for x in (ids, masks))
    assert (found.labels == same.labels).all()
    torch.testing.assert_close(found.scores, same.scores)
    for i in (3, 7):  # all pixels of a region have one label
        assert len(set(found.labels[1:-1, 1:-1][(ids == i)[1:-1, 1:-1].numpy()].tolist())) <= 2
    soft = masks.float() * 0.4
    assert abs(model().segment(image, WORDS, regions=soft).scores - found.scores).max() > 1e-3


def test_cached_features_know_the_masks():
    image, masks = picture().numpy(), torch.zeros(1, 90, 130)
    masks[:, :50, 20:70] = 1
    cached, plain = model(), model(memory_mb=0)
    for given in (masks, masks.flip(1), masks):
        found, expected = (m.segment(image, WORDS, regions=given) for m in (cached, plain))
        assert (found.labels == expected.labels).all()
        assert abs(found.scores - expected.scores).max() == 0


def test_masks_that_overlap_are_only_for_methods_that_take_them():
    image, masks = picture().numpy(), torch.ones(2, 90, 130)
    guide = torch.nn.Identity()
    guide.forward = lambda x: sfp.Tokens(F.avg_pool2d(x, 8).flatten(2).mT, (8, 8), prefix=0)
    for method in (dict(type="corrclip", output=None), dict(type="Method", vote="regions")):
        other = model(method=method, guides=dict(dino=guide))
        with pytest.raises(RegionsError, match="overlapping masks"):
            other.segment(image, WORDS, regions=masks)
    with pytest.raises(RegionsError, match="regions="):
        model().segment(image, WORDS)
    with pytest.raises(ValueError, match=r"or masks \(R, h, w\)"):
        model().segment(image, WORDS, regions=masks.long())


@pytest.mark.parametrize("settings", [{}, dict(slide_tiles=False, pad_windows=48)], ids=str)
def test_without_masks_pixels_take_both_scales(settings):
    image = picture().numpy()
    settings = dict(settings, slide_crop=64, slide_stride=48) if settings else {}
    found = model(**settings).segment(image, WORDS, regions=torch.zeros(0, 90, 130))
    empty = torch.zeros(90, 130, dtype=torch.int64)
    same = model(**settings).segment(image, WORDS, regions=empty)
    torch.testing.assert_close(found.scores, same.scores, atol=1e-4, rtol=1e-3)
    assert abs(found.scores - 1 / 3).max() > 0.01


@pytest.mark.parametrize("knobs", [dict(resample="bilinear"), dict(halves=True)], ids=str)
def test_knobs_of_the_whole_image(knobs):
    image, masks = picture().numpy(), torch.zeros(1, 90, 130)
    masks[:, :50, 20:70] = 1
    found, other = (
        model().segment(image, WORDS, method=dict(type="textregion", **k), regions=masks).scores
        for k in ({}, knobs)
    )
    assert abs(found - other).max() > 1e-4


@pytest.mark.parametrize("knobs", [{}, dict(scale=3.0, bias=-0.5)], ids=str)
def test_a_tower_with_a_pool_against_loops(knobs):
    """The mean of normalised tokens over a mask as the pool's value; pixels in no mask have 0."""
    config = ImageConfig(32, 8, 64, 4, 24, head_width=16, pool=PoolConfig(64, 4, 128))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = VisionTransformer(config).eval().requires_grad_(False)
    image, text = tiny.images(1, 32, 48), tiny.queries(3, width=24)
    masks = (torch.arange(48).expand(2, 32, 48) < torch.tensor([20, 32])[:, None, None]).float()
    method = sfp.build_method("textregion", beta=0, threshold=None, pool_mlp=False, **knobs)
    found, trace = method.logits(tower, image, text, regions=masks[None])
    tokens = tower.ln_post(trace.leaving().data[0, 1:]).unflatten(0, (4, 6))  # the class token goes
    expected = torch.zeros(3, 32, 48)
    for mask, columns in zip(masks, (3, 4), strict=True):  # patches that a mask reaches
        mean = tokens[:, :columns].flatten(0, 1).mean(0)
        pooled = tower.pool.out_proj(F.linear(mean, *_values(tower.pool))) @ tower.proj
        cosine = F.normalize(pooled, dim=-1) @ text.T
        scaled = knobs.get("scale", 1) * cosine + knobs.get("bias", 0)
        expected += scaled[:, None, None] * mask
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def _values(pool: AttentionPool) -> tuple[Tensor, Tensor]:
    return pool.in_proj_weight[pool.width :], pool.in_proj_bias[pool.width :]
