"""Text towers of every family against the packages that define them, on small random weights."""

from __future__ import annotations

import math
from dataclasses import replace

import packages
import pytest
import tiny
import torch
from torch import Tensor

from sfp.clip.checkpoints import image_layouts, text_layouts
from sfp.clip.checkpoints.published import LayoutError
from sfp.clip.checkpoints.renaming import stated
from sfp.clip.text_towers import TextTower, sinusoids

SMALL = dict(
    vocab_size=90,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=3,
    max_position_embeddings=12,
)


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """With every parameter away from its initial value, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("logit_scale", "temperature")):
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def read(
    state: dict[str, Tensor], config: dict | None = None, activation: str = "quick_gelu"
) -> TextTower:
    """Our tower of a state dict, without its image side.

    `activation` is that of towers which share it with the image tower.
    """
    rest = {k: v for k, v in state.items() if not k.startswith(image_layouts.PREFIXES)}
    rest = {k: v for k, v in rest.items() if not k.startswith("logit_")}
    named, sizes, settled = text_layouts.read(rest, config)
    if not settled:
        sizes = replace(sizes, activation=activation)
    tower = sizes.build().eval()
    named.pop("logit_scale", None)
    tower.load_state_dict({k.removeprefix("text."): v for k, v in named.items()})
    return tower


def batch(vocab: int = 90, length: int = 12, pad: int = 0, end: int | None = None) -> Tensor:
    """Texts of different lengths, padded."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab - 1, (5, length), generator=generator)
    for row, size in zip(ids, (length, length - 1, length // 2, 3, 2), strict=True):
        row[size:] = pad
        if end is not None:
            row[size - 1] = end
    return ids


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.05


@torch.no_grad()
def transformers_text(kind: str, text: dict, ids: Tensor, mask: bool, **config) -> None:
    """A model of transformers' against ours, with and without what its configuration says."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{kind}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}Model")
    vision = dict(
        hidden_size=text["hidden_size"],
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    configuration = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=vision, **config
    )
    model = shaken(getattr(transformers, f"{kind}Model")(configuration))
    pad = configuration.text_config.pad_token_id
    arguments = dict(input_ids=ids)
    if mask:
        arguments["attention_mask"] = (ids != pad).long()
    out = model.get_text_features(**arguments)
    expected = getattr(out, "pooler_output", out)
    tower = read(model.state_dict(), configuration.to_dict())
    close(tower(ids), expected)
    if mask:  # padding changes nothing, so it need not be there
        close(tower(ids[3:, :3]), expected[3:])


def test_clip():
    text = dict(SMALL, eos_token_id=89, bos_token_id=88, pad_token_id=0, hidden_act="quick_gelu")
    transformers_text("CLIP", text, batch(end=89), False, projection_dim=24)


@pytest.mark.parametrize("kind", ["Siglip", "Siglip2"])
def test_siglip(kind):
    transformers_text(kind, dict(SMALL, projection_size=48), batch(pad=1), False)


def test_metaclip2():
    # an id above that of the end: the embedding is at the first end, not at the largest id
    text = dict(SMALL, eos_token_id=2, pad_token_id=1, hidden_act="quick_gelu")
    transformers_text("MetaClip2", text, batch(pad=1, end=2), False, projection_dim=24)


@pytest.mark.parametrize(
    ("kind", "text", "ids", "config"),
    [
        ("CLIP", dict(eos_token_id=40, pad_token_id=0), dict(end=40), dict(projection_dim=24)),
        ("Siglip", dict(projection_size=48, hidden_act="gelu"), dict(pad=1), {}),
        (
            "MetaClip2",
            dict(eos_token_id=2, pad_token_id=1, hidden_act="gelu"),
            dict(pad=1, end=2),
            dict(projection_dim=24),
        ),
        ("Tipsv2", dict(pad_token_id=0, hidden_act="gelu"), dict(pad=0), {}),
    ],
)
def test_what_configurations_state(kind, text, ids, config):
    """Another end, activation or eps than the family's published models have."""
    if kind != "CLIP":
        text = text | dict(layer_norm_eps=1e-2)
    text = dict(SMALL, hidden_act="quick_gelu") | text
    transformers_text(kind, text, batch(**ids), kind == "Tipsv2", **config)


def test_an_activation_that_is_not_known():
    with pytest.raises(LayoutError, match="hidden_act 'silu' is none of quick_gelu, gelu"):
        stated(dict(hidden_act="silu"))


def test_tips():
    transformers_text("Tipsv2", dict(SMALL, pad_token_id=0), batch(pad=0), True)


def test_chinese_clip():
    text = dict(SMALL, max_position_embeddings=20, pad_token_id=0)
    transformers_text("ChineseCLIP", text, batch(pad=0), True, projection_dim=24)


def test_alt_clip():
    text = dict(SMALL, max_position_embeddings=20, pad_token_id=1, project_dim=32)
    transformers_text("AltCLIP", text, batch(pad=1), True, projection_dim=24)


def test_alt_clip_lies_in_its_own_layers():
    """Its head has the layer norm, the linear layer with a bias and the projection."""
    with pytest.raises(LayoutError, match=r"text_model\.pre_LN\.weight is missing"):
        text_layouts.read({"text_model.roberta.embeddings.LayerNorm.weight": torch.ones(4)})


OPEN_CLIP = {
    "siglip": dict(
        pool_type="last",
        no_causal_mask=True,
        proj_bias=True,
        norm_kwargs={"eps": 1e-6},
        hf_tokenizer_name="timm/ViT-B-16-SigLIP",
        tokenizer_kwargs={"clean": "canonicalize"},
    ),
    "siglip2": dict(
        pool_type="last",
        no_causal_mask=True,
        proj_bias=True,
        norm_kwargs={"eps": 1e-6},
        act_kwargs={"approximate": "tanh"},
        hf_tokenizer_name="timm/ViT-B-16-SigLIP2",
        tokenizer_kwargs={"clean": "canonicalize"},
    ),
    "siglip, other switches": dict(
        pool_type="last",
        no_causal_mask=True,
        proj_bias=True,
        norm_kwargs={"eps": 1e-2},
        act_kwargs={"approximate": "tanh"},
        hf_tokenizer_name="timm/ViT-B-16-SigLIP",
    ),
    "i18n": dict(
        pool_type="last",
        no_causal_mask=True,
        proj_type="none",
        norm_kwargs={"eps": 1e-6},
        hf_tokenizer_name="timm/ViT-B-16-SigLIP-i18n-256",
        tokenizer_kwargs={"clean": "canonicalize"},
    ),
    "clipa": dict(
        pool_type="last",
        no_causal_mask=True,
        hf_tokenizer_name="bert-base-uncased",
        tokenizer_kwargs={"strip_sep_token": True},
    ),
    "worldwide": dict(pool_type="eos", eos_id=2, hf_tokenizer_name="facebook/xlm-v-base"),
    "eva": dict(),
    "mobileclip2": dict(no_causal_mask=True),
    "coca": dict(embed_cls=True),
}


@pytest.mark.parametrize("family", OPEN_CLIP)
@torch.no_grad()
def test_open_clip(family):
    module = packages.open_clip()
    settings = OPEN_CLIP[family]
    sizes = dict(context_length=12, vocab_size=90, width=48, heads=3, layers=2, mlp_ratio=2.5)
    embed = 48 if family == "i18n" else 24
    torch.manual_seed(0)
    cfg = module.CLIPTextCfg(**sizes, **settings)
    tower = shaken(module._build_text_tower(embed, cfg, quick_gelu=False))
    state = {f"text.{k}": v for k, v in tower.state_dict().items()}
    config = dict(model_cfg=dict(embed_dim=embed, text_cfg=dict(sizes, **settings)))
    ids = batch(pad=1 if family == "worldwide" else 0, end=2 if family == "worldwide" else 89)
    expected = tower(ids)
    close(read(state, config, activation="gelu")(ids), expected)


@pytest.mark.parametrize("head", ["mlp", "linear"])
@torch.no_grad()
def test_biomed_clip(head):
    """A BERT in open_clip's wrapper, with one of its two heads."""
    transformers = pytest.importorskip("transformers")
    pooler = "cls_last_hidden_state_pooler"
    torch.manual_seed(0)
    tower = shaken(
        packages.open_clip("hf_model").HFTextEncoder(
            "", 24, transformers.BertConfig(**SMALL), pooler_type=pooler, proj_type=head
        )
    )
    state = {f"text.{k}": v for k, v in tower.state_dict().items()}
    text = dict(context_length=12, hf_pooler_type=pooler)
    config = dict(model_cfg=dict(text_cfg=text))
    ids = batch()
    named, sizes, _ = text_layouts.read(state, config)
    ours = replace(sizes, head_width=16).build().eval()
    ours.load_state_dict({k.removeprefix("text."): v for k, v in named.items()})
    close(ours(ids), tower(ids))


def openai_state(**sizes: int) -> dict[str, Tensor]:
    clip = tiny.clip(**sizes)
    return {k: v for k, v in clip.state_dict().items() if not k.startswith(("visual.", "logit"))}


def test_long_clip():
    """Rows 0 to 19 of its table are the original's, the others those that were trained on."""
    state = openai_state(context=30)
    kept, trained = torch.randn(2, 30, 64)
    state |= dict(positional_embedding=kept, positional_embedding_res=trained)
    table = read(state).positional_embedding
    assert (table[:20] == kept[:20]).all()
    assert (table[20:] == trained[20:]).all()
    assert read(state).context == 30


REFUSED = {
    "another vocabulary": (lambda: openai_state(vocab=60000), "60000 tokens"),
    "two towers": (lambda: openai_state() | {"text.ln_final.bias": torch.ones(64)}, "two text"),
    "T5": (lambda: {"text.transformer.encoder.layers.0.x": torch.ones(3)}, "other than BERT"),
    "nothing": (dict, ".token_embedding.weight. is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(LayoutError, match=message):
        read(make())


def test_sinusoids():
    """Against the formula, one number after the other."""
    table = sinusoids(7, 10)
    for position in range(7):
        for i in range(5):
            rate = 10000 ** (-i / 4)
            assert table[position, i] == pytest.approx(math.sin(position * rate), abs=1e-6)
            assert table[position, 5 + i] == pytest.approx(math.cos(position * rate), abs=1e-6)
