"""The page's output as pixels and HTML."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

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
from sfp.mini import scene


def test_large_photos_are_scaled_down():
    assert bounded(np.zeros((10, 20, 3), np.uint8)).shape == (10, 20, 3)
    assert bounded(np.zeros((3000, 4000, 3), np.uint8)).shape == (1200, 1600, 3)
    assert bounded(np.zeros((9, 40_000, 3), np.uint8)).shape == (1, 1600, 3)
    grey = np.full((64, 3200, 3), 77, np.uint8)
    assert (bounded(grey) == 77).all()


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

    tall = heat(image.transpose(1, 0, 2)[:, :20], values.T[:, :1], 16, "L2 norm of patch tokens")
    below = tall[SHOWN + 2 :]
    assert (below < 128).any()
    assert (below[:, -3:] == 255).all()  # its unit does not run out of the picture

    frame = framed(image, (2, 3), 16)
    plain = framed(image, (0, 0), 16)
    rows, columns = np.nonzero((frame != plain).any(-1))
    inside = (rows > 1.8 * side) & (columns > 2.8 * side)
    assert (inside | ((rows < 1.2 * side) & (columns < 1.2 * side))).all()


def test_pictures_and_legend_of_a_result(model):
    pixels, _ = scene(900_047)
    result = model.segment(pixels, ["house", "mushroom", "cat", "sand", "<b>boat</b>"])
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


def test_status_lines_are_announced_and_escaped():
    for line in (status("no <b>"), status("", warning="no <b>"), status("no <b>", error=True)):
        assert "no &lt;b&gt;" in line
    assert 'role="alert"' in status("no", error=True)
    assert 'role="alert"' not in status("yes")
    assert 'role="alert"' in status("yes", warning="but")
