"""`sfp demo`: what it computes, and the page in a real browser, without any network."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import socket
import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import sfp
from sfp import cli
from sfp.demo.pictures import (
    SHOWN,
    bounded,
    framed,
    heat,
    labelled,
    legend,
    marked,
    patch_at,
    status,
)
from sfp.demo.session import FALLBACK, OWN, Desk, usable_methods
from sfp.demo.words import parse_words, unknown_to_mini
from sfp.mini import scene

ROOT = Path(__file__).parents[2]
WORDS = "house, mushroom, cat|kitten, sand, box, water, night"
CLASSES = parse_words(WORDS)


@pytest.fixture(scope="module")
def model():
    return sfp.load("mini", "sfp", short_side=224)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """Two scenes beside each other, 880 x 440, of a whole number of patches neither way."""
    path = tmp_path_factory.mktemp("photos") / "beach.png"
    pixels = np.hstack([scene(seed, 440)[0] for seed in (900_047, 900_060)])
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def desk(model):
    return Desk(model, mini=True)


# -- pure functions ------------------------------------------------------------------------------


def test_words_as_people_type_them():
    assert parse_words(" cat |kitten,,\n brick  wall, ") == [["cat", "kitten"], ["brick  wall"]]
    for nothing in ("", None, " , | ,\n"):
        with pytest.raises(ValueError, match="type the words to look for"):
            parse_words(nothing)
    with pytest.raises(ValueError, match="'cat' is there twice"):
        parse_words("cat, dog|cat")
    with pytest.raises(ValueError, match="257 words: expected 256 at most"):
        parse_words(",".join(map(str, range(257))))
    assert unknown_to_mini(["cat", "kitten", "dog"]) == ["dog"]


def test_large_photos_are_scaled_down():
    assert bounded(np.zeros((10, 20, 3), np.uint8)).shape == (10, 20, 3)
    assert bounded(np.zeros((3000, 4000, 3), np.uint8)).shape == (1200, 1600, 3)
    assert bounded(np.zeros((9, 40_000, 3), np.uint8)).shape == (1, 1600, 3)
    grey = np.full((64, 3200, 3), 77, np.uint8)
    assert (bounded(grey) == 77).all()


def test_huge_photos_are_refused(desk, tmp_path):
    """By what the header says."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "huge.png").write_bytes(data)
    with pytest.raises(sfp.ImageError, match=r"huge\.png: claims 60000 x 60000 pixels"):
        desk.photo(str(tmp_path / "huge.png"))


