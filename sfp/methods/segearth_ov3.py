"""SegEarth-OV3: SAM 3's instances and its map of a query, fused and weighted by its presence.

SAM 3 segments things as instances and stuff in its semantic map; the maximum of both covers both. It is
multiplied by the presence, which SAM 3 already includes in the scores of instances; there it counts
twice, here as in the release. This is our interpretation, not compared with numbers of the official
code. Thresholds of the background are settings of the segmentor: `prob_thd=0.4` on VOC21 and
COCO-Object, 0.1 on Context60 and in remote sensing, else 0.
"""

from __future__ import annotations

from typing import Any

from sfp.methods.sam3 import reader
from sfp.registry import METHODS, tuned

DATASETS = dict(
    ade20k=(0.3, False),
    city_scapes=(0.3, False),
    coco_object=(0.5, False),
    coco_stuff164k=(0.2, False),
    context59=(0.3, False),
    context60=(0.3, False),
    remote_sensing=(0.1, True),
    voc20=(0.2, False),
    voc21=(0.5, False),
)


@METHODS.register_module()
def segearth_ov3(
    *,
    guide: str = "sam3",
    dataset: str = "context59",
    score: float | None = None,
    windows: bool | None = None,
) -> dict[str, Any]:
    """SAM 3's instances and maps fused, weighted by presence; needs the words and no CLIP.

    Args:
        guide: name of the SAM 3, which the caller provides (`guides=dict(sam3=dict(type="sam3",
            model="facebook/sam3"))`).
        dataset: dataset whose constants replace those that are None; see `DATASETS`.
        score: instances are kept if their score is larger.
        windows: whether SAM 3 sees each window instead of the whole image: for remote sensing, with
            `slide_crop=512, slide_stride=512`.
    """
    values = tuned(dataset, DATASETS, score=score, windows=windows)
    return reader(dict(type="sam3_maps", guide=guide, fuse="twice", **values))
