"""Weights of other publishers: each layout against its original code, and layouts that are refused."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfp
from sfp.cli import main
from sfp.clip.checkpoints import download, layouts, published
from sfp.clip.checkpoints import metadata as facts
from sfp.clip.checkpoints.loading import (
    PUBLISHED,
    LayoutError,
    load_clip,
    open_weights,
    weights_digest,
)
from sfp.clip.checkpoints.published import (
    ARCHITECTURES,
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    OPENAI_MEAN,
    OPENAI_STD,
    Architecture,
    in_pixels,
    on_disk,
)
from sfp.clip.model import CLIP, build_clip
from sfp.evaluation.card import differences
from sfp.evaluation.settings import settings
from sfp.files import sha256_file

GOLDENS = Path(__file__).parents[1] / "goldens"
GUESS = "it is not recorded which activation"
CONFIG = dict(
    model_cfg=dict(
        embed_dim=24,
        vision_cfg=dict(layers=2, width=48, head_width=24, mlp_ratio=2.5, patch_size=4),
        text_cfg=dict(context_length=12, vocab_size=64, width=32, heads=2, layers=2),
    ),
    preprocess_cfg=dict(mean=list(HALF), std=list(HALF)),
)


# -- open_clip -----------------------------------------------------------------------------------


@functools.cache
def golden() -> dict[str, Tensor]:
    return load_file(GOLDENS / "open_clip.safetensors")


def open_clip_state() -> dict[str, Tensor]:
    return {
        k.removeprefix("weights/"): v.clone()
        for k, v in golden().items()
        if k.startswith("weights/")
    }


def custom_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower under `text.`, as in `CustomTextCLIP`."""
    kept = ("visual.", "logit_scale")
    return {k if k.startswith(kept) else f"text.{k}": v for k, v in state.items()}


def epoch(state: dict[str, Tensor]) -> dict[str, object]:
    """What open_clip's training writes: everything under `module.`, beside an optimizer."""
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    return dict(
        epoch=32,
        name="2024_01_01-model_ViT-B-16",
        state_dict={f"module.{k}": v for k, v in state.items()},
        optimizer=optimizer.state_dict(),
        scaler=dict(scale=65536.0, growth_factor=2.0, growth_interval=2000, _growth_tracker=7),
    )


def linear_projection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    projection = state.pop("text_projection")
    return state | {"text_projection.weight": projection.T.contiguous()}


FORMS = {
    "plain": lambda state: state,
    "custom_text": custom_text,
    "epoch": epoch,
    "compiled": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "linear_projection": lambda state: custom_text(linear_projection(state)),
    "float32": lambda state: {k: v.float() for k, v in state.items()},
    "logit_bias": lambda state: dict(
        state, logit_bias=torch.tensor(-10.0), logit_scale=state["logit_scale"].reshape(1)
    ),
}


