"""Guides from tiny random models of `transformers`; nothing is downloaded."""

from __future__ import annotations

import sys

import pytest
import torch
from conformance import clip, image
from torch import nn
from torch.nn import functional as F

import sfp
from sfp.guides import TransformersGuide, build_guides
from sfp.guides.transformers import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from sfp.segmentor import ImagePreprocessor

pytestmark = pytest.mark.usefixtures("no_grad")

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def model(name: str, patch: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(SIZES, patch_size=patch, image_size=8 * patch)
    if name == "dinov2":
        sizes.pop("intermediate_size")
        return transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    if name == "registers":
        sizes.pop("intermediate_size")
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=3)
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.ViTModel(transformers.ViTConfig(**sizes), add_pooling_layer=False)


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers"])
@pytest.mark.parametrize(
    ("patch", "size", "grid"), [(8, (64, 64), (8, 8)), (14, (64, 100), (5, 7))]
)
def test_patch_tokens(name, patch, size, grid):
    guide = TransformersGuide(model=model(name, patch))
    pictures = image("ns")[..., : size[0], : size[1]]
    tokens = guide(torch.cat([pictures, pictures.flip(-1)]))
    assert (tokens.grid, tokens.prefix, tokens.data.shape[-1]) == (grid, 0, 32)
    torch.testing.assert_close(tokens.data[:1], guide(pictures).data, atol=1e-5, rtol=0)
    # the model's own call on pixels normalised its own way
    pixels = pictures * torch.tensor(CLIP_STD)[:, None, None] / 255
    pixels = pixels + torch.tensor(CLIP_MEAN)[:, None, None] / 255
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6
    pixels = (pixels - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[
        :, None, None
    ]
    whole = (grid[0] * patch, grid[1] * patch)
    pixels = F.interpolate(pixels, whole, mode="bilinear")
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    expected = guide.model(pixel_values=pixels, **options).last_hidden_state
    prefix = dict(vit=1, dinov2=1, registers=4)[name]
    torch.testing.assert_close(tokens.patches[:1], expected[:, prefix:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "dinov2", "registers"])
def test_attention(name):
    """The last layer's, of patches to patches; the model's own call gives the full maps."""
    own = model(name, 8)
    pixels = image("ns")[..., :40, :64]
    weights, grid = TransformersGuide(model=own).attention(pixels)
    assert grid == (5, 8)
    own.set_attn_implementation("eager")
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    pixels = pixels * torch.tensor(CLIP_STD)[:, None, None] + torch.tensor(CLIP_MEAN)[:, None, None]
    pixels = (pixels / 255 - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(
        IMAGENET_STD
    )[:, None, None]
    full = own(pixel_values=pixels, output_attentions=True, **options).attentions[1]
    prefix = dict(vit=1, dinov2=1, registers=4)[name]
    assert full.shape == (1, 2, 40 + prefix, 40 + prefix)
    torch.testing.assert_close(weights, full.mean(1)[:, prefix:, prefix:], atol=1e-5, rtol=1e-4)


def radio() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "RadioModel"):
        pytest.skip("this transformers has no C-RADIO")
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
    config = transformers.RadioConfig(**sizes, patch_size=8, max_img_size=128, layerscale_value=0.5)
    return transformers.RadioModel(config).eval()


def test_a_guide_that_normalises_images_itself():
    """C-RADIO: pixels in 0..1 go in, 3 class tokens and 7 registers are left out."""
    own = radio()
    guide = TransformersGuide(model=own)
    pictures = image("ns")[..., :40, :64]
    pixels = pictures * torch.tensor(CLIP_STD)[:, None, None] / 255
    pixels = pixels + torch.tensor(CLIP_MEAN)[:, None, None] / 255
    tokens = guide(pictures)
    assert (tokens.grid, tokens.prefix) == ((5, 8), 0)
    expected = own(pixels)
    torch.testing.assert_close(tokens.data, expected.features, atol=1e-5, rtol=1e-4)
    caught = []
    hook = own.encoder.layer[-1].register_forward_pre_hook(lambda m, args: caught.append(args[0]))
    own(pixels)
    hook.remove()
    entering = guide.entering(pictures)
    assert entering.prefix == 10
    torch.testing.assert_close(entering.data, caught[0], atol=1e-5, rtol=1e-4)
    weights, grid = guide.attention(pictures)
    assert grid == (5, 8)
    assert weights.shape == (1, 40, 40)
    # there is no norm at the end: what joined patches leave behind is the residual as it is
    block, patches = own.encoder.layer[-1], caught[0][:, 10:]
    torch.testing.assert_close(
        guide(pictures, "stitched").data, block(patches), atol=1e-5, rtol=1e-4
    )
    normal = block.norm1(patches)
    both = block.attention.q_proj(normal) + block.attention.k_proj(normal)  # as CorrCLIP asks for
    torch.testing.assert_close(guide(pictures, "q+k").data, both, atol=1e-5, rtol=1e-4)
    given = TransformersGuide(model=own, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert (given(pictures).data - tokens.data).abs().max() > 1e-3


def test_rows_and_columns():
    """A picture's transpose does not give the transposed tokens, but the transposed grid."""
    guide = TransformersGuide(model=model("vit", 8))
    assert guide(image("ns")[..., :40, :100]).grid == (5, 12)
    assert guide(image("ns")[..., :100, :40]).grid == (12, 5)
    assert guide(image("ns")[..., :3, :3]).grid == (1, 1)


def test_frozen():
    guide = TransformersGuide(model=model("dinov2", 8)).train()
    assert not any(module.training for module in guide.modules())
    assert not any(p.requires_grad for p in guide.parameters())
    half = guide.to(torch.bfloat16)
    assert half(image("sq")[..., :64, :64]).data.dtype == torch.bfloat16


def test_normalisation_is_the_preprocessors():
    preprocessor = ImagePreprocessor()
    assert preprocessor.mean.flatten().tolist() == pytest.approx(CLIP_MEAN)
    assert preprocessor.std.flatten().tolist() == pytest.approx(CLIP_STD)


@pytest.mark.parametrize(("kind", "patch"), [("vit", 8), ("dinov2", 14)])
def test_outputs_of_the_last_block(kind, patch):
    """What the last block's own attention computes, caught on its way."""
    encoder = model(kind, patch)
    guide = build_guides(dict(x=dict(type="transformers", model=encoder)))["x"]
    caught = {}
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: caught.__setitem__(name, out))
        for name, module in encoder.named_modules()
    ]
    pixels = image("sq")[..., :84, :112]
    plain = guide(pixels)
    for hook in hooks:
        hook.remove()
    layers = sorted({name.rpartition(".q_proj")[0] for name in caught if name.endswith("q_proj")})
    last = layers[-1]
    patches = plain.data.shape[1]
    for output in ("q", "k", "v"):
        expected = caught[f"{last}.{output}_proj"][:, -patches:]
        torch.testing.assert_close(guide(pixels, output).data, expected)
        assert guide(pixels, output).grid == plain.grid
    both = guide(pixels, "q").data + guide(pixels, "k").data
    torch.testing.assert_close(guide(pixels, "q+k").data, both)
    with pytest.raises(
        ValueError, match=r"unknown output 'keys'.*valid: entering, k, q, stitched, v"
    ):
        guide(pixels, "keys")


