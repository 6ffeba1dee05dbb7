"""Registered ops, by kind. Importing this package registers them."""

from sfp.ops import (
    affinity,
    attention,
    detectors,
    integrators,
    mitigators,
    positions,
    refiners,
    surgery,
)

__all__ = [
    "affinity",
    "attention",
    "detectors",
    "integrators",
    "mitigators",
    "positions",
    "refiners",
    "surgery",
]
