"""`sfp compare` over several weights: towers by methods, on two scenes of the mini world."""

from __future__ import annotations

import json

import pytest
import torch
from clip.test_tokenizers import bpe

from sfp import cli
from sfp.data.images import DataError
from sfp.evaluation import matrix
from sfp.evaluation.matrix import extra_models, supervision

FEW = ["--cfg-options", "test_dataloader.dataset.scenes=2", "test_dataloader.num_workers=0"]


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A small random SigLIP with its tokenizer, as transformers writes them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("towers") / "siglip"
    tower = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4)
    text = dict(tower, num_hidden_layers=1, vocab_size=420, projection_size=64)
    torch.manual_seed(0)
    config = transformers.SiglipConfig(
        text_config=dict(text, max_position_embeddings=64),
        vision_config=dict(tower, image_size=224, patch_size=32),
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    vocabulary = bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    transformers.Siglip2Tokenizer(*vocabulary).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_towers_by_methods(siglip, tmp_path, capsys):
    command = ["compare", "mini", "--methods", "naclip", "--work-dir", str(tmp_path)]
    assert cli.main([*command, "--weights", "mini", str(siglip), *FEW]) == 0
    record = json.loads((tmp_path / "matrix.json").read_text(), parse_constant=pytest.fail)
    assert [(row["weights"], row["method"]) for row in record["rows"]] == [
        (weights, "naclip") for weights in ("mini", str(siglip))
    ]
    scores = [row["scores"]["mIoU"] for row in record["rows"]]
    assert scores[0] > 20 > 2 * scores[1]  # one is trained, the other random
    table = (tmp_path / "matrix.md").read_text()
    assert "captions and patch labels of drawn scenes" in table
    assert table.count("| none |") == 2
    # again, with a method more: what is done is read
    journals = [p for p in tmp_path.rglob("*") if p.is_file() and "journal" in str(p.parent)]
    before = {p: p.read_bytes() for p in journals}
    assert before
    command[3:4] = ["naclip", "sclip"]
    assert cli.main([*command, "--weights", "mini", str(siglip), *FEW]) == 0
    assert {p: p.read_bytes() for p in journals} == before
    again = json.loads((tmp_path / "matrix.json").read_text())["rows"]
    kept = [row for row in again if row["method"] != "sclip"]
    assert len(again) == 4
    assert kept == record["rows"]
    capsys.readouterr()


def test_options_of_one_tower_are_refused_for_several(capsys):
    arguments = ["compare", "mini", "--weights", "mini", "mini@gelu", "--paired", "clip"]
    assert cli.main(arguments) == 2
    assert "--paired and --classes" in capsys.readouterr().err


def test_only_methods_are_refused(monkeypatch, tmp_path, capsys):
    """A name that is none, or a damaged file, is no property of a tower."""
    arguments = ["compare", "mini", "--weights", "mini", "mini@gelu", "--work-dir", str(tmp_path)]
    assert cli.main([*arguments, "--methods", "naclip", "scilp", *FEW]) == 2
    assert "did you mean 'sclip'" in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()

    def damaged(*args: object, **settings: object) -> None:
        raise DataError("a.png: cannot be read")

    monkeypatch.setattr(matrix, "measure", damaged)
    assert cli.main([*arguments, "--methods", "naclip", *FEW]) == 3
    assert "a.png" in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()


def test_what_was_learnt_from():
    from mmengine.config import Config

    guides = dict(dino=dict(type="x"), other=dict(type="y"))
    config = Config(dict(model=dict(guides=guides, masks=dict(type="SamMasks"))))
    extra = extra_models(config, "proxyclip")
    assert extra == dict(dino="unlabelled images", masks="masks")
    assert extra_models(config, "naclip") == dict(masks="masks")
    assert supervision("ViT-B/16", extra) == "captions, unlabelled images, masks"
    assert supervision("tipsv2-l14", {}) == "captions, synthetic captions"
    drawn = "captions and patch labels of drawn scenes"
    assert supervision("mini", {}) == supervision("mini@gelu", {}) == drawn
