"""Converts image towers from different layouts to the names and switches of ours.

A layout is a table of names, and a function that infers sizes and switches from names, shapes and the
configuration beside the weights. Four operations are folded into weights, since they are constant in a
frozen model: layer scales into the weights before them, batch norms into the convolutions before them,
the projection of a pool's learned query into the query, and a model's own normalisation of images into
its patch embedding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.adaptor import AdaptorConfig
from sfp.clip.blocks import HEAD_WIDTH
from sfp.clip.checkpoints.published import (
    HALF,
    HEAD_WIDTHS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LayoutError,
)
from sfp.clip.checkpoints.renaming import BLOCKS, count_blocks, packed, shape_of, stated, turned
from sfp.clip.pool import PoolConfig
from sfp.clip.rope import RopeConfig
from sfp.clip.vit import ImageConfig
from sfp.functional.grid import cropped_positions, resample_positions
from sfp.registry import Op

# prefixes of an image tower's tensors
PREFIXES = ("visual.", "vision_model.", "vision_encoder.", "visual_projection.", "radio.")
# names in C-RADIO's checkpoints of its publisher, transformers and timm, but in no image-text model
_RADIO_SIGN = re.compile(r"radio_model\.|embeddings\.patch_projection\.|(embeds\.)?reg_token$")
_RADIO_PARTS = re.compile(
    r"(radio_model|embeddings|encoder\.layer|input_conditioner|adaptors)\.|summary_idxs$"
)
_TIMM_PARTS = re.compile(r"(embeds|patch_embed|blocks)\.|(pos_embed|cls_token|reg_token)$")
RADIO_SIZE = 512  # pixels, for timm's C-RADIOs; their position embeddings are for 2048
SIGLIP_HEADS = {1152: 72, 1536: 96}  # width of heads by width of tokens; otherwise 64
NOTHING, ALL = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

State = dict[str, Tensor]
Config = Mapping[str, Any]


def _resampled(mode: str, antialias: bool) -> Op:
    return Op(resample_positions, (("offset", 0.0), ("mode", mode), ("antialias", antialias)))


EXACT_BICUBIC = _resampled("bicubic", False)  # transformers
SMOOTH_BICUBIC = _resampled("bicubic", True)  # timm
BILINEAR = _resampled("bilinear", False)  # Perception Encoder
SMOOTH_BILINEAR = _resampled("bilinear", True)  # TIPSv2, NaFlex
CROPPED = Op(cropped_positions)  # C-RADIO
CROPPED_CORNERS = Op(cropped_positions, (("align_corners", True),))


@dataclass(frozen=True)
class Layout:
    """A layout of image towers.

    Attributes:
        sign: pattern for the beginning of a name that does not occur in later layouts.
        names: pairs of patterns and replacements; the first match of a name counts. An empty
            replacement leaves the tensor out.
        config: function from tensors under our names and the configuration to sizes and switches, and
            whether these determine everything that changes features.
        flat: whether the tensor that matches `sign` must be a matrix.
    """

    sign: str
    names: tuple[tuple[str, str], ...]
    config: Callable[[State, Config], tuple[ImageConfig, bool]]
    flat: bool = False

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict has this layout."""
        return any(
            re.match(self.sign, name) and (not self.flat or value.ndim == 2)
            for name, value in state.items()
        )


def marked(state: Mapping[str, Tensor]) -> tuple[State, bool]:
    """Adds one of `PREFIXES` to the names of a C-RADIO; also returns whether it is one.

    All other names are kept.
    """
    # DINOv2 also has registers, but a norm after its blocks
    if not any(map(_RADIO_SIGN.match, state)) or "norm.weight" in state:
        return dict(state), False
    result = {}
    for name, value in state.items():
        if _RADIO_PARTS.match(name):
            name = f"radio.{name.removeprefix('radio_model.')}"
        elif _TIMM_PARTS.match(name):
            name = f"visual.trunk.{name}"
        result[name] = value
    return result, True


def read(
    state: Mapping[str, Tensor], config: Config | None = None
) -> tuple[State, ImageConfig, bool]:
    """An image tower's tensors under our names, its sizes and switches, and whether all is settled.

    Args:
        state: tensors whose names begin with one of `PREFIXES`.
        config: contents of the configuration beside the weights.

    Raises:
        LayoutError: if sizes cannot be inferred; the message names the tensor.
    """
    layout = next((x for x in LAYOUTS if x.fits(state)), LAYOUTS[-1])
    try:
        finished = _finished(_renamed(state, layout.names), config or {})
        image, settled = layout.config(finished, config or {})
        if image.post_norm:  # their norms are part of attention and MLP
            finished = {_behind(name): value for name, value in finished.items()}
        return finished, image, settled
    except LayoutError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise LayoutError(
            f"the image tower's tensors do not fit each other: {type(error).__name__}: {error}"
        ) from None


def _behind(name: str) -> str:
    name = re.sub(r"\.ln_1\.(?=\w+$)", ".attn.after.", name)
    return re.sub(r"\.ln_2\.(?=\w+$)", ".mlp.after.", name)


