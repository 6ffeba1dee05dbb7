"""`sfp compare` over several weights: towers by methods, on two scenes of the mini world."""

from __future__ import annotations

import json

import pytest
import torch
from clip.test_tokenizers import bpe
from mmengine.config import Config

from sfp import cli
from sfp.data.images import DataError
from sfp.evaluation import compare, matrix
from sfp.evaluation.scores import COLUMNS
from sfp.method import build_method

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
    assert "* mini was trained on drawn scenes" in table
    assert table.count("| - |") == 2
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


@pytest.mark.parametrize(
    "option", [["--paired", "clip"], ["--classes", "names"], ["--pictures", "2"]]
)
def test_options_of_one_tower_are_refused_for_several(option, capsys):
    assert cli.main(["compare", "mini", "--weights", "mini", "mini@gelu", *option]) == 2
    assert "--paired, --classes and --pictures need a single" in capsys.readouterr().err


@pytest.fixture
def few(tmp_path):
    """`sfp compare` on two weights, two scenes: a function from options to the exit code."""
    start = ["compare", "mini", "--weights", "mini", "mini@gelu", "--work-dir", str(tmp_path)]
    return lambda *options, settings=(): cli.main([*start, *options, *FEW, *settings])


def test_the_reason_is_given_if_a_method_does_not_run(few, tmp_path, monkeypatch, capsys):
    """The others run on a model that is loaded once."""
    built = []
    build = matrix.build_segmentor
    monkeypatch.setattr(matrix, "build_segmentor", lambda *args: built.append(0) or build(*args))
    monkeypatch.setattr(compare, "build_segmentor", lambda *args: pytest.fail("loaded again"))
    pooled = "gem:pool_mlp=False"  # of an attention pool, which CLIP does not have
    assert few("--methods", pooled, "clip") == 0
    assert len(built) == 2
    reason = f"{pooled} is refused on mini@gelu: pool_mlp=False: this tower has no MLP"
    assert reason in capsys.readouterr().out
    assert f"* {reason}" in (tmp_path / "matrix.md").read_text()
    rows = json.loads((tmp_path / "matrix.json").read_text())["rows"]
    assert ["scores" in row for row in rows] == [False, True] * 2
    assert few("--methods", pooled) == 1


@pytest.mark.parametrize(
    ("methods", "setting", "message"),
    [
        (["naclip", "scilp"], [], "did you mean 'sclip'"),
        (["proxyclip", "clip"], [], "needs the guide 'dino'"),
        (["lavg"], [], "regions"),
        (["clip"], ["model.slide_stride=500"], "slide_stride=500"),
    ],
)
def test_what_concerns_all_towers_is_an_error(few, tmp_path, capsys, methods, setting, message):
    assert few("--methods", *methods, settings=setting) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()


def test_a_damaged_file_is_an_error(few, monkeypatch, tmp_path, capsys):
    def damaged(*args: object, **settings: object) -> None:
        raise DataError("a.png: cannot be read")

    monkeypatch.setattr(matrix, "measure", damaged)
    assert few("--methods", "naclip") == 3
    assert "a.png" in capsys.readouterr().err
    assert not (tmp_path / "matrix.json").exists()


def test_what_models_were_trained_on():
    """Those that a method uses; names in the paths of models are whole words."""
    guides = dict(
        dino=dict(type="transformers", model="/data/samples/dino"),
        other=dict(type="transformers", model="y"),
    )
    regions = dict(propose=dict(type="universal", model="eomt-dinov3-l"))
    masks = dict(propose=dict(type="sam", model="facebook/sam-vit-base"))
    model = dict(weights="tipsv2-l14@gelu", guides=guides, regions=regions, masks=masks)
    found = matrix._seen(Config(dict(model=model)), build_method("proxyclip"))
    assert list(found) == [
        "tipsv2-l14@gelu",
        "guide dino (/data/samples/dino)",
        "masks (facebook/sam-vit-base)",
    ]
    assert "ImageNet" in found["guide dino (/data/samples/dino)"]
    found = matrix._seen(Config(dict(model=model)), build_method("lavg"))
    assert "labelled masks" in found["regions (eomt-dinov3-l)"]
    rows = [
        dict(weights="tipsv2-l14@gelu", method="lavg", seen=found, scores=dict.fromkeys(COLUMNS))
    ]
    ((*_, others),) = matrix.matrix_sheet(dict(rows=rows))[1]
    assert others == "masks (facebook/sam-vit-base), regions (eomt-dinov3-l)"
    assert len(matrix.matrix_lines(dict(rows=rows * 2))) == 3
