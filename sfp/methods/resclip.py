"""ResCLIP: attention of earlier blocks and a first guess (Yang et al., CVPR 2025, arXiv:2411.15851).

NACLIP's reduced last block, with two additions. RCS: attention of the middle blocks is mixed into it.
SFR: a first segmentation tells which patches belong together, and the last block reads again.

The paper's main rows carry no post-processing, but the release runs PAMR inside the feedback. Its flags
`use_rcs` and `use_sfr` are always true by a slip; here they work. It tunes four constants per dataset,
listed in `DATASETS`; its other settings (crops, thresholds) are NACLIP's.

No reference numbers exist for it here (SFR runs on CUDA only). Our reading, where the description is
open: the Gaussian prior is added after SFR's scale, the class token gets no feedback, distances are
divided by the grid's largest, the blur pads with nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sfp.registry import METHODS, pick

# temp_thd, lambda_rcs, tau_sfr, lambda_sfr
DATASETS = dict(
    ade20k=(0.25, 0.3, 2.1, 0.7),
    city_scapes=(0.10, 0.2, 2.1, 0.6),
    coco_object=(0.11, 0.4, 1.8, 0.7),
    coco_stuff164k=(0.11, 0.4, 1.8, 0.7),
    context59=(0.25, 0.4, 1.8, 0.7),
    context60=(0.30, 0.3, 1.8, 0.7),
    voc20=(0.10, 0.6, 2.1, 0.6),
    voc21=(0.50, 0.3, 2.2, 0.7),
)


@METHODS.register_module()
def resclip(
    *,
    dataset: str = "context59",
    use_rcs: bool = True,
    use_sfr: bool = True,
    layers: Sequence[int] = (5, 6, 7, 8),
    gaussian_std: float = 5.0,
    tau_rcs: float = 2.0,
    lambda_rcs: float | None = None,
    tau_sfr: float | None = None,
    lambda_sfr: float | None = None,
    temp_thd: float | None = None,
    logit_scale: float = 40.0,
    blur: float = 5.0,
    pamr_steps: int = 10,
) -> dict[str, Any]:
    """Attention output of the last block alone: no residual, no FFN. Needs the text features.

    Args:
        dataset: whose constants stand in for those of the next that are None; see `DATASETS`.
        use_rcs, use_sfr: the two additions; without both it is NACLIP.
        layers: blocks whose attention RCS adds.
        gaussian_std: NACLIP's prior, in patches.
        tau_rcs, lambda_rcs: scale and share of RCS.
        tau_sfr, lambda_sfr: scale and share of SFR.
        temp_thd: pixels of the first segmentation that are less certain become class 0.
        logit_scale: inverse temperature of its softmax.
        blur: std of the feedback mask's Gaussian.
        pamr_steps: refinement of the first segmentation; 0 for none.
    """
    given = (temp_thd, lambda_rcs, tau_sfr, lambda_sfr)
    temp_thd, lambda_rcs, tau_sfr, lambda_sfr = (
        tuned if value is None else value
        for value, tuned in zip(given, pick("dataset", dataset, DATASETS), strict=True)
    )

    def with_rcs(rule: dict[str, Any]) -> dict[str, Any]:
        if not use_rcs:
            return rule
        fused = dict(type="fuse_layers", rule=rule, layers=layers, share=lambda_rcs)
        return dict(type="scaled", rule=fused, gain=tau_rcs)

    rule = with_rcs(dict(type="neighbour", std=gaussian_std))
    if use_sfr:
        feedback = dict(
            type="semantic_feedback",
            source=dict(type="read_last", attention=rule),
            temp_thd=temp_thd,
            logit_scale=logit_scale,
            blur=blur,
            pamr_steps=pamr_steps,
        )
        rule = with_rcs(
            dict(
                type="feedback_keys",
                std=gaussian_std,
                feedback=feedback,
                share=lambda_sfr,
                gain=tau_sfr,
            )
        )
    return dict(readouts=[dict(attention=rule, residual=None, ffn=False)])
