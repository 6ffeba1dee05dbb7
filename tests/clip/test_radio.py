"""C-RADIO: an image tower whose texts another model's text tower reads."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import towers
from clip.test_families import TEXT, TEXTS, VISION, siglip2
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import sfp
from sfp.cli import main
from sfp.clip.checkpoints import image_layouts, loading
from sfp.clip.checkpoints.loading import load_clip, open_weights, weights_digest
from sfp.clip.checkpoints.published import ARCHITECTURES, PUBLISHED, LayoutError
from sfp.functional.grid import cropped_positions

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A C-RADIO as its publisher writes it, with SigLIP 2 in the folder text/ beside it."""
    folder = tmp_path_factory.mktemp("radio")
    torch.manual_seed(0)
    (folder / "text").mkdir()
    siglip = siglip2(folder / "text").eval()
    siglip.save_pretrained(folder / "text")
    family = towers.published_radio()
    size = dict(TEXT)["hidden_size"]
    adaptor = towers.noisy(towers.ResidualMLP(towers.WIDTH, 40, size, 1), seed=1)
    name = "radio_model.adaptors.siglip2-g.head_mlp."
    kept = {k: v for k, v in family.state.items() if not k.startswith(name)}
    kept |= {name + k: v for k, v in adaptor.state_dict().items()}
    save_file({k: v.contiguous() for k, v in kept.items()}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(do_normalize=False)))
    return folder, kept, adaptor, siglip


def test_both_towers(folders):
    folder, _, adaptor, siglip = folders
    clip = load_clip(folder, head_width=16)
    backbone = towers.transformers_radio()
    image = torch.rand(2, 3, 40, 24)
    tokens = backbone.run(image)[1][-1]  # (B, P + N, D), no norm behind them
    torch.testing.assert_close(
        clip.encode_image(image), adaptor(tokens[:, 0]), atol=1e-4, rtol=1e-4
    )
    patches = clip.visual.project(clip.visual.trace(image).leaving()).patches
    torch.testing.assert_close(patches, adaptor(tokens[:, 5:]), atol=1e-4, rtol=1e-4)
    ids = clip.text.tokenize(TEXTS)
    expected = siglip.get_text_features(input_ids=ids)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(clip.encode_text(ids), expected, atol=5e-5, rtol=1e-3)
    torch.testing.assert_close(clip.logit_scale, siglip.logit_scale.reshape(()))
    assert (clip.mean, clip.std) == ((0.0,) * 3, (255.0,) * 3)  # which are part of the tower


def test_from_words_to_labels(folders):
    folder, *_ = folders
    clip = load_clip(folder, head_width=16)
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    for method in ("radseg", "sfp"):
        model = sfp.load(clip, method, slide_crop=32, slide_stride=16, short_side=48)
        assert model.segment(picture, ["cat", "sky"]).labels.shape == (60, 80)


