"""What the parsers of several commands share."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

WEIGHTS = "name or path of CLIP weights, e.g. ViT-L/14"
METHOD = "preset, with knobs if need be: sclip, or sfp:pm=lof,layers=all"
CLASSES = 'names separated by commas, synonyms by "|"; or a class file; or a benchmark\'s name'
BRACKETS = {"(": ")", "[": "]"}


class _Settings(argparse.Action):
    """KEY=VALUE pairs as a dict, with the values that mmengine's `DictAction` reads."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Adds the pairs to those of an earlier use of the option."""
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
    """A setting's value: a number, a truth value, None, a list, a tuple of values, or else a word.

    Raises:
        ValueError: if brackets do not match.

    Example:
        >>> parse_value("0.5"), parse_value("True"), parse_value("som"), parse_value("[(1,2),x]")
        (0.5, True, 'som', [(1, 2), 'x'])
        >>> parse_value("5,7")  # a list needs no brackets
        [5, 7]
    """
    text = text.strip("'\"").replace(" ", "")
    if len(parts := _split(text)) > 1:
        return _values(parts)
    if text[:1] in BRACKETS and text.endswith(BRACKETS[text[0]]):
        values = _values(_split(text[1:-1]))
        return tuple(values) if text[0] == "(" else values
    for convert in (int, float):
        with contextlib.suppress(ValueError):
            return convert(text)
    words = {"true": True, "false": False}
    return words.get(text.lower(), None if text == "None" else text)


def _values(parts: list[str]) -> list[Any]:
    """What the parts mean; a comma may end the last one."""
    return [parse_value(part) for part in (parts if parts[-1] else parts[:-1])]


def _split(text: str) -> list[str]:
    """`text` at the commas that stand in no bracket."""
    parts, depth = [""], []
    for sign in text:
        if sign in BRACKETS:
            depth.append(BRACKETS[sign])
        elif sign in BRACKETS.values() and (not depth or depth.pop() != sign):
            raise ValueError("brackets do not match")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise ValueError("brackets do not match")
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
        commands: where.
        name: of the command.
        run: what it does, from the parsed arguments to an exit code.
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
    """The options of commands that evaluate a config; `load` makes a config of them.

    Args:
        parser: gets them.
        many_weights: whether --weights takes several, as a list.
    """
    parser.add_argument("config", help="shipped config by name, e.g. voc21, or the path of one")
    if many_weights:
        parser.add_argument("--weights", nargs="+", help=f"{WEIGHTS}; several for backbones")
    else:
        parser.add_argument("--weights", help=WEIGHTS)
    parser.add_argument("--work-dir", help="folder for the results (default: work/<config name>)")
    parser.add_argument(
        "--no-resume",
        action="store_true",
        help="forget what an earlier, killed start has done (by default it is continued)",
    )
    add_cfg_options(parser)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """The option that replaces any setting of a config."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help="settings that replace the config's, e.g. model.prob_thd=0.2",
    )


def add_import(parser: argparse.ArgumentParser) -> None:
    """The option that brings methods and ops of one's own; `sfp.cli.main` imports them."""
    parser.add_argument(
        "--import",
        nargs="+",
        dest="modules",
        default=[],
        metavar="MODULE|FILE",
        help="Python modules or files to import first, which register methods or ops of your own",
    )


def add_paired(parser: argparse.ArgumentParser, what: str) -> None:
    """The option that asks for differences with intervals.

    Args:
        parser: gets it.
        what: its value may name.
    """
    parser.add_argument(
        "--paired",
        metavar="BASE",
        help=f'{what}, or "previous": differences from it, with 95 %% intervals',
    )


def parse_method(text: str) -> dict[str, Any]:
    """What `build_method` takes, from a preset's name and its knobs.

    Raises:
        ValueError: if brackets do not match, or a knob has no value.

    Example:
        >>> parse_method("sfp:purify=False,layers=[-3,-2]")
        {'type': 'sfp', 'purify': False, 'layers': [-3, -2]}
    """
    name, colon, rest = text.partition(":")
    method: dict[str, Any] = {"type": name}
    for word in _split(rest) if colon else ():
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: {word!r} is not KNOB=VALUE, as in sfp:purify=False,pm=lof")
        method[key] = parse_value(value)
    return method


def parse_guide(text: str) -> tuple[str, dict[str, Any]]:
    """Name and config node of a guide.

    Raises:
        ValueError: if there is no name or no type, or a knob has no value.

    Example:
        >>> parse_guide("dino=transformers:model=facebook/dino-vitb8")
        ('dino', {'type': 'transformers', 'model': 'facebook/dino-vitb8'})
    """
    name, equals, node = text.partition("=")
    if not name or not equals or ":" in name:
        raise ValueError(
            f"--guide {text}: expected NAME=TYPE:KNOB=VALUE, as in "
            "dino=transformers:model=facebook/dino-vitb8"
        )
    return name, parse_method(node)


def add_guide(parser: argparse.ArgumentParser) -> None:
    """The option that gives a method an external encoder; `parse_guide` reads its values."""
    parser.add_argument(
        "--guide",
        nargs="+",
        default=[],
        metavar="NAME=TYPE:KNOB=VALUE",
        help="external models for methods that ask for them, e.g. "
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
    """The option that says who finds regions; `parse_regions` reads its value."""
    parser.add_argument(
        "--regions",
        metavar="TYPE:KNOB=VALUE",
        help="for methods that ask for regions: who proposes them, and how they are painted, e.g. "
        "sam:model=facebook/sam2-hiera-large,paint=largest; or files:folder=FOLDER, of id maps named "
        "as the images",
    )


def add_pictures(parser: argparse.ArgumentParser, default: int) -> None:
    """The option that says how many images the picture sheet has."""
    parser.add_argument(
        "--pictures", type=_count, default=default, help=f"images on the sheet (default: {default})"
    )


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _count(text: str) -> int:
    """A number of pictures, for argparse."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("pictures cannot be fewer than 0")
    return number


def load(args: argparse.Namespace, *, weights: str | None, method: str | None = None) -> Config:
    """The config that the options of `add_evaluation` describe, loaded and checked.

    Raises:
        ValueError: if the config or a setting is wrong.
        OSError: if data are missing.
        WeightsError: if weights are.
    """
    from sfp.evaluation import run as evaluate

    evaluate.quiet()
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
    """A class file or a benchmark as it is; else names by commas, and synonyms by "|".

    Example:
        >>> parse_classes("cat|kitten, sky")
        [['cat', 'kitten'], ['sky']]
    """
    from sfp.data.benchmarks import find
    from sfp.vocabulary import parse_words

    if find(text):
        return text
    try:
        if Path(text).is_file():
            return text
    except OSError:  # many names are too long for the name of a file
        pass
    if re.fullmatch(r"[^,|]*(\.\w+|[/\\][^,|]*)", text):  # one word, and it looks like a path
        raise FileNotFoundError(f"--classes {text}: there is no such file")
    return parse_words(text)
