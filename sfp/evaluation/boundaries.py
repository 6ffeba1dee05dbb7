"""Boundary IoU: IoU of the pixels near contours (Cheng et al., Boundary IoU, CVPR 2021).

For large objects IoU hardly depends on the contour. Boundary IoU compares only the pixels of each mask
within a distance d of its contour: |G_d ∩ P_d| / |G_d ∪ P_d|. Here the masks are those of the classes,
and intersections and unions are summed over all images, as for mIoU.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from sfp.evaluation.journal import count

_OUTSIDE = 65535


def near_contour(labels: Tensor, distance: int) -> Tensor:
    """Whether another label or the image border is within a distance: (H, W) bool.

    For all labels at once, these are the pixels removed from a label's mask by erosion with a square of
    side `2 * distance + 1`.

    Args:
        labels: (H, W) integers in 0..65535.
        distance: in pixels, along rows and columns, at least 1.
    """
    image = np.pad(labels.cpu().numpy().astype(np.uint16), 1, constant_values=_OUTSIDE)
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    mixed = cv2.dilate(image, square) != cv2.erode(image, square)
    return torch.from_numpy(mixed[1:-1, 1:-1]).to(labels.device)


def count_boundaries(
    predicted: Tensor, truth: Tensor, classes: int, ignored: int, ratio: float
) -> Tensor:
    """The confusion matrix of boundary pixels, in the format of `journal.count`.

    Args:
        predicted: labels, (H, W).
        truth: labels, (H, W).
        classes: K; labels are 0..K-1.
        ignored: label of ignored pixels in the truth; like any other label it bounds a mask.
        ratio: the distance as a share of the image diagonal, at least one pixel.

    Returns:
        Entries (3, n) int64: truth, prediction, pixels. Label K stands for pixels that are not near the
        contour of their own mask. Ignored pixels have no entry.
    """
    if truth.ndim < 2:  # mmseg squeezes images of one row or column; all their pixels are boundary
        predicted, truth = predicted.reshape(1, -1), truth.reshape(1, -1)
    height, width = truth.shape
    distance = max(1, round(ratio * (height**2 + width**2) ** 0.5))
    counted = truth != ignored
    one, two = (
        torch.where(near_contour(labels, distance), labels, classes)[counted]
        for labels in (predicted, truth)
    )
    return count(one, two, classes + 1, ignored=-1)
