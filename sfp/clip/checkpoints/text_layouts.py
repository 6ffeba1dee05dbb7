"""Converts text towers from different layouts to the names and switches of ours.

Names and shapes determine the type of a tower; everything else comes from the configuration beside the
weights, if there is one, or from what all published checkpoints of the family have in common.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sfp.clip.checkpoints.published import LayoutError
from sfp.clip.checkpoints.renaming import (
    BLOCKS,
    count_blocks,
    from_transformers,
    hidden_width,
    packed,
    shape_of,
    stated,
    turned,
)
from sfp.clip.text_towers import BertConfig, TextConfig
from sfp.clip.tokenizers import BERT, CLIPA, SIGLIP, SIGLIP2, TIPS, XLM, Rules
from sfp.clip.vit import HEAD_WIDTH

VOCABULARY = 49408  # OpenAI's byte pairs, also used by open_clip, MetaCLIP and DFN
XLM_V = 901629  # tokens of MetaCLIP 2's vocabulary
GEMMA = 256000  # tokens of SigLIP 2's vocabulary
BERT_PADDED = 32000  # rows of CLIPA's token embedding, more than its vocabulary has
HEAD_WIDTHS = {1152: 72}  # widths of heads other than 64, by the width of tokens
TEMPERATURE = 0.005065968260169029  # TIPSv2's, for checkpoints without it
LONG_CLIP_KEPT = 20  # rows of the original position embedding that LongCLIP did not change

_TRANSFORMERS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_model.head.weight": "text_projection.weight",
    "text_model.head.bias": "text_projection.bias",
}


def read(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], TextConfig | BertConfig, bool]:
    """A text tower's tensors under our names, its sizes and switches.

    Args:
        state: state dict without the image tower.
        config: contents of the configuration beside the weights.

    Returns:
        The tensors, the sizes and switches, and whether these determine the activation; if not, it is
        that of the image tower.

    Raises:
        LayoutError: if sizes cannot be read off, or nothing says which tokenizer the tower has.
    """
    config = config or {}
    for prefix, reader in _BERTS.items():
        if any(name.startswith(prefix) for name in state):
            return *reader(state, config), True
    if any(name.startswith("text_model.") for name in state):
        named = from_transformers(state, _TRANSFORMERS, "text_model.", "")
        read_family = _from_transformers if "positional_embedding" in named else _tips
    elif any(name.startswith("text_encoder.") for name in state):  # in TIPSv2's files
        named = {name.removeprefix("text_encoder."): value for name, value in state.items()}
        read_family = _tips
    else:
        if twice := next((k for k in state if f"text.{k}" in state), None):
            raise LayoutError(f"both {twice} and text.{twice}: two text towers in one file")
        named = {name.removeprefix("text."): value for name, value in state.items()}
        read_family = _from_open_clip
    named, sizes = read_family(named, config)
    said = sizes.rules == XLM and "hidden_act" in (config.get("text_config") or {})
    return named, sizes, said or sizes.rules in (SIGLIP, SIGLIP2, TIPS)


def _merge_tables(state: dict[str, Tensor]) -> None:
    """Merges LongCLIP's two position embeddings."""
    if (trained := state.pop("positional_embedding_res", None)) is not None:
        kept = state["positional_embedding"][:LONG_CLIP_KEPT]
        state["positional_embedding"] = torch.cat([kept, trained[LONG_CLIP_KEPT:]])


def _sizes(state: Mapping[str, Tensor], context: int | None = None) -> TextConfig:
    """The sizes of a tower under OpenAI's names, from shapes."""
    vocab, width = shape_of(state, "token_embedding.weight", 2)
    if "text_projection" in state:
        projection, embed_dim = "matrix", shape_of(state, "text_projection", 2)[1]
    elif "text_projection.weight" in state:
        projection, embed_dim = "linear", shape_of(state, "text_projection.weight", 2)[0]
    else:
        projection, embed_dim = "none", width
    return TextConfig(
        context=context or shape_of(state, "positional_embedding", 2)[0],
        vocab=vocab,
        width=width,
        layers=count_blocks(state, BLOCKS),
        embed_dim=embed_dim,
        head_width=HEAD_WIDTHS.get(width, HEAD_WIDTH),
        hidden=hidden_width(state),
        projection=projection,
    )


