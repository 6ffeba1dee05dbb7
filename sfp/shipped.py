"""The configs that come with the package, by name: "voc21" is configs/cfg_voc21.py.

In the repository they are the folder `configs`; installed they are `sfp.configs`.
"""

from __future__ import annotations

from pathlib import Path

from sfp.registry import suggest

_INSTALLED = Path(__file__).with_name("configs")
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "configs"


class ConfigError(ValueError):
    """A config that does not exist or says something that nobody understands."""


def config_names() -> list[str]:
    """Short names of the shipped configs that can be evaluated: "ade20k", ..., "voc21"."""
    return sorted(path.stem.removeprefix("cfg_") for path in CONFIGS.glob("cfg_*.py"))


def find_config(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: a path; or a shipped config in one of the forms voc21, cfg_voc21, cfg_voc21.py and
            configs/cfg_voc21.py. A file that exists comes first.

    Raises:
        ConfigError: if there is none; the message names the closest.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = path.name.removesuffix(".py").removeprefix("cfg_")
    if path.parent.as_posix() in (".", "configs") and short in config_names():
        return CONFIGS / f"cfg_{short}.py"
    raise ConfigError(
        f"there is no config {name}: give the path of one, or a name{suggest(short, config_names())}"
    )
