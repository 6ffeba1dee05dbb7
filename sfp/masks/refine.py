"""Sharpens labels by SAM, prompted with the labels themselves: Trident's last stage, for any method.

Trident (Shi et al., ICCV 2025, arXiv:2411.09219; Apache-2.0): each connected component of a class
becomes a prompt, and the class fills the mask that SAM predicts for it. SAM was trained on masks
without class names; nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.vit import VisionTransformer
from sfp.functional.labels import Labels
from sfp.functional.masks import BUDGET
from sfp.functional.windows import nearest
from sfp.masks.sam import PromptedSam
from sfp.registry import STAGES
from sfp.tokens import Tokens


@dataclass(frozen=True)
class Prompts:
    """Prompts for the components of a class.

    Attributes:
        label: number of the class.
        parts: component of each pixel, (h, w) int64: from 1, in the order of `boxes`, or 0 for none.
        boxes: first and last column and row of each component, (n, 4) as x0, y0, x1, y1, in pixels.
        points: column and row where the class is most probable in each component, (n, 2).
        prob: probability of the class, (h, w).
    """

    label: int
    parts: Tensor
    boxes: Tensor
    points: Tensor
    prob: Tensor


def class_prompts(
    labels: Tensor, scores: Tensor, *, coarse_thd: float, min_area: int
) -> Iterator[Prompts]:
    """The 8-connected components of each class in the labels, by class, then from the top.

    Args:
        labels: class of each pixel, (h, w).
        scores: class probabilities, (K, h, w).
        coarse_thd: pixels whose best class is less probable are ignored, as are classes that are less
            probable everywhere.
        min_area: smallest area of a component in pixels.
    """
    import cv2

    sure = scores.amax(0) >= coarse_thd
    for label in labels[sure].unique().tolist():
        prob = scores[label]
        if float(prob.max()) < coarse_thd:
            continue
        member = ((labels == label) & sure).byte().cpu().numpy()
        _, ids, stats, _ = cv2.connectedComponentsWithStats(member, connectivity=8)
        large = 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= min_area)
        if not len(large):
            continue
        found, first = np.unique(ids, return_index=True)
        large = large[np.argsort(first[np.searchsorted(found, large)])]
        number = np.zeros(len(stats), np.int64)
        number[large] = np.arange(1, len(large) + 1)
        parts = torch.from_numpy(number[ids]).to(labels.device)
        x, y, width, height = (
            torch.from_numpy(stats[large, i].astype(np.float32)).to(labels.device)
            for i in range(4)  # OpenCV's order
        )
        boxes = torch.stack([x, y, x + width - 1, y + height - 1], dim=1)
        at = [
            int(torch.where(parts == i, prob, -1).flatten().argmax())
            for i in range(1, len(large) + 1)
        ]
        points = boxes.new_tensor([[i % labels.shape[1], i // labels.shape[1]] for i in at])
        yield Prompts(int(label), parts, boxes, points, prob)


@STAGES.register_module(name="sam_refine")
class SamRefine(PromptedSam):
    """Extends classes to the masks that SAM predicts for their connected components.

    The connected components of each class are found at a lower resolution. SAM is prompted with the box
    of a component, the point where the class is most probable, and the probability map of the class. It
    predicts one mask, which is used if its predicted IoU is high enough. A pixel inside masks takes the
    class with the largest product of its probability and the mask's; all others keep their label.

    Args:
        model: as in `PromptedSam`; published: "facebook/sam-vit-base".
        coarse_thd: pixels whose best class is less probable are ignored, and smaller probabilities are
            0 in SAM's map; published: 0.2, ADE20K and COCO-Stuff 0.05, Cityscapes 0.1, COCO-Object
            0.25, Context 0.15.
        min_area: smallest area of a component in pixels, at the lower resolution.
        min_iou: masks are used if their predicted IoU is larger.
        mask_factor: factor on the probabilities in the map for SAM.
        shrink: factor by which the resolution of the labels is lowered.
        restore: whether a component whose mask is not used keeps its label where that is more probable
            than the classes of other masks; the release intends this, but overwrites before comparing.
        prompt_batch, image_mean, image_std: as in `PromptedSam`.
    """

    needs_scores = True

    def __init__(
        self,
        *,
        model: str | nn.Module,
        coarse_thd: float = 0.2,
        min_area: int = 225,
        min_iou: float = 0.8,
        mask_factor: float = 0.005,
        shrink: int = 2,
        restore: bool = False,
        prompt_batch: int = 64,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            model=model, prompt_batch=prompt_batch, image_mean=image_mean, image_std=image_std
        )
        if shrink < 1:
            raise ValueError(f"sam_refine: shrink={shrink}: expected 1 or more")
        self.coarse_thd = coarse_thd
        self.min_area = min_area
        self.min_iou = min_iou
        self.mask_factor = mask_factor
        self.shrink = shrink
        self.restore = restore

    @torch.no_grad()
    def forward(
        self,
        vit: VisionTransformer,
        image: Tensor,
        labels: Labels,
        classes: int,
        *,
        guides: Mapping[str, Callable[..., Tokens]] | None = None,
        prob_thd: float = 0.0,
    ) -> Labels:
        """The labels with sharper outlines.

        Inside SAM's masks, scores become those of `spread`, and the confidence that of the winner, but
        at least `coarse_thd`: the component of the mask had at least this probability, and a later
        threshold must not undo the mask.

        Args:
            image: normalised for CLIP, (3, h, w), of any size.
            labels: labels of the image, at any size, with scores.
            vit, classes, guides, prob_thd: not used; other final stages may need them.

        Raises:
            ValueError: if the labels have no scores.
            FloatingPointError: if SAM gives NaN or infinite values.
        """
        if labels.scores is None:
            raise ValueError("sam_refine needs labels with scores")
        found, failed = self.spread(image, labels)
        best, winner = found.max(0)
        changed = best > 0
        if self.restore:
            changed &= ~(failed & (labels.confidence > best))
        return replace(
            labels,
            labels=torch.where(changed, winner, labels.labels),
            confidence=torch.where(changed, best.clamp_min(self.coarse_thd), labels.confidence),
            scores=torch.where(changed, found, labels.scores),
        )

    def spread(self, image: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Scores of the classes inside their masks, and the components without a usable mask.

        Args:
            image, labels: as in `forward`.

        Returns:
            The maximum of sigmoid(mask logit) * probability over a class's masks, 0 outside of them,
            (K, H, W); and the pixels of components whose mask is not used, (H, W) bool.
        """
        scores = labels.scores
        assert scores is not None
        height, width = labels.labels.shape
        small = (max(height // self.shrink, 1), max(width // self.shrink, 1))
        coarse = F.interpolate(scores[None].float(), small, mode="bilinear", align_corners=False)[0]
        inner = self.inner(image.shape[-2], image.shape[-1])
        found, embeddings = torch.zeros_like(scores), None
        failed = torch.zeros(small, dtype=torch.bool, device=scores.device)
        for prompts in class_prompts(
            nearest(labels.labels, small),
            coarse,
            coarse_thd=self.coarse_thd,
            min_area=self.min_area,
        ):
            embeddings = self.embed(image) if embeddings is None else embeddings
            masks, iou = self.ask(embeddings, prompts, inner)
            counts = iou > self.min_iou
            failed |= F.pad(~counts, (1, 0))[prompts.parts]
            if not bool(counts.any()):
                continue
            sheet = self.sheet(masks[counts], inner, (height, width))
            step = max(BUDGET // (len(sheet.maps) * width), 1)
            for start in range(0, height, step):
                own = slice(start, min(start + step, height))
                logits = sheet.rows(own.start, own.stop).amax(0)  # the sigmoid keeps their order
                prob = logits.sigmoid() * scores[prompts.label, own]
                found[prompts.label, own] = torch.where(logits > 0, prob, 0)
        return found, nearest(failed, (height, width))

    def ask(
        self, embeddings: Any, prompts: Prompts, inner: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """One mask for each component, (n, s, s) logits, and its predicted IoU, (n,).

        Args:
            embeddings: result of `embed`.
            prompts: prompts of a class.
            inner: rows and columns that the image takes of the model's square.
        """
        height, width = prompts.prob.shape
        scale = prompts.boxes.new_tensor([inner[1] / width, inner[0] / height])
        boxes, points = prompts.boxes * scale.repeat(2), prompts.points * scale
        given = self.mask_input(prompts.prob)[None, None].to(self.dtype)
        maps, scores = [], []
        for box, point in zip(
            boxes.split(self.prompt_batch), points.split(self.prompt_batch), strict=True
        ):
            masks, iou = self.decode(
                embeddings,
                input_points=point[None, :, None],
                input_boxes=box[None],
                input_masks=given,
                multimask_output=False,
            )
            maps.append(masks[:, 0])
            scores.append(iou[:, 0])
        return torch.cat(maps), torch.cat(scores)

    def mask_input(self, prob: Tensor) -> Tensor:
        """The mask prompt from a class's map (h, w): scaled, at a quarter of SAM's resolution."""
        side = self.side // 4
        height, width = prob.shape
        scale = side / max(height, width)
        size = (side, side)
        if not self.stretch:
            size = (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
        small = F.interpolate(prob[None, None], size, mode="bilinear", align_corners=False)[0, 0]
        small = self.mask_factor * torch.where(small > self.coarse_thd, small, 0)
        return F.pad(small, (0, side - size[1], 0, side - size[0]))
