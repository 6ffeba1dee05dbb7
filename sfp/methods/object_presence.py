"""Object presence: moves words towards an image that shows them (CASS and RF-CLIP's text part).

CASS: Kim et al., CVPR 2025, Distilling Spectral Graph for Object-Context Aware Open-Vocabulary Semantic
Segmentation; code of RF-CLIP: github.com/liblacklucy/RF-CLIP. Both releases have the same constants for
each benchmark, listed in `DATASETS`. Part of RF-CLIP's published gain comes from this step, which can
be added to any method.

It is the comparison `present_words`, for any preset; the preset `object_presence` adds it to another
one.

The releases cluster by "ward" (CASS) and "complete" linkage (RF-CLIP). CASS can take the image's
embedding from a larger CLIP with its own text bank; here it comes from the same model. The word of a
cluster with a single member moves too, as in the releases.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.functional.precision import upcast
from sfp.registry import METHODS, Count, composition, op, tuned
from sfp.tokens import Tokens
from sfp.trace import Trace

# image_weight (w), move (a), height (eta)
DATASETS = dict(
    ade20k=(0.3, 0.05, 0.06),
    city_scapes=(0.1, 0.03, 0.14),
    coco_object=(0.25, 0.01, 0.10),
    coco_stuff164k=(0.2, 0.02, 0.02),
    context59=(0.25, 0.04, 0.09),
    context60=(0.25, 0.04, 0.09),
    voc20=(0.4, 0.02, 0.10),
    voc21=(0.1, 0.03, 0.10),
)


def hierarchy(text: Tensor, height: float, linkage: str = "complete") -> Tensor:
    """The cluster of each query, by agglomerative clustering with cosine distances, (Q,) int64.

    Args:
        text: unit features, (Q, C).
        height: distance at which the tree is cut: clusters further apart are not merged.
        linkage: "complete" or "ward", as in SciPy.
    """
    if len(text) < 2:
        return text.new_zeros(len(text), dtype=torch.long)
    rows = upcast(text).cpu().numpy()
    found = _clusters(rows.tobytes(), rows.dtype.str, len(rows), height, linkage)
    return torch.tensor(found, dtype=torch.long, device=text.device)


@functools.lru_cache(maxsize=8)
def _clusters(data: bytes, kind: str, count: int, height: float, linkage: str) -> list[int]:
    """`hierarchy` of `count` rows, cached, since words stay the same from image to image."""
    from scipy.cluster.hierarchy import fcluster
    from scipy.cluster.hierarchy import linkage as tree
    from scipy.spatial.distance import pdist

    rows = np.frombuffer(data, kind).reshape(count, -1)
    return (fcluster(tree(pdist(rows, "cosine"), linkage), height, "distance") - 1).tolist()


def winners(scores: Tensor, clusters: Tensor) -> Tensor:
    """The query of largest score in each cluster, the first in a tie: (B, Q), (Q,) -> (B, Q) bool."""
    best = scores.new_full((len(scores), len(clusters)), -torch.inf)
    best = best.scatter_reduce(1, clusters.expand_as(scores), scores, "amax")
    equal = scores == best[:, clusters]
    earlier = (clusters[:, None] == clusters) & torch.ones_like(equal[0].outer(equal[0])).tril(-1)
    return equal & ~((equal.float() @ earlier.mT.float()) > 0)


def moved_words(
    text: Tensor, patches: Tensor, present: Tensor, clusters: Tensor, *, move: float, nearest: int
) -> Tensor:
    """Moves the word with the highest score in each cluster towards its most similar patches.

    t' = unit((1 - move) t + move * unit(mean of the `nearest` unit patches of largest cosine to t)).

    Args:
        text: unit features, (Q, C).
        patches: unit features of an image's patches, (B, N, C).
        present: score of every query in every image, (B, Q).
        clusters: cluster of each query, (Q,).
        move: share a of the patches in the moved word.
        nearest: number of patches.

    Returns:
        Unit features (B, Q, C); all other words of a cluster stay the same.
    """
    cosine = patches @ text.T  # (B, N, Q)
    best = cosine.topk(min(nearest, patches.shape[1]), dim=1).indices  # (B, k, Q)
    rows = torch.arange(len(patches), device=patches.device)[:, None, None]
    context = F.normalize(patches[rows, best].mean(1), dim=-1)  # (B, Q, C)
    changed = F.normalize((1 - move) * text + move * context, dim=-1)
    return torch.where(winners(present, clusters)[..., None], changed, text)


@op("comparison", words=True, whole=True)
def present_words(
    features: Tokens,
    trace: Trace,
    *,
    image_weight: float = 0.25,
    move: float = 0.04,
    height: float = 0.09,
    linkage: Literal["complete", "ward"] = "complete",
    nearest: Count = 2,
    scope: Literal["image", "window"] = "image",
) -> Tensor:
    """Cosines with words moved towards the image, mixed with those of its embedding (CASS, RF-CLIP).

    Queries are clustered (`hierarchy`); in each cluster, the one most similar to the image's embedding
    moves (`moved_words`). Logits are (1 - image_weight) patch . t' + image_weight g, where g is the
    cosine of the image's embedding with the original words: a prior on classes, the same for all
    patches. With `image_weight` and `move` 0 they are plain cosines.

    Args:
        image_weight: weight w of the image's embedding.
        move: share a of the patches in a moved word.
        height: eta, the cosine distance at which the tree of queries is cut.
        linkage: "complete" (RF-CLIP) or "ward" (CASS).
        nearest: number of patches of the window that a word moves towards.
        scope: image to embed: the whole "image", or each "window" (the releases on Cityscapes).

    Returns:
        (B, Q, h, w).
    """
    patches = F.normalize(upcast(features.patches), dim=-1)  # (B, N, C)
    text = trace.query_features().to(patches)
    if scope == "image":
        image = trace.image_embedding()[: len(patches)]  # also if windows are joined
    else:
        trace.one_by_one(patches, 'present_words(scope="window")')
        image = trace.global_embedding()
    present = F.normalize(upcast(image), dim=-1).to(patches) @ text.T  # (B, Q)
    clusters = hierarchy(text, height, linkage)
    words = moved_words(text, patches, present, clusters, move=move, nearest=nearest)
    logits = (1 - image_weight) * (patches @ words.mT) + image_weight * present[:, None]
    return logits.mT.unflatten(2, features.grid)


def presence(
    dataset: str,
    image_weight: float | None,
    move: float | None,
    height: float | None,
    **knobs: Any,
) -> dict[str, Any]:
    """The node of `present_words`, with a benchmark's constants in place of None."""
    values = tuned(dataset, DATASETS, image_weight=image_weight, move=move, height=height)
    return dict(type="present_words", **values, **knobs)


@METHODS.register_module()
def object_presence(
    *,
    base: str | Mapping[str, Any] = "scclip",
    dataset: str = "context59",
    image_weight: float | None = None,
    move: float | None = None,
    height: float | None = None,
    linkage: Literal["complete", "ward"] = "complete",
    nearest: Count = 2,
    scope: Literal["image", "window"] = "image",
) -> dict[str, Any]:
    """Another preset with words moved towards the image. Needs the text features.

    Args:
        base: the preset, by name or with knobs.
        dataset: dataset whose constants replace those of the next three that are None; see `DATASETS`.
        image_weight, move, height: as in `present_words`.
        linkage, nearest, scope: as in `present_words`.
    """
    words = presence(
        dataset, image_weight, move, height, linkage=linkage, nearest=nearest, scope=scope
    )
    return dict(composition(base), comparison=words)
