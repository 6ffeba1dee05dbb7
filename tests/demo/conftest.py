from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import sfp
from sfp.demo.session import Session
from sfp.mini import scene


@pytest.fixture(scope="package")
def model():
    return sfp.load("mini", "sfp")


@pytest.fixture(scope="package")
def photo(tmp_path_factory) -> Path:
    """Two scenes beside each other, 880 x 440, of a whole number of patches neither way."""
    path = tmp_path_factory.mktemp("photos") / "scenes.png"
    pixels = np.hstack([scene(seed)[0] for seed in (900_107, 900_060)])
    Image.fromarray(cv2.resize(pixels, (880, 440), interpolation=cv2.INTER_CUBIC)).save(path)
    return path


@pytest.fixture
def session(model):
    return Session(model, "mini")
