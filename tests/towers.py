"""Small random image towers of every family, built and run by the packages that define them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import packages
import torch
from torch import Tensor, nn

from sfp.clip.checkpoints import image_layouts
from sfp.clip.vit import VisionTransformer

DEPTH, WIDTH, HEADS, PATCH, SIDE, EMBED = 6, 64, 4, 8, 32, 24


@dataclass
class Family:
    """A tower of a package.

    Attributes:
        state: under the names of a checkpoint.
        call: images -> their embeddings.
        blocks: modules whose outputs are compared.
        config: the configuration beside the weights.
        size: side of the images that have the grid of the position embedding.
        other: of images with another grid, or None if the package cannot run them.
        head_width: what neither names nor shapes nor configuration tell.
        knobs: of our tower, to do what the package does on the other grid.
    """

    state: Mapping[str, Tensor]
    call: Callable[[Tensor], Tensor]
    blocks: list[nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = field(default_factory=lambda: (SIDE, SIDE))
    other: tuple[int, int] | None = (40, 24)
    head_width: int | None = field(default_factory=lambda: WIDTH // HEADS)
    knobs: dict[str, Any] = field(default_factory=dict)

    def run(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The embeddings (B, C) of images, and what leaves each block, (B, T, D)."""
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        with torch.no_grad():
            embedding = self.call(image)
        for handle in handles:
            handle.remove()
        return embedding, outputs

    def tower(self) -> VisionTransformer:
        """Ours with the same weights."""
        state, _ = image_layouts.marked(self.state)
        part = {k: v for k, v in state.items() if k.startswith(image_layouts.PREFIXES)}
        named, config, _ = image_layouts.read(part, self.config)
        if self.head_width:
            config = replace(config, head_width=self.head_width)
        tower = VisionTransformer(config).eval().requires_grad_(False)
        tower.load_state_dict({k.removeprefix("visual."): v for k, v in named.items()})
        return tower


