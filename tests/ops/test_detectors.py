"""Detectors against brute force written from their definitions, one image at a time."""

from __future__ import annotations

import functools

import pytest
import torch
from narrow import images, vit
from torch import Tensor

import sfp
from sfp.ops.detectors import squared_distances
from sfp.outliers.planted import Plant
from sfp.registry import bind

pytestmark = pytest.mark.usefixtures("no_grad")

DETECTORS = sfp.list_ops("detector")
assert DETECTORS
LAYER = 6


@functools.cache
def trace(height: int = 112, width: int = 112) -> sfp.Trace:
    return vit().trace(images(2, height, width))


def detect(name: str, of: sfp.Trace, layer: int = LAYER, **knobs) -> Tensor:
    return bind(dict(type=name, **knobs), "detector")(of, layer)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("size", [(112, 112), (56, 136)])
def test_batch_equals_singles_on_any_grid(name, size):
    batch = images(2, *size)
    found = detect(name, trace(*size))
    grid = (size[0] // 8, size[1] // 8)
    assert found.dtype == torch.bool
    assert found.shape == (2, grid[0] * grid[1])
    for i in range(2):
        assert torch.equal(detect(name, vit().trace(batch[i : i + 1]))[0], found[i])


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_tiny_grids_and_equal_patches(name):
    for height, width in ((8, 8), (8, 16), (16, 16), (8, 40)):
        found = detect(name, vit().trace(images(1, height, width)))
        assert found.shape == (1, height * width // 64)
    flat = vit().trace(torch.zeros(1, 3, 112, 112))
    flat.outputs[LAYER] = flat.outputs[LAYER].with_patches(torch.ones(1, 196, 128))
    assert detect(name, flat).shape == (1, 196)


def attention(i: int) -> Tensor:
    """Head-wise attention of image `i`, (H, T, T), by the textbook."""
    block = vit().blocks[LAYER]
    x = block.ln_1(trace().outputs[LAYER - 1].data[i])
    q, k, _ = (x @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, -1)
    maps = [
        (a @ b.T / 8).softmax(-1) for a, b in zip(q.split(64, -1), k.split(64, -1), strict=True)
    ]
    return torch.stack(maps)


def marked(found: Tensor) -> list[int]:
    return found.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("i", [0, 1])
def test_som(i):
    a = attention(i).mean(0)
    drawn, own = a[0, 1:].tolist(), a.diagonal()[1:].tolist()
    expected = [j for j in range(196) if 1.5 * drawn[j] > own[j]]
    assert expected
    assert marked(detect("som", trace(), gain=1.5)[i]) == expected
    ranked = sorted(expected, key=lambda j: -drawn[j])[:10]
    assert marked(detect("som", trace(), gain=1.5, top_k=10)[i]) == sorted(ranked)


@pytest.mark.parametrize("i", [0, 1])
def test_cls_self_ratio(i):
    a = attention(i)
    ratio = [float((a[:, 0, j] / a[:, j, j]).mean()) for j in range(1, 197)]
    usual = sorted(ratio)[97]  # the lower of the two in the middle
    expected = [j for j in range(196) if ratio[j] > 1.2 * usual]
    assert 0 < len(expected) < 196
    assert marked(detect("cls_self_ratio", trace(), above=1.2)[i]) == expected
    # SOM compares the means over heads: other patches
    assert marked(detect("som", trace())[i]) != expected


@pytest.mark.parametrize("i", [0, 1])
def test_attention_received_and_cls_attention(i):
    a = attention(i).mean(0)
    received = [sum(a[q, j].item() for q in range(1, 197)) / 196 for j in range(1, 197)]
    usual = sorted(received)[97]
    expected = [j for j in range(196) if received[j] > 1.2 * usual]
    assert 0 < len(expected) < 196
    assert marked(detect("attention_received", trace(), above=1.2)[i]) == expected
    few = sorted(expected, key=lambda j: -received[j])[:3]
    found = detect("attention_received", trace(), above=1.2, top_k=3)
    assert marked(found[i]) == sorted(few)
    most = sorted(range(196), key=lambda j: -a[0, j + 1].item())[:10]
    assert marked(detect("cls_attention", trace())[i]) == sorted(most)


@pytest.mark.parametrize("i", [0, 1])
def test_weight_norm_channel(i):
    rows = vit().blocks[LAYER].mlp.c_proj.weight
    norms = [float(row.square().sum()) for row in rows]
    value = trace().outputs[LAYER].patches[i, :, norms.index(max(norms))]
    usual = sorted(value.tolist())[97]
    apart = [abs(v - usual) for v in value.tolist()]
    spread = 1.4826 * sorted(apart)[97]
    expected = [j for j in range(196) if apart[j] > 2 * spread]
    assert 0 < len(expected) < 100
    assert marked(detect("weight_norm_channel", trace(), above=2.0)[i]) == expected
    assert len(marked(detect("weight_norm_channel", trace(), above=2.0, channels=4)[i])) > len(
        expected
    )


def distances(i: int) -> list[list[float]]:
    x = trace().outputs[LAYER].patches[i].double()
    return (x[:, None] - x[None]).norm(dim=-1).tolist()


@pytest.mark.parametrize("i", [0, 1])
def test_l2_norm(i):
    norms = [float(x.norm()) for x in trace().outputs[LAYER].patches[i]]
    most = sorted(range(196), key=lambda j: -norms[j])[:10]
    assert marked(detect("l2_norm", trace())[i]) == sorted(most)


def test_squared_distances_of_close_and_far_points():
    generator = torch.Generator().manual_seed(0)
    x = 30 + 5 * torch.randn(2, 40, 64, generator=generator)
    x[0, 1], x[0, 2] = x[0, 0], x[0, 0] + 1e-4
    expected = (x.double()[:, :, None] - x.double()[:, None]).square().sum(-1)
    found = squared_distances(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-9)
    assert found[0, 0, 1] == 0


@pytest.mark.parametrize("i", [0, 1])
def test_lof_textbook(i):
    """Breunig et al., definitions 3 to 7."""
    d, k = distances(i), 20
    near = [
        sorted((j for j in range(196) if j != p), key=lambda j: d[p][j])[:k] for p in range(196)
    ]
    far = [d[p][near[p][-1]] for p in range(196)]
    density = [k / sum(max(far[j], d[p][j]) for j in near[p]) for p in range(196)]
    factor = [sum(density[j] for j in near[p]) / k / density[p] for p in range(196)]
    assert marked(detect("lof_textbook", trace())[i]) == [p for p in range(196) if factor[p] > 1.5]
    share = marked(detect("lof_textbook", trace(), contamination=0.05)[i])
    assert share == sorted(sorted(range(196), key=lambda p: -factor[p])[:10])


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("eps", [0.95, 1.0])
def test_dbscan(i, eps):
    """A patch is left over if it is no core and within reach of none."""
    d, k = distances(i), 20  # a tenth of 196
    far = sorted(sorted(row)[k] for row in d)  # row[0] is the patch itself
    radius = eps * (far[97] + far[98]) / 2
    core = [sum(x <= radius for x in row) >= k for row in d]
    expected = [p for p in range(196) if not any(core[j] and d[p][j] <= radius for j in range(196))]
    assert 0 < len(expected) < 196
    assert marked(detect("dbscan", trace(), eps=eps)[i]) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hdbscan", "optics", "isolation_forest", "dbscan", "lof_textbook"]
)
def test_clusterings_leave_far_points_over(name):
    """Two tight groups and three points far from both and from each other."""
    generator = torch.Generator().manual_seed(0)
    x = 0.1 * torch.randn(1, 196, 128, generator=generator)
    x[:, 90:, 0] += 5
    x[:, [3, 77, 150]] += 10 * torch.randn(1, 3, 128, generator=generator)
    of = vit().trace(images(1))
    of.outputs[LAYER] = of.outputs[LAYER].with_patches(x)
    found = marked(detect(name, of)[0])
    # OPTICS counts the point at which a valley's far wall begins into the valley
    assert len({3, 77, 150} - set(found)) <= (name == "optics")
    if name != "isolation_forest":  # it marks some of any points
        assert len(found) < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["lof_textbook", "dbscan", "hdbscan", "optics", "isolation_forest"]
)
def test_scale_of_the_features_does_not_matter(name):
    of = vit().trace(images())
    of.outputs[LAYER] = of.outputs[LAYER].with_patches(64 * of.outputs[LAYER].patches)
    assert torch.equal(detect(name, of), detect(name, trace()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("som", dict(gain=0.9)),
        ("cls_self_ratio", dict(above=1.1)),
        ("cls_self_ratio", dict(above=1.1, top_k=2)),
        ("cls_attention", dict(top_k=3)),
        ("attention_received", dict(above=1.1)),
        ("l2_norm", dict(top_k=3)),
        ("lof", dict(neighbours=5)),
        ("lof", dict(contamination=0.2)),
        ("lof_textbook", dict(contamination=0.1, neighbours=3)),
        ("lof_textbook", dict(contamination=0.2)),
        ("dbscan", dict(eps=1.0)),
        ("dbscan", dict(eps=1.0, share=0.02)),
        ("hdbscan", dict(share=0.02)),
        ("hdbscan", dict(share=0.02, selection="leaf")),
        ("optics", dict(xi=0.01)),
        ("optics", dict(share=0.02)),
        ("isolation_forest", dict(trees=10)),
        ("isolation_forest", dict(contamination=0.1, seed=1)),
        ("isolation_forest", dict(contamination=0.2)),
    ],
)
def test_knobs_change_what_is_found(name, knobs):
    """The last knob does, on top of the others."""
    *before, _ = knobs.items()
    assert not torch.equal(detect(name, trace(), **knobs), detect(name, trace(), **dict(before)))