def _renamed(state: Mapping[str, Tensor], names: tuple[tuple[str, str], ...]) -> State:
    named: State = {}
    for name, value in state.items():
        matches = ((re.fullmatch(pattern, name), new) for pattern, new in names)
        ours = next((match.expand(new) for match, new in matches if match), name)
        if ours in named:
            raise LayoutError(f"two tensors for {ours}, one of them {name}")
        if ours:
            named[ours] = value
    return named


# -- computed tensors ------------------------------------------------------------------------------


def _finished(named: State, config: Config) -> State:
    """Computes our tensors from renamed ones, some of which are parts to be merged or folded."""
    state = dict(named)
    apart = (re.match(r"(.*\.attn\.)[qkv]\.", name) for name in named)
    for prefix in dict.fromkeys(match[1] for match in apart if match):
        _pack(state, prefix)
    for name in named:
        prefix = name.rpartition(".")[0].rpartition(".")[0] + "."
        if name.endswith(".mlp.gate.weight"):
            for kind in ("weight", "bias"):
                halves = [state.pop(f"{prefix}{part}.{kind}") for part in ("gate", "value")]
                state[f"{prefix}c_fc.{kind}"] = torch.cat(halves)
        elif name.endswith(".bn.weight"):
            _fold_norm(state, prefix)
    _fill_biases(state)
    scales = [match for name in named if (match := re.fullmatch(r"(.*)\.ls_([12])", name))]
    if scales and len(scales) != 2 * count_blocks(named, _BLOCK):
        raise LayoutError(f"{len(scales)} layer scales: expected two in each block or none")
    for match in scales:
        target = "attn.out_proj" if match[2] == "1" else "mlp.c_proj"
        _fold_scale(state, match[0], f"{match[1]}.{target}")
    if "visual.pool.probe" in state:
        _project_query(state)
    if "visual.prefix" in state:
        _split_prefix(state, config)
    _reshape(state)
    if "visual.image_mean" in state:
        _fold_normalisation(state)
    return state


