"""Functions shared by the readers of layouts: renaming, transposing and merging tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfp.clip.blocks import ACTIVATIONS
from sfp.clip.checkpoints.published import LayoutError

BLOCKS = "transformer.resblocks."

_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


# transformers' names of activations that differ from ours
_ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Activation and eps of a tower, as far as transformers' configuration of it states them.

    Raises:
        LayoutError: for an activation that no tower here has.
    """
    result: dict[str, Any] = {}
    if name := config.get("hidden_act"):
        result["activation"] = _ACTIVATION_NAMES.get(name, name)
        if result["activation"] not in ACTIVATIONS:
            raise LayoutError(f"hidden_act {name!r} is none of {', '.join(ACTIVATIONS)}")
    if eps := config.get("layer_norm_eps"):
        result["eps"] = float(eps)
    return result


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    """The shape of a tensor from which the sizes of a tower are inferred.

    Raises:
        LayoutError: if it is missing or has another number of dimensions.
    """
    if name not in state or state[name].ndim != dimensions or not state[name].numel():
        what = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        names = ", ".join(list(state)[:4])
        raise LayoutError(
            f"not a CLIP state dict: {name!r} is {what}; found {len(state)} tensors: {names}"
            f"{', ...' if len(state) > 4 else ''}"
        )
    return state[name].shape


def turned(x: Tensor) -> Tensor:
    """The matrix of a linear layer, transposed for x @ matrix."""
    return x.T if x.ndim == 2 else x


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow a prefix."""
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})


def hidden_width(state: Mapping[str, Tensor], tower: str = "") -> int | None:
    """Width of the MLPs, from the first one; in some models 4.36 or 4.92 times that of the tokens."""
    first = state.get(f"{tower}{BLOCKS}0.mlp.c_fc.weight")
    return first.shape[0] if first is not None and first.ndim == 2 else None


def packed(parts: Mapping[str, Tensor], target: str) -> Tensor:
    """Weights or biases of "q", "k" and "v", stacked.

    Raises:
        LayoutError: if one is missing or they do not fit.
    """
    shapes = {(tuple(x.shape), x.dtype) for x in parts.values()}
    if set(parts) != set("qkv") or len(shapes) != 1 or not parts["q"].ndim:
        sides = ", ".join(f"{k} {tuple(x.shape)}" for k, x in sorted(parts.items()))
        raise LayoutError(
            f"{target} cannot be put together from {sides}: expected q, k and v of one shape"
        )
    return torch.cat([parts[k] for k in "qkv"])


def from_transformers(
    state: Mapping[str, Tensor], names: Mapping[str, str], source: str, target: str
) -> dict[str, Tensor]:
    """A tower of transformers' `CLIPModel` under our names; unknown names are kept.

    Args:
        state: tensors of the tower.
        names: our names of tensors outside the blocks, by transformers' names.
        source: prefix of transformers' names, such as "vision_model.".
        target: prefix of our names, such as "visual.".
    """
    result: dict[str, Tensor] = {}
    together: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        layer = _LAYER.fullmatch(name.removeprefix(source)) if name.startswith(source) else None
        if name in names:
            result[names[name]] = value
        elif layer and layer[2] in _PARTS:
            result[f"{target}{BLOCKS}{layer[1]}.{_PARTS[layer[2]]}.{layer[3]}"] = value
        elif layer and (which := re.fullmatch(r"self_attn\.([qkv])_proj", layer[2])):
            key = f"{target}{BLOCKS}{layer[1]}.attn.in_proj_{layer[3]}"
            together.setdefault(key, {})[which[1]] = value
        elif not name.endswith(".position_ids"):  # 0, 1, 2, ... in older files
            result[name] = value
    return result | {key: packed(parts, key) for key, parts in together.items()}
