"""ClearCLIP: the last block's attention output alone (Lan et al., ECCV 2024, arXiv:2407.12442)."""

from __future__ import annotations

from typing import Any, Literal

from sfp.methods.gem import gem
from sfp.registry import METHODS, Count

ATTENTION: dict[str, dict[str, Any] | None] = dict(
    ClearCLIP=dict(type="self_self", pairs=("qq",)),
    SCLIP=dict(type="self_self", pairs=("qq", "kk")),
    MaskCLIP=dict(type="identity"),
    GEM=None,
    vanilla=None,
)


@METHODS.register_module()
def clearclip(
    *,
    model_type: Literal["ClearCLIP", "SCLIP", "MaskCLIP", "GEM", "vanilla"] = "ClearCLIP",
    ignore_residual: bool = True,
    last_n_layers: Count = 1,
) -> dict[str, Any]:
    """softmax(qq), no residual, no MLP.

    Args:
        model_type: attention of the last block(s), named after the methods that the release compares.
            "GEM" is the preset `gem`, which has further knobs.
        ignore_residual: False keeps residual and MLP.
        last_n_layers: number of last blocks summed; each is applied to its ordinary input.
    """
    if model_type == "GEM":
        return gem(ignore_residual=ignore_residual)
    kept: dict[str, Any] = dict(residual=None, ffn=False) if ignore_residual else {}
    blocks = range(-last_n_layers, 0)
    return dict(
        readouts=[dict(blocks=(i,), attention=ATTENTION[model_type], **kept) for i in blocks]
    )
