"""SFP as described on its poster: SOM at every layer, SAE in the last block, HAI over all layers.

Feature Purification Matters: Suppressing Outlier Propagation for Training-Free Open-Vocabulary
Semantic Segmentation (Jin et al., ICCV 2025). The released code is the preset `sfp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from sfp.methods.sfp import Enhancer, purification
from sfp.registry import METHODS, Some, op
from sfp.trace import LayerError, Trace


@op("affinity")
def mean_attention(trace: Trace, *, first: int = 0, last: int = -2) -> Tensor:
    """Patch-to-patch attention, averaged over heads and over a range of layers.

    SFP's Hierarchical Attention Integrator sums layers l0 to L-1 of the poster, counted from 1:
    `first` = l0 - 1.

    Args:
        first, last: method layers, both included.
    """
    start, stop = trace.layer(first), trace.layer(last) + 1
    if start >= stop:
        raise LayerError(f"mean_attention: layer {first} comes after layer {last}")
    prefix = trace.embedded.prefix
    maps = (trace.mean_attention(i)[:, prefix:, prefix:] for i in range(start, stop))
    total = next(maps).clone()
    for attention in maps:
        total += attention
    return total / (stop - start)


@METHODS.register_module()
def sfp_paper(
    *,
    purify: bool | str | Mapping[str, Any] = True,
    pm: str | Mapping[str, Any] = "som",
    layers: Some[int] | Literal["all"] = "all",
    enhancer: Enhancer = "qq+kk",
    integrator: bool = True,
    integrator_start: int = 0,
) -> dict[str, Any]:
    """Each module can be switched off alone; all off is the ablation's base (57.0 on VOC21).

    Args:
        purify: SOM, the outlier mitigator; False switches it off, the name of another mitigator (or a
            node) replaces the mean of the neighbours.
        pm: its detector ("som", "l2_norm", "lof", any registered one, or a node with knobs).
        layers: layers to purify; "all" is every block but the last, and each passes purified tokens on.
        enhancer: SAE, the last block's attention: "qq+kk" or another sum; "qk" switches it off.
        integrator: HAI, which multiplies the last block's patches by the mean attention of layers.
        integrator_start: its first layer, from 0 (the poster's l0 counts from 1).
    """
    hai = dict(type="aggregate", affinity=dict(type="mean_attention", first=integrator_start))
    readout = dict(
        attention=dict(type="self_self", pairs=enhancer.split("+")),
        residual=None,
        ffn=False,
        after=[hai] if integrator else [],
    )
    return dict(edits=purification(purify, pm, layers), readouts=[readout])
