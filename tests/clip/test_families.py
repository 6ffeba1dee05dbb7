"""Model folders of transformers with weights, configuration and tokenizer: from words to labels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from clip.test_tokenizers import bpe
from torch import Tensor

import sfp
from sfp.cli import main
from sfp.clip.checkpoints.loading import load_clip, open_weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

VISION = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=12,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
TEXT = dict(
    vocab_size=420,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
TEXTS = ["a photo of a cat", "sky", "traffic light"]


def tips(folder, **vision):
    if not hasattr(transformers, "Tipsv2Model"):
        pytest.skip("this transformers has no TIPSv2")
    config = transformers.Tipsv2Config(
        text_config=dict(TEXT, pad_token_id=0), vision_config=VISION | vision
    )
    transformers.Tipsv2Tokenizer(*bpe(["<pad>", "<unk>"])).save_pretrained(folder)
    images = dict(do_normalize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return transformers.Tipsv2Model(config)


def tips_gated(folder):
    """As TIPSv2 g/14, whose MLPs are SwiGLUs."""
    return tips(folder, use_swiglu_ffn=True)


def siglip2(folder):
    config = transformers.SiglipConfig(
        text_config=dict(TEXT, projection_size=64), vision_config=VISION
    )
    vocabulary = bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    transformers.Siglip2Tokenizer(*vocabulary).save_pretrained(folder)
    return transformers.SiglipModel(config)


def metaclip2(folder):
    if not hasattr(transformers, "MetaClip2Model"):
        pytest.skip("this transformers has no MetaCLIP 2")
    text = dict(TEXT, eos_token_id=2, pad_token_id=1, hidden_act="gelu")
    config = transformers.MetaClip2Config(
        text_config=text, vision_config=dict(VISION, hidden_act="gelu"), projection_dim=48
    )
    transformers.Siglip2Tokenizer(*bpe(["<s>", "<pad>", "</s>", "<unk>"])).save_pretrained(folder)
    return transformers.MetaClip2Model(config)


FAMILIES = dict(tips=tips, tips_gated=tips_gated, siglip2=siglip2, metaclip2=metaclip2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Its folder and the package's own model."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = FAMILIES[request.param](folder).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("temperature", "logit_scale", "logit_bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return request.param, folder, model


def pooled(out) -> Tensor:
    return getattr(out, "pooler_output", out)


@pytest.mark.slow
@torch.no_grad()
def test_both_towers_and_the_tokenizer(family):
    name, folder, model = family
    clip = load_clip(folder)
    image = torch.randn(2, 3, 32, 32)
    expected = pooled(model.get_image_features(pixel_values=image))
    torch.testing.assert_close(clip.encode_image(image), expected, atol=5e-5, rtol=1e-3)
    ids = clip.text.tokenize(TEXTS)
    assert ids.max() > 10  # words, not marks alone
    mask = dict(attention_mask=(ids != 0).long()) if name.startswith("tips") else {}
    expected = pooled(model.get_text_features(input_ids=ids, **mask))
    torch.testing.assert_close(clip.encode_text(ids), expected, atol=5e-5, rtol=1e-3)
    scale = 1 / model.temperature if name.startswith("tips") else model.logit_scale.exp()
    torch.testing.assert_close(clip.logit_scale.exp(), scale.reshape(()))
    assert (clip.logit_bias is None) == (name != "siglip2")
    if name.startswith("tips"):  # its images are not normalised, whatever mean is written there
        assert (clip.mean, clip.std) == ((0.0,) * 3, (255.0,) * 3)


@pytest.mark.slow
def test_from_words_to_labels(family):
    """One line for a model, and one for a picture."""
    _, folder, _ = family
    model = sfp.load(folder, method="naclip", slide_crop=32, slide_stride=16, short_side=48)
    picture = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    result = model.segment(picture, ["cat", "sky", "traffic light"])
    assert result.labels.shape == (60, 80)


def test_check_says_what_a_folder_is(family, capsys):
    _, folder, _ = family
    assert main(["weights", "check", str(folder)]) == 0
    shown = "".join(capsys.readouterr().out.replace("│", "").split())
    assert f"{folder}/tokenizer.json" in shown
    assert "width64,12blocks,4heads" in shown
    assert "context64,vocabulary420" in shown


@pytest.mark.slow
def test_the_tokenizer_is_part_of_the_digest(family):
    _, folder, _ = family
    digest = open_weights(folder).digest
    path = folder / "tokenizer.json"
    text = path.read_text()
    try:
        path.write_text(text + " ")
        assert open_weights(folder).digest != digest
        path.unlink()
        assert open_weights(folder).digest != digest
        with pytest.raises(sfp.WeightsError, match=r"tokenizer\.json"):
            sfp.load(folder, method="naclip").encode(["cat"])
    finally:
        path.write_text(text)
    assert open_weights(folder).digest == digest == load_clip(folder).digest
