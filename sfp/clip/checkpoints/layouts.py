"""Converts state dicts of CLIPs from different layouts, recognised by their names of tensors.

Accepted are OpenAI's layout, which open_clip shares (also with the text tower under `text.`, and with
the prefix `module.` of distributed training), and that of `CLIPModel` in Hugging Face's transformers.
The layouts of image towers are in `image_layouts.py`, those of text towers in `text_layouts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sfp.clip.checkpoints import image_layouts, text_layouts
from sfp.clip.checkpoints.published import LayoutError
from sfp.clip.text_towers import BertConfig, TextConfig
from sfp.clip.vit import ImageConfig

OPENAI = "OpenAI"
SHARED = "OpenAI or open_clip"
OPEN_CLIP = "open_clip"
TRANSFORMERS = "transformers CLIPModel"
RADIO = "C-RADIO"
ACCEPTED = (
    "accepted are CLIPs with a plain ViT in the layouts of OpenAI (visual.conv1.weight, "
    "token_embedding.weight, ...), open_clip (the same names, or text.token_embedding.weight, ...) and "
    "transformers' CLIPModel (vision_model.embeddings.class_embedding, ...)"
)

_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of distributed training and torch.compile
_SCALARS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's archives
_UNUSED = re.compile(r"attn_mask$|text_decoder\.")  # the causal mask; CoCa's caption decoder

# checkpoints that cannot be used; the first match counts: a regular expression for the beginning of a
# name, what the model is, and why it cannot be used
_REFUSED = (
    (r"visual\.layer1\.", "a ResNet CLIP", "only ViT towers have the patch tokens methods need"),
    (
        r"visual\.trunk\.(stages|network|stem)\.",
        "an open_clip model with a convolutional image tower (ConvNeXt, MobileCLIP-S, ...)",
        "only ViT towers have the patch tokens methods need",
    ),
    (
        r"visual\.trunk\.patch_embed\.backbone\.(stem|stages|pool)",
        "a ViTamin",
        "most of its image tower is convolutional",
    ),
    (
        r"vision_model\.embeddings\.convolution\.",
        "an ALIGN",
        "only ViT towers have the patch tokens methods need",
    ),
    (
        r"(vision_model\.blocks|text_model\.transformer)\.",
        "a jina-clip",
        "its code comes from the Hub with the weights, and such code is never run",
    ),
    (
        r"visual_model\.",
        "a dino.txt",
        "its two towers share a space in halves, and its code comes from the Hub",
    ),
    (r"(image_model|multimodal_model)\.", "a FLAVA", "its towers have no joint space of patches"),
    (
        r"text\.transformer\.(shared|block|encoder\.(block|embed_tokens|layer_norm))\b",
        "an open_clip model whose text tower is T5 or NLLB",
        "read are those of CLIP's kind and BERTs",
    ),
    (
        r"(visual\.)?transformer\.resblocks\.\d+\.(ls_\d\.|attn\.(ln_|logit_scale|head_scale)|ln_attn)",
        "a CLIP whose blocks have more than CLIP's (layer scale, normalised or scaled attention)",
        "only plain CLIP ViTs run here",
    ),
    (r"(blip|qformer|language_model|model\.language_model)\b", "a multimodal language model", ""),
)


@dataclass(frozen=True)
class Recognised:
    """A state dict under the names of `sfp.clip.model.CLIP`.

    Attributes:
        layout: name of the layout, one of those above.
        state: tensors of the towers, without other entries.
        image, text: sizes and switches, as far as names, shapes and the configuration determine them.
        settled, text_settled: whether they determine the activation of a tower; if not, that in `image`
            or `text` is OpenAI's.
    """

    layout: str
    state: dict[str, Tensor]
    image: ImageConfig
    text: TextConfig | BertConfig
    settled: bool = False
    text_settled: bool = False


def recognise(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    words: Mapping[str, Any] | None = None,
) -> Recognised:
    """The layout of a state dict, and the same tensors under the names of this package.

    Names that belong to no layout are kept; `build_clip` reports them.

    Args:
        state: tensors as read.
        config: contents of the configuration beside the weights.
        words: configuration of the text tower, if it comes from other weights.

    Raises:
        LayoutError: if it is another type of model, or not a CLIP; the message says which.
    """
    words = config if words is None else words
    state, wrapped = _unwrap(state)
    state, radio = image_layouts.marked(state)
    for pattern, what, why in _REFUSED:
        found = next((name for name in state if re.match(pattern, name)), None)
        if found:
            reason = f": {why}" if why else ""
            raise LayoutError(f"this is {what}{reason} (found {found})")
    layout = RADIO if radio else _layout(state, wrapped)
    state = {k: v for k, v in state.items() if k not in _SCALARS and not _UNUSED.match(k)}
    shared = {k: state.pop(k) for k in ("logit_scale", "logit_bias") if k in state}
    part = {k: state.pop(k) for k in list(state) if k.startswith(image_layouts.PREFIXES)}
    image, image_config, settled = image_layouts.read(part, config)
    if radio:
        _check_space(image_config, state)
    text, text_config, text_settled = text_layouts.read(state, words)
    shared = {k: v.reshape(()) if v.numel() == 1 else v for k, v in shared.items()}  # some are (1,)
    if settled and not text_settled:
        activation = image_config.activation
        if layout != TRANSFORMERS:  # timm's image towers may have another activation
            quick = (words or {}).get("model_cfg", {}).get("quick_gelu", False)
            activation = "quick_gelu" if quick else "gelu"
        text_config = replace(text_config, activation=activation)
    return Recognised(
        layout,
        image | text | shared,
        image_config,
        text_config,
        settled,
        settled or text_settled,
    )


def text_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the image tower: the text tower, and scale and bias of the logits."""
    state, _ = image_layouts.marked(_unwrap(state)[0])
    shown = image_layouts.PREFIXES
    return {name: value for name, value in state.items() if not name.startswith(shown)}


