"""Planted outliers: which detectors find them, which mitigators repair them."""
