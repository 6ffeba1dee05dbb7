"""Sources of weights: a file, a folder, shards with their index, a repository on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import sfp
from sfp.clip.checkpoints import download, sources
from sfp.clip.checkpoints.loading import find_tokenizer, load_clip, locate, open_weights
from sfp.clip.checkpoints.published import PUBLISHED, WEIGHT_FILES
from sfp.clip.text_towers import TextConfig
from sfp.clip.tokenizers import SIGLIP

INDEX = "model.safetensors.index.json"


def state() -> dict[str, torch.Tensor]:
    return {k: v.contiguous() for k, v in tiny.clip(layers=2).state_dict().items()}


def sharded(folder: Path, *, suffix: str = "safetensors", count: int = 3) -> Path:
    """The small CLIP in several files, with the index that transformers writes."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "pytorch_model" if suffix == "bin" else "model"
    names, tensors = {}, list(state().items())
    for i in range(count):
        file = f"{stem}-{i + 1:05}-of-{count:05}.{suffix}"
        part = dict(tensors[i::count])
        (torch.save if suffix == "bin" else save_file)(part, folder / file)
        names |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps(dict(metadata=dict(total_size=1), weight_map=names)))
    return index


def same(source: object) -> None:
    """Whether a source gives the small CLIP, to the last bit."""
    found = load_clip(source, activation="quick_gelu").state_dict()
    assert found.keys() == state().keys()
    assert all(torch.equal(found[name], value) for name, value in state().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in WEIGHT_FILES if not n.endswith("json")] + ["my.pt"])
def test_a_folder_with_one_file(tmp_path, name):
    file = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(state(), file)
    same(tmp_path)
    same(str(tmp_path))
    assert locate(tmp_path) == locate(f"{tmp_path}@gelu") == file


