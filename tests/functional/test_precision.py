"""Sums over pixels are as exact for a large region as for a small one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch

from sfp.engine import Engine
from sfp.functional.clusters import mask_means
from sfp.functional.kmeans import spherical_kmeans
from sfp.functional.labels import Labels
from sfp.functional.masks import MaskSheet, vote_in_masks
from sfp.functional.precision import cpu_has, native_half, sum_over_pixels

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize("side", [8, 64, 700])
def test_means_of_masks(side):
    generator = torch.Generator().manual_seed(side)
    logits = 0.2 + 0.01 * torch.randn(5, side, side, generator=generator)
    masks = torch.ones(side, side, dtype=torch.int64)
    masks[: side // 3] = 4  # 0, 2 and 3 have no pixel
    means = mask_means(masks, logits)
    exact = logits.double()
    for number in (1, 4):
        exact[:, masks == number] = exact[:, masks == number].mean(1, keepdim=True)
    torch.testing.assert_close(means.double(), exact, atol=4e-8, rtol=0)
    assert means.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("side", [16, 1200])
def test_mean_votes(side):
    generator = torch.Generator().manual_seed(side)
    scores = (3 + torch.rand(4, side, side, generator=generator)).softmax(0)
    labels = Labels(scores.argmax(0), scores.amax(0), scores)
    inside = torch.ones(2, side, side)
    inside[1, :, : side // 2] = -1
    eye = torch.eye(side)
    voted = vote_in_masks(MaskSheet(inside, eye, eye), labels, 4, mean=True)
    whole, right = (scores.double()[:, inside[i] > 0].mean(1) for i in (0, 1))
    torch.testing.assert_close(voted.scores[:, 0, 0].double(), whole, atol=6e-8, rtol=0)
    torch.testing.assert_close(voted.scores[:, 0, -1].double(), right, atol=6e-8, rtol=0)


def test_products_of_pixels():
    a, b = torch.rand(3, 500_001), torch.rand(2, 500_001)
    torch.testing.assert_close(sum_over_pixels(a, b), a.double() @ b.double().T, rtol=5e-7, atol=0)


def test_centres_of_many_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200_000, 8, generator=generator) + 1
    points = torch.nn.functional.normalize(points, dim=1)
    (centre,), _ = spherical_kmeans(points, 1, restarts=1)
    expected = torch.nn.functional.normalize(points.double().sum(0), dim=0)
    torch.testing.assert_close(centre.double(), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "bf16", "avx2"])
def test_half_precision_of_a_processor_is_looked_up(flag, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
    half = "bf16" if "bf16" in flag else None
    assert native_half(torch.device("cpu")) == half
    assert [cpu_has(name) for name in ("bf16", "fp16", "int8")] == [bool(half), False, False]
    engine = Engine(tiny.clip(**tiny.WORDS), precision="half", templates=["{}"])
    assert engine.computes_in == (half or "fp32")
    assert engine.clip.dtype == (torch.bfloat16 if half else torch.float32)
    assert Engine(tiny.clip(**tiny.WORDS)).computes_in == "fp32"  # the same on every CPU
    assert native_half(torch.device("cuda")) == "fp16"
    assert native_half(torch.device("mps")) is None


@pytest.mark.skipif(not CPUINFO.is_file(), reason="Linux says which instructions there are")
@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="PyTorch before 2.11")
def test_the_look_up_is_what_linux_says():
    flags = set(
        re.findall(r"^(?:flags|Features)\s*: (.*)$", CPUINFO.read_text(), re.MULTILINE)[0].split()
    )
    found = native_half(torch.device("cpu")) == "bf16"
    assert found == bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