def _reshape(state: State) -> None:
    """Changes tensors that are stored transposed, flattened or with leading dimensions of 1."""
    for theirs, ours in (("table", "positional"), ("registers", "register"), ("cls", "class")):
        if f"visual.{theirs}" in state:
            x = state.pop(f"visual.{theirs}")
            x = x.reshape(-1, x.shape[-1])
            if len(x):  # a configuration may have 0 registers
                state[f"visual.{ours}_embedding"] = x[0] if theirs == "cls" else x
    kernel = state.get("visual.conv1.weight")
    if kernel is not None and kernel.ndim == 2:  # for flattened patches: row, column, channel
        side = math.isqrt(kernel.shape[1] // 3)
        state["visual.conv1.weight"] = kernel.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    if "visual.kernel" in state:  # for flattened patches: channel, row, column
        kernel = state.pop("visual.kernel")
        side = math.isqrt(kernel.shape[1] // 3)
        state["visual.conv1.weight"] = kernel.unflatten(1, (3, side, side))
    if "visual.head.weight" in state:
        state["visual.proj"] = turned(state.pop("visual.head.weight"))
    if "visual.head.bias" in state:
        state["visual.proj_bias"] = state.pop("visual.head.bias")


def _fold_scale(state: State, name: str, target: str) -> None:
    """Folds a scale of a layer's channels into the layer."""
    scale = state.pop(name).float()
    state[f"{target}.weight"] = scale[:, None] * state[f"{target}.weight"].float()
    state[f"{target}.bias"] = scale * state[f"{target}.bias"].float()


def _pack(state: State, prefix: str) -> None:
    """Stacks queries, keys and values; EVA's keys have no bias."""
    parts: dict[str, State] = dict(weight={}, bias={})
    for kind, found in parts.items():
        for part in "qkv":
            if f"{prefix}{part}.{kind}" in state:
                found[part] = state.pop(f"{prefix}{part}.{kind}")
    if "q" in parts["bias"]:
        parts["bias"].setdefault("k", torch.zeros_like(parts["bias"]["q"]))
    for kind, found in parts.items():
        target = f"{prefix}in_proj_{kind}"
        # EVA-01 has packed weights, but separate biases
        if found or (kind == "weight" and target not in state):
            state[target] = packed(found, target)


def _fill_biases(state: State) -> None:
    """Adds zero biases to layers that have no bias in any block."""
    for layer in ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj."):
        if not any(name.endswith(f"{layer}bias") and _BLOCK in name for name in state):
            for name in [x for x in state if x.endswith(f"{layer}weight") and _BLOCK in x]:
                bias = state[name].new_zeros(state[name].shape[0])
                state[f"{name.removesuffix('weight')}bias"] = bias


def _split_prefix(state: State, config: Config) -> None:
    """C-RADIO's class tokens and registers, with the class token of SigLIP 2 first.

    There is one class token for each teacher. Their order does not matter for the blocks, since they
    have no positions. The publisher's configuration states which is SigLIP 2's; by default the first.
    """
    tokens = state.pop("visual.prefix")
    first = 0
    for name, settings in (config.get("adaptor_configs") or {}).items():
        if "siglip2" in name:
            first = int(settings.get("head_idx", 0))
    if not 0 <= first < len(tokens):
        raise LayoutError(f"head_idx of the adaptor is {first}: there are {len(tokens)} tokens")
    state["visual.class_embedding"] = tokens[first]
    if len(tokens) > 1:
        state["visual.register_embedding"] = torch.cat([tokens[:first], tokens[first + 1 :]])


def _fold_normalisation(state: State) -> None:
    """Folds a model's normalisation of images into its patch embedding: W (x - mean) / std + b."""
    mean, std = (state.pop(f"visual.image_{part}").double().flatten() for part in ("mean", "std"))
    kernel = state["visual.conv1.weight"].double() / std[:, None, None]
    bias = state.get("visual.conv1.bias", kernel.new_zeros(len(kernel))).double()
    state["visual.conv1.bias"] = (bias - kernel.sum((2, 3)) @ mean).float()
    state["visual.conv1.weight"] = kernel.float()


def _fold_norm(state: State, prefix: str) -> None:
    """Folds a batch norm into the convolution without bias before it."""
    weight, bias, mean, variance = (
        state.pop(f"{prefix}bn.{part}").double()
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    state.pop(f"{prefix}bn.num_batches_tracked", None)
    scale = weight / (variance + 1e-5).sqrt()
    kernel = state[f"{prefix}weight"].double()
    state[f"{prefix}weight"] = (kernel * scale[:, None, None, None]).float()
    state[f"{prefix}bias"] = (bias - mean * scale).float()


def _project_query(state: State) -> None:
    """Projects the first of a pool's learned queries, and keeps only its keys and values."""
    pool = "visual.pool."
    probe = state.pop(f"{pool}probe")
    probe = probe.reshape(-1, probe.shape[-1])[0].double()
    if f"{pool}ln_q.weight" in state:  # CoCa
        weight, bias = (state.pop(f"{pool}ln_q.{kind}").double() for kind in ("weight", "bias"))
        probe = F.layer_norm(probe, probe.shape, weight, bias)
    if f"{pool}q.weight" not in state:
        _split_pool(state)
    weight, bias = (state.pop(f"{pool}q.{kind}").double() for kind in ("weight", "bias"))
    state[f"{pool}query"] = (weight @ probe + bias).float()
    for kind in ("weight", "bias"):
        state[f"{pool}in_proj_{kind}"] = state.pop(f"{pool}kv.{kind}")


def _split_pool(state: State) -> None:
    """Splits PyTorch's multi-head attention into queries, and keys with values."""
    pool = "visual.pool."
    bias = state.pop(f"{pool}in_proj_bias")
    width = len(bias) // 3
    state[f"{pool}q.bias"], state[f"{pool}kv.bias"] = bias[:width], bias[width:]
    if f"{pool}in_proj_weight" in state:
        weight = state.pop(f"{pool}in_proj_weight")
        state[f"{pool}q.weight"], state[f"{pool}kv.weight"] = weight[:width], weight[width:]
    else:  # tokens and pool have different widths
        query, key, value = (state.pop(f"{pool}{part}_proj_weight") for part in "qkv")
        state[f"{pool}q.weight"], state[f"{pool}kv.weight"] = query, torch.cat([key, value])


# -- sizes and switches ----------------------------------------------------------------------------


def _sizes(
    state: State, *, head_widths: Mapping[int, int] = HEAD_WIDTHS, **given: Any
) -> dict[str, Any]:
    """Arguments of `ImageConfig` from shapes and names of any tower, in addition to those `given`.

    Args:
        state: tensors under our names.
        head_widths: widths of heads by the width of tokens; 64 for others.
        **given: further arguments; with `may_lack` a position embedding may lack the class token.
    """
    width, _, _, kernel = shape_of(state, "visual.conv1.weight", 4)
    rows = shape_of(state, "visual.positional_embedding", 2)[0]
    prefix = int("visual.class_embedding" in state)
    prefix += len(state.get("visual.register_embedding", ()))
    table_prefix = prefix > 0
    if given.pop("may_lack", False) and math.isqrt(rows) ** 2 == rows:  # rows - 1 is no square then
        table_prefix = False
    side = math.isqrt(max(rows - table_prefix, 0))
    if side * side + table_prefix != rows or not side:
        raise LayoutError(
            f"position embedding of {rows} rows: expected a square grid{' plus CLS' if prefix else ''}"
        )
    patch = kernel * math.prod(stride for _, stride in given.get("stem", ()))
    first = f"visual.{BLOCKS}0."
    proj = state.get("visual.proj")
    pool = given.get("pool")
    embed_dim = pool.width if isinstance(pool, PoolConfig) else width
    if proj is not None:
        embed_dim = shape_of(state, "visual.proj", 2)[1]
    elif given.get("adaptor") is not None:
        embed_dim = shape_of(state, "visual.adaptor.final.2.weight", 2)[0]
    hidden = state.get(f"{first}mlp.c_proj.weight")
    return given | dict(
        image_size=side * patch,
        patch=patch,
        width=width,
        layers=count_blocks(state, f"visual.{BLOCKS}"),
        embed_dim=embed_dim,
        head_width=head_widths.get(width, HEAD_WIDTH),
        hidden=hidden.shape[1] if hidden is not None and hidden.ndim == 2 else None,
        conv_bias="visual.conv1.bias" in state,
        prefix=prefix,
        table_prefix=table_prefix,
        ln_pre="visual.ln_pre.weight" in state,
        inner_norms=f"{first}attn.norm.weight" in state,
        ln_post="visual.ln_post.weight" in state,
        proj=proj is not None,
        proj_bias="visual.proj_bias" in state,
    )


def _pool(state: State, heads: int | None = None) -> PoolConfig:
    """The sizes of an attention pool."""
    hidden = state.get("visual.pool.mlp.c_fc.weight")
    return PoolConfig(
        width=len(state["visual.pool.query"]),
        heads=heads,
        hidden=None if hidden is None else hidden.shape[0],
        norm="visual.pool.norm.weight" in state,
    )


_NAMED_AT_HOME = ("clip", "clip_vision_model", "", None)


def _vision(config: Config, width: int) -> dict[str, Any]:
    """The settings of an image tower that transformers' configuration states."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return {}
    said = stated(vision)
    if heads := vision.get("num_attention_heads"):
        said["head_width"] = width // int(heads)
    return said


def _plain(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """OpenAI's tower, in its own layout and open_clip's; CLIPA without a norm before the blocks."""
    if "visual.proj" not in state:
        raise LayoutError("not a CLIP state dict: visual.proj is missing")
    if not _sizes(state)["table_prefix"]:
        rows = len(state["visual.positional_embedding"])
        raise LayoutError(f"position embedding of {rows} rows: expected a square grid plus CLS")
    if "visual.ln_pre.weight" in state or "visual.ln_pre.bias" in state:
        return ImageConfig(**_sizes(state)), False
    sizes = _sizes(
        state,
        activation="gelu",
        pool="mean",
        positions=SMOOTH_BICUBIC,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return ImageConfig(**sizes | _open_clip_said(config)), True


def _transformers_clip(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """`CLIPModel`, and models with its image tower and another text tower."""
    sizes = _sizes(state)
    if config.get("model_type") in _NAMED_AT_HOME:
        return ImageConfig(**sizes), False
    return ImageConfig(**sizes | _vision(config, sizes["width"])), True


def _transformers_siglip(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """`SiglipModel`, also for SigLIP 2 of fixed sizes."""
    return _siglip(state, config, "gelu_tanh", EXACT_BICUBIC), True


def _naflex(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """`Siglip2Model` and timm's NaFlex towers, which take images of any shape."""
    if _is_radio(state):
        return _radio(state, config)
    return _siglip(state, config, "gelu_tanh", SMOOTH_BILINEAR), True


def _siglip(state: State, config: Config, activation: str, positions: Op) -> ImageConfig:
    sizes = _sizes(
        state,
        head_widths=SIGLIP_HEADS,
        activation=activation,
        eps=1e-6,
        pool=_pool(state),
        positions=positions,
        mean=HALF,
        std=HALF,
    )
    return ImageConfig(**sizes | _vision(config, sizes["width"]))


def _tipsv2(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """`Tipsv2Model`: the class token was trained on web captions, the register on synthetic ones."""
    gated = f"visual.{BLOCKS}0.mlp.c_fc.weight" in state and _is_gated(state)
    sizes = _sizes(
        state,
        head_widths={1152: 72},
        activation="gelu",
        eps=1e-6,
        positions=SMOOTH_BILINEAR,
        mean=NOTHING,
        std=ALL,
    )
    sizes |= _vision(config, sizes["width"])
    return ImageConfig(**sizes | (dict(activation="swiglu") if gated else {})), True


def _radio(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """C-RADIO of its publisher, timm's NaFlex and `RadioModel`, without the normalisation of images.

    The publisher and timm align the corners of the position embeddings of v3-B and v3-H, `RadioModel`
    does not.
    """
    sizes = _sizes(
        state,
        head_widths={1152: 72, 1280: 80},
        activation="gelu",
        eps=1e-6,
        adaptor=_adaptor(state),
        may_lack=True,
    )
    ours = config.get("model_type") != "radio"
    corners = ours and (sizes["width"], sizes["prefix"]) in ((768, 8), (1280, 8))
    sizes["positions"] = CROPPED_CORNERS if corners else CROPPED
    if sizes["image_size"] > RADIO_SIZE:
        sizes["usual_size"] = RADIO_SIZE
    sizes |= _vision({"vision_config": config}, sizes["width"])
    if _is_gated(state):
        sizes["activation"] = "swiglu"
    return ImageConfig(**sizes), True


def _whole_radio(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """The same, with the normalisation of images folded into the patch embedding."""
    image, settled = _radio(state, config)
    return replace(image, mean=NOTHING, std=ALL), settled


def _is_radio(state: State) -> bool:
    """Whether a tower of timm is C-RADIO: with registers, and nothing after the last block."""
    behind = ("visual.ln_post.weight", "visual.pool.query")
    return "visual.register_embedding" in state and not any(name in state for name in behind)


def _adaptor(state: State) -> AdaptorConfig | None:
    """The sizes of an adaptor, or None if there is none."""
    if "visual.adaptor.fc1.weight" not in state:
        return None
    return AdaptorConfig(
        hidden=shape_of(state, "visual.adaptor.fc1.weight", 2)[0],
        layers=count_blocks(state, "visual.adaptor.blocks."),
        norm="visual.adaptor.pre_norm.0.weight" in state,
    )


def _timm(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """open_clip's models with an image tower of timm: SigLIP, PE, EVA, MobileCLIP, BiomedCLIP."""
    if _is_radio(state):  # with a position embedding of one size
        image, settled = _radio(state, config)
        return replace(image, positions=SMOOTH_BICUBIC), settled
    if "visual.pool.query" in state and "visual.ln_pre.weight" not in state:
        return _timm_siglip(state, config), True  # PE has `ln_pre`
    said = str(_open_clip_vision(config).get("timm_model_name", ""))
    before = "visual.ln_pre.weight" in state
    sizes = _sizes(
        state,
        head_widths=HEAD_WIDTHS | {1536: 96, 1792: 112},
        activation="swiglu" if _is_gated(state) else "gelu",
        eps=1e-5 if before else 1e-6,
        positions=SMOOTH_BICUBIC,
        stem=_stem(state),
        may_lack=True,
    )
    if sizes["width"] == 1792 or "eva02_enormous" in said:
        sizes["post_norm"] = True
    if "quickgelu" in said:
        sizes["activation"] = "quick_gelu"
    if sizes["inner_norms"]:
        sizes["rope"] = RopeConfig("yx", side=16)
    elif "visual.pool.query" in state:
        side = sizes["image_size"] // sizes["patch"]
        rope = RopeConfig("xy", side, first=sizes["prefix"], rescale=False)
        sizes |= dict(rope=rope, pool=_pool(state, heads=8), mean=HALF, std=HALF)
    elif sizes["stem"]:
        sizes |= dict(mean=NOTHING, std=ALL)
    return ImageConfig(**sizes), True


def _timm_siglip(state: State, config: Config) -> ImageConfig:
    """SigLIP in timm, with the exact GELU in some sizes, unlike transformers and the publisher."""
    sizes = _siglip(state, config, "gelu", SMOOTH_BICUBIC)
    side = sizes.image_size // sizes.patch
    tanh = (
        sizes.patch == 32
        or (sizes.width, sizes.patch) in ((1152, 16), (1536, 16))
        or (sizes.width, sizes.patch, side) == (1024, 16, 32)
    )
    return replace(sizes, activation="gelu_tanh" if tanh else "gelu")


def _perception(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """The Perception Encoder in its publisher's layout."""
    sizes = _sizes(
        state,
        head_widths={1536: 96},
        activation="gelu",
        pool=_pool(state, heads=8),
        positions=BILINEAR,
        mean=HALF,
        std=HALF,
    )
    side = sizes["image_size"] // sizes["patch"]
    rope = RopeConfig("xy", side, first=sizes["prefix"], rescale=False)
    return ImageConfig(**sizes, rope=rope), True


def _coca(state: State, config: Config) -> tuple[ImageConfig, bool]:
    """CoCa; the first of its 256 queries gives the embedding."""
    sizes = _sizes(state, activation="gelu", pool=_pool(state, heads=8), positions=SMOOTH_BICUBIC)
    return ImageConfig(**sizes | _open_clip_said(config)), True


def _open_clip_vision(config: Config) -> Config:
    """The settings of an image tower in open_clip's configuration; empty if there are none."""
    model = config.get("model_cfg")
    vision = model.get("vision_cfg") if isinstance(model, Mapping) else None
    return vision if isinstance(vision, Mapping) else {}


def _open_clip_said(config: Config) -> dict[str, Any]:
    """Arguments of `ImageConfig` from that configuration, for open_clip's own towers."""
    if not (vision := _open_clip_vision(config)):
        return {}
    said: dict[str, Any] = {"head_width": int(vision.get("head_width", HEAD_WIDTH))}
    if config["model_cfg"].get("quick_gelu"):
        said["activation"] = "quick_gelu"
    if eps := (vision.get("norm_kwargs") or {}).get("eps"):
        said["eps"] = float(eps)
    return said


def _is_gated(state: State) -> bool:
    """Whether MLPs are SwiGLUs: the output of the first layer is twice the input of the second."""
    first, second = (
        state.get(f"visual.{BLOCKS}0.mlp.{part}.weight") for part in ("c_fc", "c_proj")
    )
    return first is not None and second is not None and first.shape[0] == 2 * second.shape[1]


def _stem(state: State) -> tuple[tuple[int, int], ...]:
    """Widths and strides of the convolutions before the patch embedding."""
    stem = [state[k] for k in sorted(state) if re.fullmatch(r"visual\.stem\.\d\.weight", k)]
    return tuple((x.shape[0], x.shape[-1]) for x in stem)


# -- layouts ---------------------------------------------------------------------------------------

_BLOCK = f"visual.{BLOCKS}"
_KIND = r"(weight|bias)"


def _transformers_blocks(
    layer: str, norm: str, attention: str, out: str
) -> tuple[tuple[str, str], ...]:
    """The names of a block in transformers' towers."""
    at = rf"vision_model\.encoder\.{layer}\.(\d+)\."
    return (
        (rf"{at}{norm}([12])\.{_KIND}", rf"{_BLOCK}\1.ln_\2.\3"),
        (rf"{at}{attention}\.([qkv])_proj\.{_KIND}", rf"{_BLOCK}\1.attn.\2.\3"),
        (rf"{at}{attention}\.{out}\.{_KIND}", rf"{_BLOCK}\1.attn.out_proj.\2"),
        (rf"{at}mlp\.fc1\.{_KIND}", rf"{_BLOCK}\1.mlp.c_fc.\2"),
        (rf"{at}mlp\.(?:fc2|down_proj)\.{_KIND}", rf"{_BLOCK}\1.mlp.c_proj.\2"),
        (rf"{at}mlp\.gate_proj\.{_KIND}", rf"{_BLOCK}\1.mlp.gate.\2"),
        (rf"{at}mlp\.up_proj\.{_KIND}", rf"{_BLOCK}\1.mlp.value.\2"),
        (rf"{at}layer_scale([12])\.lambda1", rf"{_BLOCK}\1.ls_\2"),
    )


# AltCLIP's files have "layer", transformers' model of it "layers"
_BLOCKS = _transformers_blocks("layers?", "layer_norm", "self_attn", "out_proj")
_EMBEDDINGS = r"vision_model\.embeddings\."
_SHARED = (
    *_BLOCKS,
    (rf"{_EMBEDDINGS}patch_embedding\.{_KIND}", r"visual.conv1.\1"),
    (rf"{_EMBEDDINGS}position_embedding\.weight", "visual.positional_embedding"),
    (rf"{_EMBEDDINGS}position_ids", ""),  # 0, 1, 2, ... in older files
    (rf"vision_model\.post_layernorm\.{_KIND}", r"visual.ln_post.\1"),
)
_HEAD = r"vision_model\.head\."
_SIGLIP = (
    *_SHARED,
    (rf"{_HEAD}probe", "visual.pool.probe"),
    (rf"{_HEAD}attention\.in_proj_{_KIND}", r"visual.pool.in_proj_\1"),
    (rf"{_HEAD}attention\.out_proj\.{_KIND}", r"visual.pool.out_proj.\1"),
    (rf"{_HEAD}layernorm\.{_KIND}", r"visual.pool.ln.\1"),
    (rf"{_HEAD}mlp\.fc1\.{_KIND}", r"visual.pool.mlp.c_fc.\1"),
    (rf"{_HEAD}mlp\.fc2\.{_KIND}", r"visual.pool.mlp.c_proj.\1"),
)
_TRUNK = r"visual\.trunk\."
_AT = rf"{_TRUNK}blocks\.(\d+)\."
_TIMM = (
    (rf"{_AT}norm([12])\.{_KIND}", rf"{_BLOCK}\1.ln_\2.\3"),
    (rf"{_AT}attn\.qkv\.{_KIND}", rf"{_BLOCK}\1.attn.in_proj_\2"),
    (rf"{_AT}attn\.([qkv])_proj\.{_KIND}", rf"{_BLOCK}\1.attn.\2.\3"),
    (rf"{_AT}attn\.([qv])_bias", rf"{_BLOCK}\1.attn.\2.bias"),
    (rf"{_AT}attn\.proj\.{_KIND}", rf"{_BLOCK}\1.attn.out_proj.\2"),
    (rf"{_AT}attn\.norm\.{_KIND}", rf"{_BLOCK}\1.attn.norm.\2"),
    (rf"{_AT}(?:gamma_|ls)([12])(?:\.gamma)?", rf"{_BLOCK}\1.ls_\2"),
    (rf"{_AT}mlp\.fc1\.{_KIND}", rf"{_BLOCK}\1.mlp.c_fc.\2"),
    (rf"{_AT}mlp\.fc1_g\.{_KIND}", rf"{_BLOCK}\1.mlp.gate.\2"),
    (rf"{_AT}mlp\.fc1_x\.{_KIND}", rf"{_BLOCK}\1.mlp.value.\2"),
    (rf"{_AT}mlp\.fc2\.{_KIND}", rf"{_BLOCK}\1.mlp.c_proj.\2"),
    (rf"{_AT}mlp\.norm\.{_KIND}", rf"{_BLOCK}\1.mlp.norm.\2"),
    (rf"{_TRUNK}patch_embed\.proj\.{_KIND}", r"visual.conv1.\1"),
    (rf"{_TRUNK}patch_embed\.backbone\.([01])\.conv\.weight", r"visual.stem.\1.weight"),
    (rf"{_TRUNK}patch_embed\.backbone\.([01])\.bn\.(\w+)", r"visual.stem.\1.bn.\2"),
    (rf"{_TRUNK}patch_embed\.backbone\.2\.conv\.{_KIND}", r"visual.conv1.\1"),
    (rf"{_TRUNK}embeds\.proj\.{_KIND}", r"visual.conv1.\1"),
    (rf"{_TRUNK}(?:embeds\.)?pos_embed", "visual.table"),
    (rf"{_TRUNK}(?:embeds\.)?cls_token", "visual.cls"),
    (rf"{_TRUNK}(?:embeds\.)?reg_token", "visual.registers"),
    (rf"{_TRUNK}norm_pre\.{_KIND}", r"visual.ln_pre.\1"),
    (rf"{_TRUNK}norm\.{_KIND}", r"visual.ln_post.\1"),
    (rf"{_TRUNK}attn_pool\.latent", "visual.pool.probe"),
    (rf"{_TRUNK}attn_pool\.(q|kv)\.{_KIND}", r"visual.pool.\1.\2"),
    (rf"{_TRUNK}attn_pool\.proj\.{_KIND}", r"visual.pool.out_proj.\1"),
    (rf"{_TRUNK}attn_pool\.norm\.{_KIND}", r"visual.pool.ln.\1"),
    (rf"{_TRUNK}attn_pool\.mlp\.fc1\.{_KIND}", r"visual.pool.mlp.c_fc.\1"),
    (rf"{_TRUNK}attn_pool\.mlp\.fc2\.{_KIND}", r"visual.pool.mlp.c_proj.\1"),
    (rf"{_TRUNK}head\.{_KIND}", r"visual.head.\1"),
    (r"visual\.head\.proj\.weight", "visual.head.weight"),
)

# the adaptor to SigLIP 2; those for other teachers, and for patches, are not comparable with texts
_ADAPTORS = (
    (r"radio\.adaptors\.siglip2[^.]*\.head_mlp\.(.+)", r"visual.adaptor.\1"),
    (r"radio\.adaptors\..*", ""),
)
_RADIO_AT = r"radio\.(?:model\.blocks|encoder\.layer)\.(\d+)\."
_GENERATOR = r"radio\.model\.patch_generator\."
_RADIO = (
    *_ADAPTORS,
    (rf"{_RADIO_AT}norm([12])\.{_KIND}", rf"{_BLOCK}\1.ln_\2.\3"),
    (rf"{_RADIO_AT}attn\.qkv\.{_KIND}", rf"{_BLOCK}\1.attn.in_proj_\2"),
    (rf"{_RADIO_AT}attention\.([qkv])_proj\.{_KIND}", rf"{_BLOCK}\1.attn.\2.\3"),
    (rf"{_RADIO_AT}(?:attn\.proj|attention\.o_proj)\.{_KIND}", rf"{_BLOCK}\1.attn.out_proj.\2"),
    (rf"{_RADIO_AT}mlp\.fc1\.{_KIND}", rf"{_BLOCK}\1.mlp.c_fc.\2"),
    (rf"{_RADIO_AT}mlp\.(?:fc2|down_proj)\.{_KIND}", rf"{_BLOCK}\1.mlp.c_proj.\2"),
    (rf"{_RADIO_AT}mlp\.gate_proj\.{_KIND}", rf"{_BLOCK}\1.mlp.gate.\2"),
    (rf"{_RADIO_AT}mlp\.up_proj\.{_KIND}", rf"{_BLOCK}\1.mlp.value.\2"),
    (
        rf"{_RADIO_AT}(?:ls|layer_scale)([12])\.(?:gamma|grandma|lambda1)",
        rf"{_BLOCK}\1.ls_\2",
    ),
    (rf"{_GENERATOR}embedder\.weight", "visual.kernel"),
    (rf"{_GENERATOR}pos_embed", "visual.table"),
    (rf"{_GENERATOR}cls_token\.token", "visual.prefix"),
    (rf"{_GENERATOR}video_embedder\.weight", ""),
    (r"radio\.embeddings\.patch_projection\.weight", "visual.kernel"),
    (r"radio\.embeddings\.position_embedding", "visual.table"),
    (r"radio\.embeddings\.cls_register_token", "visual.prefix"),
    (r"radio\.embeddings\.video_patch_projection\.weight", ""),
    (r"radio\.input_conditioner\.norm_(mean|std)", r"visual.image_\1"),
    (r"radio\.summary_idxs", ""),
)

_ENCODER = r"vision_encoder\."
_IN = rf"{_ENCODER}blocks\.(\d+)\."

LAYOUTS = (
    Layout(
        _ENCODER,  # TIPSv2's files, whose names transformers changes when it reads them
        (
            (rf"{_IN}norm([12])\.{_KIND}", rf"{_BLOCK}\1.ln_\2.\3"),
            (rf"{_IN}attn\.qkv\.{_KIND}", rf"{_BLOCK}\1.attn.in_proj_\2"),
            (rf"{_IN}attn\.proj\.{_KIND}", rf"{_BLOCK}\1.attn.out_proj.\2"),
            (rf"{_IN}mlp\.(?:c_fc|fc1|w12)\.{_KIND}", rf"{_BLOCK}\1.mlp.c_fc.\2"),
            (rf"{_IN}mlp\.(?:c_proj|fc2|w3)\.{_KIND}", rf"{_BLOCK}\1.mlp.c_proj.\2"),
            (rf"{_IN}ls([12])\.gamma", rf"{_BLOCK}\1.ls_\2"),
            (rf"{_ENCODER}cls_token", "visual.cls"),
            (rf"{_ENCODER}register_tokens", "visual.registers"),
            (rf"{_ENCODER}mask_token", ""),
            (rf"{_ENCODER}pos_embed", "visual.table"),
            (rf"{_ENCODER}patch_embed\.proj\.{_KIND}", r"visual.conv1.\1"),
            (rf"{_ENCODER}norm\.{_KIND}", r"visual.ln_post.\1"),
        ),
        _tipsv2,
    ),
    Layout(
        rf"{_EMBEDDINGS}cls_token",
        (
            *_transformers_blocks("layer", "norm", "attention", "o_proj"),
            (rf"{_EMBEDDINGS}cls_token", "visual.cls"),
            (rf"{_EMBEDDINGS}register_tokens", "visual.registers"),
            (rf"{_EMBEDDINGS}mask_token", ""),  # of the training
            (rf"{_EMBEDDINGS}position_embeddings", "visual.table"),
            (rf"{_EMBEDDINGS}patch_embeddings\.projection\.{_KIND}", r"visual.conv1.\1"),
            (rf"vision_model\.layernorm\.{_KIND}", r"visual.ln_post.\1"),
        ),
        _tipsv2,
    ),
    Layout(rf"{_EMBEDDINGS}patch_embedding\.weight", _SIGLIP, _naflex, flat=True),
    Layout(_HEAD, _SIGLIP, _transformers_siglip),
    Layout(
        r"vision_model\.",
        (
            *_SHARED,
            (rf"{_EMBEDDINGS}class_embedding", "visual.class_embedding"),
            (rf"vision_model\.pre_layrnorm\.{_KIND}", r"visual.ln_pre.\1"),  # their spelling
            (r"visual_projection\.weight", "visual.head.weight"),
        ),
        _transformers_clip,
    ),
    Layout(r"radio\.input_conditioner\.", _RADIO, _whole_radio),
    Layout(r"radio\.(model|embeddings)\.", _RADIO, _radio),
    Layout(rf"{_TRUNK}embeds\.proj\.weight", (*_ADAPTORS, *_TIMM), _naflex, flat=True),
    Layout(_TRUNK, _TIMM, _timm),
    Layout(
        r"visual\.attn_pool\.probe",
        (
            (r"visual\.attn_pool\.probe", "visual.pool.probe"),
            (rf"visual\.attn_pool\.attn\.in_proj_{_KIND}", r"visual.pool.in_proj_\1"),
            (rf"visual\.attn_pool\.attn\.out_proj\.{_KIND}", r"visual.pool.out_proj.\1"),
            (rf"visual\.attn_pool\.layernorm\.{_KIND}", r"visual.pool.ln.\1"),
            (rf"visual\.attn_pool\.mlp\.(c_fc|c_proj)\.{_KIND}", r"visual.pool.mlp.\1.\2"),
            (r"(visual\.transformer\.resblocks\.\d+\.ls_[12])\.gamma", r"\1"),
        ),
        _perception,
    ),
    Layout(
        r"visual\.attn_pool\.query",
        (
            (r"visual\.attn_pool\.query", "visual.pool.probe"),
            (rf"visual\.attn_pool\.ln_q\.{_KIND}", r"visual.pool.ln_q.\1"),
            (rf"visual\.attn_pool\.ln_k\.{_KIND}", r"visual.ln_post.\1"),
            (r"visual\.attn_pool\.attn\.([qkv])_proj_weight", r"visual.pool.\1_proj_weight"),
            (rf"visual\.attn_pool\.attn\.in_proj_{_KIND}", r"visual.pool.in_proj_\1"),
            (rf"visual\.attn_pool\.attn\.out_proj\.{_KIND}", r"visual.pool.out_proj.\1"),
            (rf"visual\.ln_post\.{_KIND}", r"visual.pool.norm.\1"),
        ),
        _coca,
    ),
    Layout(r"visual\.", (), _plain),
)