def lacks_texts(state: Mapping[str, Tensor]) -> bool:
    """Whether this is an image tower for the text tower of another model: C-RADIO's."""
    return any("siglip2" in name for name in state) and not text_part(state)


def _check_space(image: ImageConfig, texts: Mapping[str, Tensor]) -> None:
    """Raises `LayoutError`, with what to do, if a C-RADIO lacks its adaptor or text tower."""
    if image.adaptor is None:
        raise LayoutError(
            "this is a C-RADIO without its adaptor to SigLIP 2 (radio_model.adaptors.siglip2-g."
            "head_mlp.*), so its features cannot be compared with texts: use its publisher's "
            "checkpoint with that adaptor, or use this one as a guide (type='transformers')"
        )
    if not texts:
        raise LayoutError(
            "this is a C-RADIO, which needs SigLIP 2's text tower: pass that model (g-opt), "
            "load_clip(..., texts='siglip2-gopt16-384'), or put its folder beside the weights, as text/"
        )


def _layout(state: Mapping[str, Tensor], wrapped: bool) -> str:
    """The name of the layout; raises `LayoutError` if it is not known."""
    for pair in (("vision_model", "text_model"), ("vision_encoder", "text_encoder")):
        missing = [t for t in pair if not any(name.startswith(f"{t}.") for name in state)]
        if not missing:
            return TRANSFORMERS
        if len(missing) == 1:
            raise LayoutError(f"one tower of a CLIP only: {missing[0]}.* is missing")
    if not any(name.startswith("visual.trunk.") for name in state) and (
        "visual.conv1.weight" not in state
    ):
        names = ", ".join(list(state)[:4]) or "nothing"
        raise LayoutError(
            f"not a CLIP state dict: 'visual.conv1.weight' is missing; found {len(state)} tensors: "
            f"{names}{', ...' if len(state) > 4 else ''}"
        )
    if wrapped or any(name.startswith("text.") for name in state):
        return OPEN_CLIP
    return OPENAI if all(name in state for name in _SCALARS) else SHARED


def _unwrap(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Removes the prefixes that wrappers add to all names; also whether there were any."""
    result, wrapped = dict(state), False
    while result and (
        prefix := next((p for p in _WRAPPERS if all(k.startswith(p) for k in result)), None)
    ):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
        wrapped = True
    return result, wrapped
