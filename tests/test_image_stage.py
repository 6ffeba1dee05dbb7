"""Methods on all windows of an image at once: stitched grids, positions, and the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.engine import Engine, Queries
from sfp.functional.windows import WindowGrid, nearest
from sfp.registry import op
from sfp.trace import RegionsError, Trace
from sfp.whole import PADDING, WholeImage

pytestmark = pytest.mark.usefixtures("no_grad")

WORDS = Queries(tiny.queries(5), (0, 1, 2, 3, 4))


def maps(grid: WindowGrid, cells: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(grid.places), 3, *cells, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("size", "window"), [((32, 48), 16), ((16, 16), 16), ((60, 20), 20)])
def test_windows_side_by_side_come_back(size, window):
    grid = WindowGrid.over(size, window, window)
    x = maps(grid, (4, 4))
    for floor in (False, True):
        canvas = grid.stitch(x, floor=floor)
        assert canvas.shape[2:] == (size[0] * 4 // window, size[1] * 4 // window)
        assert torch.equal(grid.unstitch(canvas, (4, 4), floor=floor), x)


def by_pixels(grid: WindowGrid, x: Tensor, canvas: tuple[int, int]) -> Tensor:
    """`stitch` by brute force: every pixel of every window, and the mean of those in a cell."""
    height, width = (grid.size[i] + grid.padding[i] for i in range(2))
    sums = torch.zeros(3, *canvas, dtype=torch.float64)
    counts = torch.zeros(canvas, dtype=torch.float64)
    for n, (top, left) in enumerate(grid.places):
        rows, columns = (grid.window[i] + grid.padding[i] for i in range(2))
        for row in range(rows):
            for column in range(columns):
                y, x_ = (top + row) * canvas[0] // height, (left + column) * canvas[1] // width
                at = (row * x.shape[2] // rows, column * x.shape[3] // columns)
                sums[:, y, x_] += x[n, :, at[0], at[1]]
                counts[y, x_] += 1
    return sums / counts


@pytest.mark.parametrize(
    ("size", "window", "stride", "multiple"),
    # origins between cells; wide; padded
    [((42, 54), 24, 10, 1), ((24, 60), 24, 20, 1), ((20, 54), 30, 10, 12)],
)
def test_stitching_is_the_mean_over_pixels(size, window, stride, multiple):
    grid = WindowGrid.over(size, window, stride, multiple=multiple)
    cells = tuple((grid.window[i] + grid.padding[i]) // 6 for i in range(2))
    x = maps(grid, cells)
    canvas = grid.canvas(cells)
    sides = [grid.size[i] + grid.padding[i] for i in range(2)]
    assert not any(side % count for side, count in zip(sides, canvas, strict=True))
    torch.testing.assert_close(grid.stitch(x)[0], by_pixels(grid, x, canvas))


@pytest.mark.parametrize("floor", [False, True])
def test_a_constant_stays_and_places_agree(floor):
    grid = WindowGrid.over((173, 236), 112, 56)
    x = torch.ones(len(grid.places), 1, 14, 14, dtype=torch.float64)
    canvas = grid.stitch(x, floor=floor)
    torch.testing.assert_close(canvas, torch.ones(1, 1, 21, 29, dtype=torch.float64))
    torch.testing.assert_close(grid.unstitch(canvas, (14, 14), floor=floor), x)
    # what lies where: a ramp over the image survives, up to a cell if placed by the floor
    at = grid.positions((14, 14)).unflatten(0, (len(grid.places), 14, 14)).movedim(3, 1)
    ramp = grid.stitch(at, floor=floor)[0]
    rows = (torch.arange(21, dtype=torch.float64) + 0.5) * 173 / 21
    columns = (torch.arange(29, dtype=torch.float64) + 0.5) * 236 / 29
    error = max(
        (ramp[0] - rows[:, None]).abs().max().item(), (ramp[1] - columns).abs().max().item()
    )
    assert error < (8 if floor else 4)


def test_positions_are_in_pixels_of_the_image():
    grid = WindowGrid.over((20, 50), 30, 20, multiple=12)  # a window of 20 x 30 padded to 24 x 36
    at = grid.positions((2, 3)).unflatten(0, (2, 2, 3))
    assert at[0, :, 0, 0].tolist() == [4.0, 16.0]  # padded by 2 in front
    assert at[1, 0, :, 1].tolist() == [23.0, 35.0, 47.0]  # starts at 20, padded by 3


def test_nearest_takes_the_floor():
    ids = torch.arange(7)[None] * torch.ones(3, 1, dtype=torch.int64)
    assert nearest(ids, (2, 3))[0].tolist() == [0, 2, 4]
    assert torch.equal(nearest(ids, (3, 7)), ids)
    assert nearest(ids, (6, 14))[1].tolist() == [i // 2 for i in range(14)]


def test_a_canvas_knows_the_image():
    """Tokens, outliers, hidden patches, regions and guides, each on the grid of the whole image."""
    image = tiny.images(1, 64, 96)[0]
    ids = (torch.arange(96) // 40 + 1).expand(64, -1)
    grid = WindowGrid.over((64, 96), 64, 32)
    whole = WholeImage(grid, image, regions=ids)
    cut = [whole.cut(place) for place in grid.places]
    method = sfp.build_method("sfp", stitched=True, purify="mask_attention")
    colours = lambda x: sfp.Tokens(F.avg_pool2d(x, 4).flatten(2).mT, (16, 16), prefix=0)  # noqa: E731
    trace = method.run(
        tiny.clip().visual,
        torch.stack([window for window, _ in cut]),
        whole=whole,
        regions=torch.stack([part for _, part in cut if part is not None]),
        guides=dict(colours=colours),
        portion=1,
    )
    canvas = method.seen(trace)
    assert canvas.embedded.grid == (8, 12)
    assert torch.equal(canvas.regions, ids[None])
    assert torch.equal(canvas.image[0], image)
    torch.testing.assert_close(
        canvas.guide("colours").as_map()[0], F.avg_pool2d(image, 4), atol=1e-5, rtol=1e-5
    )
    last = trace.outputs[10].as_map()
    torch.testing.assert_close(canvas.outputs[10].as_map()[0, :, :, :4], last[0, :, :, :4])
    both = (last[0, :, :, 4:] + last[1, :, :, :4]) / 2
    torch.testing.assert_close(canvas.outputs[10].as_map()[0, :, :, 4:8], both)
    hidden = canvas.outputs[10].hidden
    assert hidden is not None
    assert torch.equal(hidden, canvas.masks[10])
    assert hidden.any()


def centred_over_windows(logits: Tensor, trace: Trace) -> Tensor:
    """Logits minus their mean over all windows of the image."""
    assert trace.whole is not None
    assert len(logits) == len(trace.whole.grid.places)
    return logits - logits.mean((0, 2, 3), keepdim=True)


def region_numbers(trace: Trace) -> sfp.Tokens:
    """The last layer, shifted by the ids of the patches' upper left pixels."""
    tokens = trace.outputs[-1].only_patches()
    ids = nearest(trace.regions, tokens.grid).flatten(1)
    return tokens.with_data(tokens.data + ids[..., None].clamp(max=9))


