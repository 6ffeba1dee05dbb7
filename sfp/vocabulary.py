"""Class names and their synonyms, from a file, a list, a benchmark or typed text.

A class file has one class per line, in the label order of its dataset, with synonyms separated by ", "
or "|"; every synonym is a text query of its own::

    sky, wall, tree
    cat
    tv monitor | screen

In typed text (`--classes`, the demo page) commas separate classes and "|" separates synonyms.
"""

from __future__ import annotations

import numbers
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from sfp.data import benchmarks
from sfp.data.listing import read_text
from sfp.registry import suggest

SEPARATOR = ", "
BACKGROUND = "background"
# common mistakes: other separators, and bullets, numbers or quotes around names
_SUSPICIOUS = re.compile(r",(?=\S)|[;|\t]|^\s*(#|//|- |\d+\s*[:.)])|^([\"']).*\2$")


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


Classes: TypeAlias = "str | os.PathLike[str] | Sequence[str | Sequence[str]] | Vocabulary"


def as_vocabulary(
    classes: Classes, background: str | Sequence[str] | float | None = None
) -> Vocabulary:
    """The queries of a list, a file or a benchmark, with background words if there are any.

    Args:
        classes: one of

            * a list with an entry per class: its name, or a list of its synonyms;
            * the path of a class file, one class per line, synonyms separated by ", " or "|";
            * the name of a benchmark (`sfp.data.benchmarks`): its words, under its own class names;
            * a `Vocabulary`.
        background: a word or a list of words, which become class 0, "background". A number or None
            adds no query (see `background_threshold`).

    Raises:
        ValueError: if `classes` is none of these, or has its own background besides these words.
        FileNotFoundError: if there is no such file.
    """
    vocabulary = _vocabulary(classes)
    if background is None or background_threshold(background) is not None:
        return vocabulary
    words = [background] if isinstance(background, str) else list(background)  # type: ignore[arg-type]
    if BACKGROUND in vocabulary.names:
        raise ValueError(
            f"background={background!r}, but the classes already include {BACKGROUND!r}: rename or "
            "remove one of them"
        )
    try:
        queries = load_vocabulary([words]).queries
    except ValueError as error:
        raise ValueError(f"background={background!r}: {error}") from None
    clash = sorted(set(queries) & set(vocabulary.queries))
    if clash:
        raise ValueError(
            f"background={background!r}: {clash[0]!r} is also a name of a class, so their scores "
            "would tie; remove one of them"
        )
    return Vocabulary(
        (*queries, *vocabulary.queries),
        (*(0 for _ in queries), *(i + 1 for i in vocabulary.index)),
        (BACKGROUND, *vocabulary.names),
    )


def _vocabulary(classes: Classes) -> Vocabulary:
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str) and (row := benchmarks.find(classes)) is not None:
        return _of_benchmark(row.name)
    if isinstance(classes, str) and not Path(classes).is_file():
        if Path(classes).suffix or os.sep in classes:
            return load_vocabulary(classes)  # raises that the file is missing
        raise ValueError(
            f"classes={classes!r} is neither a file nor a benchmark"
            f"{suggest(classes, benchmarks.BENCHMARKS)}. "
            f"To name classes give a list: {[c.strip() for c in classes.split(',')]}"
        )
    if not isinstance(classes, (str, os.PathLike, list, tuple)):
        raise ValueError(
            f"classes={classes!r}: expected a list of names (or of lists of synonyms) in label order, "
            "a class file, or the name of a benchmark"
        )
    return load_vocabulary(classes)


@cache
def _of_benchmark(name: str) -> Vocabulary:
    """The words of a benchmark, under its dataset's own class names ("background", not "sky")."""
    row = benchmarks.BENCHMARKS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # COCO-Object's protocol has "bed" in two classes
        vocabulary = load_vocabulary(row.words)
    return replace(vocabulary, names=row.class_names)


# -- background ----------------------------------------------------------------------------------


def background_threshold(background: object) -> float | None:
    """The threshold if `background` is a number; None for words and None.

    Raises:
        ValueError: if it is none of these, or not between 0 and 1.
    """
    if background is None or isinstance(background, (str, list, tuple)):
        return None
    if isinstance(background, bool) or not isinstance(background, numbers.Real):
        raise ValueError(
            f"background={background!r}: expected None, words, or a probability between 0 and 1"
        )
    threshold = float(background)
    if not 0 < threshold < 1:
        raise ValueError(f"background={background}: a threshold must be between 0 and 1")
    return threshold


def check_threshold(vocabulary: Vocabulary, threshold: float | None) -> None:
    """Warns about thresholds without effect, and about a single class, which gets every pixel.

    Probabilities are a softmax over the Q queries, so the best one is at least 1 / Q: no pixel is below
    a threshold smaller than that, and a single query has probability 1 everywhere.

    Args:
        vocabulary: the queries, including background words.
        threshold: pixels whose best probability is lower become background; None or 0 for none.
    """
    queries = len(vocabulary.queries)
    advice = "add words for the rest, background=['wall', 'floor'], or more classes"
    if queries == 1:
        effect = (
            f"and the threshold {threshold:g} has no effect"
            if threshold
            else "whatever the image shows"
        )
        warnings.warn(
            f"{vocabulary.names[0]!r} is the only query, so its probability is 1 at every pixel, "
            f"{effect}: {advice}",
            stacklevel=3,
        )
    elif threshold and threshold <= 1 / queries:
        warnings.warn(
            f"the threshold {threshold:g} has no effect: among {queries} queries the best probability "
            f"is at least {1 / queries:.3g}; raise the threshold, or {advice}",
            stacklevel=3,
        )


