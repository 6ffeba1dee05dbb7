"""Checkpoints of CLIP: where they are published, how they are fetched, read and recognised."""
