"""Clusters, feedback, alignment, propagation, guides: against loops written from the mathematics."""

from __future__ import annotations

import math

import pytest
import torch
from conformance import clip, image, inputs
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.functional.clusters import (
    dbscan,
    mask_means,
    median_filter,
    prototypes,
    resize,
    segments,
    vote_shares,
)
from sfp.functional.pamr import pamr
from sfp.methods.cliptrase import cluster_vote, head_cosine, overshadowed
from sfp.methods.pearl import (
    laplacian,
    orthogonal_factor,
    propagate,
    propagation_weights,
    text_aware_propagation,
)
from sfp.methods.resclip import feedback_mask, patch_modes, segment_steps
from sfp.ops.affinity import guide_similarity
from sfp.registry import bind

pytestmark = pytest.mark.usefixtures("no_grad")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text() -> Tensor:
    rows = inputs()["text7/64"]
    return F.normalize(rows - rows.mean(0), dim=-1)  # else one query wins everywhere


def guide(side: int):
    """A stand-in for an external encoder: colours in cells of `side` pixels."""

    def encode(pictures: Tensor) -> sfp.Tokens:
        maps = F.avg_pool2d(pictures.float(), side)
        return sfp.Tokens(maps.flatten(2).mT, tuple(maps.shape[-2:]), prefix=0)

    return encode


METHODS = {
    "cliptrase": dict(type="cliptrase", eps=1.1, min_samples=4),
    "cliptrase-mean": dict(type="cliptrase", eps=1.1, vote="mean", cells=4, cls_logits=True),
    "cliptrase-paper": dict(
        type="cliptrase", correlation="cosine", layer=-1, unit_rows=True, denoise="paper"
    ),
    "resclip": dict(type="resclip", pamr_steps=2),
    "proxyclip": dict(type="proxyclip"),
    "pearl": dict(type="pearl", size=30),
    "pearl-fast": dict(type="pearl", newton_schulz=5, inter_class=False, size=30),
}


@pytest.fixture(params=METHODS)
def method(request) -> sfp.Method:
    return sfp.build_method(METHODS[request.param])


def logits(method: sfp.Method, pictures: Tensor) -> Tensor:
    guides = dict(dino=guide(12))
    index = (0, 0, 1, 2, 3, 4, 5)
    return method.logits(clip().visual, pictures, text(), guides=guides, index=index)[0]


@pytest.mark.slow
@pytest.mark.parametrize("height", [160, 96])
def test_batch_of_two_equals_two_singles(method, height):
    pair = torch.cat([image("sq"), image("sqb")])[..., :height, :160]
    together = logits(method, pair)
    apart = torch.cat([logits(method, x[None]) for x in pair])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)
    assert together.isfinite().all()


def test_transposed_grids_have_transposed_shapes(method):
    wide = logits(method, image("sq")[..., :96, :160])
    tall = logits(method, image("sq")[..., :160, :96])
    assert wide.shape[-2:] == tall.shape[-2:][::-1]
    assert wide.shape[-1] > wide.shape[-2]


# clusters


