"""The planted-outlier benchmark: planted outliers, scores and files."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from narrow import images, vit
from torch.nn import functional as F

import sfp
from sfp import cli
from sfp.outliers import planted as plant
from sfp.outliers import report as plant_report
from sfp.tables import markdown

pytestmark = pytest.mark.usefixtures("no_grad")

ROOT = Path(__file__).parents[2]
SETTING = plant.Setting(strengths=(30.0,), at=30.0)
NAMES = ["som", "l2_norm", "lof", "weight_norm_channel"]  # of detectors; test_tool has all


@pytest.fixture(scope="module")
def result():
    with torch.no_grad():
        found = {**plant.detectors(NAMES), "l2 of 10": plant.detectors(["l2_norm"])["l2_norm"]}
        return plant.benchmark(vit(), [images(2)], SETTING, found, plant.mitigators())


@pytest.mark.parametrize("pattern", plant.PATTERNS)
def test_choose(pattern):
    for seed in range(20):
        mask = plant.choose((6, 11), 9, pattern, np.random.default_rng(seed))
        again = plant.choose((6, 11), 9, pattern, np.random.default_rng(seed))
        assert mask.sum() == 9
        assert (mask == again).all()
        rows, cols = np.nonzero(mask.reshape(6, 11))
        extent = max(np.ptp(rows), np.ptp(cols))
        assert extent <= 8 if pattern == "clustered" else extent > 3
    with pytest.raises(ValueError, match="did you mean 'clustered'"):
        plant.choose((6, 11), 9, "cluster", np.random.default_rng(0))


def test_counts():
    varied = [int(SETTING.mask((14, 14), "scattered", i).sum()) for i in range(200)]
    assert (min(varied), max(varied)) == (1, 19)
    assert np.mean(varied) == pytest.approx(10, abs=1)
    fixed = plant.Setting(planted=4, varied=False)
    assert {int(fixed.mask((14, 14), "clustered", i).sum()) for i in range(20)} == {4}
    assert plant.Setting(planted=0.001).count(196) == 1
    assert plant.Setting(planted=500).count(196) == 98


def test_disturbance_is_what_it_says():
    """Only at its block, only at its patches; as loud as asked; along what CLS looks for."""
    mask = torch.from_numpy(np.stack([SETTING.mask((14, 14), "scattered", i) for i in range(2)]))
    clean = vit().trace(images())
    of = vit().trace(images(), [plant.Plant(5, mask, 3.0, 0.25)])
    for i in range(5):
        assert torch.equal(of.outputs[i].data, clean.outputs[i].data)
    moved = of.outputs[5].patches - clean.outputs[5].patches
    usual = clean.outputs[5].patches.norm(dim=-1).median(-1).values
    assert torch.equal(moved.norm(dim=-1) > 0, mask)
    torch.testing.assert_close(moved.norm(dim=-1), mask * 3 * usual[:, None], atol=1e-4, rtol=1e-4)
    drawn, before = (t.cls_row(6).mean(1) for t in (of, clean))
    assert (drawn[mask] > before[mask]).all()

    whole = vit().trace(images(), [plant.Plant(5, mask, 3.0, 1.0)])
    channel = int(vit().blocks[5].mlp.c_proj.weight.norm(dim=1).argmax())
    only = (whole.outputs[5].patches - clean.outputs[5].patches)[mask]
    assert (only.abs().argmax(-1) == channel).all()
    assert only[:, torch.arange(128) != channel].abs().max() < 1e-4


def test_direction_is_the_gradient_of_the_class_token_logit():
    clean = vit().trace(images())
    tokens, block = clean.outputs[5], vit().blocks[6]
    query = block.heads(tokens).q[:, :, 0]  # (B, H, d)
    with torch.enable_grad():
        u = torch.zeros(2, 1, 128, requires_grad=True)
        normed = (u - u.mean(-1, keepdim=True)) * block.ln_1.weight + block.ln_1.bias
        _, key, _ = block.attn.project(normed)  # (B, H, 1, d)
        (key[:, :, 0] * query).sum().backward()
    expected = F.normalize(u.grad[:, 0], dim=-1)
    torch.testing.assert_close(plant.outlier_direction(clean, 5, 0.0), expected)


@pytest.mark.slow
def test_scores(result):
    """Against counts made here; giants are found by their norms and repaired."""
    assert result["setting"]["layer"] == 5
    assert result["setting"]["detect"] == 6
    assert set(result["undisturbed"]) == {*plant.detectors(NAMES), "l2 of 10"}
    assert result["undisturbed"]["l2_norm"] == pytest.approx(10 / 196, abs=1e-4)
    for pattern, table in result["patterns"].items():
        truth = torch.from_numpy(np.stack([SETTING.mask((14, 14), pattern, i) for i in range(2)]))
        of = vit().trace(images(2), [plant.Plant(5, truth, 30.0)])
        norms = of.outputs[6].patches.norm(dim=-1)
        found = torch.zeros_like(truth).scatter(-1, norms.topk(10).indices, True)
        hit = int((found & truth).sum())
        row = table["detection"]["l2 of 10"][0]
        assert row["precision"] == pytest.approx(hit / 20, abs=1e-4)
        assert row["recall"] == pytest.approx(hit / int(truth.sum()), abs=1e-4)
        assert row["f1"] == pytest.approx(2 * hit / (20 + int(truth.sum())), abs=1e-4)
        restored = {m: rows[0] for m, rows in table["restoration"].items()}
        none = restored.pop("none")
        for name, row in restored.items():
            assert row["others"] > none["others"] or name == "box_blend", name
            # hidden giants stay giants, and blended ones for the most part
            keeps = name in ("mask_attention", "box_blend")
            assert keeps or row["planted"] > none["planted"], name
        assert restored["neighbour_mean"]["planted"] > none["planted"] + 0.2
        assert set(table["pairs"]) == {plant.TRUTH, *result["undisturbed"]}
        truth_row = {m: rows[0] for m, rows in table["restoration"].items()}
        for name, row in table["pairs"][plant.TRUTH].items():
            assert row["planted"] == truth_row[name]["planted"]


def test_giants_are_found_exactly():
    """As many as the budget, of huge strength: F1 = 1."""
    setting = plant.Setting(planted=10, varied=False, strengths=(100.0,), at=100.0)
    found = plant.benchmark(vit(), [images(3)], setting, plant.detectors(["l2_norm"]), {})
    for table in found["patterns"].values():
        (row,) = table["detection"]["l2_norm"]
        assert (row["precision"], row["recall"], row["f1"]) == (1, 1, 1)


@pytest.mark.slow
def test_batches_do_not_matter():
    found = plant.detectors(["som", "lof", "dbscan"])
    tools = plant.mitigators(["median", "mask_attention"])
    whole = plant.benchmark(vit(), [images(3)], SETTING, found, tools)
    parts = plant.benchmark(vit(), images(3).split(2), SETTING, found, tools)
    assert json.dumps(whole["setting"]) == json.dumps(parts["setting"])
    for pattern in plant.PATTERNS:
        a, b = (r["patterns"][pattern] for r in (whole, parts))
        assert a["detection"] == b["detection"]
        for name, rows in a["pairs"].items():
            for mitigator, row in rows.items():
                assert row == pytest.approx(b["pairs"][name][mitigator], abs=2e-4)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(layer=11), "expected 0 <= planted"),
        (dict(layer=5, detect=3), "expected 0 <= planted"),
        (dict(patterns=["clustred"]), "did you mean 'clustered'"),
        (dict(strengths=[0.0]), "above 0"),
        (dict(channel_share=2.0), "from 0 to 1"),
    ],
)
def test_wrong_settings(knobs, message):
    with pytest.raises(ValueError, match=message):
        plant.Setting(**knobs).blocks(vit())


@pytest.mark.slow
def test_report(result, tmp_path):
    text = plant_report.report(result, "a test", "sfp plant", "x.png")
    for name in result["undisturbed"]:
        assert text.count(f"| {name} |") == 4  # detection and pairs, for two patterns
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) > 1
    json.dumps(result, allow_nan=False)

    page = tmp_path / "x.md"
    plant_report.write_page(page, text)
    first = page.read_text()
    assert text in first
    page.write_text("# Title\n\n" + first + "\nThe end.\n")
    plant_report.write_page(page, "new\n")
    assert page.read_text().startswith("# Title")
    assert page.read_text().endswith("The end.\n")
    assert "new" in page.read_text()
    assert text not in page.read_text()
    page.write_text("somebody's page")
    with pytest.raises(ValueError, match="choose another --out"):
        plant_report.frame(page)
    with pytest.raises(ValueError, match="choose another --out"):
        plant_report.write_page(page, "new")
    assert page.read_text() == "somebody's page"

    plant_report.plot(result, tmp_path / "x.png")
    assert cv2.imread(str(tmp_path / "x.png")).shape[1] > 800
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.md", "x.png"]


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """`sfp plant` in an empty folder: (arguments) -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        return cli.main(["plant", *args]), *capsys.readouterr()

    return run