def test_planted_giants_are_the_largest_norms():
    mask = torch.zeros(2, 196, dtype=torch.bool)
    mask[0, [5, 60, 61, 190]] = mask[1, [0, 1, 14, 15]] = True
    of = vit().trace(images(), [Plant(LAYER, mask, 1000.0)])
    assert torch.equal(detect("l2_norm", of, top_k=4), mask)
    assert torch.equal(detect("weight_norm_channel", of), mask)
    # the class token of the next block looks at nothing else
    drawn = of.cls_row(LAYER + 1).mean(1)
    assert ((drawn * mask).sum(-1) > 0.5).all()


def test_unknown_names_and_knobs():
    with pytest.raises(ValueError, match="did you mean 'dbscan'"):
        sfp.build_method("sfp", pm="dbscn")
    with pytest.raises(ValueError, match="no knob 'epps'; did you mean 'eps'"):
        sfp.build_method("sfp_paper", pm=dict(type="dbscan", epps=1))
    with pytest.raises(ValueError, match="of kind 'mitigator'"):
        sfp.build_method("sfp", pm="median")
    with pytest.raises(ValueError, match="unknown detector"):  # also where it would not be used
        sfp.build_method("sfp", purify=False, pm="dbscn")


@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
@pytest.mark.parametrize("layers", [[], "al", 3, [2.5]], ids=["none", "word", "number", "fraction"])
def test_unusable_layers(method, layers):
    with pytest.raises(ValueError, match="layers="):
        sfp.build_method(method, layers=layers)


@pytest.mark.parametrize("layers", [[3], [3, 7, -2], "all"])
@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
def test_any_set_of_layers(method, layers):
    _, of = sfp.build_method(method, layers=layers, pm="l2_norm").features(vit(), images())
    expected = range(11) if layers == "all" else [i % 12 for i in layers]
    assert sorted(of.masks) == sorted(expected)
