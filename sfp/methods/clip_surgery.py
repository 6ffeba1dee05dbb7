"""CLIP Surgery: a v-v stream beside the last blocks, and logits without the part common to all classes.

A Closer Look at the Explainability of Contrastive Language-Image Pre-training (Li et al., Pattern
Recognition 2025, arXiv:2304.05653).
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from sfp.registry import METHODS, AtLeast, op
from sfp.tokens import Tokens
from sfp.trace import Trace, native_last


@op("smoother")
def native_cls(tokens: Tokens, trace: Trace) -> Tokens:
    """Replaces the class token with that of the plain forward pass (CLIP Surgery)."""
    native = trace.once(native_last)[:, : tokens.prefix]
    return tokens.with_data(torch.cat([native, tokens.patches], dim=1))


@op("refiner", words=True)
def remove_redundancy(logits: Tensor, trace: Trace, *, temperature: float = 2.0) -> Tensor:
    """CLIP Surgery's feature surgery: subtracts what a patch has in common with all queries.

    w s - mean over queries of w s, where s are the logits and w the weights of the queries in the whole
    image: softmax(temperature * global logits), divided by its mean. The paper writes it for features
    of shape (N, Q, C); their sum over C is this.
    """
    weights = (temperature * trace.global_logits()).softmax(-1)  # (B, Q)
    weighted = logits * (weights / weights.mean(-1, keepdim=True))[..., None, None]
    return weighted - weighted.mean(1, keepdim=True)


@METHODS.register_module()
def clip_surgery(
    *, surgery_blocks: Annotated[int, AtLeast(0)] = 6, feature_surgery: bool = True
) -> dict[str, Any]:
    """softmax(vv) summed over the last blocks onto their input, no MLP; CLS of the plain forward pass.

    The release resamples the position embedding bilinearly, in place (so that later sizes start from
    the result) and only to square grids; here the model is not modified and any grid works.

    Args:
        surgery_blocks: number of last blocks; 0 is the plain forward pass.
        feature_surgery: whether redundancy is removed from the logits.
    """
    readout = dict(
        blocks=range(-surgery_blocks, 0),
        attention=dict(type="self_self", pairs=("vv",)),
        ffn=False,
        after=[dict(type="native_cls")],
    )
    return dict(
        readouts=[readout if surgery_blocks else {}],
        refiners=[dict(type="remove_redundancy")] if feature_surgery else [],
        positions=dict(type="resample_positions", offset=0, mode="bilinear"),
    )