def _turn_projection(state: dict[str, Tensor]) -> None:
    """Turns a linear layer without bias into a matrix."""
    if not {"text_projection", "text_projection.bias"} & set(state):
        weight = state.pop("text_projection.weight", None)
        if weight is not None:
            state["text_projection"] = turned(weight)


def _from_transformers(
    state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], TextConfig]:
    """The towers of `CLIPModel`, `SiglipModel`, `Siglip2Model` and `MetaClip2Model`."""
    _turn_projection(state)
    sizes = _sizes(state)
    text, kind = config.get("text_config") or {}, config.get("model_type")
    sizes = replace(sizes, head_width=_head_width(sizes.width, text) or sizes.head_width)
    if sizes.projection == "linear":  # the only towers of this layout with a bias in the projection
        rules = SIGLIP2 if kind == "siglip2" or sizes.vocab == GEMMA else SIGLIP
        sizes = _siglip(replace(sizes, activation="gelu_tanh"), rules)
        return state, replace(sizes, **stated(text))
    end = int(text.get("eos_token_id") or 2)
    if kind == "metaclip_2" or sizes.vocab == XLM_V:
        return state, replace(sizes, pool="end", end=end, rules=XLM, **stated(text))
    # the end token has the largest id; older configurations state 2 for it
    pool = "argmax" if end in (2, sizes.vocab - 1) else "end"
    return state, replace(_byte_pairs(sizes), pool=pool, end=-1 if pool == "argmax" else end)


def _head_width(width: int, config: Mapping[str, Any]) -> int | None:
    """The width of heads from a configuration of transformers or open_clip, or None."""
    heads = config.get("num_attention_heads") or config.get("heads")
    return width // int(heads) if heads else None


def _siglip(sizes: TextConfig, rules: Rules) -> TextConfig:
    return replace(sizes, causal=False, pool="last", eps=1e-6, rules=rules)


def _byte_pairs(sizes: TextConfig) -> TextConfig:
    """A tower like OpenAI's, with its vocabulary.

    Raises:
        LayoutError: if the vocabulary is another.
    """
    if sizes.vocab > VOCABULARY:
        raise LayoutError(
            f"a vocabulary of {sizes.vocab} tokens: the text tower was trained with another tokenizer "
            f"than CLIP's ({VOCABULARY} byte pairs), and neither tensor names nor a configuration file "
            "beside the weights (config.json, open_clip_config.json) identify it"
        )
    return sizes


def _from_open_clip(
    state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], TextConfig]:
    """The towers of OpenAI and open_clip."""
    _merge_tables(state)
    _turn_projection(state)
    text = (config.get("model_cfg") or {}).get("text_cfg") or {}
    if "cls_emb" in state:
        sizes = _sizes(state, context=shape_of(state, "positional_embedding", 2)[0] - 1)
        sizes = replace(sizes, pool="class")
    else:
        sizes = _sizes(state)
    sizes = replace(sizes, head_width=_head_width(sizes.width, text) or sizes.head_width)
    if sizes.projection != "matrix":
        rules = SIGLIP2 if _is_siglip2(sizes, text) else SIGLIP
        # as in open_clip's published configurations; transformers uses tanh for all
        approximate = (text.get("act_kwargs") or {}).get("approximate")
        tanh = approximate == "tanh" if text else rules == SIGLIP2
        sizes = _siglip(replace(sizes, activation="gelu_tanh" if tanh else "gelu"), rules)
        eps = (text.get("norm_kwargs") or {}).get("eps", sizes.eps)
        return state, replace(sizes, eps=float(eps))
    if text.get("pool_type") == "eos" or sizes.vocab == XLM_V:
        return state, replace(sizes, pool="end", end=int(text.get("eos_id", 2)), rules=XLM)
    tokenizer = text.get("hf_tokenizer_name")
    if str(tokenizer).startswith("bert") or sizes.vocab == BERT_PADDED:
        return state, replace(sizes, causal=False, pool="last", rules=CLIPA)
    for name, plain in (("hf_tokenizer_name", None), ("pool_type", "argmax")):
        if text.get(name, plain) != plain:
            raise LayoutError(
                f"not a plain CLIP: {name} of its text_cfg is {text[name]!r}, expected {plain!r}, or "
                "the settings of a family that is read"
            )
    return state, replace(_byte_pairs(sizes), causal=not text.get("no_causal_mask", False))


