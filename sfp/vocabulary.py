"""What to look for: class names and their synonyms, from a file or from a list.

A class file holds one class per line in the label order of its dataset, synonyms separated by
", "; every synonym is a text query of its own::

    sky, wall, tree
    cat
    tv monitor, screen
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEPARATOR = ", "
BACKGROUND = "background"


@dataclass(frozen=True)
class Vocabulary:
    """Text queries and the class that each one stands for.

    Attributes:
        queries: Every synonym of every class, in the order of the classes.
        index: Class of each query, counted from 0.
        names: First name of each class.
    """

    queries: tuple[str, ...]
    index: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.names)


def load_vocabulary(
    source: str | os.PathLike[str] | Sequence[str | Sequence[str]] | Vocabulary,
) -> Vocabulary:
    """Reads class names.

    Names are stripped of surrounding blanks, and a separator or blank lines at the end are ignored.
    A name that two classes share is allowed, since the field's own COCO-Object file has one ("bed"),
    but warned about: the scores tie and the earlier class always wins.

    Args:
        source: Path of a class file, or a list with one entry per class: its name, or a list of its
            synonyms. In a list a name is taken as it is, commas included. A `Vocabulary` is
            returned as it is.

    Returns:
        The queries, their classes and the class names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a class or a name is empty, a class repeats a name, or the file is not UTF-8.

    Example:
        >>> load_vocabulary([["cat", "kitten"], "dog"])
        Vocabulary(queries=('cat', 'kitten', 'dog'), index=(0, 0, 1), names=('cat', 'dog'))
    """
    if isinstance(source, Vocabulary):
        return source
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        classes = _read(path)
        places = [f"{path}, line {number}" for number in range(1, len(classes) + 1)]
    else:
        entries: Sequence[Any] = source
        classes = [list(x) if isinstance(x, (list, tuple)) else [x] for x in entries]
        places = [f"entry {number} of the class list" for number in range(len(classes))]
        if not classes:
            raise ValueError("the class list is empty: give at least one class name")

    seen: dict[str, int] = {}
    queries: list[str] = []
    index: list[int] = []
    for number, (synonyms, place) in enumerate(zip(classes, places, strict=True)):
        for name in _clean(synonyms, place):
            if seen.get(name) == number:
                raise ValueError(
                    f"{place}: the name {name!r} stands there twice; remove one, every synonym of "
                    "a class is a query of its own"
                )
            if name in seen:
                warnings.warn(
                    f"{place}: the name {name!r} is also in {places[seen[name]]}. Their scores tie "
                    "and the earlier class wins, so rename or remove one unless a benchmark "
                    "prescribes it",
                    stacklevel=2,
                )
            seen.setdefault(name, number)
            queries.append(name)
            index.append(number)
    first = [index.index(number) for number in range(len(classes))]
    return Vocabulary(tuple(queries), tuple(index), tuple(queries[i] for i in first))


def _read(path: Path) -> list[list[str]]:
    """Synonyms of each line of a class file, blank lines at the end left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no class file {str(path)!r}: expected a text file with one class per line, synonyms "
            f"separated by {SEPARATOR!r}. To name classes directly give a list: ['cat', 'dog']"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    lines = text.rstrip().split("\n")  # not splitlines(), which also splits at rarer characters
    if lines == [""]:
        raise ValueError(f"{path} is empty: expected one class per line")
    return [line.strip().removesuffix(",").split(SEPARATOR) for line in lines]


def _clean(synonyms: Sequence[str], place: str) -> list[str]:
    """The names without surrounding blanks.

    Raises:
        ValueError: If there is none, or one is empty or not a string.
    """
    if not synonyms or not all(isinstance(name, str) for name in synonyms):
        raise ValueError(f"{place}: expected a name or a list of names, got {synonyms!r}")
    names = [name.strip() for name in synonyms]
    if names == [""]:
        raise ValueError(
            f"{place}: the class has no name; write one, or remove the line if it is not a class "
            "(the lines are counted as labels 0, 1, 2, ...)"
        )
    if "" in names:
        raise ValueError(f"{place}: a synonym is empty; remove the separator that is too much")
    return names
