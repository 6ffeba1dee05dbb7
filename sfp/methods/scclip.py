"""SC-CLIP: outliers repaired, tokens aggregated by mid-layer similarity (Bai et al., 2024).

Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation, arXiv:2411.15869.
"""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def scclip(
    *,
    pre_adjust_idx: int = 8,
    post_adjust_idx: int = 3,
    multi_start_idx: int = 3,
    multi_end_idx: int = 10,
    res_cls: float = 0.3,
    beta: float = 0.4,
) -> dict[str, Any]:
    """Two readouts of the last block with the mean of sm(kk) and a similarity map, summed.

    The release computes wrong positions of outliers on grids that are not square, and fails on batches.

    Args:
        pre_adjust_idx: layer from which the similarity for aggregation before the block, and for the
            block's attention, is taken.
        post_adjust_idx: layer from which the similarity for aggregation afterwards is taken.
        multi_start_idx, multi_end_idx: the second readout uses the sum of the layers from the first of
            these to the one before the second.
        res_cls: share of the class token that is added to every patch.
        beta: similarities below this become 0 in aggregations, but not in the attention.
    """
    repair = dict(type="neighbour_mean", alone="keep")
    guide = dict(type="similarity", layer=pre_adjust_idx, fill=repair)
    before = dict(guide, cut=beta)
    after = dict(type="similarity", layer=post_adjust_idx, cut=beta)
    keys = dict(type="self_self", pairs=("kk",))
    shared = dict(
        keep_cls=False,
        attention=dict(
            type="average", rules=[keys, dict(type="affinity_attention", affinity=guide)]
        ),
        residual=dict(type="cls_token", scale=res_cls),
        ffn=False,
        after=[dict(type="aggregate", affinity=after)],
    )
    summed = dict(type="layer_sum", layers=range(multi_start_idx, multi_end_idx))
    return dict(
        edits=[dict(layers=(-2,), detector=dict(type="lof"), mitigator=repair)],
        readouts=[
            dict(before=[dict(type="aggregate", affinity=before)], **shared),
            dict(source=summed, **shared),
        ],
    )
