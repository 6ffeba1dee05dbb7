"""GLA-CLIP: ProxyCLIP's attention over all windows of an image (code by 2btlFe).

The patches of all windows form one list of keys. Each patch attends through a proxy, the mean of its
similar keys, updated in several rounds. The sharpness of a row depends on the number of patches that
its proxy represents, and the subtracted multiple of the mean on the number of windows.

The release runs OpenAI's B/16 with DINO ViT-B/8 on windows of 224 pixels (stride 112) padded to
multiples of 56 (`pad_windows=56`). Its script names a threshold of 0.6 but does not pass it on, so that
0.55 is used. It supports only square windows and keeps all similarities in memory; here rows are
processed in chunks. Its alternative keys, ClearCLIP's queries, fail in the release and are left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import CHUNK, anchored_softmax
from sfp.functional.precision import upcast
from sfp.methods.proxyclip import to_guide
from sfp.registry import METHODS, op
from sfp.tokens import Tokens
from sfp.trace import Trace


def proxies(keys: Tensor, threshold: float, rounds: int) -> tuple[Tensor, Tensor]:
    """The proxy of each key, and the number of keys that it represents: (M, C) and (M,).

    A proxy starts as the key itself. In each round it becomes the unit mean of the keys whose cosine
    with it is larger than `threshold`, or its own key where there are none.

    Args:
        keys: unit rows, (M, C).
        threshold: cosine.
        rounds: number of rounds; with 0 the keys are their own proxies.
    """
    found, counts = [], []
    for start in range(0, len(keys), step := _rows(len(keys))):
        own = keys[start : start + step]
        proxy, similar = own, own @ keys.T > threshold
        for _ in range(rounds):
            similar = proxy @ keys.T > threshold
            total = torch.where(similar.any(1, keepdim=True), similar.to(keys) @ keys, own)
            proxy = F.normalize(total, dim=-1)
        found.append(proxy)
        counts.append(similar.sum(1).clamp_min(1))
    return torch.cat(found), torch.cat(counts)


@op("reader", whole=True)
def proxy_anchors(
    trace: Trace,
    *,
    guide: str = "dino",
    threshold: float = 0.55,
    rounds: int = 2,
    beta: float | None = None,
    gamma: float | None = None,
    beta_share: float = 0.3,
    gamma_share: float = 30.0,
    row_mean: bool = True,
) -> Tokens:
    """The last block's values, mixed over all windows of the image, on the guide's grid, (W, M, D).

    Args:
        guide: name of an external encoder; its final patches are the keys.
        threshold, rounds: as for `proxies`; without rounds the keys are used directly.
        beta: factor on the mean; None for 1 + beta_share * ln(1 + W), with W windows.
        gamma: inverse temperature; None for 1 + gamma_share / n, for a proxy of n keys.
        beta_share, gamma_share: factors in these formulas.
        row_mean: whether the mean is that of each row, at least 0, instead of one over all pairs.
    """
    last = trace.vit.blocks[-1]
    tokens = trace.entering(len(trace.vit.blocks) - 1).only_patches()
    values = last.heads(tokens).v.transpose(1, 2).flatten(2)  # (W, N, D)
    layout = trace.guide(guide)
    windows = len(values)
    keys = F.normalize(upcast(layout.patches), dim=-1).flatten(0, 1)  # (W * M, C)
    beta = 1 + beta_share * math.log(1 + windows) if beta is None else beta
    looks, counts = proxies(keys, threshold, rounds)
    mean = looks.mean(0).dot(keys.mean(0))
    mixed = []
    for start in range(0, len(keys), step := _rows(len(keys))):
        own = slice(start, start + step)
        similarity = looks[own] @ keys.T
        centre = similarity.mean(1, keepdim=True) if row_mean else mean
        sharp = 1 + gamma_share / counts[own, None] if gamma is None else gamma
        weights = anchored_softmax(similarity, centre.clamp_min(0), beta, sharp)
        weights = to_guide(weights.unflatten(1, (windows, -1)), tokens.grid, layout.grid)
        mixed.append(weights.flatten(1).to(values) @ values.flatten(0, 1))
    data = torch.cat(mixed).unflatten(0, (windows, -1))
    return layout.with_data(last.attn.join(data))


def _rows(length: int) -> int:
    return max(CHUNK // length, 1)


@METHODS.register_module()
def gla_clip(
    *,
    guide: str = "dino",
    threshold: float = 0.55,
    rounds: int = 2,
    beta: float | None = None,
    gamma: float | None = None,
    beta_share: float = 0.3,
    gamma_share: float = 30.0,
    row_mean: bool = True,
) -> dict[str, Any]:
    """Attention output of the last block alone, over the windows of the whole image; needs a guide.

    Args:
        guide: name of the guide, which the caller provides.
        threshold: cosine above which keys belong to a proxy.
        rounds: number of rounds in which proxies are updated; 0 uses the keys, as in ProxyCLIP.
        beta: factor on the mean similarity; None derives it from the number of windows.
        gamma: inverse temperature; None derives it from the number of keys of each proxy.
        beta_share, gamma_share: factors for deriving them, as in `proxy_anchors`.
        row_mean: whether the mean is that of each row, instead of one over all pairs as in ProxyCLIP.
    """
    return dict(
        readouts=[
            dict(
                type="proxy_anchors",
                guide=guide,
                threshold=threshold,
                rounds=rounds,
                beta=beta,
                gamma=gamma,
                beta_share=beta_share,
                gamma_share=gamma_share,
                row_mean=row_mean,
            )
        ]
    )
