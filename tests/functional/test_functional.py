"""The pure functions and the mathematics of ops, against brute force, float64 and mmseg's own code."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import cv2
import pytest
import reference
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.functional import attention, labels
from sfp.functional import windows as windows_module
from sfp.functional.grid import resample_positions
from sfp.functional.pamr import pamr
from sfp.functional.windows import WindowGrid, interpolation, merge_matrix, window_starts
from sfp.methods.sfp_paper import mean_attention
from sfp.ops.affinity import similarity
from sfp.ops.attention import affinity_attention, average, self_self
from sfp.ops.detectors import l2_norm, lof, lof_scores, som
from sfp.ops.integrators import aggregate, layer_sum
from sfp.ops.mitigators import neighbour_mean
from sfp.registry import bind

pytestmark = pytest.mark.usefixtures("no_grad")

few = settings(max_examples=40)
sides = st.integers(1, 40)
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- windows -------------------------------------------------------------------------------------


@few
@given(st.integers(1, 300), st.integers(1, 100), st.data())
def test_windows_cover_every_pixel(length, crop, data):
    stride = data.draw(st.integers(1, crop))
    starts = window_starts(length, crop, stride)
    window = min(crop, length)
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] + window == length
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("crop", "stride"), [(10, 0), (10, 11), (10, -1), (0, 0), (0, 5)])
def test_strides_that_leave_gaps(crop, stride):
    with pytest.raises(ValueError, match=f"stride {stride} must be between 1 and the crop, {crop}"):
        window_starts(30, crop, stride)


def mmseg_slide(image: Tensor, crop: int, stride: int, patch: int) -> Tensor:
    """mmseg's own sliding window, with the mean of each patch, upsampled, as the network."""

    def network(window: Tensor, metas: object) -> Tensor:
        size = window.shape[2:]
        return F.interpolate(patches(window, patch), size, mode="bilinear", align_corners=False)

    model = SimpleNamespace(
        test_cfg=SimpleNamespace(stride=(stride, stride), crop_size=(crop, crop)),
        out_channels=image.shape[1],
        encode_decode=network,
    )
    return EncoderDecoder.slide_inference(model, image, [{}])


def patches(window: Tensor, patch: int) -> Tensor:
    """The mean of each whole patch, squared to tell patches from pixels: (B, C, h, w)."""
    return F.avg_pool2d(window, patch) ** 2


@pytest.mark.slow
@few
@given(sides, sides, st.integers(1, 30), st.integers(1, 4), sides, sides, seeds, st.data())
def test_sheets_are_mmsegs_slide_inference(h, w, crop, patch, out_h, out_w, seed, data):
    """Images smaller than the crop too; then resized, as mmseg does, to the original size."""
    assume(min(h, w, crop) >= patch)
    stride = data.draw(st.integers(1, crop))
    image = random(seed, 1, 3, h, w)
    expected = F.interpolate(
        mmseg_slide(image, crop, stride, patch),
        (out_h, out_w),
        mode="bilinear",
        align_corners=False,
    )
    grid = WindowGrid.over((h, w), crop, stride)
    windows = torch.stack([grid.cut(image[0], place) for place in grid.places])
    assert windows.shape[2:] == grid.window == (min(crop, h), min(crop, w))
    sheet = grid.sheet(patches(windows, patch), (out_h, out_w))
    assert sheet.size == (out_h, out_w)
    torch.testing.assert_close(sheet.rows(0, out_h)[None], expected, atol=1e-12, rtol=1e-9)


