"""MaskCLIP: the last block's values, unmixed (Zhou et al., ECCV 2022, arXiv:2112.01071)."""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def maskclip(
    *,
    ignore_residual: bool = False,
    ks_thresh: float | None = None,
    pd_thresh: float | None = None,
) -> dict[str, Any]:
    """Every token attends to itself alone in the last block.

    The release keeps the block's residual and MLP. Later papers (ClearCLIP, SegEarth-OV, FLOSS) report
    as "MaskCLIP" the form without both, which scores far lower on some sets (VOC20 74.9 -> 61.4).

    Args:
        ignore_residual: True for that reduced form.
        ks_thresh: key smoothing of patches less confident than this; None for none.
        pd_thresh: prompt denoising of classes less confident than this; None for none. It follows
            the smoothing, so that the logits it sets are not smoothed.
    """
    readout: dict[str, Any] = dict(attention=dict(type="identity"))
    if ignore_residual:
        readout.update(residual=None, ffn=False)
    refiners = []
    if ks_thresh is not None:
        refiners.append(dict(type="key_smoothing", ks_thresh=ks_thresh))
    if pd_thresh is not None:
        refiners.append(dict(type="prompt_denoising", pd_thresh=pd_thresh))
    return dict(readouts=[readout], refiners=refiners)
