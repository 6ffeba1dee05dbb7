"""tools/bench.py: its baseline has the same labels, its stages add up, its record is complete."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parents[2] / "tools" / "bench.py"
SMALL = dict(patch=16, width=128, layers=12, embed_dim=64)


@pytest.fixture
def bench(monkeypatch):
    """The tool's names, with a model that takes milliseconds."""
    spec = importlib.util.spec_from_file_location("bench", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench", module)
    monkeypatch.syspath_prepend(TOOL.parent)  # as for a script
    spec.loader.exec_module(module)
    module.ARCHS["small"] = SMALL
    module.IMAGES["small"] = ((150, 230), 300)
    return module


@pytest.mark.parametrize("layers", [12, 24])
def test_the_sequential_reference_computes_the_same_logits(bench, layers):
    bench.ARCHS["small"] = {**SMALL, "layers": layers}
    clip = bench.Case("small", "small", 7, "cpu").clip()
    generator = torch.Generator().manual_seed(0)
    window = torch.randn(1, 3, 224, 192, generator=generator)
    text = torch.nn.functional.normalize(torch.randn(7, 64, generator=generator), dim=-1)
    with torch.inference_mode():
        expected, trace = bench.sfp.build_method("sfp").logits(clip.visual, window, text)
        logits = bench.SequentialSFP(clip).window(window, text)
    assert sum(int(mask.sum()) for mask in trace.masks.values()) > 0  # SOM found outliers
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_reference_where_all_patches_are_outliers(bench):
    x = torch.randn(4, 3)
    assert torch.equal(sys.modules["sequential"].without(x, [0, 1, 2, 3], (2, 2)), x)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [12, 24])
def test_the_sequential_reference_gives_the_same_labels(bench, layers):
    bench.ARCHS["small"] = {**SMALL, "layers": layers}
    case = bench.Case("small", "small", 7, "cpu")
    own = case.contender(case.clip(), "sfp", "fp32")
    data = bench.jpeg(*case.size)
    ours, theirs = (getattr(bench, run)(own, case, data) for run in ("fast", "sequential"))
    assert ours.shape == theirs.shape == (1, *case.size)
    assert len(ours.unique()) > 1
    assert (ours == theirs).float().mean() > 0.999  # but for ties within rounding


def test_the_reference_keeps_every_map(bench):
    clip = bench.Case("small", "small", 3, "cpu").clip()
    with torch.inference_mode():
        grid, outputs, maps = bench.SequentialSFP(clip).trunk(torch.zeros(1, 3, 224, 224))
    assert grid == (14, 14)
    assert [tuple(x.shape) for x in outputs] == [(197, 1, 128)] * 11
    assert [tuple(weights.shape) for weights in maps] == [(1, 2, 197, 197)] * 11


@pytest.mark.slow
def test_a_run_writes_its_record(bench, monkeypatch, tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = (
        "bench --arch small --image tiny --classes 3 --batch 2 --rounds 1 --no-memory --threads 1"
    )
    command += f" --variants fp32 int8 --methods sfp sclip --out {out}"
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", command.split())
    try:
        assert bench.main() == 0
    finally:
        torch.set_num_threads(threads)
    (case,) = json.loads(out.read_text())["cases"]
    assert [(row["method"], row["variant"]) for row in case["rows"]] == [
        ("sfp", "fp32"),
        ("sfp", "int8"),
        ("sclip", "fp32"),
        ("sclip", "int8"),
    ]
    first, second = case["rows"][:2]
    assert set(first["stages"]) == set(bench.STAGES)
    assert all(seconds >= 0 for seconds in first["stages"].values())
    assert first["equal_labels"] > 0.99
    assert case["sequential"]["variant"] == "fp32"
    assert "equal_labels" not in case["rows"][2]
    assert 0 < second["feature_error"] < 0.2
    assert "from the first variant's" in capsys.readouterr().out


def test_the_text_bank(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.ARCHS, "ViT-B/16", SMALL)
    monkeypatch.setattr(bench, "WORDS", dict(bench.WORDS, text_width=64, text_layers=1))
    out = tmp_path / "text.json"
    monkeypatch.setattr(sys, "argv", f"bench --text 2 --threads 1 --out {out}".split())
    assert bench.main() == 0
    record = json.loads(out.read_text())["text"]
    assert record["prompts"] == 160
    assert record["max_difference"] < 1e-5
    assert "160 prompts of 2 ADE20K classes" in capsys.readouterr().out


def test_the_tables_of_the_documentation(monkeypatch, capsys):
    docs = TOOL.parents[1] / "docs"
    records = [str(path) for path in sorted(docs.glob("measured/cpu_*.json"))]
    monkeypatch.setattr(sys, "argv", ["bench_tables.py", *records])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(TOOL.with_name("bench_tables.py")), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n## ") + 1 == len(records) > 5
    assert (docs / "cpu.md").read_text().endswith(printed)


def test_a_command_line_without_its_output(bench):
    words = ["--classes", "21", "--out", "x.json", "--rounds", "2"]
    assert bench.without_out(words) == ["--classes", "21", "--rounds", "2"]
    assert bench.without_out(words[:2]) == words[:2]
