"""NACLIP: attend to similar and to nearby patches (Hajimiri et al., WACV 2025, arXiv:2404.08181)."""

from __future__ import annotations

from typing import Any, Literal

from sfp.registry import METHODS, pick


@METHODS.register_module()
def naclip(
    *,
    arch: Literal["reduced", "vanilla"] = "reduced",
    attn_strategy: Literal["naclip", "nonly", "kk", "csa", "vanilla"] = "naclip",
    gaussian_std: float = 5.0,
) -> dict[str, Any]:
    """softmax(kk + Gaussian of the patch distance), no residual, no MLP.

    The release refines with ten steps of PAMR by default, the paper's main numbers do without: that
    is `pamr_steps` of the segmentor. Its "nonly" averages norms over the batch, ours per image.

    Args:
        arch: "vanilla" keeps the last block's residual and MLP.
        attn_strategy: "nonly" is the Gaussian alone, "kk" the keys alone, "csa" SCLIP's attention.
        gaussian_std: in patches.
    """
    attention = pick(
        "attn_strategy",
        attn_strategy,
        dict(
            naclip=dict(type="neighbour", std=gaussian_std),
            nonly=dict(type="neighbour_only", std=gaussian_std),
            kk=dict(type="self_self", pairs=("kk",)),
            csa=dict(type="self_self", pairs=("qq", "kk")),
            vanilla=None,
        ),
    )
    kept = pick("arch", arch, dict(reduced=dict(residual=None, ffn=False), vanilla={}))
    return dict(readouts=[dict(attention=attention, **kept)])