# -- lists, files, text --------------------------------------------------------------------------


def parse_words(text: str) -> list[list[str]]:
    """Splits typed text into classes at commas and line ends, and into synonyms at "|".

    Empty entries are skipped.

    Raises:
        ValueError: if nothing is left.

    Example:
        >>> parse_words("cat | kitten, sky,")
        [['cat', 'kitten'], ['sky']]
    """
    classes = [_synonyms(entry) for entry in re.split(r"[,\n]", text)]
    classes = [synonyms for synonyms in classes if synonyms]
    if not classes:
        raise ValueError("type the words to look for, separated by commas: cat, sofa|couch, floor")
    return classes


def _synonyms(text: str) -> list[str]:
    """Splits text at "|"."""
    return [name.strip() for name in text.split("|") if name.strip()]


def load_vocabulary(
    source: str | os.PathLike[str] | Sequence[str | Sequence[str]] | Vocabulary,
) -> Vocabulary:
    """Reads class names.

    Blanks around names, a trailing separator and trailing blank lines are ignored. A name in two
    classes is allowed, since the commonly used COCO-Object file has one ("bed"), but causes a warning:
    the scores tie and the earlier class always wins. Names that look like several, such as "cat;dog" or
    "cat,dog", are taken as one query, with a warning.

    Args:
        source: Path of a class file, or a list with one entry per class: its name, or a list of its
            synonyms. Names in a list may contain commas. A `Vocabulary` is returned unchanged.

    Returns:
        The queries, their classes and the class names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a class or a name is empty, a class repeats a name, or the file is not text.

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

    classes = [_clean(synonyms, place) for synonyms, place in zip(classes, places, strict=True)]
    _warn_about_names(classes, places, isinstance(source, (str, os.PathLike)))
    queries = [name for synonyms in classes for name in synonyms]
    index = [number for number, synonyms in enumerate(classes) for _ in synonyms]
    return Vocabulary(tuple(queries), tuple(index), tuple(synonyms[0] for synonyms in classes))


def _warn_about_names(classes: list[list[str]], places: list[str], in_file: bool) -> None:
    """Warns about names shared by two classes, and about names that look like several."""
    seen: dict[str, int] = {}
    odd: list[str] = []
    for number, synonyms in enumerate(classes):
        for name in synonyms:
            if name in seen:
                warnings.warn(
                    f"{places[number]}: the name {name!r} is also in {places[seen[name]]}. Their "
                    "scores tie and the earlier class wins, so rename or remove one, unless the "
                    "benchmark requires it",
                    stacklevel=3,
                )
            if _SUSPICIOUS.search(name):
                odd.append(f"{places[number]}: {name!r}")
            seen.setdefault(name, number)
    if odd:
        several = f", and {len(odd) - 1} more like it" if len(odd) > 1 else ""
        advice = (
            'A class file has one class per line and nothing else, synonyms separated by ", " or "|"'
            if in_file
            else "A list has one entry per class, which is itself a list if there are synonyms: "
            "[['sofa', 'couch'], 'floor']"
        )
        warnings.warn(f"{odd[0]} is taken as one name{several}. {advice}", stacklevel=3)


def _read(path: Path) -> list[list[str]]:
    """The synonyms in each line of a class file, without trailing blank lines."""
    try:
        text = read_text(path)
        text.encode()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no class file {str(path)!r}: expected a text file with one class per line, synonyms "
            f"separated by {SEPARATOR!r}. To name classes directly, pass a list: ['cat', 'dog']"
        ) from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}): save it as UTF-8") from None
    lines = text.rstrip().split("\n")  # splitlines() would also split at rarer characters
    if lines == [""]:
        raise ValueError(f"{path} is empty: expected one class per line")
    classes = [
        re.split(r", | *\| *", line.strip().removesuffix(",").removesuffix("|")) for line in lines
    ]
    if len(classes) == 1 and len(classes[0]) > 1:
        warnings.warn(
            f"{path} has a single line, which is one class with {len(classes[0])} synonyms. If they "
            "are classes, write one per line",
            stacklevel=3,
        )
    return classes


def _clean(synonyms: Sequence[str], place: str) -> list[str]:
    """The names without surrounding blanks.

    Raises:
        ValueError: If there are none, or one is empty, repeated or not a string.
    """
    if not synonyms or not all(isinstance(name, str) for name in synonyms):
        raise ValueError(f"{place}: expected a name or a list of names, got {synonyms!r}")
    names = [name.strip() for name in synonyms]
    if names == [""]:
        raise ValueError(
            f"{place}: the class has no name; add one, or remove the line if it is not a class "
            "(lines are numbered as labels 0, 1, 2, ...)"
        )
    if "" in names:
        raise ValueError(f"{place}: a synonym is empty; remove the extra separator")
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"{place}: the name {twice[0]!r} appears twice; remove one, since every synonym of a "
            "class is a query of its own"
        )
    return names
