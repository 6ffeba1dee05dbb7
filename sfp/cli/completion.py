"""`sfp completion`: shell completion."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator

from sfp.cli.options import add_command

TEXT = """\
Prints a script with which TAB completes commands, options and names. The script contains all words,
so TAB does not start Python. Write it again after an update.

Examples:
    sfp completion bash > ~/.local/share/bash-completion/completions/sfp
    sfp completion zsh > ~/.zfunc/_sfp      # with fpath+=~/.zfunc before compinit in ~/.zshrc
    sfp completion fish > ~/.config/fish/completions/sfp.fish

Needs shtab: pip install 'sfp[completion]'.
"""


def register(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "completion", run, help="print a script for TAB completion", text=TEXT
    )
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> int:
    """Prints the script."""
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "completion needs shtab: pip install 'sfp[completion]'", name=error.name
        ) from None
    from sfp.cli import build_parser

    parser = build_parser()
    words = _words()
    for action in _actions(parser):
        if action.choices is None and action.dest in words:
            action.choices = words[action.dest]
    print(shtab.complete(parser, args.shell))
    return 0


def _words() -> dict[str, list[str]]:
    """The possible values of options and positional arguments by name, apart from files."""
    from sfp.clip.checkpoints.published import PUBLISHED
    from sfp.data.benchmarks import DOWNLOADED
    from sfp.registry import OPS, list_methods

    methods = list_methods()
    words = dict(
        weights=[*PUBLISHED],
        names=[*PUBLISHED],
        source=[*PUBLISHED],
        datasets=[*DOWNLOADED],
        method=methods,
        methods=methods,
        kind=sorted({getattr(op, "kind", "") for op in OPS.module_dict.values()}),
    )
    with contextlib.suppress(ModuleNotFoundError):  # without mmsegmentation there are no configs
        from sfp.evaluation.ablate import studies
        from sfp.evaluation.configs import config_names

        words |= dict(config=config_names(), study=sorted(studies()))
    return words


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            commands: Iterable[argparse.ArgumentParser] = action.choices.values()
            for command in commands:
                yield from _actions(command)
