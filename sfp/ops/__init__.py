"""Registered ops, by kind. Importing this package registers them."""

from sfp.ops import affinity, attention, detectors, integrators, mitigators
from sfp.ops import alignment, clusters, feedback, guided, propagation

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
    "propagation",
]