def test_a_folder_of_timm_has_the_whole_model_under_open_clips_name(tmp_path):
    save_file(state(), tmp_path / "open_clip_model.safetensors")
    save_file({"blocks.0.norm1.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    same(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    index = sharded(tmp_path / "model", suffix=suffix)
    same(index)
    same(tmp_path / "model")
    digest = open_weights(index).digest
    shard = index.parent / json.loads(index.read_text())["weight_map"]["visual.proj"]
    part = torch.load(shard) if suffix == "bin" else load_file(shard)
    part = {k: v + 1 if k == "visual.proj" else v.clone() for k, v in part.items()}
    (torch.save if suffix == "bin" else save_file)(part, shard)
    assert open_weights(index).digest != digest


def test_the_configuration_beside_shards_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.CLIPConfig(
        text_config=dict(small, vocab_size=99, max_position_embeddings=20, hidden_act="gelu"),
        vision_config=dict(small, image_size=32, patch_size=8, hidden_act="gelu"),
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path, max_shard_size="100kB")
    assert (tmp_path / INDEX).is_file()
    for source in (tmp_path, tmp_path / INDEX):
        clip = load_clip(source)
        assert clip.activation == "gelu"
        assert clip.visual.blocks[0].attn.num_heads == 4
        image = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected = model.get_image_features(pixel_values=image)
        expected = getattr(expected, "pooler_output", expected)
        torch.testing.assert_close(clip.encode_image(image), expected, atol=1e-5, rtol=1e-4)


def missing_shard(folder):
    index = sharded(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    return index


def shard_of_another_model(folder):
    index = sharded(folder)
    save_file({"weight": torch.ones(2)}, folder / "model-00002-of-00003.safetensors")
    return index


def shard_alone(folder):
    sharded(folder)
    return folder / "model-00002-of-00003.safetensors"


def shard_without_index(folder):
    sharded(folder).unlink()
    return folder / "model-00001-of-00003.safetensors"


def folder_of_shards_without_index(folder):
    sharded(folder).unlink()
    return folder


def index_with(content: str):
    def make(folder):
        folder.mkdir()
        (folder / INDEX).write_text(content)
        return folder

    return make


def two_files(folder):
    folder.mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(state(), folder / name)
    return folder


def empty(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


OUTSIDE = json.dumps(dict(weight_map={"visual.proj": "../../secret.safetensors"}))
ERRORS = {
    "missing shard": (missing_shard, "1 are not in its folder: model-00002-of-00003.safetensors"),
    "shard of another model": (shard_of_another_model, "which its parts do not contain"),
    "shard alone": (shard_alone, r"is only part .*give the index, .*index\.json$"),
    "shard without index": (shard_without_index, r"index\.json, which is missing"),
    "shards without index": (folder_of_shards_without_index, r"index\.json, which is missing"),
    "no JSON": (index_with("{"), f"cannot read .*{INDEX}"),
    "no map": (index_with("{}"), f"cannot read .*{INDEX}"),
    "empty map": (index_with('{"weight_map": {}}'), f"cannot read .*{INDEX}"),
    "a list": (index_with("[]"), f"cannot read .*{INDEX}"),
    "files elsewhere": (index_with(OUTSIDE), "of the same folder"),
    "several files": (two_files, r"2 of other names: a\.pt, b\.pt\. Give the file itself"),
    "nothing": (empty, r"no weights in the folder .*expected one of .*found none"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(tmp_path, case):
    make, message = ERRORS[case]
    with pytest.raises(sfp.WeightsError, match=message) as error:
        load_clip(make(tmp_path / "model"), activation="gelu")
    assert str(tmp_path / "model") in str(error.value)


# -- tokenizers ----------------------------------------------------------------------------------

SIZES = TextConfig(vocab=99, context=16, width=64, layers=1, embed_dim=32, rules=SIGLIP)


def test_the_tokenizer_beside_the_weights(tmp_path, monkeypatch):
    """The caller's file first, then the folder's, then the Hub's cache; else what to do is said."""
    monkeypatch.setattr(download, "on_hub", lambda place, names: None)
    row = PUBLISHED["siglip2-b16-256"]
    weights = tmp_path / "model.safetensors"
    missing = find_tokenizer(SIZES, None, weights, row)
    with pytest.raises(
        sfp.WeightsError,
        match=rf"tokenizer\.json .*of huggingface\.co/timm/ViT-B-16-SigLIP2-256 into {tmp_path}",
    ):
        missing(["a cat"])
    with pytest.raises(sfp.WeightsError, match="load_clip"):
        find_tokenizer(SIZES, None, None, None)(["a cat"])
    cached = tmp_path / "cache.model"
    cached.write_bytes(b"1")
    monkeypatch.setattr(download, "on_hub", lambda place, names: cached)
    assert find_tokenizer(SIZES, None, weights, row).path == cached
    (tmp_path / "spiece.model").write_bytes(b"2")
    assert find_tokenizer(SIZES, None, weights, row).path == tmp_path / "spiece.model"
    (tmp_path / "mine.json").write_text("{}")
    mine = find_tokenizer(SIZES, tmp_path / "mine.json", weights, row)
    assert mine.path == tmp_path / "mine.json"
    assert len({mine.digest, find_tokenizer(SIZES, cached, weights, row).digest}) == 2
    with pytest.raises(sfp.WeightsError, match="no tokenizer"):
        find_tokenizer(SIZES, tmp_path / "no.json", weights, row)


# -- the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("google/siglip2-base-patch16-256", "google/siglip2-base-patch16-256"),
        ("hf-hub:timm/ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"),
        ("hf-hub:somebody/model.pt", "somebody/model.pt"),
        ("runs/epoch_32.pt", None),
        ("ViT-B/15", None),
        ("../model", None),
        ("./model", None),
        ("a/b/c", None),
        ("ViT-B-16:laion2b", None),
        ("", None),
    ],
)
def test_what_may_be_a_repository(source, expected):
    assert sources.repository(source) == expected


def test_a_repository(tmp_path, monkeypatch):
    """Any name on the Hub, with its configuration and tokenizer."""
    asked = []
    index = sharded(tmp_path / "model")
    monkeypatch.setattr(download, "on_hub", lambda place, names: None)
    monkeypatch.setattr(download, "from_hub", lambda place, names: index)
    monkeypatch.setattr(download, "companions", lambda place, names: asked.extend(names))
    same("somebody/clip")
    same("hf-hub:somebody/clip@quick_gelu")
    assert {"config.json", "open_clip_config.json", "tokenizer.json"} <= set(asked)


def test_a_repository_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(place, names):
        raise OSError("no route to host")

    monkeypatch.setattr(download, "from_hub", fail)
    with pytest.raises(sfp.WeightsError, match=r"'somebody/clip'.*no route to host.*its folder"):
        load_clip("somebody/clip")


def test_a_repository_in_the_cache_whose_shards_did_not_arrive(tmp_path, monkeypatch):
    whole = sharded(tmp_path / "whole")
    monkeypatch.setattr(download, "on_hub", lambda place, names: missing_shard(tmp_path / "cache"))
    monkeypatch.setattr(download, "from_hub", lambda place, names: whole)
    monkeypatch.setattr(download, "companions", lambda place, names: None)
    same("somebody/clip")
