"""SFP as released: SC-CLIP's pipeline with SFP's detector and enhancer.

Feature Purification Matters: Suppressing Outlier Propagation for Training-Free Open-Vocabulary
Semantic Segmentation (Jin et al., ICCV 2025), code at commit 2804f5b. The method as described on its
poster is the preset `sfp_paper`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sfp.registry import METHODS, Some, bind

Enhancer = Literal["qk", "qq", "kk", "vv", "qq+kk", "qq+vv", "kk+vv", "qq+kk+vv"]


def detector(pm: str | Mapping[str, Any], **defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The detector node of the flag `pm`: a name (the release's SOM, L2 and LOF too) or a node."""
    if isinstance(pm, Mapping):
        return dict(pm)
    name = {"l2": "l2_norm"}.get(str(pm).lower(), str(pm).lower())
    return dict(type=name, **defaults.get(name, {}))


def mitigator(purify: bool | str | Mapping[str, Any]) -> dict[str, Any]:
    """The mitigator node of the flag `purify`: a name, a node, or a bool (the release's mean)."""
    if isinstance(purify, Mapping):
        return dict(purify)
    return dict(type="neighbour_mean" if isinstance(purify, bool) else str(purify))


def purification(
    purify: bool | str | Mapping[str, Any],
    pm: str | Mapping[str, Any],
    layers: Sequence[int] | Literal["all"],
    **defaults: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The edits for the flags `purify`, `pm` and `layers`: one, or none.

    Args:
        purify, pm, layers: the flags.
        **defaults: knobs by detector, for a `pm` that is a name.

    Raises:
        ValueError: for names that are not registered, even if `purify` is False.
    """
    found, replaced = detector(pm, **defaults), mitigator(purify)
    for node, kind in ((found, "detector"), (replaced, "mitigator")):
        bind(node, kind)  # misspelt names are errors even if nothing is purified
    return [dict(layers=layers, detector=found, mitigator=replaced)] if purify else []


@METHODS.register_module()
def sfp(
    *,
    purify: bool | str | Mapping[str, Any] = True,
    pm: str | Mapping[str, Any] = "som",
    layers: Some[int] | Literal["all"] = (-2,),
    top_k: int | None = 10,
    res_cls: float = 0.3,
    res_scale: float = 5.0,
    beta: float = 0.4,
    pre_layer: int = 8,
    post_layer: int = 3,
    enhancer: Enhancer = "qq+kk",
    integrator: bool = True,
    integrator_start: int = 3,
    integrator_end: int = 9,
) -> dict[str, Any]:
    """Outliers of the last but one layer are replaced, then two readouts of the last block are summed.

    Args:
        purify: how outliers are replaced: True, by the mean of their neighbours; False, not at all
            (they are not detected either); or by another mitigator ("median", "inpaint",
            "mask_attention", any registered one, or a node with knobs).
        pm: detector ("som", "l2_norm", "lof", any registered one, or a node with knobs).
        layers: layers to purify, in ascending order, or "all"; in the release only the last but one.
        top_k: largest number of outliers that SOM keeps per image and layer.
        res_cls: share of the class token that is added to every patch.
        res_scale: `res_cls * res_scale` is the gain of SOM's comparison (the release couples them).
        beta: similarities below this become 0.
        pre_layer: layer from which the similarity for aggregation before the last block, and for the
            block's attention, is taken.
        post_layer: layer from which the similarity for aggregation afterwards is taken.
        enhancer: self-attention of the last block, one of "qk", "qq", "kk", "vv" and their sums.
        integrator: whether the second readout, of summed layers, is added.
        integrator_start, integrator_end: first and last of those layers.
    """
    if integrator and integrator_start > integrator_end:
        raise ValueError(
            f"method 'sfp': integrator_start={integrator_start} comes after "
            f"integrator_end={integrator_end}: expected the first and the last layer, from 0"
        )
    before = dict(
        type="similarity",
        layer=pre_layer,
        cut=beta,
        fill=mitigator(purify),
        fill_from=layers[-1] if isinstance(layers, (list, tuple)) and layers else -2,
    )
    after = dict(type="similarity", layer=post_layer, cut=beta)
    guided = dict(type="affinity_attention", affinity=before)
    shared = dict(
        keep_cls=False,
        residual=dict(type="cls_token", scale=res_cls),
        ffn=False,
        after=[dict(type="aggregate", affinity=after)],
    )
    rules = [dict(type="self_self", pairs=(pair,)) for pair in enhancer.split("+")]
    readouts = [
        dict(
            before=[dict(type="aggregate", affinity=before)],
            attention=dict(type="average", rules=[*rules, guided]),
            **shared,
        )
    ]
    if integrator:
        summed = range(integrator_start, integrator_end + 1)
        readouts.append(
            dict(source=dict(type="layer_sum", layers=summed), attention=guided, **shared)
        )
    som = dict(gain=res_cls * res_scale, top_k=top_k)
    return dict(edits=purification(purify, pm, layers, som=som), readouts=readouts)