@pytest.mark.slow
def test_tool(tool, tmp_path):
    """On other weights and a folder of photos of several sizes."""
    clip = sfp.CLIP(
        embed_dim=32,
        image_size=64,
        patch=16,
        width=64,
        layers=4,
        context=8,
        vocab=16,
        text_width=64,
        text_layers=1,
    )
    torch.save(clip.state_dict(), "tiny.pt")
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(90, 70, 3), (64, 200, 3), (30, 30, 3)]):
        cv2.imwrite(f"photos/{i}.png", rng.integers(0, 256, size, dtype=np.uint8))
    common = ["--weights", "tiny.pt", "--images", "photos", "--out", "deep/out"]
    code, printed, _ = tool(*common, "--planted", "2", "--strengths", "5", "--at", "5")
    assert code == 0
    assert sorted(p.name for p in Path("deep").iterdir()) == ["out.json", "out.md", "out.png"]
    found = json.loads(Path("deep/out.json").read_text())
    assert (found["images"], found["grid"], found["setting"]["layer"]) == (3, [4, 4], 1)
    assert set(found["undisturbed"]) == {*sfp.list_ops("detector"), "som (release)"}
    for line in ("scattered: detection", "clustered: restoration", "weight_norm_channel"):
        assert line in printed

    code, printed, error = tool(*common, "--detectors", "l2nrm")
    assert (code, printed) == (2, "")
    assert "did you mean 'l2_norm'" in error
    assert tool(*common, "--layer", "3")[0] == 2
    assert tool("--images", "photos", "--weights", "nowhere.pt")[0] == 3
    Path("empty").mkdir()
    code, _, error = tool("--weights", "tiny.pt", "--images", "empty")
    assert code == 3
    assert "no image or archive in empty" in error


def test_the_tables_of_the_documentation():
    result = json.loads((ROOT / "docs/measured/planted.json").read_text())
    table = markdown(*plant_report.detection_sheet(result, "scattered"))
    assert table in (ROOT / "docs/outliers.md").read_text()
    command = "sfp plant --weights mini --out docs/measured/planted"
    text = plant_report.report(result, "mini, 16 drawn scenes", command, "planted.png")
    assert text in (ROOT / "docs/measured/planted.md").read_text()


def test_every_op_is_documented_and_offered():
    page = (ROOT / "docs" / "outliers.md").read_text()
    flags = (ROOT / "configs" / "base_config.py").read_text()
    readme = (ROOT / "README.md").read_text().split("\n| `purify` |")[1].split("\n")[0]
    for name in (*sfp.list_ops("detector"), *sfp.list_ops("mitigator")):
        assert f"`{name}`" in page, name
        assert name in flags, name
    for name in set(sfp.list_ops("mitigator")) - {"neighbour_mean"}:  # the default
        assert f"`{name}`" in readme, name
