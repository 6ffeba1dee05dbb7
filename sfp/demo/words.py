"""Text as people type it: words to look for."""

from __future__ import annotations

from sfp import vocabulary
from sfp.mini import ALIASES

MOST = 256  # queries: each is a batch of prompts for the text tower


def parse_words(text: str | None) -> list[list[str]]:
    """Classes by commas or lines, synonyms by "|"; empty entries are passed over.

    Raises:
        ValueError: if there is none, one is there twice, or there are too many.

    Example:
        >>> parse_words("cat | kitten, sky,")
        [['cat', 'kitten'], ['sky']]
    """
    classes = vocabulary.parse_words(text or "")
    words = [word for synonyms in classes for word in synonyms]
    if twice := sorted({word for word in words if words.count(word) > 1}):
        raise ValueError(f"{twice[0]!r} is there twice: remove one, their scores would tie")
    if len(words) > MOST:
        raise ValueError(f"{len(words)} words: expected {MOST} at most")
    return classes


def unknown_to_mini(words: list[str]) -> list[str]:
    """Those that the mini CLIP was not trained on, whose features mean nothing."""
    known = {*ALIASES, *(alias for several in ALIASES.values() for alias in several)}
    return [word for word in words if word not in known]
