"""The configs that come with the package, by name: "voc21" is configs/cfg_voc21.py.

In the repository they are the folder `configs`; installed they are `sfp.configs`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from sfp.data import benchmarks
from sfp.evaluation.notices import quiet
from sfp.registry import suggest


class ConfigError(ValueError):
    """A config that does not exist or is invalid."""


def config_names() -> list[str]:
    """Short names of the shipped configs that can be evaluated: "ade20k", ..., "voc21"."""
    return sorted(path.stem.removeprefix("cfg_") for path in benchmarks.CONFIGS.glob("cfg_*.py"))


def find_config(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: a path; or the name of a shipped config in one of the forms voc21, cfg_voc21,
            cfg_voc21.py and configs/cfg_voc21.py, or an alias of a benchmark (cityscapes); or
            protocol_cliptrase. An existing file takes precedence.

    Raises:
        ConfigError: if there is none; the message suggests the closest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = path.name.removesuffix(".py").removeprefix("cfg_")
    if row := benchmarks.find(short):  # also by an alias
        short = row.name
    file = f"{short}.py" if short.startswith("protocol_") else f"cfg_{short}.py"
    if path.parent.as_posix() in (".", "configs") and (benchmarks.CONFIGS / file).is_file():
        return benchmarks.CONFIGS / file
    raise ConfigError(
        f"there is no config {name}: give the path of one, or a name{suggest(short, config_names())}"
    )


def read_config(path: Path, *settings: str) -> Config:
    """Reads a config.

    Args:
        path: path of the file.
        settings: dotted names of required settings.

    Raises:
        ConfigError: if it cannot be read, or lacks a setting.
    """
    try:
        with quiet():
            config = Config.fromfile(str(path))
    except Exception as error:  # configs are programs, which can raise anything
        first: BaseException = error
        while isinstance(first, ImportError) and first.__context__:
            first = first.__context__  # the one that names the module: mmengine raises two more
        advice = (
            "; modules named in custom_imports must be in a folder on PYTHONPATH"
            if isinstance(error, ImportError)
            else ""
        )
        raise ConfigError(
            f"{path} cannot be read as a config: {type(first).__name__}: {first}{advice}"
        ) from error
    require(config, *settings)
    return config


def load_config(
    path: str | Path,
    *,
    method: str | Mapping[str, Any] | None = None,
    weights: str | None = None,
    work_dir: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Config:
    """Reads a config and applies the options of a command line.

    Args:
        path: path of the config file, or the name of a shipped one (`find_config`).
        method: preset, or node with knobs, that replaces all of `model.method` (merging would keep
            the other method's flags).
        weights: replaces `model.weights`.
        work_dir: folder for results; by default work/<name of the config>.
        options: dotted keys and values, e.g. {"model.method.pm": "lof"}; applied last.

    Raises:
        ConfigError: if there is no such file, it cannot be read, or an option sets what no config has.
    """
    path = find_config(path)
    config = read_config(path, "model.type")
    if method is not None:
        config.model.pop("method", None)  # assigning a dict would merge it
        config.model.method = dict(type=method) if isinstance(method, str) else dict(method)
    if weights is not None:
        config.model.weights = weights
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work", Path(path).stem))
    if options:
        # mmengine would add a misspelt name and never read it
        known = {*config, *inspect.signature(Runner.__init__).parameters, "clusters"} - {
            "self",
            "cfg",
        }
        for name in options:
            if (first := name.partition(".")[0]) not in known:
                raise ConfigError(f"{name}: a config has no {first!r}{suggest(first, known)}")
        config.merge_from_dict(dict(options))
        require(config, "model.type")
    return config


def require(config: Config, *settings: str) -> None:
    """Checks that settings exist.

    Raises:
        ConfigError: if one is missing; the message names it.
    """
    for name in settings:
        node: Any = config
        for key in name.split("."):
            if not isinstance(node, (Config, Mapping)) or key not in node:
                raise ConfigError(
                    f"{config.filename or 'the config'} has no {name}: a config must inherit from "
                    "base_config.py and add its data and classes, as cfg_voc21.py does"
                )
            node = node[key]
