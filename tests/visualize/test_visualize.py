"""Figures: they show the trace's own numbers, with named axes and units on colour bars."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import conformance
import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import sfp
from sfp import cli, mini, visualize
from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD
from sfp.ops.detectors import l2_norm, som
from sfp.palette import OKABE_ITO
from sfp.visualize import canvas
from sfp.visualize.features import neighbour_cosine, principal_colours, reference_cosine

ROOT = Path(__file__).parents[2]
LAYERS = [1, -2]


def normalised(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W), as OpenAI's CLIP wants it."""
    pixels = (torch.from_numpy(image).float() - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    return pixels.permute(2, 0, 1)[None]


@pytest.fixture(scope="module", params=[(5, 7), (9, 4)], ids=["wide", "tall"])
def run(request):
    """A picture that holds a few pixels more than whole patches, and its trace."""
    vit = conformance.clip().visual
    height, width = (n * vit.patch + 3 for n in request.param)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with torch.no_grad():
        trace = vit.trace(normalised(image))
    assert trace.embedded.grid == request.param
    return image, trace


def panels(figure: Figure) -> list:
    """Axes that hold a picture; not the colour bars."""
    return [axes for axes in figure.axes if axes.images]


def bars(figure: Figure) -> list[str]:
    """Labels of the colour bars."""
    texts = [(a.get_xlabel(), a.get_ylabel()) for a in figure.axes if a.get_label() == "<colorbar>"]
    return [x or y for x, y in texts]


def drawn(axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def assert_labelled(figure: Figure, colour_bars: int) -> None:
    """Titles everywhere, patch rows and columns on the axes, a unit on each colour bar."""
    assert figure.get_suptitle()
    assert all(axes.get_title() and axes.get_xlabel() for axes in panels(figure))
    assert panels(figure)[0].get_ylabel()
    labels = bars(figure)
    assert len(labels) == colour_bars
    assert all(labels)
    assert isinstance(figure, Figure)
    figure.set_dpi(30)  # that it can be drawn does not depend on its size
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_nothing_touches_pyplot():
    sources = list((ROOT / "sfp/visualize").glob("*.py"))
    assert sources
    assert not any("import matplotlib.pyplot" in s.read_text() for s in sources)


@pytest.mark.slow
def test_class_attention_shows_the_class_row(run):
    image, trace = run
    figure = visualize.class_attention(image, trace, LAYERS)
    assert_labelled(figure, colour_bars=2)
    for axes, i in zip(panels(figure)[1:], (1, 10), strict=True):
        expected = trace.cls_row(i)[0].mean(0).view(trace.embedded.grid)
        np.testing.assert_array_equal(drawn(axes), expected)
        assert f"layer {i}" in axes.get_title()


@pytest.mark.slow
def test_patch_attention_shows_its_row(run):
    image, trace = run
    figure = visualize.patch_attention(image, trace, LAYERS, (3, 2))
    assert_labelled(figure, colour_bars=2)
    columns = trace.embedded.grid[1]
    expected = trace.attention(1)[0].mean(0)[1 + 3 * columns + 2, 1:]
    np.testing.assert_array_equal(drawn(panels(figure)[1]).ravel(), expected)
    with pytest.raises(ValueError, match="no patch at row 3, column 99"):
        visualize.patch_attention(image, trace, LAYERS, (3, 99))


@pytest.mark.slow
def test_attention_matrices_show_patches_only(run):
    _, trace = run
    figure = visualize.attention_matrices(trace, LAYERS)
    assert_labelled(figure, colour_bars=2)
    np.testing.assert_array_equal(drawn(panels(figure)[1]), trace.attention(10)[0].mean(0)[1:, 1:])
    assert [axes.get_xlabel() for axes in panels(figure)] == ["attended patch"] * 2


@pytest.mark.slow
def test_norm_maps_show_norms(run):
    image, trace = run
    figure = visualize.norm_maps(image, trace, LAYERS)
    assert_labelled(figure, colour_bars=2)
    assert bars(figure) == ["L2 norm"] * 2
    np.testing.assert_array_equal(
        drawn(panels(figure)[2]), trace.outputs[10].as_map()[0].norm(dim=0)
    )


def test_profile_has_a_line_for_each_statistic_and_run(run):
    _, trace = run
    figure = visualize.layer_profile({"one": trace, "other": trace})
    left, right = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines) == [
        f"{s}, {n}" for n in ("one", "other") for s in ("max", "99th percentile", "median")
    ]
    norms = torch.stack([t.patches[0].norm(dim=-1) for t in trace.outputs])
    np.testing.assert_allclose(lines["max, one"], norms.amax(1))
    np.testing.assert_allclose(lines["median, other"], norms.quantile(0.5, dim=1), rtol=1e-5)
    assert all(0 < y <= 1 for y in right.lines[0].get_ydata())
    assert all(a.get_xlabel() and a.get_ylabel() and a.get_legend() for a in (left, right))
    assert not visualize.layer_profile(trace).axes[0].lines[0].get_label().endswith(", ")


@pytest.mark.slow
def test_outliers_frame_what_detectors_find(run):
    image, trace = run
    named = ["l2_norm", dict(type="l2_norm", top_k=3)]
    figure = visualize.outliers(image, trace, LAYERS, named)
    assert_labelled(figure, colour_bars=0)
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles[0].startswith("l2_norm, layer 1\n10 of ")
    assert titles[3].startswith("l2_norm, top_k=3, layer 10\n3 of ")
    framed = panels(figure)[3].collections[0].get_paths()
    middles = {tuple((p.vertices[:4].mean(0)).round(3)) for p in framed}  # (column, row)
    mask = l2_norm(trace, 10, top_k=3)[0].view(trace.embedded.grid)
    assert middles == {(x, y) for y, x in mask.nonzero().tolist()}
    left, right, bottom, top = panels(figure)[0].images[0].get_extent()
    patch = trace.vit.patch
    assert ((right - left) * patch, (bottom - top) * patch) == (image.shape[1], image.shape[0])


def test_outliers_take_functions_and_count_planted_patches(run):
    image, trace = run
    planted = l2_norm(trace, 10, top_k=2)
    detectors = {"mine": l2_norm, "none": lambda trace, i: planted & False, "som": som}
    figure = visualize.outliers(image, trace, [-2], detectors, planted=planted)
    titles = [axes.get_title() for axes in panels(figure)]
    assert titles[0].endswith("2 planted")
    assert "0 of" in titles[1]
    assert "blue" in figure.get_suptitle()
    with pytest.raises(ValueError, match="did you mean 'som'"):
        visualize.outliers(image, trace, [-2], ["somm"])
    with pytest.raises(LookupError, match="layer 11 has not run"):
        visualize.outliers(image, trace, [11], ["som"])


def test_sample_chooses_the_image_of_a_batch(run):
    image, trace = run
    pixels = normalised(image)
    with torch.no_grad():
        both = trace.vit.trace(torch.cat([pixels.flip(-1), pixels]))
    shown, alone = (
        drawn(panels(f)[1])
        for f in (
            visualize.norm_maps(image, both, [5], sample=1),
            visualize.norm_maps(image, trace, [5]),
        )
    )
    np.testing.assert_allclose(shown, alone, rtol=1e-5)


@pytest.mark.slow
def test_purification_shows_both_runs_on_one_scale(run, no_grad):
    image, trace = run
    method = sfp.build_method("sfp", pm=dict(type="l2_norm", top_k=4))
    _, after = method.features(trace.vit, normalised(image))
    figure = visualize.purification(image, trace, after, -2, patch=(1, 2), names=("a", "b"))
    assert_labelled(figure, colour_bars=6)
    cells = panels(figure)
    assert cells[2].get_title() == f"replaced: 4 of {after.masks[10].numel()} patches"
    expected = neighbour_cosine(trace.outputs[10]).view(trace.embedded.grid)
    np.testing.assert_array_equal(drawn(cells[3]), expected)
    assert cells[3].images[0].get_clim() == cells[4].images[0].get_clim()
    np.testing.assert_allclose(drawn(cells[8]), drawn(cells[7]) - drawn(cells[6]))
    assert cells[8].images[0].get_clim()[0] == -cells[8].images[0].get_clim()[1]
    with pytest.raises(LookupError, match=r"after layer 3, only after \[10\]"):
        visualize.purification(image, trace, after, 3)


def test_cosines_by_hand():
    data = torch.tensor([[[9.0, 9.0], [1, 0], [1, 0], [0, 1]]])  # a class token and 1x3 patches
    tokens = sfp.Tokens(data, (1, 3))
    torch.testing.assert_close(neighbour_cosine(tokens), torch.tensor([[1, 0.5, 0]]))
    torch.testing.assert_close(reference_cosine(tokens, (0, 2)), torch.tensor([[0.0, 0, 1]]))


def test_equal_features_get_equal_colours():
    torch.manual_seed(0)
    x = torch.randn(20, 8)
    same, scaled = principal_colours([x, 3 * x], x)
    np.testing.assert_allclose(same, scaled, atol=1e-5)
    assert same.shape == (20, 3)
    assert same.min() == 0
    assert same.max() == 1
    (flat,) = principal_colours([torch.ones(20, 8)], torch.ones(20, 8))
    assert np.isfinite(flat).all()


def test_a_panorama_leaves_room_for_legend_and_colour_bars():
    names = [f"class {i}" for i in range(17)]
    labels = np.repeat(np.arange(17), 40)[None].repeat(45, 0)
    result = SimpleNamespace(labels=labels, confidence=np.ones(labels.shape))
    figure = visualize.segmentation(np.zeros((*labels.shape, 3), np.uint8), result, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib's, if it gives up arranging the panels
        figure.canvas.draw()
    (legend,) = (axes.get_legend() for axes in figure.axes if axes.get_legend())
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.x1 < figure.bbox.x1
    figure, grid = canvas.panels(1, 2, 45 / 680, "wide")
    canvas.draw_map(grid[0, 0], np.random.default_rng(0).random((3, 45)), "unit")
    figure.canvas.draw()
    assert figure.axes[-1].get_window_extent().width > 0.5 * grid[0, 0].get_window_extent().width


def test_segmentation_names_classes_and_shows_confidence():
    labels = np.zeros((40, 60), int)
    labels[:, 30:] = 2
    confidence = np.linspace(0, 1, labels.size).reshape(labels.shape)
    result = SimpleNamespace(labels=labels, confidence=confidence)
    image = np.full((40, 60, 3), 90, np.uint8)
    figure = visualize.segmentation(image, {"a": result, "b": result}, ["sky", "sea", "sand"])
    assert bars(figure) == ["probability of the class"]
    picture, a, b, shown, _ = panels(figure)
    assert [axes.get_title() for axes in (picture, a, b)] == ["image", "a", "b"]
    np.testing.assert_array_equal(drawn(shown), confidence)
    written = {text.get_text(): text.get_position() for text in a.texts}
    assert set(written) == {"sky", "sand"}
    assert labels[written["sand"][::-1]] == 2
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert [text.get_text() for text in legend.get_texts()] == ["sky, 50%", "sand, 50%"]
    colour = tuple(round(255 * c) for c in legend.get_patches()[1].get_facecolor()[:3])
    assert colour == visualize.class_colours(2)[1]


def test_colours_are_distinct():
    colours = visualize.class_colours(3 * len(OKABE_ITO))
    assert len(set(colours)) == len(colours)
    assert visualize.class_colours(100)[:5] == colours[:5]


def test_contact_sheet_keeps_every_picture_whole():
    figures = [Figure(figsize=size, dpi=50, facecolor="red") for size in ((3, 1), (1, 2), (2, 1))]
    sheet = visualize.contact_sheet(figures)
    assert sheet.shape == (100, 2 * 150, 3)
    assert (sheet[..., 1] == 0).sum() == (3 + 2 + 2) * 50 * 50
    assert sheet.dtype == np.uint8


@pytest.fixture
def tool(monkeypatch):
    """`sfp visualize`: (*arguments) -> exit code."""
    return lambda *args: cli.main(["visualize", *map(str, args)])


@pytest.mark.slow
def test_tool_draws_a_photo(tool, tmp_path):
    path = tmp_path / "photo.jpg"
    cv2.imwrite(str(path), mini.scene(900_007)[0][:, 50:194, ::-1])
    out = tmp_path / "out"
    assert not tool(
        path, "--out", out, "--size", 112, "--layers", 3, -2, "--patch", 2, 5,
        "--detectors", "som", "lof", "--classes", "cat, brick wall, water",
    )  # fmt: skip
    assert {file.stem for file in out.iterdir()} == {
        *("outliers", "norms", "class_attention", "patch_attention", "attention_matrices"),
        *("profile", "purification", "segmentation", "overview"),
    }
    for file in out.iterdir():
        assert min(cv2.imread(str(file)).shape[:2]) > 250


@pytest.mark.slow
def test_tool_leaves_out_what_it_has_no_data_for(tool, tmp_path, capsys):
    weights = tmp_path / "clip.pt"
    torch.save(conformance.state_dict(), weights)
    common = ("--weights", weights, "--method", "clip", "--layers", 10, "--detectors", "som")
    assert not tool(*common, "--out", tmp_path / "out")
    assert not (tmp_path / "out/segmentation.png").exists()
    said = capsys.readouterr().out
    assert "no purification.png" in said
    assert "no segmentation.png" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["no.jpg"], 3, "no.jpg: cannot be read"),
        ([__file__], 3, "test_visualize.py: not an image"),
        (["--weights", "nope"], 3, "no weights 'nope'"),
        (["--method", "sffp"], 2, "did you mean 'sfp'"),
        (["--layers", "11"], 2, "layer 11 has not run"),
        (["--detectors", "somm"], 2, "did you mean 'som'"),
        (["--classes", ","], 2, "type the words to look for"),
    ],
)
def test_tool_says_what_is_wrong(tool, args, code, message, tmp_path, capsys):
    assert tool(*args, "--out", tmp_path) == code
    assert message in capsys.readouterr().err
