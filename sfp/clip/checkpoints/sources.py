"""Finds the files of a source: a file, a folder, shards with their index, or a name on the Hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from sfp.clip.checkpoints.published import (
    INDEX,
    PUBLISHED,
    WEIGHT_FILES,
    LayoutError,
    WeightsError,
)

OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
PREPROCESSOR = "preprocessor_config.json"
COMPANIONS = (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG, PREPROCESSOR)

_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_HUB = "hf-hub:"  # open_clip's prefix for names on the Hub


def is_index(path: Path) -> bool:
    """Whether a file is the index of a model's shards."""
    return path.name.endswith(INDEX)


def repository(source: str) -> str | None:
    """The Hub's name of a repository, if a source may be one and cannot be a file.

    "hf-hub:org/name" always is; "org/name" unless it ends like a file, or begins like a published name
    ("ViT-B/15").
    """
    if source.startswith(_HUB):
        return source.removeprefix(_HUB)
    families = {name.partition("/")[0] for name in PUBLISHED if "/" in name}
    if not _REPOSITORY.fullmatch(source) or source.endswith(_SUFFIXES):
        return None
    return None if source.partition("/")[0] in {*families, ".", ".."} else source


def main_file(path: Path) -> Path:
    """The file to read for a path: the file itself, or the one in a folder.

    Raises:
        WeightsError: for a folder without weights or with several, and for one shard of a model.
    """
    if os.path.isdir(path):
        return _in_folder(path)
    if shard := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{shard[1]}{shard[4]}{INDEX}")
        there = "" if index.is_file() else ", which is missing: download it too"
        raise LayoutError(
            f"{path} is only part {shard[2]} of {shard[3]}: give the index, {index}{there}"
        )
    return path


def _in_folder(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES[:-1] and p.is_file())
    if len(found) == 1:
        return main_file(found[0])
    if parts := [p for p in found if _SHARD.fullmatch(p.name)]:
        return main_file(parts[0])  # raises an error about the missing index
    what = (
        f"{len(found)} of other names: {', '.join(p.name for p in found[:4])}" if found else "none"
    )
    raise WeightsError(
        f"no weights in the folder {folder}: expected one of {', '.join(WEIGHT_FILES)}, found {what}"
        + (". Give the file itself" if found else "")
    )


def parts(path: Path) -> list[Path]:
    """The files that hold the tensors: the file itself, or the shards of an index.

    Raises:
        WeightsError: if the index cannot be read or shards are missing; the message lists them.
    """
    if not is_index(path):
        return [path]
    files = sorted(set(weight_map(path).values()))
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise WeightsError(
            f"{path} lists {len(files)} parts, of which {len(missing)} are not in its folder: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Download them too"
        )
    return [path.parent / name for name in files]


def weight_map(index: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, by the tensor's name.

    Raises:
        WeightsError: if the file is not an index.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        proper = isinstance(files, dict) and files
        if not proper or not all(Path(str(name)).name == name for name in files.values()):
            raise ValueError("weight_map should name a file of the same folder for each tensor")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"cannot read {index}: {type(error).__name__}: {error}. Expected the index of a model in "
            "several files, as transformers writes it: fetch it again"
        ) from error
    return files


def configuration(path: Path) -> dict[str, Any]:
    """The merged contents of both libraries' configuration files beside weights; {} if there are none.

    Files that cannot be read are ignored here; `metadata.facts` reports those that it needs.
    """
    result: dict[str, Any] = {}
    for name in (TRANSFORMERS_CONFIG, OPEN_CLIP_CONFIG):
        try:
            content = json.loads(path.with_name(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            result |= content
    return result
