"""Moved to `sfp.vocabulary`."""

from pathlib import Path

from sfp.data.benchmarks import find
from sfp.vocabulary import BACKGROUND, Classes, as_vocabulary

__all__ = ["BACKGROUND", "Classes", "as_vocabulary", "class_file", "is_benchmark"]


def is_benchmark(name: str) -> bool:
    """Whether a benchmark has this name."""
    return find(name) is not None


def class_file(name: str) -> Path:
    """Where the words of a benchmark are."""
    row = find(name)
    assert row is not None
    return row.words
