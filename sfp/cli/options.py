"""Options shared by several commands."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

    from sfp.vocabulary import Vocabulary

WEIGHTS = "name or path of CLIP weights, e.g. ViT-L/14"
METHOD = "preset, with knobs if needed: sclip, or sfp:pm=lof,layers=all"
CLASSES = 'names separated by commas, synonyms by "|"; or a class file; or the name of a benchmark'
BRACKETS = {"(": ")", "[": "]"}
QUOTES = ("'", '"')


class _Settings(argparse.Action):
    """Reads KEY=VALUE pairs into a dict, as mmengine's `DictAction`, but keeps blanks."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Adds the pairs to those of earlier uses of the option."""
        settings = dict(getattr(namespace, self.dest) or {})
        for word in values:
            key, equals, text = word.partition("=")
            if not equals:
                raise argparse.ArgumentError(self, f"{word!r} is not KEY=VALUE")
            try:
                settings[key] = parse_value(text)
            except ValueError as error:
                raise argparse.ArgumentError(self, f"{word!r}: {error}") from None
        setattr(namespace, self.dest, settings)


def parse_value(text: str) -> Any:
    """Parses a setting: a number, a boolean, None, a list or tuple of values, or else a string.

    Text in quotes is a string as it stands, commas, brackets and blanks included.

    Raises:
        ValueError: if brackets or quotes do not match.

    Example:
        >>> parse_value("0.5"), parse_value("True"), parse_value("som"), parse_value("[(1,2),x]")
        (0.5, True, 'som', [(1, 2), 'x'])
        >>> parse_value("5,7")  # a list needs no brackets
        [5, 7]
        >>> parse_value("['a {}, drawn', my words.txt]")
        ['a {}, drawn', 'my words.txt']
    """
    text = text.strip()
    if len(parts := _split(text)) > 1:
        return _values(parts)
    if text[:1] in QUOTES and text[0] == text[-1] != text:
        return text[1:-1]
    if text[:1] in BRACKETS and text.endswith(BRACKETS[text[0]]):
        values = _values(_split(text[1:-1]))
        return tuple(values) if text[0] == "(" else values
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    words = {"true": True, "false": False}
    return words.get(text.lower(), None if text == "None" else text)


def _values(parts: list[str]) -> list[Any]:
    """Parses each part; a trailing comma is allowed."""
    return [parse_value(part) for part in (parts if parts[-1] else parts[:-1])]


def _split(text: str) -> list[str]:
    """Splits `text` at commas outside brackets and quotes."""
    parts, depth, quote = [""], [], ""
    for i, sign in enumerate(text):
        # at the start of a value it is a quote, elsewhere an apostrophe
        if quote or (sign in QUOTES and text[:i].rstrip()[-1:] in "=,(["):
            quote = "" if sign == quote else quote or sign
        elif sign in BRACKETS:
            depth.append(BRACKETS[sign])
        elif sign in BRACKETS.values() and (not depth or depth.pop() != sign):
            raise ValueError("brackets do not match")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    if depth or quote:
        raise ValueError("quotes do not match" if quote else "brackets do not match")
    return parts


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    text: str,
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: the subparsers to add it to.
        name: its name.
        run: its function, from the parsed arguments to an exit code.
        help: its line in the help of `sfp`.
        text: its own help: what it does, and examples.
    """
    parser = commands.add_parser(
        name,
        help=help,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_evaluation(parser: argparse.ArgumentParser, *, many_weights: bool = False) -> None:
    """Adds the options of commands that evaluate a config; `load` turns them into a config.

    Args:
        parser: the parser to add them to.
        many_weights: whether --weights accepts several values, as a list.
    """
    parser.add_argument("config", help="name of a shipped config, e.g. voc21, or path of a config")
    if many_weights:
        parser.add_argument("--weights", nargs="+", help=f"{WEIGHTS}; several compare backbones")
    else:
        parser.add_argument("--weights", help=WEIGHTS)
    parser.add_argument("--work-dir", help="folder for the results (default: work/<config name>)")
    add_import(parser)
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="start over instead of resuming an interrupted run",
    )
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds the option that overrides any setting of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="override settings of the config, e.g. model.prob_thd=0.2",
    )


def add_import(parser: argparse.ArgumentParser) -> None:
    """Adds the option that imports a user's methods and ops; `sfp.cli.main` does the import."""
    parser.add_argument(
        "--import",
        nargs="+",
        dest="modules",
        default=[],
        metavar="MODULE|FILE",
        help="Python modules or files to import first, to register your own methods or ops",
    )