@pytest.fixture
def own_ops():
    """Two ops of another package, registered for one test."""
    op("refiner", whole=True)(centred_over_windows)
    op("reader", regions=True)(region_numbers)
    yield
    for fn in (centred_over_windows, region_numbers):
        sfp.OPS.module_dict.pop(fn.__name__)


@pytest.mark.slow
def test_the_engine_keeps_images_together(own_ops):
    """Whatever the batches and the cache: each image's windows in one trace, and no other's."""
    method = sfp.build_method(dict(refiners=[dict(type="centred_over_windows")]))
    assert method.needs_whole
    plain = sfp.build_method("clip")
    pictures = [tiny.images(1, 64, 128, seed=1)[0], tiny.images(1, 100, 64, seed=2)[0]]
    sizes = [(64, 128), (50, 32)]
    engines = [
        Engine(tiny.clip(), slide_crop=64, slide_stride=32, window_batch=n, cache_bytes=size)
        for n, size in ((2, 0), (5, 2**26))
    ]
    results = [
        engine.logits([method, plain], pictures, sizes, WORDS)
        for engine in engines
        for _ in range(2)
    ]
    for sheets in results:
        for n, picture in enumerate(pictures):
            ((alone,),) = engines[0].logits([method], [picture], [sizes[n]], WORDS)
            torch.testing.assert_close(sheets[0][n].tiles, alone.tiles, atol=1e-5, rtol=1e-4)
            windows = sheets[1][n].tiles  # the tiles of plain CLIP, each patch of each window
            centred = windows - windows.mean((0, 1))
            torch.testing.assert_close(sheets[0][n].tiles, centred, atol=1e-5, rtol=1e-4)