@few
@given(st.lists(sides, min_size=6, max_size=6), seeds)
def test_sheet_slabs(numbers, seed):
    h, w, crop, out_h, out_w, step = numbers
    grid = WindowGrid.over((h, w), crop, max(crop // 2, 1))
    sheet = grid.sheet(random(seed, len(grid.places), 2, 3, 4), (out_h, out_w))
    whole = sheet.rows(0, out_h)
    slabs = [sheet.rows(y, min(y + step, out_h)) for y in range(0, out_h, step)]
    torch.testing.assert_close(torch.cat(slabs, 1), whole, atol=1e-12, rtol=1e-9)


@few
@given(st.lists(sides, min_size=6, max_size=6), st.sampled_from([1, 60, 2**20]), seeds)
def test_sheet_is_two_products_with_full_matrices(numbers, pixels, seed):
    """Also where one slab is merged in parts."""
    h, w, crop, out_h, out_w, queries = numbers
    grid = WindowGrid.over((h, w), crop, max(crop // 2, 1))
    logits = random(seed, len(grid.places), queries, 3, 4)
    tiles = logits.unflatten(0, (len(grid.ys), len(grid.xs)))  # (ys, xs, Q, 3, 4)
    rows = merge_matrix(grid.ys, grid.window[0], 3, h, out_h).unflatten(1, (-1, 3))
    columns = merge_matrix(grid.xs, grid.window[1], 4, w, out_w).unflatten(1, (-1, 4))
    expected = torch.einsum("yai,xbj,abqij->qyx", rows, columns, tiles)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "PIXELS", pixels)
        merged = grid.sheet(logits, (out_h, out_w)).rows(0, out_h)
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 1000])
def test_argmax_is_the_first_of_equals(dtype, threads, monkeypatch):
    """By NumPy or by PyTorch, of any strides; a NaN counts as the largest."""
    monkeypatch.setattr(labels, "THREADS", 8 // threads)
    values = (4 * random(0, 30, 6, 9)).round().to(dtype)
    values[3, 2, 5] = torch.nan
    values[4, 1] = 1
    for x in (values, values.permute(2, 0, 1), values.transpose(0, 2)[::2]):
        expected = [
            next((i for i, v in enumerate(row) if v != v), row.index(max(row)))
            for row in x.flatten(0, -2).tolist()
        ]
        assert labels.argmax(x).flatten().tolist() == expected


@few
@given(st.integers(1, 60), st.integers(1, 30), st.integers(1, 8), st.integers(1, 90), seeds)
def test_merge_matrix_is_the_explicit_chain(length, crop, cells, target, seed):
    """Interpolate, accumulate, divide, interpolate: along one side, with loops."""
    starts = window_starts(length, crop, max(2 * crop // 3, 1))
    window = min(crop, length)
    values = random(seed, len(starts), cells)
    total, count = torch.zeros(length).double(), torch.zeros(length).double()
    for start, row in zip(starts, values, strict=True):
        total[start : start + window] += linear(row, window)
        count[start : start + window] += 1
    matrix = merge_matrix(starts, window, cells, length, target)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ values.flatten(), linear(total / count, target))
    torch.testing.assert_close(matrix.sum(1), torch.ones(target).double())  # constants stay


def linear(row: Tensor, target: int) -> Tensor:
    """Bilinear resampling along one side, from its definition."""
    source = len(row)
    out = torch.zeros(target, dtype=row.dtype)
    for i in range(target):
        x = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        left = math.floor(x)
        right = min(left + 1, source - 1)
        out[i] = row[left] * (left + 1 - x) + row[right] * (x - left)
    return out


def test_interpolation_matrix():
    row = random(0, 7)
    for target in (1, 3, 7, 20):
        torch.testing.assert_close(interpolation(7, target, row) @ row, linear(row, target))


def test_a_whole_image_goes_straight_to_its_output_size():
    """One window; logits are resized once, not through the size of the input."""
    grid = WindowGrid.over((37, 50), 0, 0)
    assert (grid.window, grid.places) == ((37, 50), [(0, 0)])
    logits = random(0, 1, 4, 5, 7)
    expected = F.interpolate(logits, (90, 60), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(grid.sheet(logits, (90, 60)).rows(0, 90), expected)


def test_a_whole_image_by_way_of_its_own_size():
    """NACLIP's release resizes twice."""
    grid = WindowGrid.over((37, 50), 0, 0, via_input=True)
    logits = random(0, 1, 4, 5, 7)
    own = F.interpolate(logits, (37, 50), mode="bilinear", align_corners=False)
    expected = F.interpolate(own, (90, 60), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(grid.sheet(logits, (90, 60)).rows(0, 90), expected)


@few
@given(sides, sides, st.integers(0, 30), st.integers(1, 9), sides, sides, seeds)
def test_windows_padded_to_whole_patches(h, w, crop, patch, out_h, out_w, seed):
    """ClearCLIP's release: zeros around each window, half in front; cut off the logits again."""
    image = random(seed, 3, h, w)
    grid = WindowGrid.over((h, w), crop, max(crop // 2, 1), multiple=patch)
    windows = torch.stack([grid.cut(image, place) for place in grid.places])
    low = patches(windows, patch)
    total, count = torch.zeros(3, h, w).double(), torch.zeros(h, w).double()
    height, width = min(crop or h, h), min(crop or w, w)
    rest = -height % patch, -width % patch
    for window, logits, (y, x) in zip(windows, low, grid.places, strict=True):
        front = rest[0] // 2, rest[1] // 2
        inner = (..., slice(front[0], front[0] + height), slice(front[1], front[1] + width))
        assert torch.equal(window[inner], image[:, y : y + height, x : x + width])
        assert window.count_nonzero() == window[inner].count_nonzero()
        assert window.shape[1:] == (height + rest[0], width + rest[1])
        size = window.shape[1:]
        up = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
        total[:, y : y + height, x : x + width] += up[inner]
        count[y : y + height, x : x + width] += 1
    own = low if not crop and rest == (0, 0) else (total / count)[None]
    expected = F.interpolate(own, (out_h, out_w), mode="bilinear", align_corners=False)[0]
    ours = grid.sheet(low, (out_h, out_w)).rows(0, out_h)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-9)


# -- labels --------------------------------------------------------------------------------------


@st.composite
def vocabularies(draw) -> list[int]:
    """The class of each query: some classes have one, some several."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    return [k for k, size in enumerate(sizes) for _ in range(size)]


def label_by_hand(logits, index, scale, prob_thd, area_thd):
    """Pixel by pixel: labels, confidence and class scores."""
    queries, height, width = logits.shape
    classes = index[-1] + 1
    scores = torch.zeros(classes, height, width).double()
    for y, x in itertools.product(range(height), range(width)):
        powers = [math.exp(scale * float(logits[q, y, x])) for q in range(queries)]
        for q, k in enumerate(index):
            scores[k, y, x] = max(float(scores[k, y, x]), powers[q] / sum(powers))
    if area_thd is not None:
        winners = scores.argmax(0)
        counts = [int((winners == k).sum()) for k in range(classes)]
        for k in range(1, classes):
            if counts[k] <= area_thd * sum(counts[1:]):
                scores[k] = 0
    confidence, label = scores.max(0)
    return torch.where(confidence < prob_thd, 0, label), confidence, scores


@few
@given(
    vocabularies(),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.3, 0.6, 2.0]),
    st.sampled_from([None, 0.0, 0.1, 0.3, 1.0]),
    st.booleans(),
    st.sampled_from([1, 20, 2**24]),
    seeds,
)
def test_assign_by_hand(index, height, width, prob_thd, area_thd, keep, budget, seed):
    """With synonyms, both thresholds, and memory for one row, for some or for all."""
    logits = random(seed, len(index), height, width)
    slabs = []

    def rows(start: int, stop: int) -> Tensor:
        slabs.append((start, stop))
        return 2 * logits[:, start:stop]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(labels.BUDGET, "cpu", budget)
        ours = labels.assign(
            rows,
            (height, width),
            index,
            like=logits,
            prob_thd=prob_thd,
            area_thd=area_thd,
            keep_scores=keep,
        )
    label, confidence, scores = label_by_hand(logits, index, 2.0, prob_thd, area_thd)
    assert torch.equal(ours.labels, label)
    torch.testing.assert_close(ours.confidence, confidence)
    if keep:
        torch.testing.assert_close(ours.scores, scores)
    else:
        assert ours.scores is None
    most = max(stop - start for start, stop in slabs)
    assert most == min(height, max(budget // (len(index) * width), 1))


def test_synonyms_compete_in_the_softmax():
    """The protocol's order: softmax over queries, then the best synonym; never their sum."""
    logits = torch.tensor([1.0, 0.9, 0.9, 0.9]).log().view(4, 1, 1)
    scores = labels.class_scores(logits, (0, 1, 1, 1), 1.0)
    torch.testing.assert_close(scores.flatten(), torch.tensor([1.0, 0.9]) / 3.7)


def test_a_small_area_goes_to_the_next_best_class_not_to_background():
    logits = torch.zeros(3, 1, 10)
    logits[1] = 5
    logits[2, 0, 0] = 6  # class 2 wins one pixel of ten, where class 1 is second
    result = labels.assign(
        lambda a, b: logits[:, a:b], (1, 10), (0, 1, 2), like=logits, area_thd=0.1
    )
    assert result.labels.tolist() == [[1] * 10]
    result = labels.assign(
        lambda a, b: logits[:, a:b], (1, 10), (0, 1, 2), like=logits, area_thd=0.09
    )
    assert result.labels.tolist() == [[2] + [1] * 9]


# -- attention -----------------------------------------------------------------------------------


@few
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), seeds)
def test_centred_softmax_row_by_row(batch, rows, columns, seed):
    s = random(seed, batch, rows, columns)
    ours = attention.centred_softmax(s, 3.0, 1.2)
    for b in range(batch):
        mean = float(s[b].mean())
        for r in range(rows):
            logits = [3.0 * (float(x) - 1.2 * mean) for x in s[b, r]]
            powers = [math.exp(x) if x >= 0 else 0.0 for x in logits]
            total = sum(powers)
            expected = [p / total if total else 1 / columns for p in powers]
            torch.testing.assert_close(ours[b, r], torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_centred_softmax_of_dead_rows(dtype):
    """A patch like no other: the releases give NaN for its row, and so for the window."""
    s = torch.ones(1, 4, 4, dtype=dtype)
    s[0, 2] = -1
    weights = attention.centred_softmax(s, 3.0, 1.0)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights[0, 2], torch.full((4,), 0.25, dtype=dtype))


@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 8)),
    st.sampled_from([1, 7, 50, 2**24]),
    seeds,
)
def test_diagonal_weights_in_any_chunks(shape, chunk, seed):
    q, k = random(seed, *shape), random(seed + 1, *shape)
    full = (0.5 * q @ k.mT).softmax(-1).diagonal(dim1=-2, dim2=-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CHUNK", chunk)
        torch.testing.assert_close(attention.diagonal_weights(q, k, 0.5), full)
        half = attention.diagonal_weights(q.bfloat16(), k.bfloat16(), 0.5)
    assert half.dtype == torch.float32


# -- position embeddings -------------------------------------------------------------------------


def cubic(source: int, target: int, scale: float) -> Tensor:
    """Bicubic weights (a = -0.75) at (i + 0.5) / scale - 0.5, borders repeated: (target, source)."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    a = -0.75
    for i in range(target):
        x = (i + 0.5) / scale - 0.5
        first = math.floor(x) - 1
        for j in range(first, first + 4):
            d = abs(x - j)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(j, 0), source - 1)] += near if d <= 1 else far if d < 2 else 0
    return matrix


@few
@given(*[st.integers(1, 24)] * 4, st.sampled_from([0.1, 0.0]), seeds)
def test_resample_positions_from_the_formula(h0, w0, h, w, offset, seed):
    table = random(seed, h0, w0, 3)
    ours = resample_positions(table, (h, w), offset=offset)
    rows, columns = cubic(h0, h, (h + offset) / h0), cubic(w0, w, (w + offset) / w0)
    expected = torch.einsum("iy,jx,yxd->ijd", rows, columns, table)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-7)


def test_resample_positions_bilinear_and_antialiased():
    table = random(0, 8, 6, 2)
    rows = torch.stack([linear(torch.eye(8).double()[i], 5) for i in range(8)], 1)
    columns = torch.stack([linear(torch.eye(6).double()[i], 9) for i in range(6)], 1)
    expected = torch.einsum("iy,jx,yxd->ijd", rows, columns, table)
    ours = resample_positions(table, (5, 9), offset=0, mode="bilinear")
    torch.testing.assert_close(ours, expected)
    for mode in ("bicubic", "bilinear"):  # a mean of neighbours, where plain sampling skips some
        checkers = torch.tensor([1.0, -1.0]).repeat(8)[:, None, None].expand(16, 16, 1)
        smooth = resample_positions(checkers, (4, 4), offset=0, mode=mode, antialias=True)
        assert smooth.abs().max() < 0.2
    assert resample_positions(table.bfloat16(), (5, 9)).dtype == torch.bfloat16


def test_embed_compares_grids_not_counts():
    visual = tiny.clip().double().visual
    table = visual.positional_embedding
    cls = (visual.class_embedding + table[0]).expand(1, 1, -1)

    def embed(image: Tensor, positions: Tensor) -> Tensor:
        maps = F.conv2d(image, visual.conv1.weight, stride=8)
        x = torch.cat([cls, maps.flatten(2).mT + positions], 1)
        return F.layer_norm(x, (64,), visual.ln_pre.weight, visual.ln_pre.bias)

    native = tiny.images(1).double()
    assert torch.equal(visual.embed(native).data, embed(native, table[1:]))  # nothing resampled
    long = tiny.images(1, 32, 128).double()
    resampled = resample_positions(table[1:].unflatten(0, (8, 8)), (4, 16)).flatten(0, 1)
    torch.testing.assert_close(visual.embed(long).data, embed(long, resampled))
    assert (visual.embed(long).data - embed(long, table[1:])).abs().max() > 0.1
    odd = visual.embed(tiny.images(1, 71, 25).double())  # rests of patches are left out
    torch.testing.assert_close(odd.data, visual.embed(tiny.images(1, 71, 25)[..., :64, :24]).data)
    assert odd.grid == (8, 3)


@pytest.mark.parametrize("shape", [(1, 3, 64, 7), (3, 64, 64), (1, 1, 64, 64)])
def test_embed_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"sides of at least 8 pixels.*got \("):
        tiny.clip().visual.embed(torch.zeros(shape))


# -- pixel-adaptive refinement -------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["deviation", "mean"])
def test_pamr_by_hand(unit):
    """One step at one distance, from the formula; borders repeat."""
    image, mask = random(0, 1, 3, 5, 6), random(1, 1, 2, 5, 6)
    out = pamr(image, mask, steps=1, dilations=(2,), unit=unit)
    offsets = [o for o in itertools.product((-2, 0, 2), repeat=2) if o != (0, 0)]
    for y, x in itertools.product(range(5), range(6)):
        around = [(min(max(y + dy, 0), 4), min(max(x + dx, 0), 5)) for dy, dx in offsets]
        colours = torch.stack([image[0, :, a, b] for a, b in around])  # (8, 3)
        own = image[0, :, y, x]
        std = torch.cat([colours, own[None]]).std(0)
        apart = (colours - own).abs()
        size = 0.1 * std if unit == "deviation" else apart.mean(0)
        weights = (-(apart / (1e-8 + size)).mean(1)).softmax(0)
        expected = weights @ torch.stack([mask[0, :, a, b] for a, b in around])
        torch.testing.assert_close(out[0, :, y, x], expected)


def test_pamr_sees_each_image_alone_and_keeps_constants():
    image, mask = random(0, 2, 3, 20, 24), random(1, 2, 3, 5, 6)
    image[1] *= 9
    both = pamr(image, mask, steps=3, dilations=(1, 3))
    assert both.shape == (2, 3, 20, 24)
    each = [pamr(image[i : i + 1], mask[i : i + 1], steps=3, dilations=(1, 3)) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(each))
    constant = pamr(image, torch.ones(2, 1, 5, 6).double())
    torch.testing.assert_close(constant, torch.ones(2, 1, 20, 24).double())
    resized = F.interpolate(mask, (20, 24), mode="bilinear", align_corners=True)
    torch.testing.assert_close(pamr(image, mask, steps=0), resized)


@pytest.mark.parametrize("unit", ["deviation", "mean"])
def test_pamr_of_a_flat_image_is_finite(unit):
    flat, masks = torch.zeros(1, 3, 12, 12), torch.rand(1, 2, 12, 12)
    assert pamr(flat, masks, dilations=(8, 16), unit=unit).isfinite().all()


# -- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_otsu_beside_opencv(seed):
    """Of 8-bit levels, of which OpenCV's threshold is the last one below."""
    groups = torch.cat(
        [0.05 * random(seed, 400) + 0.3, 0.1 * random(seed + 9, 150) + 0.6 + seed / 20]
    )
    values = groups.clamp(0, 1)
    level, _ = cv2.threshold(
        (255 * values).round().byte().numpy(), 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU
    )
    assert float(labels.otsu(values)) == pytest.approx((level + 0.5) / 255)
    assert float(labels.within(values, (0.9, 0.95))) == pytest.approx(0.9)
    assert float(labels.within(values, (0.0, 0.1))) == pytest.approx(0.1)
    assert labels.within(values, 0.3) == 0.3


def test_otsu_of_equal_values():
    for value in (0.0, 0.4, 1.0):
        assert 0 <= float(labels.otsu(torch.full((3, 4), value))) <= 1


def test_a_threshold_of_the_images_own():
    logits = torch.stack([random(3, 12, 14).abs() + 0.5, -random(4, 12, 14).abs()])

    def own(threshold: labels.Threshold) -> labels.Labels:
        return labels.assign(
            lambda a, b: logits[:, a:b], (12, 14), (0, 1), like=logits, prob_thd=threshold
        )

    free = own(0.0)
    fixed = own(float(labels.otsu(free.confidence)))
    found = own((0.0, 1.0))
    assert torch.equal(found.labels, fixed.labels)
    assert (own((0.0, 0.0)).labels == free.labels).all()


# -- outliers ------------------------------------------------------------------------------------


@few
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from(["nearest", "keep", "zero"]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.integers(0, 2),
    seeds,
)
def test_neighbour_mean_cell_by_cell(h, w, alone, share, prefix, seed):
    """From single outliers to nothing but outliers, with and without prefix, two images at once."""
    x = random(seed, 2, prefix + h * w, 3)
    mask = torch.rand(2, h * w, generator=torch.Generator().manual_seed(seed)) < share
    tokens = sfp.Tokens(x, (h, w), prefix)
    out = neighbour_mean(tokens, mask, alone=alone)
    for i in range(2):
        patches = x[i, prefix:].view(h, w, 3)
        expected = reference.filled(patches, mask[i].view(h, w), alone)
        torch.testing.assert_close(out.patches[i].view(h, w, 3), expected)
    assert torch.equal(out.data[:, :prefix], x[:, :prefix])
    assert out.grid == (h, w)


def test_neighbour_mean_of_a_corner_cluster():
    """2 x 2 outliers in a corner: the outermost has no neighbour left; the release makes it zero."""
    x = torch.arange(16.0).view(1, 16, 1) + 1
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = True
    tokens = sfp.Tokens(x, (4, 4), 0)
    corner = {
        alone: float(neighbour_mean(tokens, mask.flatten(1), alone=alone).data[0, 0, 0])
        for alone in ("nearest", "keep", "zero")
    }
    ring = [3, 7, 9, 10, 11]  # the cells at distance 2
    assert corner == dict(nearest=sum(ring) / 5, keep=1.0, zero=0.0)
    with pytest.raises(ValueError, match="unknown alone='nearst'; did you mean 'nearest'"):
        bind(dict(type="neighbour_mean", alone="nearst"))


def traced(batch: int = 2) -> sfp.Trace:
    image = tiny.images(batch, 48, 72).double()
    return tiny.clip().double().visual.trace(image, text=None, depth=12)


@pytest.mark.slow
@pytest.mark.parametrize("gain", [0.0, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("top_k", [None, 0, 1, 4, 1000])
def test_som_patch_by_patch(gain, top_k):
    trace = traced()
    found = som(trace, 6, gain=gain, top_k=top_k)
    for i in range(2):
        full = trace.attention(6)[i].mean(0)  # (T, T), over heads
        drawn = {j: gain * float(full[0, j + 1]) for j in range(54)}
        outliers = [j for j, a in drawn.items() if a > float(full[j + 1, j + 1])]
        outliers = sorted(outliers, key=drawn.__getitem__, reverse=True)[:top_k]
        assert found[i].nonzero()[:, 0].tolist() == sorted(outliers)


def test_l2_norm_takes_the_largest():
    trace = traced()
    found = l2_norm(trace, 3, top_k=5)
    for i in range(2):
        norms = [float(row.norm()) for row in trace.outputs[3].patches[i]]
        largest = sorted(range(54), key=norms.__getitem__)[-5:]
        assert found[i].nonzero()[:, 0].tolist() == sorted(largest)


@pytest.mark.parametrize("neighbours", [1, 5, 30, 1000])
def test_lof_point_by_point(neighbours):
    x = random(3, 2, 40, 6)
    x[0, 7] += 20
    x[1, 3] = x[1, 4]  # twins
    ours = lof_scores(x, neighbours)
    for points, scores in zip(x, ours, strict=True):
        distance = [[float(((a - b) ** 2).sum()) for b in points] for a in points]
        k = min(neighbours, 39)
        order = [sorted(range(40), key=row.__getitem__) for row in distance]
        others = [[j for j in row if j != i][:k] for i, row in enumerate(order)]
        reach = [distance[i][near[-1]] for i, near in enumerate(others)]
        density = [1 / max(r, torch.finfo(torch.float64).eps * max(reach)) for r in reach]
        expected = [sum(density[j] for j in near) / k / density[i] for i, near in enumerate(others)]
        torch.testing.assert_close(scores, torch.tensor(expected).double())
    assert int(ours[0].argmax()) == 7


@pytest.mark.parametrize("same", [12, 40])
def test_lof_of_a_flat_image(same):
    """More equal tokens than neighbours: their density is not infinite, nor any score NaN."""
    x = random(0, 2, 40, 6).float()
    x[:, :same] = x[:, :1]
    scores = lof_scores(x, 5)
    assert scores.isfinite().all()
    assert scores.quantile(0.95, dim=-1).isfinite().all()
    torch.testing.assert_close(scores[:, :same], torch.ones(2, same))


def test_lof_marks_a_share():
    trace = traced()
    marked = lof(trace, 5, neighbours=10, contamination=0.1)
    assert marked.sum(1).tolist() == [6, 6]  # above the 90 % quantile of 54


# -- affinities, attention rules, integrators ----------------------------------------------------


def test_similarity_pair_by_pair():
    trace = traced()
    x = trace.outputs[3].patches
    cosine = torch.stack(
        [torch.stack([F.cosine_similarity(row, x[i], dim=-1) for row in x[i]]) for i in range(2)]
    )
    torch.testing.assert_close(similarity(trace, layer=3), cosine)
    cut = similarity(trace, layer=3, cut=0.3)
    torch.testing.assert_close(cut, torch.where(cosine < 0.3, 0.0, cosine))
    assert (cut == 0).any()


def test_similarity_fills_what_an_edit_found():
    trace, fill = traced(), neighbour_mean
    assert torch.equal(similarity(trace, layer=3, fill=fill), similarity(trace, layer=3))
    trace.masks[10] = som(trace, 10, gain=100.0, top_k=5)
    filled = similarity(trace, layer=3, fill=fill)
    x = neighbour_mean(trace.outputs[3], trace.masks[10]).patches
    torch.testing.assert_close(filled, F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT)
    assert not torch.allclose(filled, similarity(trace, layer=3))
    assert torch.equal(
        similarity(trace, layer=3, fill=fill, fill_from=9), similarity(trace, layer=3)
    )


def test_mean_attention_and_its_range():
    trace = traced()
    maps = [trace.attention(i).mean(1)[:, 1:, 1:] for i in range(12)]
    torch.testing.assert_close(mean_attention(trace), sum(maps[:11]) / 11)
    torch.testing.assert_close(mean_attention(trace, first=4, last=4), maps[4])
    torch.testing.assert_close(mean_attention(trace, first=9, last=-1), sum(maps[9:]) / 3)
    with pytest.raises(LookupError, match="layer 5 comes after layer 3"):
        mean_attention(trace, first=5, last=3)


def test_self_self_weights():
    trace = traced()
    heads = trace.heads(11)
    expected = [(getattr(heads, x) * 64**-0.5 @ getattr(heads, x).mT).softmax(-1) for x in "qkv"]
    for number in (1, 2, 3):
        for chosen in itertools.combinations(range(3), number):
            pairs = [2 * "qkv"[i] for i in chosen]
            torch.testing.assert_close(
                self_self(heads, trace, pairs=pairs), sum(expected[i] for i in chosen)
            )
    torch.testing.assert_close(self_self(heads, trace, pairs=["qk"]), trace.attention(11))


def test_affinity_attention_and_its_prefix():
    trace = traced()

    def affinity(trace):
        return similarity(trace, layer=8)

    last = trace.vit.blocks[-1]
    patches = last.heads(trace.outputs[-1].only_patches())
    weights = affinity_attention(patches, trace, affinity=affinity, gain=2.0, centre=1.1)
    expected = attention.centred_softmax(similarity(trace, layer=8), 2.0, 1.1)
    assert torch.equal(weights[:, 0], expected)
    with_cls = affinity_attention(
        trace.heads(11), trace, affinity=affinity, gain=2.0, centre=1.1
    )  # the class token attends to itself, and is attended by no patch
    assert with_cls.shape == (2, 1, 55, 55)
    assert torch.equal(with_cls[:, 0, 1:, 1:], expected)
    assert with_cls[:, 0, 0].tolist() == [[1.0] + [0.0] * 54] * 2
    assert not with_cls[:, 0, 1:, 0].any()


def test_average_layer_sum_and_aggregate():
    trace = traced()
    heads = trace.heads(11)
    rules = [lambda h, t, p=p: self_self(h, t, pairs=[p]) for p in ("qq", "vv")]
    torch.testing.assert_close(
        average(heads, trace, rules=rules), self_self(heads, trace, pairs=["qq", "vv"]) / 2
    )
    torch.testing.assert_close(
        layer_sum(trace, layers=(3, 5, -2)).data,
        trace.outputs[3].data + trace.outputs[5].data + trace.outputs[10].data,
    )
    weights = random(0, 2, 54, 54).abs()
    out = aggregate(trace.outputs[7], trace, affinity=lambda trace: weights)
    expected = torch.stack(
        [
            (weights[i] / weights[i].sum(1, keepdim=True)) @ trace.outputs[7].patches[i]
            for i in range(2)
        ]
    )
    torch.testing.assert_close(out.patches, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(out.cls, trace.outputs[7].cls)


# -- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "grid", "prefix"),
    [
        ((1, 12, 4), (3, 4), 1),
        ((1, 14, 4), (3, 4), 1),
        ((1, 13, 4), (3, 4), 0),
        ((13, 4), (3, 4), 1),
    ],
)
def test_tokens_that_do_not_fit(shape, grid, prefix):
    with pytest.raises(ValueError, match=rf"3x4 grid with {prefix} prefix.*expected \(B, 1[23]"):
        sfp.Tokens(torch.zeros(shape), grid, prefix)


def test_tokens_and_their_parts():
    data = random(0, 2, 2 + 12, 5)
    tokens = sfp.Tokens(data, (3, 4), prefix=2)
    assert torch.equal(tokens.cls, data[:, :1])
    assert torch.equal(tokens.as_map()[:, :, 1, 3], data[:, 2 + 1 * 4 + 3])
    only = tokens.only_patches()
    assert (only.prefix, only.grid) == (0, (3, 4))
    assert torch.equal(only.data, tokens.patches)
    replaced = tokens.with_patches(tokens.patches + 1)
    assert torch.equal(replaced.data[:, :2], data[:, :2])
    assert torch.equal(replaced.patches, tokens.patches + 1)
    assert tokens.with_data(data[..., :3]).data.shape == (2, 14, 3)
    assert torch.equal(tokens.data, random(0, 2, 2 + 12, 5))
    with pytest.raises(AttributeError):
        tokens.grid = (4, 3)


def test_heads_logits_in_at_least_float32():
    heads = tiny.clip().bfloat16().visual.trace(tiny.images(1)).heads(0)
    logits = heads.logits("q", "v")
    assert logits.dtype == torch.float32
    expected = torch.einsum("bhid,bhjd->bhij", heads.q.float(), heads.v.float()) / 8
    torch.testing.assert_close(logits, expected)
