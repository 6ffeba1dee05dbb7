"""The embedded mini world: generated scenes, and a small CLIP that was trained on nothing else.

The model knows the eighteen names in `CLASSES` and their `ALIASES`; any other word has an embedding
of zero. Its training used the generator's patch labels besides captions (see `train`), so that its
middle layers group patches as those of real CLIPs do. Its outlier tokens were trained in (see
`outliers`), as a stand-in for what happens by itself in large CLIPs, and labels restrict them to
background. What methods score on it says whether they run as intended, and shows what outliers do; it
is no evidence of how they fare with real images.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from sfp.clip.checkpoints import published
from sfp.mini.scenes import ALIASES, CLASSES, PALETTE, STUFF, THINGS, prepare, scene

if TYPE_CHECKING:
    from sfp.vocabulary import Vocabulary

__all__ = [
    "ALIASES",
    "CLASSES",
    "PALETTE",
    "STUFF",
    "THINGS",
    "checkpoint",
    "prepare",
    "scene",
    "unknown_words",
    "vocabulary_note",
]


def checkpoint() -> Path:
    """Path of the shipped weights: OpenAI's layout, patch 16, 224 px, half-precision matrices.

    Raises:
        FileNotFoundError: If this copy of the package came without them.
    """
    path = Path(__file__).with_name("mini.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: take it from the repository, or train it with "
            f"`python -m sfp.mini.train --out runs/mini` and copy runs/mini/mini.safetensors there"
        )
    return path


def unknown_words(weights: object, vocabulary: Vocabulary) -> list[str]:
    """The queries that the mini CLIP has never seen in a caption; none if other weights are in use.

    Its text encoder has no embedding for them, so what it finds for them means nothing.

    Args:
        weights: as in `sfp.load`.
        vocabulary: what is looked for.

    Example:
        >>> from sfp.vocabulary import load_vocabulary
        >>> unknown_words("mini", load_vocabulary(["dog", ["cat", "kitten"], "The sea"]))
        ['dog']
        >>> unknown_words("ViT-B/16", load_vocabulary(["dog"]))
        []
    """
    if not _is_mini(weights):
        return []
    known = {*ALIASES, *(alias for names in ALIASES.values() for alias in names)}
    return [query for query in vocabulary.queries if _spoken(query) not in known]


def vocabulary_note(weights: object, vocabulary: Vocabulary | None = None) -> str:
    """What to tell a user of the mini CLIP about its words; empty if other weights are in use.

    Args:
        weights: as in `sfp.load`.
        vocabulary: what is looked for; None if nothing is yet.
    """
    if not _is_mini(weights):
        return ""
    knows = f"knows the words of its drawn scenes only: {', '.join(CLASSES)}"
    real = "for photos use real weights, --weights ViT-B/16 (`sfp weights get ViT-B/16` downloads them)"
    unknown = unknown_words(weights, vocabulary) if vocabulary else []
    if unknown:
        return f"{', '.join(unknown)}: never seen by the mini CLIP, which {knows}; {real}"
    return f"the mini CLIP {knows}; {real}"


def _is_mini(weights: object) -> bool:
    return published.find(weights) is published.PUBLISHED[published.MINI]


def _spoken(query: str) -> str:
    """A query as captions spell it: in small letters, single blanks, without an article."""
    return re.sub(r"^(an?|the) ", "", " ".join(query.lower().split()))