def test_proxyclip_with_a_guide():
    guides = build_guides(
        dict(
            dino=dict(type="transformers", model=model("vit", 8)),
            dinov2=dict(type="transformers", model=model("dinov2", 14)),
        )
    )
    pair = torch.cat([image("sq"), image("sqb")])[..., :96, :160]
    for name, grid in (("dino", (12, 20)), ("dinov2", (7, 11))):
        method = sfp.build_method("proxyclip", guide=name)
        tokens, _ = method.features(clip().visual, pair, guides=guides)
        assert tokens.grid == grid
        for both, one in zip(tokens.data, pair, strict=True):
            alone, _ = method.features(clip().visual, one[None], guides=guides)
            torch.testing.assert_close(both, alone.data[0], atol=2e-5, rtol=0)
    with pytest.raises(LookupError, match="'dinov3'; given: dino, dinov2"):
        sfp.build_method("proxyclip", guide="dinov3").features(clip().visual, pair, guides=guides)


def test_building():
    assert len(build_guides(None)) == 0
    module = nn.Identity()
    assert build_guides(dict(own=module))["own"] is module
    with pytest.raises(
        ValueError, match=r"unknown guide 'transformer'.*did you mean 'transformers'"
    ):
        build_guides(dict(dino=dict(type="transformer", model="x")))
    with pytest.raises(ValueError, match=r"guide 'dino' has no knob 'modle'.*'model'"):
        build_guides(dict(dino=dict(type="transformers", modle="x")))
    with pytest.raises(ValueError, match="needs the knob"):
        build_guides(dict(dino=dict(type="transformers")))
    with pytest.raises(ValueError, match="has no type"):
        build_guides(dict(dino=dict(model="x")))


def test_the_extra_is_named_when_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"sfp\[guides\]"):
        build_guides(dict(dino=dict(type="transformers", model="facebook/dino-vitb8")))


def test_loading_from_a_folder(tmp_path):
    saved = model("vit", 8)
    saved.save_pretrained(tmp_path)
    guide = build_guides(dict(dino=dict(type="transformers", model=str(tmp_path))))["dino"]
    picture = image("sq")[..., :64, :64]
    direct = TransformersGuide(model=saved)(picture)
    torch.testing.assert_close(guide(picture).data, direct.data, atol=1e-5, rtol=0)


def test_a_function_is_not_a_guide():
    with pytest.raises(ValueError, match=r"guide 'dino' is a function: expected .*Module"):
        build_guides(dict(dino=lambda images: images))