def test_other_words_for_a_stitched_image():
    """The cache answers with the canvas of these pixels for words that it has not seen."""
    engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32, cache_bytes=2**26)
    fresh = Engine(tiny.clip(), slide_crop=64, slide_stride=32)
    image = tiny.images(1, 64, 128)
    for method in (
        sfp.build_method("resclip", stitched=True),
        sfp.build_method("sfp", stitched=True),
    ):
        for seed in (0, 1):
            words = Queries(tiny.queries(4, seed), (0, 1, 2, 3))
            sheets = [e.logits([method], image, [(64, 128)], words)[0][0] for e in (engine, fresh)]
            assert torch.equal(sheets[0].tiles, sheets[1].tiles)


def test_stitched_refuses():
    with pytest.raises(ValueError, match="stitched='yes': expected True or False"):
        sfp.build_method("clip", stitched="yes")
    with pytest.raises(ValueError, match="expected one for each of the 1 readouts"):
        sfp.build_method(dict(weights=[1.0, 2.0]))


def test_regions_reach_their_windows(own_ops):
    method = sfp.build_method(dict(readouts=[dict(type="region_numbers")]))
    assert method.needs_regions
    engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32, pad_windows=24)
    image = tiny.images(1, 40, 96)
    with pytest.raises(RegionsError, match="regions="):
        engine.logits([method], image, [(40, 96)], WORDS)
    whole = WholeImage(engine._grid(image[0]), image[0], regions=torch.ones(40, 96).long())
    seen = [whole.cut(place)[1] for place in whole.grid.places]
    assert seen[0].shape == (48, 72)
    assert int((seen[0] == PADDING).sum()) == 48 * 72 - 40 * 64
    ids = torch.ones(20, 24, dtype=torch.int64)
    plain = engine.logits([method], image, [(40, 96)], WORDS, regions=[ids])[0][0]
    ids[:, 12:] = 7
    other = engine.logits([method], image, [(40, 96)], WORDS, regions=[ids])[0][0]
    changed = (plain.tiles != other.tiles).any(-1)
    assert not changed[:, :4].any()
    assert changed[:, -4:-1].any()


def recipes() -> list[str]:
    text = (Path(__file__).parents[1] / "docs/recipes.md").read_text()
    return [block.split("```")[0] for block in text.split("```python\n")[1:]]


@pytest.mark.parametrize("recipe", recipes())
def test_recipes_run(recipe):
    """Over several windows, with mean colours for a guide and stripes for regions."""
    scope: dict = {}
    exec(recipe, scope)
    config = {k: v for k, v in scope["model"]["method"].items() if k != "_delete_"}
    guide = torch.nn.Identity()
    guide.forward = lambda image, output=None: sfp.Tokens(
        F.avg_pool2d(image, 8).flatten(2).mT, (image.shape[2] // 8, image.shape[3] // 8), prefix=0
    )
    engine = Engine(tiny.clip(), slide_crop=64, slide_stride=32, guides=dict(dino=guide))
    ids = (torch.arange(96) // 30).expand(64, -1)
    image = tiny.images(1, 64, 96)
    method = sfp.build_method(config)
    ((sheet,),) = engine.logits([method], image, [(64, 96)], WORDS, regions=[ids])
    found = engine.label(image[0], sheet, WORDS.index, method=method)
    assert found.labels.shape == (64, 96)
    assert found.confidence.isfinite().all()