def test_prototypes_and_segments():
    rows = random(12, 12).abs()
    labels = torch.tensor([0, 0, -1, 1, 1, 1, -1, 2, 2, 0, -1, 1])
    expected = torch.stack([rows[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(prototypes(rows, labels), expected)
    out = segments(rows, labels, (3, 4), (9, 20))
    assert out.shape == (9, 20)
    assert set(out.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("shape", [(9, 14), (2, 5)])
def test_median_filter(shape):
    x = random(2, *shape)
    mirror = lambda i, n: -1 - i if i < 0 else (2 * n - 1 - i if i >= n else i)  # noqa: E731
    out = median_filter(x, 5)
    for row in range(shape[0]):
        for col in range(shape[1]):
            around = [
                x[0, mirror(row + i, shape[0]), mirror(col + j, shape[1])].item()
                for i in range(-2, 3)
                for j in range(-2, 3)
            ]
            assert out[0, row, col] == sorted(around)[12]


def test_votes():
    masks = torch.tensor([[0, 0, 1], [0, 1, 1]])
    choice = torch.tensor([[2, 0, 1], [2, 1, 0]])
    shares = vote_shares(masks, choice, 3)
    torch.testing.assert_close(shares[:, 0, 0], torch.tensor([1 / 3, 0, 2 / 3]))
    torch.testing.assert_close(shares[:, 1, 1], torch.tensor([1 / 3, 2 / 3, 0]))
    values = random(4, 2, 3)
    means = mask_means(masks, values)
    torch.testing.assert_close(means[:, 1, 0], values[:, masks == 0].mean(1))
    torch.testing.assert_close(means[:, 0, 2], values[:, masks == 1].mean(1))


def test_patches_left_out_have_no_cluster():
    points = torch.cat([torch.zeros(4, 8), torch.ones(4, 8)]) + 0.01 * random(8, 8)
    assert dbscan(points, eps=0.5, min_samples=3).tolist() == [0] * 4 + [1] * 4
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1]).bool()
    labels = dbscan(points, eps=0.5, min_samples=3, keep=keep)
    assert labels.tolist() == [0, 0, -1, 0, -1, -1, -1, -1]
    assert dbscan(points, eps=0.5, min_samples=3, keep=~(keep | True)).tolist() == [-1] * 8


def test_without_clusters_pixels_keep_their_class():
    lone = sfp.build_method("cliptrase", eps=1e-6)
    plain = sfp.build_method("cliptrase", cluster=False)
    fine = resize(logits(plain, image("sq"))[0], (224, 224))
    assert torch.equal(logits(lone, image("sq"))[0].argmax(0), _class_of(fine.argmax(0)))
    mean = sfp.build_method("cliptrase", eps=1e-6, vote="mean")
    torch.testing.assert_close(logits(mean, image("sq"))[0], fine)


def _class_of(query: Tensor) -> Tensor:
    return torch.where(query == 1, 0, query)  # the first two queries are one class


def test_eq7_never_fires_on_cosines_and_does_on_attention():
    _, trace = sfp.build_method("clip").features(clip().visual, image("sq"))
    cosines = head_cosine(trace, layer=-1)
    assert (cosines.mean(-1) <= cosines.diagonal(dim1=-2, dim2=-1)).all()
    heads = trace.heads(7)
    weights = sum((heads.q[0, h] @ heads.k[0, h].T / 8).softmax(-1) for h in range(2))[1:, 1:]
    found = overshadowed(trace, 7)[0]
    assert torch.equal(found, weights.mean(1) > weights.diagonal())
    assert 0 < found.sum() < 196
    assert overshadowed(trace, 7, pairs=("qq", "kk", "vv")).sum() == 0


@pytest.mark.parametrize("name", ["concat", "product"])
def test_other_correlations(name):
    """Eq. 14 of CLIPtrase, and inner products, by loops over heads in float64."""
    _, trace = sfp.build_method("clip").features(clip().visual, image("sq"))
    heads = trace.heads(11)
    expected = torch.zeros(196, 196, dtype=torch.float64)
    for projection in (heads.q, heads.k, heads.v):
        each = projection[0].double()[:, 1:]  # (H, N, d)
        if name == "concat":
            rows = F.normalize(torch.cat(list(each), dim=-1), dim=-1)
            expected += rows @ rows.T / 3
        else:
            for rows in each:
                expected += rows @ rows.T / rows.shape[-1] ** 0.5 / (3 * len(each))
    found = head_cosine(trace, layer=-1, **{name: True})[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_a_block_of_the_trunk_attends_by_another_rule():
    """By hand: block 9 as a readout of its own, then the last two blocks as CLIP has them."""
    vit = clip().visual
    knobs = dict(correlation="cosine", cluster=False)
    found, _ = sfp.build_method("cliptrase", restore=-3, **knobs).features(vit, image("sq"))
    rule = dict(type="cosine_attention")
    ninth = dict(readouts=[dict(blocks=(-3,), attention=rule)])
    trace = sfp.build_method("clip").run(vit, image("sq"))
    x = sfp.build_method(ninth).readouts[0](trace)
    for block in vit.blocks[-2:]:
        x = block.read(x, residual=x.data, trace=trace)
    torch.testing.assert_close(found.data, vit.project(x).data)
    plain, _ = sfp.build_method("clip").features(vit, image("sq"))
    assert (plain.data - found.data).abs().max() > 1e-3


def test_features_cluster_by_their_own_distance():
    """Clusters of points, masks from the mean cosine with their members."""
    _, trace = sfp.build_method("clip").features(clip().visual, image("sq"), text=text())
    coarse = random(1, 7, 14, 14)
    source = bind(dict(type="read_last", attention=dict(type="cosine_attention"), reduced=False))
    unit = F.normalize(trace.vit.project(source(trace)).patches[0].float(), dim=-1)
    labels = dbscan(unit, eps=0.6, min_samples=3, affinities=False)
    assert 1 < len(labels.unique()) < 196
    found = cluster_vote(coarse, trace, affinity=None, source=source, eps=0.6, min_samples=3)
    size = tuple(image("sq").shape[-2:])
    masks = segments(unit @ unit.T, labels, (14, 14), size)
    choice = resize(coarse[0], size).argmax(0)
    shares = vote_shares(masks, choice, 7)
    torch.testing.assert_close(found[0], shares.to(found))


def test_noise_takes_no_part_in_the_clusters():
    _, trace = sfp.build_method("cliptrase").features(clip().visual, image("sq"), text=text())
    coarse, affinity = random(1, 7, 14, 14), bind(dict(type="head_cosine", subtract_cls=True))
    left = torch.arange(196).remainder(14) < 7
    seen = []

    def noise(trace: sfp.Trace, layer: int) -> Tensor:
        seen.append(layer)
        return left[None]

    knobs = dict(affinity=affinity, eps=1.1, min_samples=4)
    one = cluster_vote(coarse, trace, **knobs, noise=noise, noise_layer=-1)
    assert seen == [11]
    assert not torch.equal(one, cluster_vote(coarse, trace, **knobs))
    rows = affinity(trace)[0]
    labels = torch.full((196,), -1)
    labels[~left] = dbscan(rows[~left][:, ~left], eps=1.1, min_samples=4)
    masks = segments(rows, labels, (14, 14), (224, 224))
    expected = vote_shares(masks, resize(coarse[0], (224, 224)).argmax(0), 7)
    assert torch.equal(one[0], expected)


# ResCLIP


def walk(a: tuple[int, int], b: tuple[int, int]) -> list[tuple[int, int]]:
    n = max(abs(a[0] - b[0]), abs(a[1] - b[1]))
    if n == 0:
        return [a]
    half_up = lambda num: (2 * num + n) // (2 * n)  # noqa: E731
    return [
        tuple(half_up(x * n + t * (y - x)) for x, y in zip(a, b, strict=True)) for t in range(n + 1)
    ]


def slow_mask(labels: list[int], grid: tuple[int, int], std: float) -> Tensor:
    h, w = grid
    cells = [(r, c) for r in range(h) for c in range(w)]
    mask = torch.zeros(h * w, h * w)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            if labels[i] != labels[j]:
                continue
            inside = all(labels[r * w + c] == labels[i] for r, c in walk(a, b))
            far = max(abs(a[0] - b[0]), abs(a[1] - b[1]))
            mask[i, j] = 1 if inside else math.exp(-far / (max(h, w) - 1))
    blurred = torch.zeros_like(mask)
    for i in range(h * w):
        for j in range(h * w):
            blurred[i, j] = sum(
                mask[i, k] * math.exp(-((j - k) ** 2) / (2 * std**2)) for k in range(h * w)
            )
    blurred = blurred.relu()
    rows = blurred / blurred.sum(1, keepdim=True)
    return rows / rows.max()


def test_segments_between_patches():
    steps, length = segment_steps((3, 5))
    cells = [(r, c) for r in range(3) for c in range(5)]
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            path = [r * 5 + c for r, c in walk(a, b)]
            assert length[i, j] == len(path) - 1
            assert list(dict.fromkeys(steps[:, i, j].tolist())) == path
            assert set(steps[:, i, j].tolist()) == set(steps[:, j, i].tolist())


@pytest.mark.parametrize("grid", [(3, 5), (4, 2), (1, 6), (1, 1)])
def test_feedback_mask(grid):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (2, grid[0] * grid[1]), generator=generator)
    out = feedback_mask(labels, grid, 5.0)
    if grid == (1, 1):
        assert out.tolist() == [[[1.0]], [[1.0]]]
        return
    for one, many in zip(labels.tolist(), out, strict=True):
        torch.testing.assert_close(many, slow_mask(one, grid, 5.0))


def test_patch_modes():
    labels = torch.randint(0, 3, (2, 7, 10), generator=torch.Generator().manual_seed(1))
    out = patch_modes(labels, (2, 3), 3, 3)
    for b in range(2):
        for n in range(6):
            row, col = n // 3 * 3, n % 3 * 3
            square = labels[b, row : row + 3, col : col + 3].flatten().bincount(minlength=3)
            assert out[b, n] == square.argmax()


def gaussian(grid: tuple[int, int], std: float) -> Tensor:
    cells = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    out = torch.zeros(len(cells) + 1, len(cells) + 1)
    for i, a in enumerate(cells):
        for j, b in enumerate(cells):
            out[i + 1, j + 1] = math.exp(-(math.dist(a, b) ** 2) / (2 * std**2))
    return out


@pytest.mark.parametrize(
    ("rcs", "sfr"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_resclip(rcs, sfr):
    """The whole method, with nothing of `ops`: the trunk, PAMR and loops."""
    vit, picture, grid = clip().visual, image("sq")[..., 64:128, 112:212], (4, 6)
    scale, thd, lam_r, tau_s, lam_s = 40.0, 0.2, 0.3, 1.9, 0.6
    x, maps = vit.embed(picture).data, []
    for block in vit.blocks[:-1]:
        q, k, _ = block.attn.project(block.ln_1(x))
        maps.append((q @ k.mT / 8).softmax(-1)[0])
        x = block(x)
    earlier = (maps[5] + maps[6] + maps[7] + maps[8]) / 4
    last = vit.blocks[-1]
    _, k, v = last.attn.project(last.ln_1(x))
    keys, omega = (k @ k.mT / 8)[0], gaussian(grid, 5.0)

    def read(b: Tensor) -> Tensor:
        a = (b + omega).softmax(-1)
        if rcs:
            a = 2.0 * ((1 - lam_r) * a + lam_r * earlier)
        z = last.attn.out_proj((a @ v[0]).transpose(0, 1).flatten(1))
        return F.normalize((vit.ln_post(z) @ vit.proj)[1:], dim=-1) @ text().T  # (N, Q)

    expected = read(keys)
    if sfr:
        fine = F.interpolate(expected.T.unflatten(1, grid)[None], (64, 96), mode="bilinear")
        fine = pamr(picture[..., :96], fine, steps=10, dilations=(8, 16))[0]
        queries = (scale * fine).softmax(0)
        probs = torch.stack([queries[:2].amax(0), *queries[2:]])  # two names of class 0
        confidence, label = probs.max(0)
        label[confidence < thd] = 0
        modes = [
            label[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].flatten().mode().values.item()
            for r in range(4)
            for c in range(6)
        ]
        assert len(set(modes)) > 1
        mask = F.pad(slow_mask(modes, grid, 5.0), (1, 0, 1, 0))
        expected = read(tau_s * ((1 - lam_s) * keys + lam_s * mask))
    method = sfp.build_method(
        "resclip",
        use_rcs=rcs,
        use_sfr=sfr,
        temp_thd=thd,
        lambda_rcs=lam_r,
        tau_sfr=tau_s,
        lambda_sfr=lam_s,
    )
    found = logits(method, picture)[0].flatten(1).T
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if not rcs and not sfr:
        torch.testing.assert_close(
            found, logits(sfp.build_method("naclip"), picture)[0].flatten(1).T
        )


def test_first_guess_is_computed_once_and_needs_text():
    calls = []

    def source(trace: sfp.Trace) -> sfp.Tokens:
        calls.append(1)
        return trace.entering(11)

    vit = clip().visual
    trace = vit.trace(image("sq"), text=text())
    assert trace.guess(source) is trace.guess(source)
    assert len(calls) == 1
    assert trace.guess(source).shape == (1, 7, 14, 14)
    with pytest.raises(LookupError, match="text"):
        vit.trace(image("sq")).guess(source)


# ProxyCLIP


def test_proxy_attention_equals_resampled_values():
    vit, picture = clip().visual, image("ns")
    encoder = guide(17)
    method = sfp.build_method("proxyclip", guide="colour", beta=0.9, gamma=2.0)
    tokens, trace = method.features(vit, picture, guides=dict(colour=encoder))
    seen = encoder(picture)
    assert tokens.grid == seen.grid == (13, 19)
    assert tokens.prefix == 0
    unit = F.normalize(seen.patches[0], dim=-1)
    similarity = unit @ unit.T
    torch.testing.assert_close(guide_similarity(trace, guide="colour")[0], similarity)
    score = 2.0 * (similarity - 0.9 * similarity.mean())
    weights = score.masked_fill(score < 0, -torch.inf).softmax(-1)
    last = vit.blocks[-1]
    _, _, v = last.attn.project(last.ln_1(trace.outputs[10].patches))
    v = v.transpose(2, 3).flatten(1, 2).unflatten(2, (14, 21))  # (1, D, h, w)
    v = F.interpolate(v, (13, 19), mode="bilinear").flatten(2).mT[0]  # (M, D)
    expected = vit.ln_post(last.attn.out_proj(weights @ v)) @ vit.proj
    torch.testing.assert_close(tokens.data[0], expected, atol=2e-5, rtol=1e-4)


def test_a_missing_guide_is_named():
    with pytest.raises(LookupError, match="'dino'; given: none"):
        sfp.build_method("proxyclip").features(clip().visual, image("sq"))


def test_a_guide_runs_once_per_image():
    calls = []

    def encode(pictures: Tensor) -> sfp.Tokens:
        calls.append(1)
        return guide(16)(pictures)

    sfp.build_method("proxyclip").features(clip().visual, image("sq"), guides=dict(dino=encode))
    assert len(calls) == 1


# PEARL


def test_orthogonal_factor():
    k, q = random(40, 6), random(40, 6, seed=1)
    r = orthogonal_factor(k.T @ q)
    torch.testing.assert_close(r.T @ r, torch.eye(6), atol=1e-5, rtol=0)
    best = (k @ r - q).norm()
    for seed in range(50):
        other = torch.linalg.qr(random(6, 6, seed=seed)).Q
        nearby = orthogonal_factor(r + 0.05 * random(6, 6, seed=seed))
        assert best <= (k @ other - q).norm()
        assert best <= (k @ nearby - q).norm() + 1e-4
    torch.testing.assert_close(orthogonal_factor(k.T @ q, steps=30), r, atol=1e-4, rtol=0)
    five = orthogonal_factor(k.T @ q, steps=5)
    assert 0 < (five - r).norm() < (k.T @ q / (k.T @ q).norm() - r).norm()


def test_aligned_keys():
    vit, alpha = clip().visual, 0.3
    trace = vit.trace(image("ns")[..., :80, :])
    heads = vit.blocks[-1].heads(trace.outputs[-1])
    rule = bind(dict(type="aligned_keys", alpha=alpha))
    weights = rule(heads, trace)
    for h in range(2):
        q, k = heads.q[0, h].double(), heads.k[0, h].double()
        w = q.norm(dim=1)
        w[0] = 0
        w = w / w.sum()
        q_c, k_c = q - (w[:, None] * q).sum(0), k - (w[:, None] * k).sum(0)
        u, _, vt = torch.linalg.svd(k_c.T @ q_c)
        expected = ((q @ (k @ (u @ vt)).T + alpha * k_c @ k_c.T) / 8).softmax(-1)
        torch.testing.assert_close(weights[0, h].double(), expected, atol=1e-5, rtol=1e-3)


def dense_laplacian(down: Tensor, right: Tensor) -> Tensor:
    h, w = down.shape[0] + 1, down.shape[1]
    matrix = torch.zeros(h * w, h * w, dtype=torch.float64)
    edges = [((r, c), (r + 1, c), down[r, c]) for r in range(h - 1) for c in range(w)]
    edges += [((r, c), (r, c + 1), right[r, c]) for r in range(h) for c in range(w - 1)]
    for a, b, weight in edges:
        i, j = a[0] * w + a[1], b[0] * w + b[1]
        matrix[i, i] += weight
        matrix[j, j] += weight
        matrix[i, j] -= weight
        matrix[j, i] -= weight
    return matrix


def test_propagation_equals_a_dense_solve():
    h, w, tau = 6, 9, 1.7
    picture, z = random(2, 3, h, w).double(), random(2, 4, h, w, seed=1).double()
    unit = F.normalize(random(4, 8, seed=2).double(), dim=-1)
    s, p = unit @ unit.T, (2 * z).softmax(1)
    hold, down, right = propagation_weights(picture, p, s)
    for b in range(2):

        def step(i: tuple[int, int], j: tuple[int, int], b: int = b) -> Tensor:
            return (picture[b, :, i[0], i[1]] - picture[b, :, j[0], j[1]]).abs().mean()

        pairs = [((r, c), (r + 1, c)) for r in range(h - 1) for c in range(w)]
        pairs += [((r, c), (r, c + 1)) for r in range(h) for c in range(w - 1)]
        mean = sum(step(i, j) for i, j in pairs) / len(pairs)
        at = lambda i, b=b: p[b, :, i[0], i[1]]  # noqa: E731
        for i, j in pairs:
            expected = torch.exp(-5 * step(i, j) / mean) * (1 + at(i) @ s @ at(j))
            found = (down if i[1] == j[1] else right)[b, 0, i[0], i[1]]
            torch.testing.assert_close(found, expected)
        i = (2, 7)
        expected = max(at(i).max().item(), 0.05) ** 2 * (1 + at(i) @ s @ at(i))
        torch.testing.assert_close(hold[b, 0, 2, 7], expected)
        matrix = dense_laplacian(down[b, 0], right[b, 0])
        torch.testing.assert_close(
            laplacian(z[b], down[b], right[b]).flatten(1), z[b].flatten(1) @ matrix
        )
        solved = torch.linalg.solve(
            torch.diag(hold[b].flatten()) + tau * matrix, (hold[b] * z[b]).flatten(1).T
        )
        found = propagate(z, hold, down, right, tau=tau, steps=200)[b].flatten(1).T
        torch.testing.assert_close(found, solved, atol=1e-9, rtol=1e-7)
        single = propagate(z.float(), hold.float(), down.float(), right.float(), tau=tau, steps=25)
        error = (single[b].flatten(1).T - solved).abs().max()
        assert error < 0.05 * solved.abs().max(), error


def test_propagation_stays_finite_when_it_is_solved_at_once():
    flat = torch.full((1, 2, 5, 5), 0.3)
    hold, edges = torch.ones(1, 1, 5, 5), torch.ones(1, 1, 4, 5)
    out = propagate(flat, hold, edges, edges.mT, steps=25)
    torch.testing.assert_close(out, flat)


def test_inter_class_term_is_the_difference_between_paper_and_release():
    vit, picture = clip().visual, image("ns")
    trace = vit.trace(picture, text=text())
    coarse = 0.1 * random(1, 7, 14, 21)
    paper = text_aware_propagation(coarse, trace, size=30)
    release = text_aware_propagation(coarse, trace, size=30, inter_class=False)
    assert paper.shape == release.shape == (1, 7, 24, 37)
    assert not torch.allclose(paper, release)
    # orthogonal queries tell nothing of one another: both are the same
    alone = vit.trace(picture, text=torch.eye(7))
    one = text_aware_propagation(coarse, alone, size=30)
    two = text_aware_propagation(coarse, alone, size=30, inter_class=False)
    torch.testing.assert_close(one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "knob", "values"),
    [
        ("cliptrase", "correlation", ("softmax", "cosine")),
        ("cliptrase", "denoise", ("release", "none")),
        ("cliptrase", "layer", (-2, -1)),
        ("cliptrase", "unit_rows", (False, True)),
        ("cliptrase", "eps", (0.7, 1.1)),
        ("cliptrase", "min_samples", (3, 9)),
        ("cliptrase", "vote", ("mode", "mean")),
        ("cliptrase", "cls_logits", (False, True)),
        ("cliptrase", "cells", (None, 2)),
        ("cliptrase", "cluster", (True, False)),
        ("cliptrase", "concat", (False, True)),
        ("cliptrase", "features", (False, True)),
        ("cliptrase", "product", (False, True)),
        ("cliptrase", "restore", (-1, -2)),
        ("resclip", "dataset", ("context59", "voc20")),
        ("resclip", "use_rcs", (True, False)),
        ("resclip", "use_sfr", (True, False)),
        ("resclip", "layers", ((5, 6), (7,))),
        ("resclip", "gaussian_std", (5.0, 2.0)),
        ("resclip", "tau_rcs", (2.0, 1.0)),
        ("resclip", "lambda_rcs", (None, 0.1)),
        ("resclip", "tau_sfr", (None, 1.0)),
        ("resclip", "lambda_sfr", (None, 0.2)),
        ("resclip", "temp_thd", (0.0, 0.9)),
        ("resclip", "blur", (5.0, 1.0)),
        ("proxyclip", "guide", ("dino", None)),
        ("proxyclip", "beta", (1.2, 1.0)),
        ("proxyclip", "gamma", (3.0, 6.0)),
        ("pearl", "alpha", (0.08, 0.3)),
        ("pearl", "newton_schulz", (0, 5)),
        ("pearl", "propagate", (True, False)),
        ("pearl", "size", (30, 40)),
        ("pearl", "tau", (1.0, 2.0)),
        ("pearl", "steps", (25, 2)),
        ("pearl", "inter_class", (True, False)),
        ("pearl", "logit_scale", (40.0, 100.0)),
    ],
)
def test_every_knob_changes_the_output(name, knob, values):
    base = dict(pearl=dict(size=30), resclip=dict(pamr_steps=1)).get(name, {})
    one, two = (
        logits(sfp.build_method(name, **{**base, knob: value}), image("sq")) for value in values
    )
    assert one.shape != two.shape or not torch.equal(one, two)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("cliptrase", dict(correlation="softmx"), "did you mean 'softmax'"),
        ("cliptrase", dict(denoise="papr"), "did you mean 'paper'"),
        ("resclip", dict(dataset="voc2"), "did you mean 'voc2"),
        ("proxyclip", dict(betta=1), "did you mean 'beta'"),
    ],
)
def test_wrong_values_are_named(name, knobs, message):
    with pytest.raises(ValueError, match=message):
        sfp.build_method(name, **knobs)
