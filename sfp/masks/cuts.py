"""Masks by repeated normalised cuts of a DINO's patches, without prompts or training on masks.

Normalised cuts (Shi and Malik, 2000) are used as in TokenCut and MaskCut: the second eigenvector of a
graph that connects similar patches shows which part is most salient. That part is removed, and the rest
is cut again. LaVG (ECCV 2024) uses such masks as regions, each with one class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.functional.masks import MaskSheet
from sfp.functional.windows import interpolation
from sfp.guides.transformers import IMAGENET_MEAN, IMAGENET_STD
from sfp.masks.dino import ReadsPatches
from sfp.registry import MASKS

DENSE = 512  # patches up to which all eigenvectors are computed
LOOSE = 1e-5  # weight between patches that are not similar


def second_eigenvector(alike: Tensor) -> Tensor:
    """Second smallest generalised eigenvector of (D - A, D), of a symmetric A with row sums D: (n,).

    A is 1 where patches are alike, else 1e-5. That vector is D^-1/2 times the second largest
    eigenvector of D^-1/2 A D^-1/2.

    Args:
        alike: (n, n) bool, n at least 3.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = len(alike)
    degree = LOOSE * count + (1 - LOOSE) * alike.sum(1).double()
    root = degree.rsqrt()
    if count <= DENSE:
        weights = torch.where(alike, 1.0, LOOSE).double() * root[:, None] * root
        return root * torch.linalg.eigh(weights).eigenvectors[:, -2]
    joined = alike.float()

    def product(x: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = root * torch.as_tensor(x.reshape(-1), device=root.device)
        mixed = (1 - LOOSE) * (joined @ scaled.float()).double() + LOOSE * scaled.sum()
        return (root * mixed).cpu().numpy()

    operator = LinearOperator((count, count), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(count)
    values, vectors = eigsh(operator, k=2, which="LA", v0=start, tol=1e-5)
    return root * torch.from_numpy(vectors[:, values.argsort()[0]]).to(root)


def cut(alike: Tensor, free: Tensor, grid: tuple[int, int]) -> Tensor:
    """The most salient part of the free patches, a single connected component, (N,) bool.

    The eigenvector is split at its mean. Its sign is flipped if three or more corners of the image
    would be in the foreground, or if its largest entry would not; then the 4-connected component of the
    foreground with the largest entry is taken.

    Args:
        alike: which pairs of patches are similar, (N, N) bool.
        free: patches that may be taken, (N,) bool.
        grid: rows and columns.
    """
    from scipy import ndimage

    vector = second_eigenvector(alike[free][:, free])
    front = vector > vector.mean()
    full = torch.zeros_like(free)
    full[free] = front
    corners = full.view(grid)[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
    if int(corners) >= 3 or not bool(front[vector.abs().argmax()]):
        vector, front = -vector, ~front
        full[free] = front
    seed = int(free.nonzero()[vector.argmax(), 0])
    pieces, _ = ndimage.label(full.view(grid).cpu().numpy())
    return torch.from_numpy(pieces.ravel() == pieces.ravel()[seed]).to(free.device)


def normalised_cuts(
    features: Tensor, grid: tuple[int, int], *, count: int = 8, alike: float = 0.3
) -> Tensor:
    """Masks that do not overlap and cover everything, the remainder last: (M, h, w) bool.

    Holes in a mask are filled where they belong to no other mask; a mask that is less than half of its
    filled area is discarded, and its patches stay in the remainder.

    Args:
        features: features of patches, (N, D).
        grid: rows and columns.
        count: largest number of masks besides the remainder.
        alike: cosine above which patches are similar.
    """
    from scipy import ndimage

    unit = F.normalize(features.float(), dim=-1)
    joined = unit @ unit.T > alike
    free = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    taken = torch.zeros_like(free)
    masks = []
    for _ in range(count):
        if int(free.sum()) < 3:
            break
        piece = cut(joined, free, grid)
        free &= ~piece
        filled = torch.from_numpy(ndimage.binary_fill_holes(piece.view(grid).cpu().numpy()))
        filled = filled.to(free.device).flatten() & ~taken
        if int(piece.sum()) < 0.5 * int(filled.sum()):
            continue
        free &= ~filled
        taken |= filled
        masks.append(filled)
    if bool((~taken).any()):
        masks.append(~taken)
    return torch.stack(masks).unflatten(1, grid)


@MASKS.register_module(name="cuts")
class CutMasks(ReadsPatches):
    """Normalised cuts of the keys of a DINO's last block, for the whole image.

    LaVG's dense CRF after each cut is not implemented.

    Args:
        model: as in `TransformersGuide`; published: "facebook/dino-vitb8".
        side: side in pixels of the square to which the image is resized.
        count: largest number of masks besides the remainder.
        alike: cosine above which patches are similar.
        output: the guide's output whose patches are compared.
        mean, std: the model's normalisation, RGB in 0..1.
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights.
    """

    needs_points = False

    def __init__(
        self,
        *,
        model: str | nn.Module,
        side: int = 640,
        count: int = 8,
        alike: float = 0.3,
        output: str | None = "k",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(model, mean, std, image_mean, image_std)
        self.side = side
        self.count = count
        self.alike = alike
        self.output = output

    @torch.no_grad()
    def forward(self, image: Tensor, points: Tensor, size: tuple[int, int]) -> MaskSheet:
        """Mask logits of an image (3, h, w), 1 inside and -1 outside, to be rendered at a size.

        Args:
            image: normalised for CLIP.
            points: not used.
            size: rows and columns.
        """
        square = F.interpolate(
            image[None].float(),
            (self.side, self.side),
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        tokens = self.guide(square, self.output)
        masks = normalised_cuts(tokens.data[0], tokens.grid, count=self.count, alike=self.alike)
        maps = 2 * masks.float() - 1
        rows, columns = (interpolation(c, s, maps) for c, s in zip(tokens.grid, size, strict=True))
        return MaskSheet(maps, rows, columns)
