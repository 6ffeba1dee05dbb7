"""Evaluation of configs: runs that continue, tables, ablations, reproduction cards."""