def noisy(model: nn.Module, seed: int = 0) -> nn.Module:
    """With random values in everything that is learned, biases, norms and statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for x in model.state_dict().values():
        if x.is_floating_point():
            x += 0.1 * torch.randn(x.shape, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.5)
    return model.eval().requires_grad_(False)


def _prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in model.state_dict().items()}


# -- transformers ----------------------------------------------------------------------------------


def _transformers(name: str, vision: dict[str, Any], text: dict[str, Any], **rest: Any):
    import transformers

    shared = dict(hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    config = getattr(transformers, f"{name}Config")(
        vision_config=shared | dict(patch_size=PATCH) | vision,
        text_config=small | dict(vocab_size=20, max_position_embeddings=8) | text,
        **rest,
    )
    torch.manual_seed(0)
    return noisy(getattr(transformers, f"{name}Model")(config))


def transformers_clip(name: str = "CLIP", activation: str = "quick_gelu", **text: Any) -> Family:
    vision = dict(image_size=SIDE, intermediate_size=150, hidden_act=activation)
    model = _transformers(name, vision, text, projection_dim=EMBED)

    def call(image: Tensor) -> Tensor:
        pooled = model.vision_model(image, interpolate_pos_encoding=True).pooler_output
        return model.visual_projection(pooled)

    return Family(
        model.state_dict(),
        call,
        list(model.vision_model.encoder.layers),
        model.config.to_dict(),
        knobs=dict(positions=image_layouts.EXACT_BICUBIC),
    )


def tipsv2(swiglu: bool = False, **sizes: Any) -> Family:
    vision = dict(image_size=SIDE, use_swiglu_ffn=swiglu, layerscale_value=0.7) | sizes
    model = _transformers("Tipsv2", vision, dict(hidden_size=WIDTH))
    return Family(
        model.state_dict(),
        lambda image: model.vision_model(image).pooler_output,
        list(model.vision_model.encoder.layer),
        model.config.to_dict(),
        head_width=None,
    )


def transformers_siglip() -> Family:
    model = _transformers("Siglip", dict(image_size=SIDE, intermediate_size=150), {})
    tower = model.vision_model
    return Family(
        model.state_dict(),
        lambda image: tower(image, interpolate_pos_encoding=True).pooler_output,
        list(tower.encoder.layers),
        model.config.to_dict(),
        head_width=None,
    )


def transformers_naflex() -> Family:
    vision = dict(num_patches=(SIDE // PATCH) ** 2, intermediate_size=150)
    model = _transformers("Siglip2", vision, {})

    def call(image: Tensor) -> Tensor:
        rows, columns = image.shape[2] // PATCH, image.shape[3] // PATCH
        cells = image.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))
        flat = cells.permute(0, 2, 4, 3, 5, 1).reshape(len(image), rows * columns, -1)
        shapes = torch.tensor([[rows, columns]] * len(image))
        seen = torch.ones(flat.shape[:2], dtype=torch.long)
        return model.vision_model(flat, seen, shapes).pooler_output

    return Family(
        model.state_dict(),
        call,
        list(model.vision_model.encoder.layers),
        model.config.to_dict(),
        head_width=None,
    )


class ResidualMLP(nn.Module):
    """C-RADIO's adaptors, by their publisher's names."""

    def __init__(
        self, width: int, hidden: int, out: int, layers: int, *, norm: bool = False
    ) -> None:
        super().__init__()
        self.pre_norm = nn.Sequential(nn.LayerNorm(width), nn.GELU()) if norm else nn.Identity()

        def layer(size: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, size))

        self.fc1 = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(layer(hidden) for _ in range(layers))
        self.final = layer(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(self.pre_norm(x))
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


def transformers_radio(swiglu: bool = False, **sizes: Any) -> Family:
    import transformers

    given = dict(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        mlp_ratio=2.5,
        patch_size=PATCH,
        max_img_size=SIDE,
        num_registers=2,
        layerscale_value=0.7,
        use_swiglu_ffn=swiglu,
    )
    torch.manual_seed(0)
    config = transformers.RadioConfig(**given | sizes)
    model = noisy(transformers.RadioModel(config))
    model.input_conditioner.norm_std.abs_().add_(0.1)
    return Family(
        model.state_dict(),
        lambda image: model(image).last_hidden_state[:, 0],
        list(model.encoder.layer),
        model.config.to_dict(),
        head_width=None,
    )


def published_radio(**sizes: Any) -> Family:
    """The same as NVIDIA writes it, with an adaptor for SigLIP 2 and one for another teacher."""
    family = transformers_radio(**sizes)
    names = (
        ("embeddings.patch_projection", "model.patch_generator.embedder"),
        ("embeddings.position_embedding", "model.patch_generator.pos_embed"),
        ("embeddings.cls_register_token", "model.patch_generator.cls_token.token"),
        ("encoder.layer", "model.blocks"),
        ("attention.o_proj", "attn.proj"),
        ("layer_scale1.lambda1", "ls1.gamma"),
        ("layer_scale2.lambda1", "ls2.gamma"),
    )
    state: dict[str, Tensor] = {}
    for name, value in family.state.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        state[f"radio_model.{name}"] = value
    for name in [name for name in state if ".attention.q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        state[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    adaptors = {"siglip2-g": EMBED, "dino_v2": 20}
    for name, width in adaptors.items():
        for mlp in ("head_mlp", "feat_mlp"):
            adaptor = noisy(ResidualMLP(WIDTH, 40, width, 2), seed=width)
            state |= _prefixed(adaptor, f"radio_model.adaptors.{name}.{mlp}.")
            if (name, mlp) == ("siglip2-g", "head_mlp"):
                into_texts = adaptor
    call = family.call
    family.call = lambda image: into_texts(call(image))
    family.state, family.config, family.head_width = state, {}, WIDTH // HEADS
    return family


# -- timm, as open_clip holds it -------------------------------------------------------------------


def _timm(name: str, *, classes: int = EMBED, other: Any = (40, 24), **sizes: Any) -> Family:
    torch.manual_seed(0)
    given = dict(
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        img_size=SIDE,
        patch_size=PATCH,
        num_classes=classes,
        dynamic_img_size=True,
    )
    given = {k: v for k, v in (given | sizes).items() if v is not None}
    model = noisy(packages.timm().create_model(name, pretrained=False, **given))
    return Family(_prefixed(model, "visual.trunk."), model, list(model.blocks), other=other)


def timm_siglip() -> Family:
    return _timm("vit_base_patch16_siglip_224", classes=0)


def timm_naflex() -> Family:
    sizes = dict(img_size=None, patch_size=PATCH, dynamic_img_size=None)
    sizes |= dict(pos_embed_grid_size=(SIDE // PATCH,) * 2)
    return _timm("naflexvit_base_patch16_siglip", classes=0, **sizes)


def timm_radio() -> Family:
    """timm's B, which aligns corners; nothing but its size says so, and here it has another."""
    sizes = dict(img_size=None, dynamic_img_size=None, patch_size=PATCH, init_values=0.5)
    sizes |= dict(pos_embed_grid_size=(SIDE // PATCH,) * 2, reg_tokens=3)
    family = _timm("naflexvit_base_patch16_radio_v3", classes=0, **sizes)
    family.state = {k.removeprefix("visual.trunk."): v for k, v in family.state.items()}
    family.knobs = dict(positions=image_layouts.CROPPED_CORNERS)
    return family


def timm_pe(cls: bool = True) -> Family:
    name = "vit_pe_core_base_patch16_224" if cls else "vit_pe_core_gigantic_patch14_448"
    family = _timm(name, ref_feat_shape=(SIDE // PATCH,) * 2, mlp_ratio=2.5)
    family.knobs = dict(rescale=True)
    return family


def published_pe(cls: bool = True) -> Family:
    """The same as Meta writes it."""
    family = timm_pe(cls)
    names = (
        ("trunk.attn_pool.latent", "attn_pool.probe"),
        ("trunk.attn_pool.proj", "attn_pool.attn.out_proj"),
        ("trunk.attn_pool.norm", "attn_pool.layernorm"),
        ("trunk.patch_embed.proj", "conv1"),
        ("trunk.pos_embed", "positional_embedding"),
        ("trunk.cls_token", "class_embedding"),
        ("trunk.blocks.", "transformer.resblocks."),
        ("trunk.norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("trunk.norm", "ln_post"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("trunk.", ""),
    )
    state = {}
    for name, value in family.state.items():
        for theirs, ours in names:
            name = name.replace(theirs, ours)
        state[name] = value
    for kind in ("weight", "bias"):
        parts = [state.pop(f"visual.attn_pool.{part}.{kind}") for part in ("q", "kv")]
        state[f"visual.attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    state["visual.proj"] = state.pop("visual.head.weight").T
    bias = state.pop("visual.head.bias")  # which the publisher's has not
    for name in ("positional_embedding", "class_embedding"):
        if f"visual.{name}" in state:
            value = state[f"visual.{name}"]
            state[f"visual.{name}"] = value[0, 0] if name[0] == "c" else value[0]
    model = family.call
    family.call = lambda image: model(image) - bias
    family.state = state
    family.knobs["positions"] = image_layouts.SMOOTH_BICUBIC  # timm's, not the publisher's
    return family


def eva02() -> Family:
    return _timm("eva02_base_patch16_clip_224")


def eva01() -> Family:
    return _timm("eva_giant_patch14_224", global_pool="token")


def eva02_e() -> Family:
    """Whose blocks are post-norm; a configuration says so where the size does not."""
    name = "eva02_enormous_patch14_clip_224"
    family = _timm(name, mlp_ratio=2.5)
    family.config = dict(model_cfg=dict(vision_cfg=dict(timm_model_name=name)))
    return family


def mobileclip_b() -> Family:
    """Its stem and width are fixed: patches of 16 pixels."""
    sizes = dict(embed_dim=None, num_heads=None, patch_size=None, img_size=64, depth=2)
    family = _timm("vit_base_mci_224", other=(80, 48), **sizes)
    family.size, family.head_width = (64, 64), 64
    return family


def mobileclip2_l() -> Family:
    return _timm("vit_large_patch14_clip_224")


def biomedclip() -> Family:
    family = _timm("vit_base_patch16_224", classes=0)
    trunk = family.call
    head = noisy(nn.Linear(WIDTH, EMBED, bias=False))
    family.state = dict(family.state) | {"visual.head.proj.weight": head.weight}
    family.call = lambda image: head(trunk(image))
    return family


# -- open_clip -------------------------------------------------------------------------------------


def _open_clip(eps: float = 1e-5, **switches: Any) -> Family:
    transformer = packages.open_clip("transformer")
    norm = functools.partial(transformer.LayerNorm, eps=eps)
    sizes = dict(norm_layer=norm, width=WIDTH, layers=DEPTH, heads=HEADS, mlp_ratio=2.5)
    sizes |= dict(output_dim=EMBED) | switches

    def made(size: tuple[int, int]) -> nn.Module:
        torch.manual_seed(0)
        return transformer.VisionTransformer(size, PATCH, **sizes).eval()

    model = noisy(made((SIDE, SIDE)))
    resize = packages.open_clip("model").resize_pos_embed

    def call(image: Tensor) -> Tensor:
        if image.shape[2:] == (SIDE, SIDE):
            return model(image)
        holder = nn.Module()
        holder.visual = made(tuple(image.shape[2:]))
        state = _prefixed(model, "visual.")
        resize(state, holder)
        holder.load_state_dict(state)
        return holder.visual(image)

    vision = dict(head_width=WIDTH // HEADS, norm_kwargs=dict(eps=eps))
    config = dict(model_cfg=dict(vision_cfg=vision))
    blocks = list(model.transformer.resblocks)
    return Family(_prefixed(model, "visual."), call, blocks, config, head_width=None)


def clipa() -> Family:
    return _open_clip(1e-3, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True)


def coca(width: int = EMBED) -> Family:
    return _open_clip(
        attentional_pool=True, attn_pooler_heads=8, attn_pooler_queries=6, output_dim=width
    )


FAMILIES: dict[str, Callable[[], Family]] = {
    "transformers CLIP": transformers_clip,
    "MetaCLIP 2": functools.partial(transformers_clip, "MetaClip2", "gelu"),
    "Chinese-CLIP": functools.partial(transformers_clip, "ChineseCLIP"),
    "AltCLIP": functools.partial(transformers_clip, "AltCLIP", project_dim=16),
    "TIPSv2": tipsv2,
    "TIPSv2 g": functools.partial(tipsv2, True),
    "SigLIP": transformers_siglip,
    "SigLIP timm": timm_siglip,
    "NaFlex": transformers_naflex,
    "NaFlex timm": timm_naflex,
    "PE": timm_pe,
    "PE G": functools.partial(timm_pe, False),
    "PE published": published_pe,
    "PE G published": functools.partial(published_pe, False),
    "EVA02": eva02,
    "EVA02-E": eva02_e,
    "EVA01": eva01,
    "RADIO": transformers_radio,
    "RADIO SwiGLU": functools.partial(transformers_radio, True, qkv_bias=False),
    "RADIO published": published_radio,
    "RADIO timm": timm_radio,
    "MobileCLIP-B": mobileclip_b,
    "MobileCLIP2-L-14": mobileclip2_l,
    "BiomedCLIP": biomedclip,
    "CLIPA": clipa,
    "CoCa": coca,
    "CoCa of equal widths": functools.partial(coca, WIDTH),
}
