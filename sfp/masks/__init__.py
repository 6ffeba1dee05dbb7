"""Masks of objects, as regions for methods, or as outlines that labels follow.

A config defines a proposer, its prompts, and how pixels vote::

    masks=dict(
        propose=dict(type="sam", model="facebook/sam-vit-base"),
        points=dict(type="cluster_points", affinity=dict(type="head_cosine", subtract_cls=True)),
    )

A proposer is a module, registered in `MASKS`: an image (3, h, w) normalised for CLIP, points
(P, n, 2) with x and y in 0..1, n of them for each mask, and a size (H, W) -> a `MaskSheet` of
(M, H, W) mask logits, positive inside. Masks may overlap and leave pixels out.

`masks=dict(type="sam_refine", model="facebook/sam-vit-base")` is Trident's alternative, which prompts
SAM with the labels (`SamRefine`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor, nn

from sfp.clip.model import CLIP
from sfp.clip.vit import VisionTransformer
from sfp.functional.labels import Labels
from sfp.functional.masks import MaskSheet, paint_masks, same_area, vote_in_masks
from sfp.masks.cuts import CutMasks
from sfp.masks.dino import DinoMasks
from sfp.masks.files import RegionFiles
from sfp.masks.refine import SamRefine
from sfp.masks.sam import SamMasks
from sfp.masks.universal import UniversalMasks
from sfp.registry import MASKS, STAGES, bind, build, check_knobs, suggest
from sfp.tokens import Tokens
from sfp.whole import MASK_PIXELS

__all__ = [
    "MASKS",
    "STAGES",
    "CutMasks",
    "DinoMasks",
    "MaskVote",
    "Proposal",
    "RegionFiles",
    "RegionMap",
    "SamMasks",
    "SamRefine",
    "UniversalMasks",
    "build_masks",
    "build_regions",
]


class Proposal(nn.Module):
    """A mask proposer with the points that prompt it.

    CLIP runs once more over the whole image, resized to the area of a square of `side` pixels, for the
    points.

    Args:
        propose: proposer, a config node or a module.
        points: op of the kind "points": `cluster_points` or `grid_points`.
        side: as above; 224, for which the release of CLIPtrase sets `eps=0.7, min_samples=3`.
    """

    propose: Any

    def __init__(
        self,
        propose: Mapping[str, Any] | nn.Module,
        points: Mapping[str, Any] | Callable,
        side: int,
        what: str,
    ) -> None:
        super().__init__()
        self.points = bind(points, "points")
        self.side = side
        self.propose = build(MASKS, propose, f"{what}.propose")

    def follow(self, clip: CLIP) -> None:
        """Passes the CLIP on to the proposer, if that depends on its normalisation."""
        if hasattr(self.propose, "follow"):
            self.propose.follow(clip)

    def masks(
        self,
        vit: VisionTransformer,
        image: Tensor,
        size: tuple[int, int],
        *,
        guides: Mapping[str, Callable[..., Tokens]] | None = None,
    ) -> MaskSheet:
        """The mask logits of an image, normalised, (3, h, w), to be rendered at a size."""
        points = image.new_zeros(0, 1, 2)
        if getattr(self.propose, "needs_points", True):
            small = same_area(image.float(), self.side, vit.patch)
            (points,) = self.points(vit.trace(small[None], guides=guides, depth=12))
        return self.propose(image, points, size)


class RegionMap(Proposal):
    """Id maps of images from proposed masks, for methods that need regions.

    Args:
        propose: proposer, a config node or a module.
        points: op of the kind "points".
        paint: where masks overlap, use the "smallest", the "largest" (CorrCLIP), or the one with the
            highest "score" (EntitySeg) of the proposer; "none" keeps overlapping masks, for methods
            that support them (TextRegion).
        side: as in `Proposal`.
    """

    def __init__(
        self,
        *,
        propose: Mapping[str, Any] | nn.Module,
        points: Mapping[str, Any] | Callable = MappingProxyType(dict(type="grid_points", side=32)),
        paint: Literal["smallest", "largest", "score", "none"] = "largest",
        side: int = 224,
    ) -> None:
        super().__init__(propose, points, side, "regions")
        if paint not in (orders := ("smallest", "largest", "score", "none")):
            raise ValueError(f"regions: unknown paint={paint!r}{suggest(paint, orders)}")
        self.paint = paint

    def forward(
        self,
        vit: VisionTransformer,
        image: Tensor,
        size: tuple[int, int],
        *,
        guides: Mapping[str, Callable[..., Tokens]] | None = None,
    ) -> Tensor:
        """Ids of a normalised image (3, h, w) at a size: (H, W) int64, 0 where there is no mask.

        With paint="none", mask logits (M, H', W') at that size, or smaller with the same aspect ratio.
        """
        if self.paint == "none":
            scale = min((MASK_PIXELS / (size[0] * size[1])) ** 0.5, 1)
            small = (max(int(size[0] * scale), 1), max(int(size[1] * scale), 1))
            return self.masks(vit, image, small, guides=guides).rows(0, small[0])
        return paint_masks(self.masks(vit, image, size, guides=guides), self.paint)


@STAGES.register_module(name="vote")
class MaskVote(Proposal):
    """Makes the labels of an image follow proposed masks, in which pixels vote.

    Args:
        propose: proposer, a config node or a module.
        points: op of the kind "points": `cluster_points` or `grid_points`.
        vote: "mode", the most frequent label of a mask, or "mean", the class of largest mean
            probability (`sfp.functional.masks.vote_in_masks`).
        share: smallest share that a mask's winner must have; otherwise the mask is ignored.
        side: as in `Proposal`.
    """

    def __init__(
        self,
        *,
        propose: Mapping[str, Any] | nn.Module,
        points: Mapping[str, Any] | Callable,
        vote: Literal["mode", "mean"] = "mode",
        share: float = 0.0,
        side: int = 224,
    ) -> None:
        super().__init__(propose, points, side, "masks")
        if vote not in ("mode", "mean"):
            raise ValueError(f"masks: unknown vote={vote!r}{suggest(vote, ('mode', 'mean'))}")
        self.vote = vote
        self.needs_scores = vote == "mean"
        self.share = share

    def forward(
        self,
        vit: VisionTransformer,
        image: Tensor,
        labels: Labels,
        classes: int,
        *,
        guides: Mapping[str, Callable[[Tensor], Tokens]] | None = None,
        prob_thd: float = 0.0,
    ) -> Labels:
        """The labels after the vote.

        Args:
            vit: CLIP's image tower.
            image: normalised, (3, h, w), of any size.
            labels: labels of the image, at any size; with scores if `vote` is "mean".
            classes: number of classes.
            guides: external encoders that `points` may need.
            prob_thd: as in `vote_in_masks`.
        """
        height, width = labels.labels.shape
        return vote_in_masks(
            self.masks(vit, image, (height, width), guides=guides),
            labels,
            classes,
            mean=self.vote == "mean",
            share=self.share,
            prob_thd=prob_thd,
        )


def build_masks(node: Mapping[str, Any] | nn.Module | None) -> nn.Module | None:
    """The final stage of a config, a `MaskVote` unless its `type` says "sam_refine".

    A module or None is returned as it is.

    Raises:
        ValueError: for an unknown type or knob; the message names the valid ones.
    """
    if isinstance(node, Mapping) and "type" in node:
        return build(STAGES, node, "masks")
    return _built(MaskVote, node, "masks")


def build_regions(node: Mapping[str, Any] | nn.Module | None) -> nn.Module | None:
    """The `RegionMap` of a config, or a `RegionFiles` if its `type` is "files".

    A module or None is returned as it is.

    Raises:
        ValueError: for an unknown type or knob; the message names the valid ones.
    """
    if not (isinstance(node, Mapping) and "type" in node):
        return _built(RegionMap, node, "regions")
    if node["type"] != "files":
        raise ValueError(
            f"regions: type={node['type']!r}: expected 'files'; proposers of masks are named as "
            f"regions=dict(propose=dict(type=...)), of {', '.join(MASKS.module_dict)}"
        )
    return _built(RegionFiles, {k: v for k, v in node.items() if k != "type"}, "regions")


def _built(
    kind: type[nn.Module], node: Mapping[str, Any] | nn.Module | None, what: str
) -> nn.Module | None:
    if node is None or isinstance(node, nn.Module):
        return node
    check_knobs(kind, node, what)
    return kind(**node)
