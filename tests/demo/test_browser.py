"""The page in Chromium, which must not load anything from other servers.

`SFP_SCREENSHOTS=1 python -m pytest tests/demo -m browser` also writes docs/images/demo_*.png.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sfp
from sfp.demo.pictures import SHOWN, framed, labelled, marked
from sfp.demo.session import Session
from sfp.mini import scene

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
WORDS = "box|crate, sky, grass, sun, water, ball, cat|kitten, night"
CLASSES = [name.split("|") for name in WORDS.split(", ")]
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
        from sfp.demo.page import Page

        page = Page(Session(model, "mini"), "sfp")
        yield page.serve()
        page.blocks.close(verbose=False)
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
    page.set_default_timeout(60_000)
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
    """For the documentation, if it is asked for."""
    page.mouse.move(640, 5)
    page.wait_for_function("document.querySelector('#told .pending') === null")
    if os.environ.get("SFP_SCREENSHOTS") == "1":
        page.wait_for_timeout(300)  # for the browser to paint
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256)
        picture.save(ROOT / "docs/images" / f"demo_{name}.png", optimize=True)


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
    assert f"{same:.0%} of pixels agree" in page.locator("#both").inner_text()
    choose(page, "second", "sfp")
    alt(page, "right", f"Segmentation by sfp: {results['sfp'].summary()}")
    snapshot(page, "compare")

    page.get_by_role("tab", name="Attention").click()
    alt(page, "attention", "Attention of the patch at row 7, column 14 in layer 11")
    click_patch(page, (14, 28), (2, 25))  # a wide picture
    alt(page, "attention", "Attention of the patch at row 2, column 25 in layer 11")


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
    alt(page, "attention", "Attention of the patch at row 7, column 7 in layer 11")
    click_patch(page, (14, 14), (12, 3))  # the cat's
    alt(page, "attention", "Attention of the patch at row 12, column 3 in layer 11")
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
    told.filter(has_text="broken.png: not an image in a supported format").wait_for()
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
    page.get_by_text("unicorn: unknown to the mini CLIP").wait_for()
