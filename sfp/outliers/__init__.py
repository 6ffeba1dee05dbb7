"""Benchmarks of detectors and mitigators: planted outliers, and hubs."""
