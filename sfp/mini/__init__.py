"""The built-in mini world: generated scenes, and a small CLIP trained only on them.

The model knows the eighteen names in `CLASSES` and their `ALIASES`; any other word has an embedding of
zero. It was trained with the generator's patch labels as well as captions (see `train`), so that its
middle layers group patches like those of real CLIPs. Its outlier tokens were trained in (see
`outliers`), as a stand-in for those that large CLIPs develop on their own, and confined to the
background by labels. Scores on it show whether methods run as intended and what outliers do; they say
nothing about real images.
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

SHOWN = 10  # unknown words that a note lists


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
    """The queries that occur in no caption of the mini CLIP; none if other weights are in use.

    Its text encoder has no embedding for them, so results for them are meaningless.

    Args:
        weights: as in `sfp.load`.
        vocabulary: the words.

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
    """A note for users of the mini CLIP about its words; empty if other weights are in use.

    Args:
        weights: as in `sfp.load`.
        vocabulary: the words; None if there are none yet.
    """
    if not _is_mini(weights):
        return ""
    knows = f"knows the words of its drawn scenes only: {', '.join(CLASSES)}"
    real = "for photos use real weights, --weights ViT-B/16 (`sfp weights get ViT-B/16` downloads them)"
    unknown = unknown_words(weights, vocabulary) if vocabulary else []
    if unknown:
        if len(unknown) > SHOWN:
            unknown[SHOWN:] = [f"and {len(unknown) - SHOWN} more"]
        return f"{', '.join(unknown)}: unknown to the mini CLIP, which {knows}; {real}"
    return f"the mini CLIP {knows}; {real}"


def _is_mini(weights: object) -> bool:
    return published.find(weights) is published.PUBLISHED[published.MINI]


def _spoken(query: str) -> str:
    """A query as spelled in captions: in lower case, with single blanks, without an article."""
    return re.sub(r"^(an?|the) ", "", " ".join(query.lower().split()))
