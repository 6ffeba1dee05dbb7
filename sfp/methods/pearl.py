"""PEARL: keys aligned with queries by a rotation, and text-aware propagation of the logits.

Code: github.com/PGSmall/PEARL. Its text-aware term multiplies by the diagonal of the queries'
similarity alone (`einsum("cc,bcij->bcij")`), so that it knows nothing of how classes relate; the
default here is the full matrix of the paper, `inter_class=False` the release. The other settings
(crops, thresholds) are NACLIP's without PAMR. The propagation stands where NACLIP's PAMR does, after
windows are merged; here it runs in each window, which is the same for whole images (`slide_crop=0`).
Not compared with a run of the official code.
"""

from __future__ import annotations

from typing import Any

from sfp.registry import METHODS


@METHODS.register_module()
def pearl(
    *,
    alpha: float = 0.08,
    newton_schulz: int = 0,
    propagate: bool = True,
    size: int = 80,
    tau: float = 1.0,
    steps: int = 25,
    inter_class: bool = True,
    logit_scale: float = 40.0,
) -> dict[str, Any]:
    """Attention output of the last block alone: no residual, no FFN. Needs the text features.

    Args:
        alpha: weight of the keys' own correlation; 0.3 on ADE20K and Cityscapes.
        newton_schulz: steps for the rotation (5 in the release's fast mode); 0 for an exact one.
        propagate: whether logits are propagated.
        size: side of the propagation's grid, in cells per window; 224 on Cityscapes.
        tau, steps: strength of the propagation and iterations of its solver.
        inter_class: False for the release's diagonal text term.
        logit_scale: inverse temperature of the probabilities that steer the propagation.
    """
    rule = dict(type="aligned_keys", alpha=alpha, steps=newton_schulz)
    refiner = dict(
        type="text_aware_propagation",
        size=size,
        tau=tau,
        steps=steps,
        inter_class=inter_class,
        logit_scale=logit_scale,
    )
    return dict(
        readouts=[dict(attention=rule, residual=None, ffn=False)],
        refiners=[refiner] if propagate else [],
    )
