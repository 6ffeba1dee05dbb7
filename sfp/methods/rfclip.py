"""RF-CLIP: outliers smoothed after every block, and two readouts with attention of all blocks.

The code is github.com/liblacklucy/RF-CLIP. After every block, patches with large values in a few known
channels are blended with their neighbourhood. The last block has two readouts, of its own input and of
the mean of all blocks' outputs, both first mixed by the similarity of that mean; its attention is the
mean of softmax(kk) over all blocks.

| | here | release |
| --- | --- | --- |
| text part | `present_words`, on | the same; it shares the table of CASS |
| refinement of logits | the engine's `pamr_steps`, off | PAMR, 10 steps; no config switches it off |
| channels | of OpenAI's ViT-B/16 and ViT-L/14, else the largest (ours) | those two lists |
| batches | any | one image |

The paper's refocused attention exists in the release, but by default it is not used.
Published means use windows of 224 pixels, stride 112, short side 336 (Cityscapes 560).
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.attention import hide
from sfp.functional.precision import upcast
from sfp.kinds import Affinity, Detector, Mitigator, Source
from sfp.methods.object_presence import DATASETS as DATASETS
from sfp.methods.object_presence import presence
from sfp.ops.attention import Pair, earlier_layers
from sfp.registry import METHODS, Count, Some, op
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace, native_last

CHANNELS = {  # by width and patch of the image tower: OpenAI's ViT-B/16 and ViT-L/14
    (768, 16): (4, 162, 189, 326, 429, 474, 633, 713),
    (1024, 14): (250, 261, 437, 650, 720, 779, 936, 1005),
}


@op("detector")
def channel_share(
    trace: Trace,
    layer: int,
    *,
    channels: Some[int] | Literal["auto", "loudest"] = "auto",
    factor: float = 5.0,
    count: Count = 8,
) -> Tensor:
    """Patches in which one of a few channels has much more than the mean share (RF-CLIP).

    z_c = (x_c - min x) / sum over the channels of (x_c - min x); an outlier has z_c > factor / D for
    one of the chosen channels: `factor` times the mean share.

    Args:
        channels: numbers of the channels; "loudest", the `count` channels of largest mean magnitude
            over the image's patches (ours, for weights without a published list); or "auto", the
            release's list for towers of the size of OpenAI's ViT-B/16 and ViT-L/14, else "loudest".
            Other weights of those sizes (MetaCLIP, LAION) have other channels: use "loudest" for them.
        factor: multiple of the mean share; 5 in the release.
        count: number of channels for "loudest"; the release lists 8.
    """
    x = upcast(trace.outputs[layer].patches)  # (B, N, D)
    low = x.amin(-1, keepdim=True)
    total = (x - low).sum(-1)  # (B, N)
    if channels == "auto":
        channels = CHANNELS.get((x.shape[-1], trace.vit.patch), "loudest")
    if channels == "loudest":
        loud = x.abs().mean(1).topk(min(count, x.shape[-1]), dim=-1).indices  # (B, C)
        chosen = x.gather(-1, loud[:, None].expand(-1, x.shape[1], -1))
    else:
        chosen = x[..., list(channels)]
    return (chosen.amax(-1) - low[..., 0]) / total > factor / x.shape[-1]


@op("mitigator")
def box_blend(tokens: Tokens, mask: Tensor, *, share: float = 0.4) -> Tokens:
    """Mixes outliers with the mean of the 3 x 3 patches around them (RF-CLIP).

    (1 - share) x + share * b, where b is the sum over the neighbourhood, including the outlier itself
    and other outliers, divided by 9 even at the border.

    Args:
        share: share of the neighbourhood; 0.4 in the release.
    """
    boxes = F.avg_pool2d(upcast(tokens.as_map()), 3, stride=1, padding=1).flatten(2).mT
    blend = torch.lerp(upcast(tokens.patches), boxes, share).to(tokens.data.dtype)
    return tokens.with_patches(torch.where(mask[..., None], blend, tokens.patches))


@op("source")
def mean_of_blocks(
    trace: Trace, *, detector: Detector | None = None, mitigator: Mitigator | None = None
) -> Tokens:
    """Mean of the outputs of all blocks, including the last one's ordinary output (RF-CLIP's G).

    Args:
        detector, mitigator: how the last block's output, to which the method's edits do not apply, is
            purified; None leaves it unchanged.
    """
    last = trace.entering(len(trace.outputs)).with_data(trace.once(native_last))
    if detector is not None and mitigator is not None:
        after = copy.copy(trace)
        after.outputs = [*trace.outputs, last]
        last = mitigator(last, detector(after, len(trace.outputs)))
    total = sum((upcast(tokens.data) for tokens in trace.outputs), upcast(last.data))
    return last.with_data((total / (len(trace.outputs) + 1)).to(last.data.dtype))


@op("affinity")
def source_similarity(trace: Trace, *, source: Source, cut: float | None = None) -> Tensor:
    """Cosine similarity of the patches of any tokens, (B, N, N).

    Args:
        source: the tokens.
        cut: smaller entries become 0.
    """
    unit = F.normalize(upcast(trace.once(source).patches), dim=-1)
    cosine = unit @ unit.mT
    return cosine if cut is None else cosine.masked_fill(cosine < cut, 0)


@op("smoother")
def weighted_sum(tokens: Tokens, trace: Trace, *, affinity: Affinity) -> Tokens:
    """Replaces each patch by the sum of all patches, weighted by its row of an affinity (RF-CLIP).

    Unlike in `aggregate`, rows are not divided by their sum, so that values grow with the number of
    similar patches; the layer norm that follows removes this scale.
    """
    weights = trace.once(affinity)
    if tokens.hidden is not None:
        weights = hide(weights, tokens.hidden[:, None])
    total = weights @ upcast(tokens.patches)
    if total.dtype != tokens.data.dtype:  # the sums would leave the range of half precision
        total = total / total.shape[1]  # the layer norm that follows removes this factor
    return tokens.with_patches(total.to(tokens.data.dtype))


@op("attention")
def mean_of_layers(heads: Heads, trace: Trace, *, pair: Pair = "kk") -> Tensor:
    """Mean over all blocks of softmax(a b^T / sqrt(d)) for patches only, (B, H, T, T) (RF-CLIP).

    The last block's is computed from the tokens that it reads, the others' are those of the forward
    pass. Prefix tokens are in the softmax, but neither get attention nor attend to others: rows sum to
    less than 1.

    Args:
        pair: the projections a and b.
    """
    blocks = len(trace.vit.blocks)
    own = heads.logits(pair[0], pair[1]).softmax(-1)
    if blocks > 1:
        # negative numbers are literal: all blocks of a model of any depth
        earlier = trace.once(earlier_layers, layers=tuple(range(-blocks, -1)), pairs=(pair,))
        skip = trace.embedded.prefix - heads.prefix  # for a readout of patches without the prefix
        earlier = earlier[..., skip:, skip:]
        if earlier.shape[1] != own.shape[1]:  # a pool may have another number of heads than blocks
            own, earlier = own.mean(1, keepdim=True), earlier.mean(1, keepdim=True)
        own = torch.lerp(own, earlier, 1 - 1 / blocks)
    patches = own[..., heads.prefix :, heads.prefix :]
    return F.pad(patches, (heads.prefix, 0, heads.prefix, 0))


@METHODS.register_module()
def rfclip(
    *,
    channels: Some[int] | Literal["auto", "loudest"] = "auto",
    factor: float = 5.0,
    count: Count = 8,
    blend: float = 0.4,
    sim_cut: float = 0.4,
    dataset: str | None = "context59",
    image_weight: float | None = None,
    move: float | None = None,
    height: float | None = None,
    scope: Literal["image", "window"] = "image",
) -> dict[str, Any]:
    """Two readouts of the last block, summed: no residual, no FFN; words adapted to the image.

    Args:
        channels, factor, count: parameters of the detector, as in `channel_share`.
        blend: share of the neighbourhood that is mixed into an outlier.
        sim_cut: similarities below this become 0.
        dataset: dataset whose constants replace those of the next three that are None
            (`sfp.methods.object_presence.DATASETS`); None leaves the words unchanged.
        image_weight, move, height, scope: as in `object_presence`; the release clusters by complete
            linkage, and uses each window's own class token ("window") on Cityscapes.
    """
    detector = dict(type="channel_share", channels=channels, factor=factor, count=count)
    mitigator = dict(type="box_blend", share=blend)
    mean = dict(type="mean_of_blocks", detector=detector, mitigator=mitigator)
    similar = dict(type="source_similarity", source=mean, cut=sim_cut)
    shared = dict(
        before=[dict(type="weighted_sum", affinity=similar)],
        attention=dict(type="mean_of_layers"),
        residual=None,
        ffn=False,
    )
    composition: dict[str, Any] = dict(
        edits=[dict(layers="all", detector=detector, mitigator=mitigator)],
        readouts=[dict(**shared), dict(source=mean, **shared)],
    )
    if dataset is not None:
        composition["comparison"] = presence(
            dataset, image_weight, move, height, linkage="complete", scope=scope
        )
    return composition