def check_golden(clip: CLIP, activation: str) -> None:
    """Every stage against what open_clip computed."""
    expected = {k.split("/")[1]: v for k, v in golden().items() if k.split("/")[0] == activation}
    image, ids = golden()["image"], golden()["ids"]
    unit = torch.nn.functional.normalize
    features, text = unit(clip.encode_image(image), dim=-1), unit(clip.encode_text(ids), dim=-1)
    close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)
    close(features, expected["image_features"])
    close(text, expected["text_features"])
    close(clip.logit_scale.exp() * features @ text.T, expected["logits"], atol=1e-5)
    trace = clip.visual.trace(image)
    layers = [trace.outputs[0].data, clip.visual.blocks[-1](trace.outputs[0].data)]
    close(torch.stack(layers), expected["layers"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_open_clip_golden(tmp_path, form, activation, suffix):
    content = FORMS[form](open_clip_state())
    path = tmp_path / f"weights{suffix}"
    if suffix == ".bin":
        torch.save(content, path)
    elif form == "epoch":
        pytest.skip("safetensors hold tensors only")
    else:
        save_file(content, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load_clip(path, activation=activation, head_width=24, text_head_width=16)
    check_golden(clip, activation)


def test_the_golden_tells_what_it_should():
    """Activations, head widths and the text tower's mask each change it by more than the tolerance."""
    assert (golden()["gelu/logits"] - golden()["quick_gelu/logits"]).abs().max() > 1e-3
    for knobs in (
        dict(activation="quick_gelu", head_width=24, text_head_width=16),
        dict(activation="gelu", head_width=48, text_head_width=16),
        dict(activation="gelu", head_width=24, text_head_width=32),
    ):
        with pytest.raises(AssertionError):
            check_golden(load_clip(open_clip_state(), **knobs), "gelu")


def test_names_of_the_custom_text_layout_are_open_clips():
    with safe_open(GOLDENS / "open_clip.safetensors", "pt") as file:
        names = file.metadata()["custom_text"].split()
    assert set(names) == set(custom_text(open_clip_state()))


@pytest.mark.parametrize("quick", [False, True])
def test_open_clips_configuration_beside_the_file(tmp_path, quick):
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    config = json.loads(json.dumps(CONFIG))
    if quick:
        config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load_clip(tmp_path / "open_clip_model.safetensors")
    check_golden(clip, "quick_gelu" if quick else "gelu")
    assert clip.mean == clip.std == (127.5, 127.5, 127.5)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"model_cfg": 3}',
        '{"model_cfg": {"vision_cfg": {"head_width": null}, "text_cfg": {}}}',
        '{"model_cfg": {"vision_cfg": {}, "text_cfg": {"heads": 0}}}',
        '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"mean": 0.5}}',
        '{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}, "preprocess_cfg": {"std": [1, 2]}}',
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, content):
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(sfp.WeightsError, match=r"open_clip_config\.json, which should describe"):
        load_clip(tmp_path / "open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("tower", "setting"),
    [
        ("text_cfg", dict(pool_type="last")),
        ("text_cfg", dict(hf_tokenizer_name="somebody/tokenizer")),
        ("vision_cfg", dict(pool_type="avg")),
        ("vision_cfg", dict(norm_kwargs=dict(eps=1e-6))),
        ("vision_cfg", dict(pos_embed_type="sin_cos_2d")),
    ],
)
def test_a_configuration_of_another_model(tmp_path, tower, setting):
    """What no tensor shows, and what would be computed wrongly without a word."""
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    config = json.loads(json.dumps(CONFIG))
    config["model_cfg"][tower] |= setting
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        LayoutError, match=f"not a plain CLIP: {next(iter(setting))} of its {tower}"
    ):
        load_clip(tmp_path / "open_clip_model.safetensors")


# -- transformers --------------------------------------------------------------------------------


