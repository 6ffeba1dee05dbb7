"""Op of PEARL: logits that flow along image and text similarity."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.clusters import resize
from sfp.functional.propagation import propagate, propagation_weights
from sfp.registry import op
from sfp.trace import Trace


@op("refiner", words=True)
def text_aware_propagation(
    logits: Tensor,
    trace: Trace,
    *,
    size: int = 80,
    logit_scale: float = 40.0,
    edge: float = 5.0,
    tau: float = 1.0,
    steps: int = 25,
    inter_class: bool = True,
) -> Tensor:
    """Logits solve (rho + tau Laplacian) F = rho Z on a finer grid (PEARL's TLP), (B, Q, h', w').

    Confident cells hold their logits; neighbours of like colour and like meaning pull on each other.

    Args:
        size: the grid has about `size` x `size` cells, in the proportions of the patch grid, and
            never fewer than that.
        logit_scale: inverse temperature of the softmax over queries.
        edge: how fast a colour step cuts an edge.
        tau: strength of the pull.
        steps: of conjugate gradients.
        inter_class: whether cells of different but similar queries agree (the paper); False compares
            each query with itself alone, as the release's einsum does.
    """
    height, width = logits.shape[-2:]
    shape = (
        max(round(size * math.sqrt(height / width)), height),
        max(round(size * math.sqrt(width / height)), width),
    )
    z = resize(logits, shape)
    pixels = trace.image.to(z)
    image = F.interpolate(pixels, shape, mode="bilinear", align_corners=False, antialias=True)
    text = F.normalize(trace.query_features().to(z), dim=-1)
    similarity = text @ text.T if inter_class else torch.eye(len(text)).to(z)
    p = (logit_scale * z).softmax(1)
    return propagate(z, *propagation_weights(image, p, similarity, edge=edge), tau=tau, steps=steps)
