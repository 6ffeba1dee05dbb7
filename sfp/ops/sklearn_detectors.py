"""Detectors based on scikit-learn: the outliers of its outlier and clustering algorithms.

They process the features of a layer's output, one image at a time, on the host, with one copy per
batch. Their parameters do not depend on the scale of the features or the size of the grid: distances
are multiples of a distance in the image, minimal sizes are shares of its patches.

scikit-learn is imported where it is used, since that takes most of a second and few methods need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sfp.functional.precision import upcast
from sfp.registry import op
from sfp.trace import Trace

LEFT_OVER = -1  # scikit-learn's label of outliers, and of points in no cluster


def left_over(trace: Trace, layer: int, label: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """Marks the patches that `label`, (N, D) -> (N,), labels `LEFT_OVER`, image by image."""
    patches = trace.outputs[layer].patches
    images = upcast(patches).detach().cpu().numpy()  # (B, N, D)
    if images.shape[1] < 3:  # too few patches for outliers
        return torch.zeros(images.shape[:2], dtype=torch.bool, device=patches.device)
    import sklearn

    if not np.isfinite(images).all():
        raise ValueError("scikit-learn's detectors need finite features")
    # its own checks, repeated for every point, would take half of the time
    with sklearn.config_context(assume_finite=True, skip_parameter_validation=True):
        labels = np.stack([label(image) for image in images])
    return torch.from_numpy(labels == LEFT_OVER).to(patches.device)


def members(share: float, n: int) -> int:
    """Converts a share of `n` patches to a number, at least 2 and at most all but one."""
    return min(max(round(share * n), 2), n - 1)


def usual_distance(x: np.ndarray, k: int) -> float:
    """The median over points of the distance to the k-th nearest other point."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(x).kneighbors()
    return max(float(np.median(distances[:, -1])), np.finfo(np.float32).tiny)


@op("detector")
def lof_textbook(
    trace: Trace, layer: int, *, neighbours: int = 20, contamination: float | None = None
) -> Tensor:
    """Local outlier factor as published (Breunig et al., SIGMOD 2000).

    Unlike in the released `lof`, a point's reachability is at least its neighbour's k-distance,
    distances are not squared, and the number of outliers is not fixed.

    Args:
        neighbours: k; 20 in scikit-learn.
        contamination: share of patches to mark; None marks factors above 1.5, as scikit-learn does.
    """
    from sklearn.neighbors import LocalOutlierFactor

    def label(x: np.ndarray) -> np.ndarray:
        k = min(neighbours, len(x) - 1)
        share = "auto" if contamination is None else contamination
        return LocalOutlierFactor(n_neighbors=k, contamination=share).fit_predict(x)

    return left_over(trace, layer, label)


@op("detector")
def dbscan(trace: Trace, layer: int, *, eps: float = 2.0, share: float = 0.1) -> Tensor:
    """Patches in no dense region (DBSCAN, Ester et al., KDD 1996).

    Args:
        eps: radius, as a multiple of the median distance to the k-th nearest patch.
        share: k and `min_samples`, as a share of the patches. Similar outliers form a dense region of
            their own, unless there are fewer than this.
    """
    from sklearn.cluster import DBSCAN

    def label(x: np.ndarray) -> np.ndarray:
        k = members(share, len(x))
        return DBSCAN(eps=eps * usual_distance(x, k), min_samples=k).fit_predict(x)

    return left_over(trace, layer, label)


@op("detector")
def hdbscan(
    trace: Trace, layer: int, *, share: float = 0.1, selection: Literal["eom", "leaf"] = "eom"
) -> Tensor:
    """Patches in no cluster of any density (HDBSCAN, Campello et al., PAKDD 2013).

    Args:
        share: smallest size of a cluster, as a share of the patches.
        selection: how clusters are selected from the tree, "eom" (excess of mass) or "leaf".
    """
    from sklearn.cluster import HDBSCAN

    def label(x: np.ndarray) -> np.ndarray:
        # an image of a single texture is one cluster
        return HDBSCAN(
            min_cluster_size=members(share, len(x)),
            min_samples=members(share / 2, len(x)),
            cluster_selection_method=selection,
            allow_single_cluster=True,
            copy=True,
        ).fit_predict(x)

    return left_over(trace, layer, label)


@op("detector")
def optics(trace: Trace, layer: int, *, xi: float = 0.05, share: float = 0.1) -> Tensor:
    """Patches outside the valleys of the reachability plot (OPTICS, Ankerst et al., SIGMOD 1999).

    Args:
        xi: relative steepness at which a valley begins; 0.05 in scikit-learn.
        share: `min_samples` and smallest size of a cluster, as a share of the patches.
    """
    from sklearn.cluster import OPTICS

    def label(x: np.ndarray) -> np.ndarray:
        return OPTICS(min_samples=members(share, len(x)), xi=xi).fit_predict(x)

    return left_over(trace, layer, label)


@op("detector")
def isolation_forest(
    trace: Trace,
    layer: int,
    *,
    trees: int = 100,
    contamination: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Patches that few random cuts separate from all others (Liu, Ting and Zhou, ICDM 2008).

    Args:
        trees: number of trees; 100 in the paper and in scikit-learn.
        contamination: share of patches to mark; None marks scores above 0.5, as in the paper.
        seed: seed of the cuts, the same for every image.
    """
    from sklearn.ensemble import IsolationForest

    def label(x: np.ndarray) -> np.ndarray:
        share = "auto" if contamination is None else contamination
        forest = IsolationForest(n_estimators=trees, contamination=share, random_state=seed)
        return forest.fit_predict(x)

    return left_over(trace, layer, label)
