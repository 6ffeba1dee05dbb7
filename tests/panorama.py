"""Segments a 20,000 x 10,000 image from file to label map at full resolution; measures memory.

PYTHONPATH=.:tests python tests/panorama.py            # prints megabytes and seconds as JSON
PYTHONPATH=.:tests python tests/panorama.py 4000 2000 21
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import tiny
import torch
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope

import sfp

PIPELINE = [dict(type="LoadImage"), dict(type="PackSegInputs")]


def write(path: str, width: int, height: int) -> None:
    """A picture with structure everywhere; in a process of its own, whose memory does not count."""
    coarse = np.random.default_rng(0).integers(0, 256, (height // 100, width // 100, 3), np.uint8)
    cv2.imwrite(path, cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MB


def main(width: int = 20_000, height: int = 10_000, classes: int = 21) -> None:
    init_default_scope("mmseg")
    torch.set_num_threads(1)
    clip = tiny.clip(patch=32, image_size=224, layers=4)
    model = sfp.OpenVocabSegmentor(
        clip,
        [f"class {i}" for i in range(classes)],
        "clip",
        query_features=tiny.queries(classes),
        scores=False,
        prob_thd=0.01,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "panorama.jpg"))
        subprocess.run(
            [sys.executable, __file__, "write", path, str(width), str(height)], check=True
        )
        before, start = peak(), time.perf_counter()
        packed = Compose(PIPELINE)(dict(img_path=path))
        loaded = peak()
        (sample,) = model.test_step(
            dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]])
        )
    seconds = time.perf_counter() - start
    assert sample.pred_sem_seg.data.shape == (1, height, width)
    result = dict(before_mb=before, loaded_mb=loaded, peak_mb=peak(), seconds=round(seconds, 1))
    result["labels"] = len(sample.pred_sem_seg.data.unique())
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*map(int, sys.argv[1:]))
