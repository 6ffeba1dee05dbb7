"""Properties that a state dict does not contain: activation, heads and normalisation.

They are taken, in this order, from the caller; from the table of published weights, for their names and
files; from a configuration file beside the checkpoint (`open_clip_config.json`, or transformers'
`config.json`); from the layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sfp.clip.checkpoints import layouts
from sfp.clip.checkpoints.published import (
    OPENAI_MEAN,
    OPENAI_STD,
    RGB,
    LayoutError,
    Published,
    WeightsError,
    row_of,
)
from sfp.clip.checkpoints.sources import OPEN_CLIP_CONFIG, PREPROCESSOR, TRANSFORMERS_CONFIG
from sfp.clip.vit import ImageConfig

# settings of open_clip that change the result, are not visible in the tensors, and are not supported
_PLAIN: dict[str, dict[str, Any]] = {
    "vision_cfg": dict(pool_type="tok", pos_embed_type="learnable", norm_kwargs={}, act_kwargs={}),
    "text_cfg": dict(use_pad_mask=False, norm_kwargs={}, act_kwargs={}),
}
# errors when reading invalid configurations
WRONG = (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


@dataclass(frozen=True)
class Facts:
    """Properties of a checkpoint that do not follow from its shapes.

    Attributes:
        activation: "quick_gelu" or "gelu".
        because: the source of the activation, for messages.
        certain: whether it is known, not guessed.
        head_width, text_head_width: widths of attention heads; None for the usual ones.
        mean, std: normalisation of the images, RGB in 0..1.
    """

    activation: str
    because: str
    certain: bool = True
    head_width: int | None = None
    text_head_width: int | None = None
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD


def facts(path: Path | None, layout: str, row: Published | None = None) -> Facts:
    """The known properties of a checkpoint besides its tensors.

    Args:
        path: path of its file, if there is one.
        layout: name of the layout, from `layouts.recognise`.
        row: its row in the table, for weights given by name.

    Raises:
        WeightsError: if a configuration beside the file cannot be read, or has unsupported settings.
    """
    if path is not None and row is None and layout != layouts.OPENAI:
        row = row_of(path)
    if row is not None and row.activation:
        return Facts(row.activation, "the table of published weights", mean=row.mean, std=row.std)
    if layout == layouts.OPENAI:
        return Facts("quick_gelu", "an archive of OpenAI's")
    if path is not None:
        if layout == layouts.TRANSFORMERS:
            name, read = TRANSFORMERS_CONFIG, _from_transformers
        else:
            name, read = OPEN_CLIP_CONFIG, _from_open_clip
        config = path.with_name(name)
        if config.is_file():
            try:
                return read(config, _json(config))
            except LayoutError as error:
                raise LayoutError(f"{path}: {error}, says {config.name}") from None
            except WRONG as error:
                raise unusable(path, error, name) from error
        if "quickgelu" in path.name.lower().replace("_", "").replace("-", ""):
            return Facts("quick_gelu", "the file's name")
    if layout == layouts.OPEN_CLIP or (path is not None and path.name.startswith("open_clip_")):
        return Facts("gelu", "open_clip's default", certain=False)
    return Facts("quick_gelu", "OpenAI's activation", certain=False)


def settled_facts(path: Path | None, image: ImageConfig, row: Published | None = None) -> Facts:
    """Like `facts`, for layouts that determine the activation; only the normalisation may differ.

    Args:
        path, row: as in `facts`.
        image: configuration of the tower, with the normalisation of its family.

    Raises:
        WeightsError: if the description of the images cannot be read.
    """
    plain = Facts(image.activation, "the layout", mean=image.mean, std=image.std)
    if path is not None and row is None:
        row = row_of(path)
    if row is not None:
        return replace(plain, mean=row.mean, std=row.std)
    if path is None:
        return plain
    for name in (OPEN_CLIP_CONFIG, PREPROCESSOR):
        if (file := path.with_name(name)).is_file():
            try:
                content = _json(file)
                images = content.get("preprocess_cfg", {}) if name == OPEN_CLIP_CONFIG else content
                mean = images.get("mean", images.get("image_mean", plain.mean))
                std = images.get("std", images.get("image_std", plain.std))
                if images.get("do_normalize", True):
                    return replace(plain, mean=_rgb(mean), std=_rgb(std))
                return replace(plain, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
            except WRONG as error:
                raise unusable(path, error, name) from error
    return plain


def unusable(path: Path, error: Exception, name: str | None = None) -> WeightsError:
    """The error for an invalid configuration beside weights."""
    both = (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG)
    names = [name] if name else [each for each in both if path.with_name(each).is_file()]
    return WeightsError(
        f"{' or '.join(str(path.with_name(each)) for each in names)}, which should describe "
        f"{path.name}, cannot be used: {type(error).__name__}: {error}. Fetch it again, or move it "
        "away and say the activation yourself"
    )


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return content


def _from_open_clip(path: Path, config: Mapping[str, Any]) -> Facts:
    """Facts from open_clip's configuration, which omits defaults."""
    model = config["model_cfg"]
    text = model["text_cfg"]
    for tower, plain in _PLAIN.items():
        for key, value in plain.items():
            if model[tower].get(key) not in (None, False, {}, value):
                raise LayoutError(
                    f"not a plain CLIP: {key} of its {tower} is {model[tower][key]!r}, expected "
                    f"{value!r}"
                )
    images = config.get("preprocess_cfg", {})
    return Facts(
        "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        path.name,
        head_width=int(model["vision_cfg"].get("head_width", 64)),
        text_head_width=int(text.get("width", 512)) // int(text.get("heads", 8)),
        mean=_rgb(images.get("mean", OPENAI_MEAN)),
        std=_rgb(images.get("std", OPENAI_STD)),
    )


# models of transformers with CLIP's image tower, and whether their text tower is CLIP's too
_CLIPS = {"clip": True, "metaclip_2": True, "chinese_clip": False, "altclip": False}


def _from_transformers(path: Path, config: Mapping[str, Any]) -> Facts:
    """Facts from transformers' configuration; older files omit defaults."""
    kind = config.get("model_type", "clip")
    if kind not in _CLIPS:
        raise ValueError(f"model_type {kind!r}, not {', '.join(map(repr, _CLIPS))}")
    vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
    towers = (vision, text) if _CLIPS[kind] else (vision,)
    activations = {tower.get("hidden_act", "quick_gelu") for tower in towers}
    if len(activations) > 1 or not activations <= {"quick_gelu", "gelu"}:
        raise ValueError(f"hidden_act {sorted(activations)}: expected 'quick_gelu' or 'gelu'")
    if any(float(tower.get("layer_norm_eps", 1e-5)) != 1e-5 for tower in towers):
        raise ValueError("layer_norm_eps is not 1e-5")
    preprocessor = path.with_name(PREPROCESSOR)
    images = _json(preprocessor) if preprocessor.is_file() else {}
    text_heads = text.get("hidden_size", 512) // text.get("num_attention_heads", 8)
    return Facts(
        activations.pop(),
        path.name,
        head_width=vision.get("hidden_size", 768) // vision.get("num_attention_heads", 12),
        text_head_width=text_heads if _CLIPS[kind] else None,
        mean=_rgb(images.get("image_mean", OPENAI_MEAN)),
        std=_rgb(images.get("image_std", OPENAI_STD)),
    )


def _rgb(values: Any) -> RGB:
    red, green, blue = map(float, values)
    return red, green, blue