def add_paired(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the option for paired differences.

    Args:
        parser: the parser to add it to.
        what: what BASE may be, for the help.
    """
    parser.add_argument(
        "--paired",
        metavar="BASE",
        help=f'{what}, or "previous": show differences from it, with 95 %% confidence intervals',
    )


def parse_method(text: str) -> dict[str, Any]:
    """Parses a preset's name and knobs into a node for `build_method`.

    Raises:
        ValueError: if brackets or quotes do not match, or a knob has no value.

    Example:
        >>> parse_method("sfp:purify=False,layers=[-3,-2]")
        {'type': 'sfp', 'purify': False, 'layers': [-3, -2]}
    """
    name, colon, rest = text.partition(":")
    method: dict[str, Any] = {"type": name}
    for word in _split(rest) if colon else ():
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(
                f"{text!r}: expected KNOB=VALUE, got {word!r}; write e.g. sfp:purify=False,pm=lof"
            )
        method[key.strip()] = parse_value(value)
    return method


def parse_guide(text: str) -> tuple[str, dict[str, Any]]:
    """Parses the name and config node of a guide.

    Raises:
        ValueError: if the name or the type is missing, or a knob has no value.

    Example:
        >>> parse_guide("dino=transformers:model=facebook/dino-vitb8")
        ('dino', {'type': 'transformers', 'model': 'facebook/dino-vitb8'})
    """
    name, equals, node = text.partition("=")
    if not name or not equals or ":" in name:
        raise ValueError(
            f"--guide {text}: expected NAME=TYPE:KNOB=VALUE, e.g. "
            "dino=transformers:model=facebook/dino-vitb8"
        )
    return name, parse_method(node)


def add_guide(parser: argparse.ArgumentParser) -> None:
    """Adds the option for external encoders; `parse_guide` parses its values."""
    parser.add_argument(
        "--guide",
        nargs="+",
        default=[],
        metavar="NAME=TYPE:KNOB=VALUE",
        help="external models for methods that need them, e.g. "
        "dino=transformers:model=facebook/dino-vitb8 or sam3=sam3:model=facebook/sam3",
    )


def parse_regions(text: str | None) -> dict[str, Any] | None:
    """The setting `regions` of an engine.

    Raises:
        ValueError: if a knob has no value.

    Example:
        >>> parse_regions("sam:model=facebook/sam-vit-base,paint=largest")
        {'propose': {'type': 'sam', 'model': 'facebook/sam-vit-base'}, 'paint': 'largest'}
        >>> parse_regions("files:folder=maps")
        {'type': 'files', 'folder': 'maps'}
    """
    if text is None:
        return None
    node = parse_method(text)
    if node["type"] == "files":
        return node
    own = {"paint": node.pop("paint")} if "paint" in node else {}
    return dict(propose=node, **own)


def add_regions(parser: argparse.ArgumentParser) -> None:
    """Adds the option for the source of regions; `parse_regions` parses its value."""
    parser.add_argument(
        "--regions",
        metavar="TYPE:KNOB=VALUE",
        help="for methods that need regions: mask proposer and order of painting, e.g. "
        "sam:model=facebook/sam2-hiera-large,paint=largest; or files:folder=FOLDER, with id maps named "
        "like the images",
    )


def add_pictures(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds the option for the number of images on the picture sheet."""
    parser.add_argument(
        "--pictures", type=count, default=default, help=f"images on the sheet (default: {default})"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return int(text)


def probability(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    try:
        if 0 <= (number := float(text)) <= 1:
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text}")


def note_words(weights: object, vocabulary: Vocabulary) -> None:
    """Says on stderr which words the mini CLIP knows, if it is in use."""
    from sfp.mini import vocabulary_note

    if note := vocabulary_note(weights, vocabulary):
        print(f"note: {note}", file=sys.stderr)


def load(
    args: argparse.Namespace, *, weights: str | None, method: Mapping[str, Any] | None = None
) -> Config:
    """The config that the options of `add_evaluation` describe, loaded and checked.

    Raises:
        ValueError: if the config or a setting is wrong.
        OSError: if data are missing.
        WeightsError: if weights are missing.
    """
    from sfp.evaluation import run as evaluate

    config = evaluate.load_config(
        args.config,
        method=method,
        weights=weights,
        work_dir=args.work_dir,
        options=args.cfg_options,
    )
    evaluate.check(config)
    return config


def parse_classes(text: str) -> str | list[list[str]]:
    """Returns the name of a class file or benchmark unchanged; splits anything else into names.

    Warns about a word that is nearly the name of a benchmark.

    Example:
        >>> parse_classes("cat|kitten, sky")
        [['cat', 'kitten'], ['sky']]
    """
    from sfp.data import benchmarks
    from sfp.vocabulary import parse_words

    if benchmarks.find(text):
        return text
    try:
        if Path(text).is_file():
            return text
    except OSError:  # a long list of names is not a valid file name
        pass
    if re.fullmatch(r"[^,|]*(\.\w+|[/\\][^,|]*)", text):  # a single word that looks like a path
        raise FileNotFoundError(f"--classes {text}: there is no such file")
    if near := difflib.get_close_matches(text.lower(), benchmarks.BENCHMARKS, n=1, cutoff=0.8):
        warnings.warn(
            f"--classes {text}: no benchmark has this name, so it is taken as a word; did you mean "
            f"{near[0]}?",
            stacklevel=2,
        )
    return parse_words(text)
