"""State dicts of CLIPs as different people write them, recognised by their names, in one form.

Accepted are OpenAI's layout, which open_clip shares (also with the text tower under `text.`, and under
the `module.` of distributed training), and that of `CLIPModel` in Hugging Face's transformers. Nothing
is computed: tensors are renamed, transposed and put together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sfp.clip.checkpoints.published import LayoutError

OPENAI = "OpenAI"
SHARED = "OpenAI or open_clip"
OPEN_CLIP = "open_clip"
TRANSFORMERS = "transformers CLIPModel"
ACCEPTED = (
    "accepted are CLIPs with a plain ViT in the layouts of OpenAI (visual.conv1.weight, "
    "token_embedding.weight, ...), open_clip (the same names, or text.token_embedding.weight, ...) and "
    "transformers' CLIPModel (vision_model.embeddings.class_embedding, ...)"
)

_WRAPPERS = ("module.", "_orig_mod.")  # of distributed training and torch.compile
_SCALARS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's archives
_UNUSED = ("logit_bias", "attn_mask")  # a shift of all logits alike; the causal mask itself

_NO_CLS = (
    "there is no class token, which most methods read, images are embedded by an attention pool in "
    "place of a projection, and texts need a SentencePiece tokenizer; none of that is implemented"
)
# how a checkpoint that cannot be used gives itself away, the first that fits: a regular expression for
# the beginning of a name, what it is, what is in the way
_REFUSED = (
    (r"visual\.layer1\.", "a ResNet CLIP", "only ViT towers have the patch tokens methods need"),
    (r"vision_model\.head\.", "a SigLIP (transformers)", _NO_CLS),
    (r"visual\.trunk\.attn_pool\.", "a SigLIP (open_clip)", _NO_CLS),
    (
        r"visual\.trunk\.",
        "an open_clip model whose image tower is timm's (EVA, ConvNeXt, ViTamin, MobileCLIP, ...)",
        "only plain CLIP ViTs run here",
    ),
    (r"(text_decoder|visual\.attn_pool)\.", "a CoCa", "its image tower ends in an attention pool"),
    (
        r"text\.transformer\.(embeddings|encoder|shared)\b",
        "an open_clip model whose text tower is transformers'",
        "its tokenizer is another than CLIP's",
    ),
    (r"text\.cls_emb", "a CLIP whose text tower has a class token", "texts end in one token here"),
    (
        r"(visual\.)?transformer\.resblocks\.\d+\.(ls_\d\.|attn\.(ln_|logit_scale|head_scale)|ln_attn)",
        "a CLIP whose blocks have more than CLIP's (layer scale, normalised or scaled attention)",
        "only plain CLIP ViTs run here",
    ),
    (r"(blip|qformer|language_model|model\.language_model)\b", "a multimodal language model", ""),
)


@dataclass(frozen=True)
class Recognised:
    """A state dict under OpenAI's names.

    Attributes:
        layout: one of the names above.
        state: without bookkeeping.
    """

    layout: str
    state: dict[str, Tensor]


def recognise(state: Mapping[str, Tensor]) -> Recognised:
    """The layout of a state dict, and the same tensors under OpenAI's names.

    Names that belong to no layout stay, for `build_clip` to complain about.

    Raises:
        LayoutError: if it is a model of another kind, or no CLIP; the message says which.
    """
    state, wrapped = _unwrap(state)
    for pattern, what, why in _REFUSED:
        found = next((name for name in state if re.match(pattern, name)), None)
        if found:
            reason = f": {why}" if why else ""
            raise LayoutError(f"this is {what}{reason} (found {found})")
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        return Recognised(TRANSFORMERS, _from_transformers(state))
    if "visual.conv1.weight" not in state:
        names = ", ".join(list(state)[:4]) or "nothing"
        raise LayoutError(
            f"not a CLIP state dict: 'visual.conv1.weight' is missing; found {len(state)} tensors: "
            f"{names}{', ...' if len(state) > 4 else ''}"
        )
    if not any(name.startswith("visual.ln_pre.") for name in state):
        raise LayoutError(
            "this CLIP has no visual.ln_pre, as CLIPA, whose image tower averages its patches and "
            "whose text tower has another tokenizer"
        )
    layout = OPENAI if all(name in state for name in _SCALARS) else SHARED
    if any(name.startswith("text.") for name in state):
        layout = OPEN_CLIP
        if twice := next((k for k in state if f"text.{k}" in state), None):
            raise LayoutError(f"both {twice} and text.{twice}: two text towers in one file")
        state = {name.removeprefix("text."): value for name, value in state.items()}
    elif wrapped:
        layout = OPEN_CLIP
    state = {k: v for k, v in state.items() if k not in (*_SCALARS, *_UNUSED)}
    if "logit_scale" in state:
        state["logit_scale"] = _scalar(state["logit_scale"])
    projection = state.get("text_projection.weight")  # a Linear, in some text towers of open_clip
    if projection is not None and "text_projection" not in state:
        del state["text_projection.weight"]
        state["text_projection"] = _turned(projection)
    return Recognised(layout, state)


def _unwrap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Without what wrappers put before every name, and whether there was any."""
    result, wrapped = dict(state), False
    while result and (
        prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in result)), None)
    ):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
        wrapped = True
    return result, wrapped


def _scalar(x: Tensor) -> Tensor:
    """`logit_scale`, which some files store as (1,)."""
    return x.reshape(()) if x.numel() == 1 else x


def _turned(x: Tensor) -> Tensor:
    """The matrix of a Linear as it stands in x @ matrix."""
    return x.T if x.ndim == 2 else x


_TOWERS = {"vision_model": "visual.", "text_model": ""}
_NAMES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",  # their spelling
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    missing = [tower for tower in _TOWERS if not any(k.startswith(f"{tower}.") for k in state)]
    if missing:
        raise LayoutError(f"one tower of a CLIP only: {missing[0]}.* is missing")
    result: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.endswith(".position_ids") or name == "logit_bias":  # 0, 1, 2, ... in older files
            continue
        if name in _NAMES:
            result[_NAMES[name]] = value
        elif name == "logit_scale":
            result[name] = _scalar(value)
        elif name == "visual_projection.weight":
            result["visual.proj"] = _turned(value)
        elif name == "text_projection.weight":
            result["text_projection"] = _turned(value)
        elif (layer := _LAYER.fullmatch(name)) and layer[3] in _PARTS:
            tower, number, part, kind = layer.groups()
            result[f"{_TOWERS[tower]}transformer.resblocks.{number}.{_PARTS[part]}.{kind}"] = value
        elif layer and (which := re.fullmatch(r"self_attn\.([qkv])_proj", layer[3])):
            target = f"{_TOWERS[layer[1]]}transformer.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
            packed.setdefault(target, {})[which[1]] = value
        else:
            result[name] = value
    for target, parts in packed.items():
        shapes = {(tuple(x.shape), x.dtype) for x in parts.values()}
        if set(parts) != set("qkv") or len(shapes) != 1 or not parts["q"].ndim:
            sides = ", ".join(f"{k} {tuple(x.shape)}" for k, x in sorted(parts.items()))
            raise LayoutError(
                f"{target} cannot be put together from {sides}: expected q, k and v of one shape"
            )
        result[target] = torch.cat([parts[k] for k in "qkv"])
    return result
