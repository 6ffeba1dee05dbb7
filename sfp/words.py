"""What to look for, in every form that people write it, and what counts as background."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeAlias

from sfp.registry import suggest
from sfp.vocabulary import BACKGROUND, Vocabulary, load_vocabulary

BENCHMARKS = dict(  # name: (its class file, its dataset in `sfp.data.datasets`)
    voc21=("cls_voc21.txt", "PascalVOC21Dataset"),
    context60=("cls_context60.txt", "PascalContext60Dataset"),
    coco_object=("cls_coco_object.txt", "COCOObjectDataset"),
    voc20=("cls_voc20.txt", "PascalVOC20Dataset"),
    context59=("cls_context59.txt", "PascalContext59Dataset"),
    coco_stuff=("cls_coco_stuff.txt", "COCOStuff164kDataset"),
    ade20k=("cls_ade20k.txt", "ADE20K150Dataset"),
    cityscapes=("cls_city_scapes.txt", "Cityscapes19Dataset"),
    mini=("cls_mini.txt", "MiniSceneDataset"),
)
ALIASES = dict(city_scapes="cityscapes", coco_stuff164k="coco_stuff")  # as their configs are named
Classes: TypeAlias = "str | os.PathLike[str] | Sequence[str | Sequence[str]] | Vocabulary"


def as_vocabulary(
    classes: Classes, background: str | Sequence[str] | float | None = None
) -> Vocabulary:
    """The queries of a list, a file or a benchmark, with a background where words describe it.

    Args:
        classes: one of

            * a list with an entry per class: its name, or a list of its synonyms;
            * the path of a class file, one class per line, synonyms separated by ", ";
            * the name of a benchmark (`BENCHMARKS`): its words, under its own class names;
            * a `Vocabulary`.
        background: words, one or a list: they become class 0, "background". A number or None adds
            no query.

    Raises:
        ValueError: if `classes` is none of these, or has a background of its own beside the words.
        FileNotFoundError: if there is no such file.
    """
    vocabulary = _vocabulary(classes)
    if background is None or isinstance(background, (int, float)):
        return vocabulary
    words = [background] if isinstance(background, str) else list(background)
    if BACKGROUND in vocabulary.names:
        raise ValueError(
            f"background={background!r}, but the classes have a {BACKGROUND!r} already: rename or "
            "remove one of them"
        )
    try:
        queries = load_vocabulary([words]).queries
    except ValueError as error:
        raise ValueError(f"background={background!r}: {error}") from None
    clash = sorted(set(queries) & set(vocabulary.queries))
    if clash:
        raise ValueError(
            f"background={background!r}: {clash[0]!r} is also a name of a class, and their scores "
            "would tie; remove one"
        )
    return Vocabulary(
        (*queries, *vocabulary.queries),
        (*(0 for _ in queries), *(i + 1 for i in vocabulary.index)),
        (BACKGROUND, *vocabulary.names),
    )


def _vocabulary(classes: Classes) -> Vocabulary:
    if isinstance(classes, Vocabulary):
        return classes
    if isinstance(classes, str) and is_benchmark(classes):
        return benchmark(ALIASES.get(classes, classes))
    if isinstance(classes, str) and not Path(classes).is_file():
        if Path(classes).suffix or os.sep in classes:
            return load_vocabulary(classes)  # whose error says that the file is missing
        raise ValueError(
            f"classes={classes!r} is neither a file nor a benchmark{suggest(classes, BENCHMARKS)}. "
            f"To name classes give a list: {[c.strip() for c in classes.split(',')]}"
        )
    if not isinstance(classes, (str, os.PathLike, list, tuple)):
        raise ValueError(
            f"classes={classes!r}: expected a list of names (or of lists of synonyms), in the order "
            "of the labels, a class file, or the name of a benchmark"
        )
    return load_vocabulary(classes)


def is_benchmark(name: str) -> bool:
    """Whether a benchmark, with words of its own, has this name."""
    return ALIASES.get(name, name) in BENCHMARKS


def class_file(name: str) -> Path:
    """Where the words of a benchmark are."""
    from sfp.evaluation.configs import CONFIGS

    return CONFIGS / BENCHMARKS[ALIASES.get(name, name)][0]


@cache
def benchmark(name: str) -> Vocabulary:
    """The words of a benchmark, under its dataset's own class names ("background", not "sky")."""
    from sfp.data import datasets

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # COCO-Object names "bed" twice, which is its protocol
        vocabulary = load_vocabulary(class_file(name))
    names = getattr(datasets, BENCHMARKS[name][1]).METAINFO["classes"]
    return replace(vocabulary, names=tuple(each.strip() for each in names))
