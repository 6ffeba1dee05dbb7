"""Registered ops, by kind. Importing this package registers them."""

from sfp.ops import affinity, attention, detectors, integrators, mitigators, sklearn_detectors

__all__ = ["affinity", "attention", "detectors", "integrators", "mitigators", "sklearn_detectors"]
