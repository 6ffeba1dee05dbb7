"""Registered ops, by kind. Importing this package registers them."""

from sfp.ops import (
    affinity,
    alignment,
    attention,
    clusters,
    detectors,
    feedback,
    guided,
    integrators,
    mitigators,
    positions,
    propagation,
    refiners,
    sklearn_detectors,
    surgery,
)

__all__ = [
    "affinity",
    "alignment",
    "attention",
    "clusters",
    "detectors",
    "feedback",
    "guided",
    "integrators",
    "mitigators",
    "positions",
    "propagation",
    "refiners",
    "sklearn_detectors",
    "surgery",
]