def test_whose_texts(folders, tmp_path, capsys):
    """Given, or in the folder beside the weights; the file and its texts both name the model."""
    folder, state, *_ = folders
    beside = open_weights(folder, head_width=16)
    given = open_weights(folder, head_width=16, texts=folder / "text")
    assert beside.digest == given.digest != open_weights(folder / "text").digest
    assert beside.texts == str(folder / "text" / "model.safetensors")
    torch.manual_seed(1)
    (tmp_path / "other").mkdir()
    siglip2(tmp_path / "other").save_pretrained(tmp_path / "other")
    other = open_weights(folder, head_width=16, texts=tmp_path / "other")
    assert other.digest != beside.digest
    assert load_clip(state, head_width=16, texts=folder / "text").text.tokenize(["sky"]).shape
    with pytest.raises(LayoutError, match=r"texts='siglip2-gopt16-384'.*as text/"):
        load_clip(state, head_width=16)
    with pytest.raises(LayoutError, match="has its own text tower: omit texts="):
        load_clip(folder / "text", texts=folder / "text")
    assert main(["weights", "check", str(folder)]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert f"itsweights{folder}/text/model.safetensors" in shown
    assert f"tokenizer{folder}/text/tokenizer.json" in shown


def test_without_an_adaptor_it_says_what_to_do(folders, tmp_path):
    """Also as `RadioModel` and timm write it."""
    folder, *_ = folders
    config = transformers.RadioConfig(**VISION | dict(max_img_size=64))
    transformers.RadioModel(config).save_pretrained(tmp_path)
    for source in (tmp_path, towers.transformers_radio().state, towers.timm_radio().state):
        with pytest.raises(LayoutError, match=r"without its adaptor to SigLIP 2.*as a guide"):
            load_clip(source, texts=folder / "text")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layers", [0, 3])
def test_adaptors(norm, layers):
    """As many residual layers as the file has, with or without a norm before the first."""
    family = towers.transformers_radio()
    adaptor = towers.noisy(towers.ResidualMLP(towers.WIDTH, 24, 16, layers, norm=norm))
    parts = {f"adaptors.siglip2-g.head_mlp.{k}": v for k, v in adaptor.state_dict().items()}
    family.state = dict(family.state) | parts
    ours, image = family.tower(), torch.rand(1, 3, 24, 40)
    torch.testing.assert_close(ours(image), adaptor(family.run(image)[0]), atol=1e-4, rtol=1e-4)


def test_a_scale_that_is_missing(folders):
    """transformers would take 1, and features would be wrong without a word."""
    _, state, *_ = folders
    state = dict(state)
    del state["radio_model.model.blocks.3.ls1.gamma"]
    with pytest.raises(LayoutError, match="11 layer scales: expected two in each block or none"):
        load_clip(state)


def test_get_fetches_the_text_tower_too(monkeypatch, tmp_path, capsys):
    fetched = []

    def located(name):
        fetched.append(name)
        path = tmp_path / name
        path.write_bytes(bytes(3))
        return path

    monkeypatch.setattr(loading, "locate", located)
    monkeypatch.setattr(loading, "complete", lambda row: None)
    monkeypatch.setattr(loading, "verify", lambda name, path: ("0" * 64, True))
    assert main(["weights", "get", "c-radio-v3-l", "c-radio-v3-b"]) == 0
    assert fetched == ["c-radio-v3-l", "c-radio-v3-b", "siglip2-gopt16-384"]


def tower_of(state: dict[str, Tensor], config: dict | None = None):
    named, image, _ = image_layouts.read(
        {
            k: v
            for k, v in image_layouts.marked(state)[0].items()
            if k.startswith(image_layouts.PREFIXES)
        },
        config,
    )
    return named, image


def test_what_transformers_writes_is_read(tmp_path):
    """Under the publisher's names, which it gives its own when it reads."""
    family = towers.transformers_radio(True)
    model = transformers.RadioModel(transformers.RadioConfig(**family.config))
    model.load_state_dict(family.state)
    model.save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    named, image = tower_of(written, json.loads((tmp_path / "config.json").read_text()))
    expected, same = tower_of(dict(family.state), family.config)
    assert image == same
    assert named.keys() == expected.keys()
    for name, value in named.items():
        torch.testing.assert_close(value, expected[name])


def test_the_class_token_is_that_of_siglip_2():
    """The publisher's configuration says which; patches do not depend on the order."""
    state = dict(towers.published_radio().state)
    heads = dict(num_attention_heads=towers.HEADS)
    plain, _ = tower_of(state, heads)
    named, image = tower_of(state, heads | dict(adaptor_configs={"siglip2-g": dict(head_idx=1)}))
    tokens = state["radio_model.model.patch_generator.cls_token.token"]
    assert torch.equal(named["visual.class_embedding"], tokens[1])
    assert torch.equal(named["visual.register_embedding"], tokens[[0, 2, 3, 4]])
    pixels, features = torch.rand(1, 3, 40, 24), []
    for weights in (plain, named):
        tower = sfp.clip.vit.VisionTransformer(image).eval()
        tower.load_state_dict({k.removeprefix("visual."): v for k, v in weights.items()})
        features.append(tower.trace(pixels).leaving())
    torch.testing.assert_close(features[0].patches, features[1].patches)
    torch.testing.assert_close(features[0].data[:, 1], features[1].data[:, 0])
    with pytest.raises(LayoutError, match="head_idx of the adaptor is 7: there are 5 tokens"):
        tower_of(state, dict(adaptor_configs={"siglip2-g": dict(head_idx=7)}))


@pytest.mark.parametrize("align", [False, True])
def test_cropped_positions(align):
    """By hand: the larger side is resized, and the rest of the square cut off."""
    table = torch.randn(4, 4, 3)
    for grid in ((6, 4), (3, 6)):
        found = cropped_positions(table, grid, align_corners=align)
        for row in range(grid[0]):
            for column in range(grid[1]):
                where = [i * 3 / 5 if align else (i + 0.5) * 4 / 6 - 0.5 for i in (row, column)]
                where = [min(max(x, 0), 3) for x in where]
                expected = torch.zeros(3)
                for y in range(4):
                    for x in range(4):
                        share = max(1 - abs(where[0] - y), 0) * max(1 - abs(where[1] - x), 0)
                        expected += share * table[y, x]
                torch.testing.assert_close(found[row, column], expected)


@pytest.mark.parametrize(
    ("width", "tokens", "config", "heads", "align"),
    [
        (768, 8, {}, 12, True),
        (1024, 8, {}, 16, False),
        (1280, 8, {}, 16, True),
        (1536, 8, {}, 24, False),
        (1152, 10, {}, 16, False),
        (1280, 10, {}, 16, False),
        (1280, 8, dict(model_type="radio", num_attention_heads=16), 16, False),
    ],
)
def test_what_sizes_tell(width, tokens, config, heads, align):
    """timm's definitions of v3-B, L, H, g and v4-SO400M, H; transformers aligns nothing."""
    names = {
        "patch_generator.embedder.weight": (width, 768),
        "patch_generator.pos_embed": (1, 128 * 128, width),
        "patch_generator.cls_token.token": (tokens, width),
    }
    state = {f"radio_model.model.{k}": torch.empty(v, device="meta") for k, v in names.items()}
    _, image = tower_of(state, config)
    assert width // image.head_width == heads
    assert (image.patch, image.image_size, image.usual_size, image.prefix) == (
        16,
        2048,
        512,
        tokens,
    )
    assert image.positions == (image_layouts.CROPPED_CORNERS if align else image_layouts.CROPPED)
    assert not image.ln_post


def test_timms_tower_of_one_size():
    """`vit_*_radio_*`, whose table is not cropped."""
    family = towers._timm("vit_base_patch16_radio_v3", classes=0, reg_tokens=3, init_values=0.5)
    state = {k.removeprefix("visual.trunk."): v for k, v in family.state.items()}
    family.state = state
    ours = family.tower()
    for size in (family.size, family.other):
        image = torch.rand(2, 3, *size)
        torch.testing.assert_close(ours(image), family.run(image)[0], atol=1e-4, rtol=1e-4)


def test_rows_of_the_table():
    rows = {name: row for name, row in PUBLISHED.items() if row.family == "C-RADIO"}
    assert len(rows) == 6
    for row in rows.values():
        text = ARCHITECTURES[PUBLISHED[row.texts].architecture]
        own = ARCHITECTURES[row.architecture]
        assert (own.text_width, own.text_layers) == (text.text_width, text.text_layers)
        assert own.embed_dim == text.embed_dim
        assert row.tokenizer is None
        assert row.file.endswith(".safetensors")


def test_a_name_finds_its_text_tower(folders, tmp_path, monkeypatch):
    """The row of C-RADIO names SigLIP 2's row; both are looked for on this machine."""
    folder, *_ = folders
    monkeypatch.setenv("SFP_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    shared = "siglip2-gopt16-384"
    for name in ("c-radio-v3-b", shared):
        monkeypatch.setitem(
            PUBLISHED, name, dataclasses.replace(PUBLISHED[name], architecture=None)
        )
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(folder / "model.safetensors", weights / "c-radio-v3-b.safetensors")
    assert weights_digest("c-radio-v3-b") is None
    shutil.copytree(folder / "text", weights / shared)
    clip = load_clip("c-radio-v3-b", head_width=16)
    assert F.normalize(clip.encode_text(clip.text.tokenize(["sky"])), dim=-1).isfinite().all()
    assert open_weights("c-radio-v3-b", head_width=16).digest == clip.digest
