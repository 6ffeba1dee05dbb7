"""Evaluation of configs: resumable runs, tables, ablations, reproduction cards."""