def _is_siglip2(sizes: TextConfig, text: Mapping[str, Any]) -> bool:
    return sizes.vocab == GEMMA or "siglip2" in str(text.get("hf_tokenizer_name")).lower()


def _tips(
    state: dict[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], TextConfig]:
    """TIPSv2's tower, without a projection and with sinusoidal positions."""
    text = config.get("text_config") or {}
    sizes = _sizes(state, context=int(text.get("max_position_embeddings", 64)))
    temperature = state.pop("temperature", torch.tensor(TEMPERATURE))
    state["logit_scale"] = -temperature.float().reshape(()).log()
    return state, replace(
        sizes,
        head_width=_head_width(sizes.width, text) or sizes.head_width,
        causal=False,
        hide_padding=True,
        pool="mean",
        positions="sinusoids",
        rules=TIPS,
        **dict(activation="relu") | stated(text),
    )


_BERT_NAMES = {
    "embeddings.word_embeddings.weight": "token_embedding.weight",
    "embeddings.LayerNorm.weight": "ln_embedding.weight",
    "embeddings.LayerNorm.bias": "ln_embedding.bias",
}
_BERT_PARTS = {
    "attention.output.dense": "attn.out_proj",
    "attention.output.LayerNorm": "ln_1",
    "intermediate.dense": "mlp.c_fc",
    "output.dense": "mlp.c_proj",
    "output.LayerNorm": "ln_2",
}
_BERT_LAYER = re.compile(r"encoder\.layers?\.(\d+)\.(.+)\.(weight|bias)")


def _bert(
    state: Mapping[str, Tensor], prefix: str, layers: Mapping[str, Tensor], **switches: Any
) -> tuple[dict[str, Tensor], BertConfig]:
    """A BERT of transformers and its head.

    Args:
        state: all tensors.
        prefix: prefix of the BERT's names.
        layers: tensors of its head, by our names.
        switches: fields of `BertConfig` that shapes do not determine.
    """
    result = {f"head.{name}": value for name, value in layers.items()}
    together: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        bare = name.removeprefix(prefix)
        layer = _BERT_LAYER.fullmatch(bare)
        if bare in _BERT_NAMES:
            result[_BERT_NAMES[bare]] = value
        elif layer and layer[2] in _BERT_PARTS:
            result[f"blocks.{layer[1]}.{_BERT_PARTS[layer[2]]}.{layer[3]}"] = value
        elif layer and (which := re.fullmatch("attention.self.(query|key|value)", layer[2])):
            key = f"blocks.{layer[1]}.attn.in_proj_{layer[3]}"
            together.setdefault(key, {})[which[1][0]] = value
        elif name.startswith(prefix) and not re.match(_BERT_ASIDE, bare):
            result[name] = value
    result |= {key: packed(parts, key) for key, parts in together.items()}
    vocab, width = shape_of(result, "token_embedding.weight", 2)
    rows, _ = shape_of(state, f"{prefix}embeddings.position_embeddings.weight", 2)
    _, _ = shape_of(state, f"{prefix}embeddings.token_type_embeddings.weight", 2)
    positions, types = (
        state[f"{prefix}embeddings.{kind}_embeddings.weight"] for kind in ("position", "token_type")
    )
    # all tokens of a text have the first type
    result["positional_embedding"] = positions.float() + types[0].float()
    last = max(name for name in layers if name.endswith("weight"))
    sizes: dict[str, Any] = dict(
        vocab=vocab,
        rows=rows,
        width=width,
        layers=count_blocks(result, "blocks."),
        hidden=shape_of(result, "blocks.0.mlp.c_fc.weight", 2)[0],
        embed_dim=shape_of(layers, last, 2)[0],
    )
    named = {f"text.{name}": value for name, value in result.items()}
    return named, BertConfig(**(sizes | switches))