def transformers_clip(activation: str = "gelu", **vision: int):
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_act=activation, num_hidden_layers=2)
    text = dict(
        tower,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=50,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=62,
        eos_token_id=63,
        pad_token_id=0,
    )
    images = dict(
        tower,
        hidden_size=48,
        intermediate_size=100,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLIPModel(
            CLIPConfig(text_config=text, vision_config=images | vision, projection_dim=24)
        ).eval()
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.data += torch.randn_like(parameter) * 0.15
    return model


def check_transformers(clip: CLIP, model) -> None:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 62, (3, 12), generator=generator)
    for row, end in enumerate((4, 11, 7)):
        ids[row, 0], ids[row, end], ids[row, end + 1 :] = 62, 63, 0
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=image)
    unit = torch.nn.functional.normalize
    features, text = unit(clip.encode_image(image), dim=-1), unit(clip.encode_text(ids), dim=-1)
    close = functools.partial(torch.testing.assert_close, atol=2e-6, rtol=1e-5)
    close(features, expected.image_embeds)
    close(text, expected.text_embeds)
    close(clip.logit_scale.exp() * features @ text.T, expected.logits_per_image, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("vision", [dict(), dict(num_attention_heads=4), dict(hidden_size=64)])
def test_transformers_clip(tmp_path, activation, vision):
    """Its `save_pretrained`, read with all that its configuration says; equal logits."""
    model = transformers_clip(activation, **vision)
    model.save_pretrained(tmp_path)
    images = dict(image_mean=list(HALF), image_std=[0.25] * 3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = load_clip(tmp_path / "model.safetensors")
    check_transformers(clip, model)
    assert (clip.mean, clip.std) == ((127.5,) * 3, (63.75,) * 3)


@pytest.mark.parametrize("kind", ["AltCLIP", "ChineseCLIP"])
def test_clips_beside_other_text_towers(tmp_path, kind):
    """Folders as transformers writes them; AltCLIP's have other names than the model in memory."""
    import transformers

    tower = dict(hidden_size=48, num_attention_heads=3, num_hidden_layers=2, intermediate_size=70)
    text = tower | dict(
        vocab_size=60, max_position_embeddings=90, pad_token_id=int(kind == "AltCLIP")
    )
    images = tower | dict(image_size=24, patch_size=8, hidden_act="quick_gelu")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config=images, projection_dim=24
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    clip = load_clip(tmp_path)
    image, ids = torch.randn(2, 3, 24, 24), torch.randint(3, 60, (3, 12))
    with torch.no_grad():
        pairs = [
            (clip.encode_image(image), model.get_image_features(pixel_values=image)),
            (clip.encode_text(ids), model.get_text_features(ids, torch.ones_like(ids))),
        ]
    for found, out in pairs:
        expected = getattr(out, "pooler_output", out)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


def test_transformers_clip_without_its_configuration():
    model = transformers_clip("quick_gelu")
    state = model.state_dict()
    state["text_model.embeddings.position_ids"] = torch.arange(12)[None]  # in older files
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    with pytest.warns(UserWarning, match=GUESS):
        clip = load_clip(state, head_width=24, text_head_width=16)
    check_transformers(clip, model)
    with pytest.raises(
        LayoutError, match="width 48 cannot be divided into attention heads of width 64"
    ):
        load_clip(state, activation="gelu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vision_config=dict(hidden_act="gelu")), "hidden_act"),
        (dict(text_config=dict(hidden_act="gelu_new"), vision_config=dict(hidden_act="gelu_new")),
         "gelu_new"),
        (dict(vision_config=dict(layer_norm_eps=1e-6)), "layer_norm_eps"),
        (dict(vision_config=dict(num_attention_heads=0)), "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_transformers_configurations_that_are_refused(tmp_path, change, message):
    transformers_clip("quick_gelu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sfp.WeightsError, match=message):
        load_clip(tmp_path / "model.safetensors")


# -- what is refused -----------------------------------------------------------------------------


def open_clip_with(*names: str) -> dict[str, Tensor]:
    return open_clip_state() | {name: torch.ones(2) for name in names}


def without(state: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not k.startswith(prefixes)}


BLOCK = "visual.transformer.resblocks.0"
REFUSED = [
    (lambda: open_clip_with("radio_model.model.patch_generator.pos_embed"), "C-RADIO.*a guide"),
    (lambda: open_clip_with("visual.trunk.stages.0.blocks.0.norm.weight"), "convolutional"),
    (lambda: open_clip_with("visual.trunk.patch_embed.backbone.stem.conv1.weight"), "ViTamin"),
    (lambda: open_clip_with("visual.trunk.attn_pool.latent"), "tensors do not fit each other"),
    (lambda: open_clip_with("visual.trunk.blocks.0.norm1.weight"), "two tensors for visual"),
    (lambda: open_clip_with("visual.attn_pool.query"), "tensors do not fit each other"),
    (lambda: open_clip_with("text.transformer.embeddings.LayerNorm.bias"), "other than BERT"),
    (lambda: open_clip_with("text.cls_emb"), "cls_emb is"),
    (lambda: open_clip_with("text.transformer.shared.weight"), "T5 or NLLB"),
    (lambda: {"image_model.embeddings.cls_token": torch.ones(2)}, "FLAVA"),
    (lambda: {"vision_model.blocks.0.attn.q_proj.weight": torch.ones(2)}, "jina-clip.*never run"),
    (lambda: {"visual_model.head.blocks.0.norm1.weight": torch.ones(2)}, r"dino\.txt"),
    (lambda: {"vision_model.embeddings.convolution.weight": torch.ones(2)}, "ALIGN"),
    (lambda: open_clip_with(f"{BLOCK}.ls_1.gamma"), "layer scale"),
    (lambda: open_clip_with(f"{BLOCK}.attn.ln_q.weight"), "blocks have more than CLIP's"),
    (lambda: open_clip_with("visual.layer1.0.conv1.weight"), "ResNet CLIP"),
    (lambda: open_clip_with("text.ln_final.weight"), "two text towers"),
    (lambda: open_clip_with("text_projection.bias"), "unexpected text_projection.bias"),
    (
        lambda: without(transformers_clip().state_dict(), "text_model."),
        r"text_model\.\* is missing",
    ),
    (lambda: without(transformers_clip().state_dict(), "vision_model."), "one tower"),
    (
        lambda: without(
            transformers_clip().state_dict(),
            "vision_model.encoder.layers.1.self_attn.q_proj.weight",
        ),
        "in_proj_weight cannot be put together",
    ),
    (lambda: without(open_clip_state(), "visual.transformer.resblocks.0"), "missing visual"),
    (
        lambda: dict(open_clip_state(), **{"token_embedding.weight": torch.ones(250100, 32)}),
        "vocabulary of 250100 tokens.*another tokenizer",
    ),
    (lambda: {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(3)}, "found 2 tensors: conv1"),
    (lambda: {"module.": torch.ones(2)}, "not a CLIP state dict"),
]


@pytest.mark.parametrize(("state", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_models_of_other_kinds(tmp_path, state, message):
    """One error, with the path, what it is, and which layouts are accepted."""
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in state().items()}, path)
    knobs = dict(activation="gelu", head_width=24, text_head_width=16)
    with pytest.raises(LayoutError, match=message) as error:
        load_clip(path, **knobs)
    for part in (str(path), "accepted are CLIPs with a plain ViT", "open_clip", "CLIPModel"):
        assert part in str(error.value)
    assert isinstance(error.value, sfp.WeightsError)
    assert isinstance(error.value, ValueError)
    assert "\n" not in str(error.value)


def test_a_part_of_a_sharded_checkpoint(tmp_path):
    path = tmp_path / "open_clip_pytorch_model-00001-of-00002.safetensors"
    save_file(without(open_clip_state(), "transformer."), path)
    with pytest.raises(LayoutError, match="is only part"):
        load_clip(path, activation="gelu", head_width=24)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_damaged_state_dicts_end_in_one_error(seed):
    """Names dropped, renamed and swapped, shapes and types changed: `LayoutError` or a model."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda n: int(torch.randint(n, (), generator=generator))  # noqa: E731
    state = [
        open_clip_state,
        lambda: custom_text(open_clip_state()),
        lambda: dict(transformers_clip().state_dict()),
    ][seed % 3]()
    for _ in range(1 + pick(3)):
        name = list(state)[pick(len(state))]
        value = state[name]
        match pick(6):
            case 0:
                del state[name]
            case 1:
                state[f"x.{name}"] = state.pop(name)
            case 2:
                state[name] = value.flatten()[:1]
            case 3:
                state[name] = value[None]
            case 4:
                state[name] = value.long()
            case 5:
                state[name] = value.new_empty(0)
    with pytest.raises(LayoutError, match="accepted are"):
        load_clip(state, activation="gelu", head_width=24, text_head_width=16)


# -- activation, heads and normalisation ---------------------------------------------------------


def saved(path: Path, form: str = "plain", **size: int) -> Path:
    """A small CLIP with heads of 64, in one of open_clip's forms."""
    state = {k: v.clone() for k, v in tiny.clip(layers=2, vocab=64, **size).state_dict().items()}
    torch.save(FORMS[form](state), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form", "expected", "certain"),
    [
        ("model.pt", "plain", "quick_gelu", False),
        ("open_clip_pytorch_model.bin", "plain", "gelu", False),
        ("model.pt", "custom_text", "gelu", False),
        ("model.pt", "epoch", "gelu", False),
        ("vit_b_32-quickgelu-laion400m_e32.pt", "plain", "quick_gelu", True),
        ("ViT-B-32-quick_gelu.pt", "custom_text", "quick_gelu", True),
        ("ViT-B-16-dfn2b.bin", "plain", "quick_gelu", True),
        ("ViT-L-14-laion2b_s32b_b82k.safetensors", "custom_text", "gelu", True),
    ],
)
def test_the_activation_of_a_file(tmp_path, name, form, expected, certain):
    path = saved(tmp_path / name, form)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip = load_clip(path)
    assert clip.activation == expected
    assert [bool(re.search(GUESS, str(w.message))) for w in caught] == [True] * (not certain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for activation in ("gelu", "quick_gelu"):
            assert load_clip(f"{path}@{activation}").activation == activation
            assert load_clip(path, activation=activation).activation == activation
            assert load_clip(f"{path}@quick_gelu", activation=activation).activation == activation


def test_a_file_in_the_hubs_cache_has_the_facts_of_its_row(tmp_path):
    folder = tmp_path / "models--laion--CLIP-ViT-L-14-laion2B-s32B-b82K" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    clip = load_clip(saved(folder / "open_clip_pytorch_model.bin"))
    assert clip.activation == "gelu"
    assert clip.mean == (127.5,) * 3
    with pytest.warns(UserWarning, match=GUESS):
        load_clip(saved(folder / "other.bin"))


def test_an_at_sign_in_a_file_name_is_no_suffix(tmp_path):
    path = saved(tmp_path / "weights@gelu", "custom_text")
    with pytest.warns(UserWarning, match=GUESS):
        assert load_clip(path).activation == "gelu"
    with pytest.raises(sfp.WeightsError, match="neither a file nor a known name"):
        load_clip(tmp_path / "weights@relu")


@pytest.mark.parametrize(
    ("width", "heads"), [(64, 1), (1280, 16), (1408, 16), (1664, 16), (896, 14), (768, 12)]
)
def test_heads_of_published_widths(width, heads):
    """As open_clip's configurations have them; only the large image towers have wider heads."""
    with torch.device("meta"):
        state = CLIP(**dict(tiny.SIZE, width=width, text_width=1280)).state_dict()
        read = layouts.recognise(state)
        clip = build_clip(read.state, read.image, read.text)
    assert clip.visual.blocks[0].attn.num_heads == heads
    assert clip.transformer.resblocks[0].attn.num_heads == 20


def test_what_changes_features_changes_the_digest(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(open_clip_state(), path)
    sizes = [(24, 16), (48, 16), (24, 32)]
    knobs = [dict(activation="gelu", head_width=a, text_head_width=b) for a, b in sizes]
    knobs.append(dict(knobs[0], activation="quick_gelu"))
    assert len({load_clip(path, **k).digest for k in knobs}) == 4


def test_the_table():
    assert in_pixels(OPENAI_MEAN, OPENAI_STD) == (CLIP_MEAN, CLIP_STD)
    exact = torch.tensor([OPENAI_MEAN, OPENAI_STD]) * 255
    torch.testing.assert_close(exact, torch.tensor([CLIP_MEAN, CLIP_STD]), atol=6e-4, rtol=0)
    hub = {name: row for name, row in PUBLISHED.items() if ":" in name}
    openai = {"ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"}
    assert len({row.file for row in PUBLISHED.values()}) == len(PUBLISHED)
    assert len({row.repo for row in PUBLISHED.values()}) == len(PUBLISHED)  # None for the mini
    for name, row in PUBLISHED.items():
        sizes = ARCHITECTURES[row.architecture]
        assert sizes.image_size % sizes.patch == 0
        assert sizes.width % published.HEAD_WIDTHS.get(sizes.width, 64) == 0
        assert row.activation in ("gelu", "quick_gelu") or (name not in hub and not row.activation)
        assert (row.sha256 is not None) == (name in openai)
    for name in hub:  # the published statements: OpenAI's recipe kept by these two
        assert (hub[name].activation == "quick_gelu") == (
            ("metaclip_" in name and "altogether" not in name)
            or name.split(":")[1] in ("dfn2b", "dfn5b")
            or name == "ViT-B-32:laion400m_e32"
        )  # fmt: skip
    assert [n for n, row in hub.items() if row.mean == HALF] == ["ViT-L-14:laion2b_s32b_b82k"]


def test_a_setting_that_no_tensor_shows(cache, monkeypatch):
    """MobileCLIP2-L-14's text tower is not causal; its row says so where no configuration does."""
    monkeypatch.setitem(published.SETTINGS, "ViT-B-32", published.SETTINGS["MobileCLIP2-L-14"])
    monkeypatch.setitem(ARCHITECTURES, "ViT-B-32", Architecture(8, 64, 64, 2, 64, 2, 32))
    saved(cache / "ViT-B-32-datacomp_xl_s13b_b90k.bin")
    name = "ViT-B-32:datacomp_xl_s13b_b90k"
    assert open_weights(name).text.causal is False
    assert open_weights(tiny.save(cache / "other.safetensors")).text.causal


def test_rows_by_name_and_place(tmp_path):
    shipped = PUBLISHED["mini"].shipped
    for weights in ("mini", shipped, str(shipped)):
        assert published.find(weights) is PUBLISHED["mini"]
        assert published.short_side(weights) == 224
    assert published.short_side("mini@gelu") == 224
    assert published.short_side("ViT-B/16") == published.short_side("my/clip.pt") == 336
    assert published.short_side({}) == 336
    assert published.find({}) is published.find("my/clip.pt") is None
    assert published.find(tmp_path / "mini.safetensors") is None  # another file of that name
    assert published.find("ViT-B/16") is PUBLISHED["ViT-B/16"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "cache" / "weights"
    folder.mkdir(parents=True)
    return folder


def test_a_copy_in_the_cache_folder_needs_no_hub(cache, monkeypatch):
    """With the row's activation and normalisation; and the architecture has to be right."""
    name = "ViT-B-32:datacomp_xl_s13b_b90k"
    monkeypatch.setitem(ARCHITECTURES, "ViT-B-32", Architecture(8, 64, 64, 2, 64, 2, 32))
    path = saved(cache / "ViT-B-32-datacomp_xl_s13b_b90k.bin")
    clip = load_clip(name)
    assert clip.activation == "gelu"
    assert not open_weights(name).verified
    assert clip.digest == weights_digest(name)
    saved(path, image_size=32, text_layers=1)
    wrong = (
        r"is not a ViT-B-32: image size 32, expected 64; text blocks 1, expected 2\. It is another"
    )
    with pytest.raises(LayoutError, match=wrong):
        load_clip(name)


def test_digests_without_the_weights(cache, monkeypatch):
    assert weights_digest("ViT-B/16") == PUBLISHED["ViT-B/16"].sha256
    assert weights_digest("ViT-B/16@gelu") not in (None, PUBLISHED["ViT-B/16"].sha256)
    assert weights_digest("ViT-B-16:dfn2b") is None
    path = saved(cache / "own.pt")
    for source in (path, f"{path}@gelu"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert weights_digest(source) == load_clip(source).digest


# -- normalisation reaches the images ------------------------------------------------------------


def half_weights(folder: Path) -> Path:
    """Readable words, and a configuration that says mean = std = 0.5."""
    path = tiny.save(folder / "model.safetensors", **tiny.WORDS)
    config = dict(CONFIG, model_cfg=dict(vision_cfg={}, text_cfg=dict(width=64, heads=1)))
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return path


def test_the_segmentor_normalises_as_the_weights_want_it(tmp_path):
    build = functools.partial(sfp.OpenVocabSegmentor, classes=["cat", "dog"], method="clip")
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    data = dict(inputs=[image])
    rgb = image.flip(0).float()
    plain = build(tiny.clip(**tiny.WORDS)).data_preprocessor(data)["inputs"][0]
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    assert torch.equal(plain, (rgb - mean) / std)
    path = half_weights(tmp_path)
    half = build(path)
    torch.testing.assert_close(half.data_preprocessor(data)["inputs"][0], rgb / 127.5 - 1)
    given = build(path, data_preprocessor=dict(type="ImagePreprocessor", mean=[1, 2, 3]))
    torch.testing.assert_close(
        given.data_preprocessor(data)["inputs"][0],
        (rgb - torch.tensor([1.0, 2, 3])[:, None, None]) / 127.5,
    )


def test_guides_see_the_same_picture_whatever_the_weights(tmp_path):
    from sfp.guides import TransformersGuide

    class Eye(torch.nn.Module):
        """Gives back the pixels it is shown, one patch a pixel."""

        def __init__(self):
            super().__init__()
            self.config = argparse.Namespace(patch_size=1)
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pixel_values):
            return argparse.Namespace(last_hidden_state=pixel_values.flatten(2).mT)

    seen = []
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    for weights in (tiny.clip(**tiny.WORDS), half_weights(tmp_path)):
        guide = TransformersGuide(model=Eye())
        segmentor = sfp.OpenVocabSegmentor(weights, ["cat"], "clip", guides=dict(eye=guide))
        seen.append(guide(segmentor.data_preprocessor(dict(inputs=[image]))["inputs"][0][None]))
    expected = image.flip(0).float().flatten(1).T / 255
    mean, std = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for tokens in seen:
        torch.testing.assert_close(tokens.data[0], (expected - mean) / std, atol=1e-5, rtol=1e-5)


def test_benchmarks_take_the_normalisation_of_their_weights(tmp_path):
    """Numbers of weights with another normalisation compare: it belongs to the weights."""
    from mmengine.config import Config

    path = str(Path(__file__).parents[2] / "configs" / "cfg_mini.py")
    config, other = Config.fromfile(path), Config.fromfile(path)
    other.model.weights = str(half_weights(tmp_path))
    groups = {d.group for d in differences(settings(config), settings(other))}
    assert groups == {"weights"}


# -- the command ---------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return main(["weights", *arguments])


def test_list(cache, capsys):
    (cache / "ViT-B-16-dfn2b.safetensors").write_bytes(bytes(123456))
    assert run("list") == 0
    shown = capsys.readouterr().out
    for name in PUBLISHED:
        assert f" {name} " in shown
    lines = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert lines["ViT-B-16:dfn2b"].endswith("123 kB  │")
    assert lines["ViT-B-16:metaclip_400m"].endswith("-       │")
    assert "0.5" in lines["ViT-L-14:laion2b_s32b_b82k"]


def test_the_page_shows_the_table(capsys):
    assert run("list", "--markdown") == 0
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text()
    shown = page.split("<!-- weights: begin -->\n")[1].split("<!-- weights: end -->")[0]
    assert shown == capsys.readouterr().out


def test_check_a_file(tmp_path, capsys):
    save_file(open_clip_state(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    assert run("check", str(tmp_path / "open_clip_model.safetensors")) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    sha256 = sha256_file(tmp_path / "open_clip_model.safetensors")
    for part in (
        sha256,
        "no published hash to compare with",
        "OpenAI or open_clip",
        "tensors of bfloat16",
        "patch 4, 16 pixels, width 48, 2 blocks, 2 heads",
        "width 32, 2 blocks, 2 heads, context 12, vocabulary 64",
        "gelu (open_clip_config.json)",
        "mean 0.5, 0.5, 0.5",
        "all finite",
    ):
        assert part in shown
    (tmp_path / "open_clip_config.json").unlink()
    assert run("check", f"{saved(tmp_path / 'epoch.pt', 'epoch')}") == 0
    assert "gelu (open_clip's default; a guess" in capsys.readouterr().out


def test_check_mini(capsys):
    assert run("check", "mini") == 0
    assert "patch 16, 224 pixels" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "nan", "other", "missing"])
def test_check_finds_damage(tmp_path, damage, capsys):
    path = tiny.save(tmp_path / "model.safetensors")
    state = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "nan":
        state["visual.proj"][3, 4] = torch.nan
        save_file(state, path)
    elif damage == "other":
        save_file({"weight": torch.ones(3)}, path)
    else:
        path.unlink()
    assert run("check", str(path)) == 3
    assert str(path) in capsys.readouterr().err


def test_check_does_not_download(cache, capsys):
    for name in ("ViT-L/14", "ViT-L/14@gelu"):
        assert run("check", name) == 3
        assert "run `sfp weights get ViT-L/14` first" in capsys.readouterr().err


def test_get_wants_names(capsys):
    assert run("get", "ViT-B-16:dfn3b") == 2
    shown = capsys.readouterr().err
    assert "'ViT-B-16:dfn3b'; did you mean 'ViT-B-16:dfn2b'" in shown
    for arguments in ([], ["get"], ["check"]):
        with pytest.raises(SystemExit) as exit_:
            run(*arguments)
        assert exit_.value.code == 2


def test_without_huggingface_hub(cache, monkeypatch):
    """Names of the Hub say what to install, and everything else works."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert on_disk("ViT-B-16:dfn2b") is None
    with pytest.raises(sfp.WeightsError, match="could not download ViT-B-16:dfn2b") as error:
        load_clip("ViT-B-16:dfn2b")
    for part in (
        "pip install 'sfp[hub]'",
        "apple/DFN2B-CLIP-ViT-B-16/resolve/main/open_clip_model.safetensors",
        str(cache / "ViT-B-16-dfn2b.safetensors"),
        "open_clip_pytorch_model.bin from there, as ViT-B-16-dfn2b.bin",
    ):
        assert part in str(error.value)


def test_layout_names():
    assert layouts.recognise(tiny.clip().state_dict()).layout == layouts.SHARED
    assert facts.facts(None, layouts.OPENAI).certain


def test_gated_repositories_say_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import GatedRepoError

    def refused(repo, name, **options):
        raise GatedRepoError.__new__(GatedRepoError)

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "hf_hub_download", refused)
    with pytest.raises(
        OSError, match=r"org/model is gated: accept its terms at .*org/model.*HF_TOKEN"
    ):
        download.from_hub("org/model")


def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch):
    """Its library would repeat its request five times, with a line on stderr for each."""
    hub = pytest.importorskip("huggingface_hub")

    def asked(*args, **options):
        raise AssertionError

    monkeypatch.setattr(hub, "hf_hub_download", asked)
    monkeypatch.setattr(download.urllib.request, "getproxies", dict)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")  # a name that never resolves, RFC 2606
    with pytest.raises(OSError, match=r"hub\.invalid cannot be found"):
        download.from_hub("org/model")
