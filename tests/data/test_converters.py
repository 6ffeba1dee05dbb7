"""Label maps drawn from COCO's instances."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from sfp.data import coco_object

SCRIPT = Path(__file__).parents[2] / "tools" / "dataset_converters" / "coco_object.py"
SPEC = importlib.util.spec_from_file_location("coco_object_tool", SCRIPT)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

# The category ids of COCO's 80 things: 1 to 90 without these.
IDS = sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """A rectangle as a COCO polygon."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def annotation(image: int, category: int, segmentation, area: float, iscrowd: int = 0) -> dict:
    return dict(
        image_id=image,
        category_id=category,
        segmentation=segmentation,
        area=area,
        iscrowd=iscrowd,
    )


@pytest.fixture
def root(tmp_path):
    """COCO's annotations of three images."""
    crowd = dict(size=[20, 30], counts=[0, 20 * 30])
    annotations = [
        annotation(1, 90, [box(4, 4, 8, 8)], 16),  # a toothbrush in front of a bicycle
        annotation(1, 2, [box(2, 2, 12, 10), box(20, 0, 30, 5)], 130),
        annotation(2, 13, crowd, 600, iscrowd=1),
        annotation(2, 1, [box(0, 0, 30, 10)], 300),
    ]
    data = dict(
        images=[
            dict(id=1, file_name="000000000001.jpg", height=20, width=30),
            dict(id=2, file_name="000000000002.jpg", height=20, width=30),
            dict(id=3, file_name="000000000003.jpg", height=7, width=5),  # with nothing in it
        ],
        annotations=annotations,
        categories=[dict(id=number, name=str(number)) for number in reversed(IDS)],
    )
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(data))
    return tmp_path


def read(root: Path, number: int) -> np.ndarray:
    path = root / "annotations" / "val2017" / f"{number:012d}_instanceTrainIds.png"
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_label_maps(root, nproc, capsys):
    assert tool.main([str(root), "--nproc", nproc]) == 0
    assert "3 label maps written, 0 already there" in capsys.readouterr().out

    first = np.zeros((20, 30), np.uint8)
    first[2:10, 2:12] = 2
    first[0:5, 20:30] = 2
    first[4:8, 4:8] = 80  # the smaller one on top, though it comes first in the file
    second = np.full((20, 30), 12, np.uint8)  # id 13 is the twelfth thing
    second[:10] = 1  # the crowd lies below, whatever its size
    assert np.array_equal(read(root, 1), first)
    assert np.array_equal(read(root, 2), second)
    assert np.array_equal(read(root, 3), np.zeros((7, 5)))
    assert len(list((root / "annotations" / "val2017").iterdir())) == 3  # nothing half written


def test_resumes(root, capsys):
    assert tool.main([str(root), "--nproc", "1"]) == 0
    maps = root / "annotations" / "val2017"
    (maps / "000000000002_instanceTrainIds.png").unlink()
    (maps / "000000000001_instanceTrainIds.png").write_text("mine")
    assert tool.main([str(root), "--nproc", "1"]) == 0
    assert "1 label maps written, 2 already there" in capsys.readouterr().out
    assert (maps / "000000000001_instanceTrainIds.png").read_text() == "mine"
    assert tool.main([str(root), "--nproc", "1", "--force"]) == 0
    assert read(root, 1).shape == (20, 30)


def test_errors(root, tmp_path, capsys):
    assert tool.main([str(tmp_path / "nowhere")]) == 3
    message = capsys.readouterr().err
    assert "nowhere/annotations/instances_val2017.json" in message
    assert "docs/data.md" in message

    path = root / "annotations" / "instances_val2017.json"
    text = path.read_text()
    path.write_text(text[:-9])
    assert tool.main([str(root)]) == 3
    assert "or truncated" in capsys.readouterr().err

    data = json.loads(text)
    path.write_text(json.dumps(dict(data, categories=data["categories"][:-1])))
    assert tool.main([str(root)]) == 3
    assert "instances_val2017.json is not COCO's" in capsys.readouterr().err

    data["annotations"][2]["segmentation"]["counts"] = [3, 4]
    path.write_text(json.dumps(data))
    assert tool.main([str(root), "--nproc", "1"]) == 3
    message = capsys.readouterr().err
    assert "000000000002.jpg" in message
    assert "7 pixels in an image of 20 x 30" in message


@pytest.mark.process
def test_the_script_itself(root):
    command = [sys.executable, str(SCRIPT), str(root), "--nproc", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--nproc 0 is not a positive number" in done.stderr


def test_polygons():
    # The pixels of a triangle whose centre is inside, and nothing outside of the image.
    triangle = np.array([[0, 0], [4, 0], [0, 4]], float)
    assert coco_object.polygon_mask(triangle, 3, 5).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]
    outside = np.array([[-9, -9], [40, -9], [40, 2.4], [-9, 2.4]])
    assert coco_object.polygon_mask(outside, 4, 6).sum(1).tolist() == [6, 6, 0, 0]
    hourglass = np.array([[0, 0], [6, 5], [6, 0], [0, 5]], float)  # crosses itself
    assert coco_object.polygon_mask(hourglass, 5, 6).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 1],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 0, 0, 1, 1],
        [1, 0, 0, 0, 0, 1],
    ]


def test_polygons_by_brute_force():
    """Every centre on its own: how many edges a ray to the right of it crosses."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 20, 2)
        points = rng.uniform(-8, 26, (rng.integers(3, 8), 2))
        expected = np.zeros((height, width), bool)
        for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, 0), strict=True):
            for row, column in np.ndindex(height, width):
                x, y = column + 0.5, row + 0.5
                if (y0 <= y) != (y1 <= y):
                    expected[row, column] ^= x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
        assert np.array_equal(coco_object.polygon_mask(points, height, width), expected)
    assert not coco_object.polygon_mask(np.zeros((0, 2)), 4, 5).any()


@pytest.mark.parametrize(
    ("text", "runs"),  # as pycocotools encodes them
    [
        ("52203", [5, 2, 2, 2, 5]),
        ("`01", [16, 1]),
        ("T3`n17cQNYU1g2ajN", [100, 2000, 7, 3, 1200, 90, 1]),
        ("Pd0P?P?0O1alS2", [640, 480, 480, 480, 479, 481, 70000]),
    ],
)
def test_run_lengths(text, runs):
    assert coco_object.decode_counts(text) == runs


def test_run_length_codes_go_down_the_columns():
    code = dict(size=[3, 4], counts=[1, 2, 3, 1, 5])
    expected = [[0, 0, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert coco_object.mask(code, 3, 4).astype(int).tolist() == expected
    with pytest.raises(ValueError, match="12 pixels in an image of 4 x 3"):
        coco_object.mask(code, 4, 3)