@pytest.mark.parametrize("shape", [(224, 224), (240, 310), (100, 33)])
def test_the_patch_under_each_pixel(shape):
    """Against a map of patch numbers that is scaled up as the picture is."""
    patch, scale = 16, 3
    rows, columns = (n // patch for n in shape)
    numbers = np.zeros(shape, int)
    for y, x in itertools.product(range(shape[0]), range(shape[1])):
        numbers[y, x] = min(y // patch, rows - 1) * columns + min(x // patch, columns - 1)
    numbers = numbers.repeat(scale, 0).repeat(scale, 1)
    size = numbers.shape
    for y, x in itertools.product(range(0, size[0], 7), range(0, size[1], 7)):
        row, column = patch_at((x, y), size, shape, patch)
        assert row * columns + column == numbers[y, x]


def test_pictures_show_what_they_are_given():
    image = np.full((48, 64, 3), 128, np.uint8)
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    shown = marked(image, mask, 16)
    side = SHOWN / 4
    centres = {
        (r, c): shown[int((r + 0.5) * side), int((c + 0.5) * side)].astype(int)
        for r, c in itertools.product(range(3), range(4))
    }
    orange = {cell for cell, (red, _, blue) in centres.items() if red - blue > 60}
    assert orange == {(1, 2)}

    values = np.arange(12.0).reshape(3, 4)
    warm = heat(image, values, 16, "share", chosen=(0, 0))
    light = [warm[int((r + 0.5) * side), int((c + 0.5) * side)].sum() for r, c in centres]
    assert (np.diff(light) > 0).all()  # inferno grows lighter
    assert warm.shape == shown.shape == framed(image, (0, 0), 16).shape

    frame = framed(image, (2, 3), 16)
    plain = framed(image, (0, 0), 16)
    rows, columns = np.nonzero((frame != plain).any(-1))
    inside = (rows > 1.8 * side) & (columns > 2.8 * side)
    assert (inside | ((rows < 1.2 * side) & (columns < 1.2 * side))).all()


def test_pictures_and_legend_of_a_result(model):
    pixels, _ = scene(900_047)
    result = model.segment(pixels, [*CLASSES, ["<b>boat</b>"]])
    shown = labelled(result)
    assert shown.shape == (SHOWN, SHOWN, 3)
    expected = cv2.resize(np.asarray(result.overlay()), (SHOWN, SHOWN))
    assert np.median(abs(shown.astype(int) - expected)) < 12  # but for names and borders
    text = legend([result, result])
    for name, share in result.shares.items():
        red, green, blue = result.palette[result.names.index(name)]
        assert f"rgb({red},{green},{blue})" in text
        assert f"{share:.0%} | {share:.0%}" in text
    assert "<b>" not in text
    assert "&lt;b&gt;" in text
    assert 'role="alert"' in status("no <b>", error=True)
    assert "<b>" not in status("no <b>")


# -- the desk ------------------------------------------------------------------------------------


def test_segmentation_is_the_models(desk, model, photo):
    timed = desk.segment(str(photo), CLASSES, ["sky"], "naclip")
    expected = model.segment(photo, CLASSES, background=["sky"], method="naclip")
    np.testing.assert_array_equal(timed.result.labels, expected.labels)
    assert timed.result.names[0] == "background"
    assert re.fullmatch(r"text [\d.]+ s, image [\d.]+ s, total [\d.]+ s", str(timed))


@pytest.mark.parametrize("method", ["sfp", "sfp_paper"])
def test_outliers_are_those_that_the_method_replaces(method, desk, model, photo):
    trace = model.trace(photo, method=method)
    for layer, mask in trace.masks.items():
        found = desk.outliers(str(photo), method, OWN, layer)
        np.testing.assert_array_equal(found.mask.ravel(), mask[0])
        assert found.replaced
    plain = model.trace(photo, method="clip")
    found = desk.outliers(str(photo), method, "lof", 3)
    assert not found.replaced
    lof = sfp.OPS.get("lof")(plain, 3)[0]
    np.testing.assert_array_equal(found.mask.ravel(), lof)
    expected = plain.outputs[3].patches[0].norm(dim=-1)
    np.testing.assert_array_equal(found.norms.ravel(), expected)


def test_methods_that_look_for_no_outliers(desk, model, photo):
    found = desk.outliers(str(photo), "sclip", OWN, 5)
    assert found.detector == FALLBACK
    expected = sfp.OPS.get(FALLBACK)(model.trace(photo, method="clip"), 5)[0]
    np.testing.assert_array_equal(found.mask.ravel(), expected)


@pytest.mark.parametrize("layer", [0, 11])
def test_attention_is_the_row_of_the_matrix(layer, desk, model, photo):
    share, to_class = desk.attention(str(photo), "sfp", layer, (3, 5))
    trace = model.trace(photo)
    row = trace.attention(layer)[0].mean(0)[1 + 3 * trace.embedded.grid[1] + 5]
    torch.testing.assert_close(torch.from_numpy(share).ravel(), row[1:])
    assert to_class == pytest.approx(float(row[0]), rel=1e-5)


def test_methods_on_offer_run_without_guides(desk, photo):
    assert set(sfp.list_methods()) - set(usable_methods()) == {"proxyclip"}


# -- the command ---------------------------------------------------------------------------------


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gradio")
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    assert cli.main(["demo", "--method", "scilp"]) == 2
    assert "did you mean 'sclip'" in capsys.readouterr().err
    assert cli.main(["demo", "--weights", "nowhere.pt"]) == 3
    assert "nowhere.pt" in capsys.readouterr().err


def test_the_command_asks_for_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sfp.demo.page", raising=False)
    assert cli.main(["demo"]) == 3
    assert "pip install 'sfp[demo]'" in capsys.readouterr().err


def test_weights_that_are_there_are_taken(tmp_path, monkeypatch):
    from sfp.cli.demo import default_weights

    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_weights() == "mini"
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "ViT-B-16.pt").touch()
    assert default_weights() == "ViT-B/16"


def test_only_uploads_are_read(tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from sfp.demo.page import _uploaded

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    assert _uploaded(dict(path=f"{tmp_path}/a/b.png")) == f"{tmp_path.resolve()}/a/b.png"
    for path in ("/etc/passwd", f"{tmp_path}/../b.png"):
        with pytest.raises(ValueError, match="no uploaded file"):
            _uploaded(dict(path=path))


# -- the page in a browser -----------------------------------------------------------------------

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
LOCAL = {"localhost", "127.0.0.1", "::1", "0.0.0.0", None, ""}


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """The page, served by this process, which looks up no other host."""
    pytest.importorskip("gradio", reason="no gradio: pip install 'sfp[demo]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        asked = []
        look_up = socket.getaddrinfo

        def watched(host, *args, **kwargs):
            asked.append(host.decode() if isinstance(host, bytes) else host)
            return look_up(host, *args, **kwargs)

        patch.setattr(socket, "getaddrinfo", watched)
        from sfp.demo.page import build, look

        page = build(Desk(model, mini=True), weights="mini", method="sfp")
        _, url, _ = page.launch(prevent_thread_lock=True, share=False, **look())
        yield url
        page.close(verbose=False)
    assert set(asked) <= LOCAL


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install 'sfp[test]'"
    )
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no chromium: apt install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(address, chromium):
    """The page on a laptop's screen; it must ask for nothing from elsewhere, and raise no error."""
    page = chromium.new_page(viewport=dict(width=1280, height=800))
    page.set_default_timeout(20_000)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.locator("#segment").wait_for()
    yield page
    page.close()
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests
    assert not elsewhere
    assert not errors


def snapshot(page, name: str) -> None:
    """For the documentation if it is asked for; taken in any case."""
    page.mouse.move(640, 5)
    page.wait_for_function("document.querySelector('#told .pending') === null")
    page.wait_for_timeout(300)  # for the browser to paint
    kept = os.environ.get("SFP_SCREENSHOTS") == "1"
    path = ROOT / "docs/images" / f"demo_{name}.png" if kept else None
    data = page.screenshot()
    if path:
        Image.open(io.BytesIO(data)).convert("RGB").quantize(256).save(path, optimize=True)


def shown(page, place: str) -> np.ndarray:
    """The pixels that the browser was given."""
    source = page.locator(f"#{place} img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB"))


def upload(page, path: Path) -> None:
    page.locator("#photo input[type=file]").set_input_files(path)


def choose(page, place: str, option: str) -> None:
    page.locator(f"#{place} input").click()
    page.get_by_role("option", name=option, exact=True).click()


def click_patch(page, grid: tuple[int, int], cell: tuple[int, int]) -> None:
    """Clicks the middle of a patch (row, column), wherever the picture lies in its box."""
    picture = page.locator("#clicked img")
    box = picture.bounding_box()
    natural = picture.evaluate("x => [x.naturalWidth, x.naturalHeight]")
    scale = min(box["width"] / natural[0], box["height"] / natural[1])  # it is contained
    left, top = (
        (box[k] - scale * n) / 2 for k, n in zip(("width", "height"), natural, strict=True)
    )
    side = SHOWN / max(grid) * scale
    picture.click(position=dict(x=left + (cell[1] + 0.5) * side, y=top + (cell[0] + 0.5) * side))


def alt(page, place: str, text: str):
    """Waits for a picture with this alternative text."""
    page.locator(f'#{place} img[alt="{text}"]').wait_for()


def test_from_a_photo_to_two_methods(page, model, photo):
    upload(page, photo)
    page.get_by_text("Now type words and press Segment.").wait_for()
    page.locator("#words textarea").fill(WORDS)
    page.locator("#segment").click()
    results = {m: model.segment(photo, CLASSES, method=m) for m in ("sfp", "naclip", "clip")}
    alt(page, "segmented", f"Segmentation by sfp: {results['sfp'].summary()}")
    np.testing.assert_array_equal(shown(page, "segmented"), labelled(results["sfp"]))
    assert page.locator("#legend li").all_inner_texts() == [
        f"{name}\n{share:.0%}" for name, share in results["sfp"].shares.items()
    ]
    # gradio's own "processing" may still stand before it
    page.get_by_text(re.compile(r"^sfp: text [\d.]+ s, image")).wait_for()
    snapshot(page, "segmentation")

    choose(page, "method", "naclip")
    alt(page, "segmented", f"Segmentation by naclip: {results['naclip'].summary()}")
    np.testing.assert_array_equal(shown(page, "segmented"), labelled(results["naclip"]))

    page.get_by_role("tab", name="Compare").click()
    alt(page, "left", f"Segmentation by naclip: {results['naclip'].summary()}")
    alt(page, "right", f"Segmentation by clip: {results['clip'].summary()}")
    same = (results["naclip"].labels == results["clip"].labels).mean()
    assert f"same class in {same:.0%}" in page.locator("#both").inner_text()
    choose(page, "second", "sfp")
    alt(page, "right", f"Segmentation by sfp: {results['sfp'].summary()}")
    snapshot(page, "compare")

    page.get_by_role("tab", name="Attention").click()
    alt(page, "attention", "Where the patch at row 7, column 14 looks in layer 11")
    click_patch(page, (14, 28), (2, 25))  # a wide picture
    alt(page, "attention", "Where the patch at row 2, column 25 looks in layer 11")


def test_a_scene_its_outliers_and_a_click(page, model):
    pixels, _ = scene(900_047)
    page.locator("#scenes button").first.click()
    page.locator("#segmented img").wait_for()
    assert page.locator("#words textarea").input_value().startswith("house, mushroom")

    page.get_by_role("tab", name="Outliers").click()
    trace = model.trace(pixels)
    count = int(trace.masks[10].sum())
    alt(page, "found", f"Outliers of layer 10 over the photo: {count} of 196 patches")
    expected = marked(pixels, trace.masks[10][0].view(14, 14).numpy(), 16)
    np.testing.assert_array_equal(shown(page, "found"), expected)
    snapshot(page, "outliers")
    choose(page, "detector", "lof")
    lof = int(sfp.OPS.get("lof")(model.trace(pixels, method="clip"), 10).sum())
    alt(page, "found", f"Outliers of layer 10 over the photo: {lof} of 196 patches")
    page.locator("#outlier-layer input[type=range]").press("ArrowLeft")
    page.locator('#found img[alt^="Outliers of layer 9 "]').wait_for()

    page.get_by_role("tab", name="Attention").click()
    alt(page, "attention", "Where the patch at row 7, column 7 looks in layer 11")
    click_patch(page, (14, 14), (12, 3))  # the cat's
    alt(page, "attention", "Where the patch at row 12, column 3 looks in layer 11")
    row = trace.attention(11)[0].mean(0)[1 + 12 * 14 + 3]
    text = page.locator("#attention-caption").inner_text()
    assert f"{row[1 + 12 * 14 + 3]:.1%} of its attention goes to itself" in text
    assert f"{row[0]:.1%} to the class token" in text
    np.testing.assert_array_equal(shown(page, "clicked"), framed(pixels, (12, 3), 16))
    snapshot(page, "attention")


def test_what_is_wrong_is_told(page, photo, tmp_path):
    """A file that is no picture, no words, no photo: a line, and the page goes on."""
    told = page.locator("#told [role=alert]")
    page.locator("#segment").click()
    told.filter(has_text="first drop a photo").wait_for()

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    upload(page, broken)
    told.filter(has_text="broken.png: not an image, or a damaged one").wait_for()
    assert "Traceback" not in page.content()
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:5000])
    upload(page, cut)
    told.filter(has_text="cut.png: truncated PNG").wait_for()

    upload(page, photo)
    page.get_by_text("Now type words and press Segment.").wait_for()
    page.locator("#segment").click()
    told.filter(has_text="type the words to look for").wait_for()
    page.locator("#words textarea").fill("cat, unicorn")
    page.locator("#words textarea").press("Enter")
    page.get_by_text("the mini CLIP does not know unicorn").wait_for()