# tensors of BERTs that are not used, or have been merged above
_BERT_ASIDE = r"pooler\.|embeddings\.(position|token_type)"


def _biomed(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], BertConfig]:
    """The BERTs of open_clip, as in BiomedCLIP and QuiltNet."""
    text = (config.get("model_cfg") or {}).get("text_cfg") or {}
    pooler = text.get("hf_pooler_type", "cls_last_hidden_state_pooler")
    prefix = "text.transformer."
    if f"{prefix}encoder.layer.0.attention.self.query.weight" not in state:
        raise LayoutError("its text tower is a model of transformers other than BERT")
    rows = shape_of(state, f"{prefix}embeddings.position_embeddings.weight", 2)[0]
    if pooler != "cls_last_hidden_state_pooler" or rows == 514:  # which RoBERTas have
        raise LayoutError(
            "its text tower is a RoBERTa or averages its tokens; only BERTs whose first token is the "
            "embedding are supported, like BiomedCLIP's"
        )
    names = [name for name in state if name.startswith("text.proj.")]
    head = {name.removeprefix("text.proj."): state[name] for name in names}
    if "weight" in head:
        head = {"0.weight": head["weight"]}
    mlp = dict(head="mlp", head_hidden=head["0.weight"].shape[0]) if len(head) > 1 else {}
    context = int(text.get("context_length", 256))
    return _bert(state, prefix, head, context=context, rules=BERT, **mlp)


def _chinese(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], BertConfig]:
    """Chinese-CLIP, in transformers' layout or its publisher's."""
    text = config.get("text_config") or {}
    prefix = "bert." if any(name.startswith("bert.") for name in state) else "text_model."
    if prefix == "bert.":
        head = turned(_needed(state, "text_projection"))
    else:
        head = _needed(state, "text_projection.weight")
    return _bert(
        state,
        prefix,
        {"0.weight": head},
        context=52,  # as in its publisher's examples
        rules=replace(BERT, clean="none"),
        **_bert_switches(text),
    )


def _alt(
    state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], BertConfig]:
    """AltCLIP: XLM-R, and its own layers before the projection."""
    text = config.get("text_config") or {}
    head = {
        "0.weight": _needed(state, "text_model.pre_LN.weight"),
        "0.bias": _needed(state, "text_model.pre_LN.bias"),
        "1.weight": _needed(state, "text_model.transformation.weight"),
        "1.bias": _needed(state, "text_model.transformation.bias"),
        "2.weight": _needed(state, "text_projection.weight"),
    }
    switches = dict(eps=1e-5) | _bert_switches(text)
    return _bert(
        state,
        "text_model.roberta.",
        head,
        context=77,
        head="norm",
        head_hidden=head["1.weight"].shape[0],
        pad=1,
        first=2,
        rules=replace(XLM, clean="none"),
        **switches,
    )


def _needed(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise LayoutError(f"{name} is missing")
    return state[name]


def _bert_switches(text: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `BertConfig` from transformers' configuration of a BERT."""
    switches = stated(text)
    if {"hidden_size", "num_attention_heads"} <= set(text):
        switches["head_width"] = int(text["hidden_size"]) // int(text["num_attention_heads"])
    return switches


_BERTS = {
    "text_model.roberta.": _alt,
    "text_model.embeddings.word_embeddings.": _chinese,
    "bert.": _chinese,
    "text.transformer.embeddings.": _biomed,
    "text.transformer.encoder.layer": _biomed,
}
