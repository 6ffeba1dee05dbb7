"""NACLIP: attend to similar and to nearby patches (Hajimiri et al., WACV 2025, arXiv:2404.08181)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from sfp.functional.attention import gaussian_prior, pad_prefix
from sfp.functional.precision import upcast
from sfp.registry import METHODS, op
from sfp.tokens import Heads
from sfp.trace import Trace


@op("attention")
def neighbour_only(heads: Heads, trace: Trace, *, std: float = 5.0) -> Tensor:
    """softmax(c * Gaussian of the patch distance), one map for all heads, (B, 1, T, T).

    c is the mean of |q_i| |k_j| / sqrt(d) over heads and pairs of an image, which gives the prior the
    scale of attention logits (NACLIP's strategy "nonly").
    """
    prior = pad_prefix(gaussian_prior(heads.grid, std, heads.k.device), heads.prefix)  # (T, T)
    # the mean over pairs of a product is the product of the means
    q, k = (upcast(x).norm(dim=-1).mean(-1) for x in (heads.q, heads.k))  # (B, H)
    level = heads.scale * (q * k).mean(-1)
    return (level[:, None, None, None] * prior).softmax(-1)


@METHODS.register_module()
def naclip(
    *,
    arch: Literal["reduced", "vanilla"] = "reduced",
    attn_strategy: Literal["naclip", "nonly", "kk", "csa", "vanilla"] = "naclip",
    gaussian_std: float = 5.0,
) -> dict[str, Any]:
    """softmax(kk + Gaussian of the patch distance), no residual, no MLP.

    The release refines with ten steps of PAMR by default, which the paper's main numbers do not use;
    set it by `pamr_steps` of the segmentor. The release's "nonly" averages norms over the batch, here
    they are averaged per image.

    Args:
        arch: "vanilla" keeps the last block's residual and MLP.
        attn_strategy: "nonly" is only the Gaussian, "kk" only the keys, "csa" SCLIP's attention.
        gaussian_std: standard deviation of the Gaussian, in patches.
    """
    rules: dict[str, dict[str, Any] | None] = dict(
        naclip=dict(type="neighbour", std=gaussian_std),
        nonly=dict(type="neighbour_only", std=gaussian_std),
        kk=dict(type="self_self", pairs=("kk",)),
        csa=dict(type="self_self", pairs=("qq", "kk")),
        vanilla=None,
    )
    kept: dict[str, Any] = dict(residual=None, ffn=False) if arch == "reduced" else {}
    return dict(readouts=[dict(attention=rules[attn_strategy], **kept)])
