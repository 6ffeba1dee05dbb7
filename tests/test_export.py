"""Exported files give the engine's labels, and what cannot be exported is refused with the reason."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sfp
from sfp import cli, mini
from sfp.engine import Engine
from sfp.export import ExportError, export

DOCS = Path(__file__).parents[1] / "docs" / "deploy.md"
WORDS = sfp.load_vocabulary([["grass", "meadow"], "sky", "house", "tree"])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine("mini", prob_thd=0.3)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [mini.scene(920_000 + i, 224)[0] for i in range(3)]


def expected(engine: Engine, method: str, images: list[np.ndarray]) -> np.ndarray:
    """The engine's labels, (B, 224, 224)."""
    inputs = [engine.input(torch.from_numpy(x.copy()).permute(2, 0, 1)) for x in images]
    queries = engine.queries(WORDS)
    sizes = [(224, 224)] * len(images)
    (sheets,) = engine.logits([sfp.build_method(method)], inputs, sizes, queries)
    pairs = zip(inputs, sheets, strict=True)
    return torch.stack([engine.label(x, s, queries.index).labels for x, s in pairs]).numpy()


@pytest.mark.slow
def test_a_program(engine, images, tmp_path):
    """With its words inside; batches of another size than the one it was traced with."""
    out = tmp_path / "sfp.pt2"
    assert export(engine, sfp.build_method("sfp"), WORDS, out)[0] == out
    program = torch.export.load(out).module()
    ours = expected(engine, "sfp", images)
    for count in (1, 3):
        batch = torch.from_numpy(np.stack(images[:count]))
        logits, labels, confidence = program(image=batch)
        assert logits.shape == (count, 5, 14, 14)
        assert (labels.numpy() == ours[:count]).mean() > 0.9999  # ties within rounding
        assert confidence[labels > 0].min() >= 0.3


@pytest.mark.slow
def test_onnx(engine, images, tmp_path, monkeypatch, capsys):
    """With words as an input; and the program of the documentation runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "any.onnx"
    command = f"export {out} --weights mini --words-as-input --threshold 0.3 --method sclip"
    assert cli.main([*command.split(), "--classes", "grass|meadow,sky,house,tree"]) == 0
    session = onnxruntime.InferenceSession(str(out))
    words = load_file(out.with_suffix(".safetensors"))["queries"].numpy()
    _, labels, _ = session.run(None, {"image": np.stack(images), "words": words})
    ours = expected(engine, "sclip", images)
    assert (np.array(WORDS.index)[labels] == ours).mean() > 0.9999
    _, fewer, _ = session.run(None, {"image": np.stack(images[:1]), "words": words[:3]})
    assert fewer.max() < 3
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["classes"] == list(WORDS.queries)

    (program,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    program = program.replace('{"image": image}', '{"image": image, "words": WORDS}')
    (tmp_path / "program.py").write_text(program)
    files = [str(tmp_path / f"{i}.png") for i in range(3)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    monkeypatch.setattr(sys, "argv", ["program.py", str(out), *files])
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "program.py"), {"WORDS": words})
    assert capsys.readouterr().out.count("%") >= 3
    for file, own in zip(files, labels, strict=True):
        assert np.array_equal(np.asarray(Image.open(file + ".labels.png")), own)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (dict(type="cliptrase"), "decides on the host, with aten"),
        (dict(type="proxyclip"), "needs the guide 'dino'"),
        (dict(type="sfp", pm="isolation_forest"), "cannot be exported"),
    ],
)
def test_methods_that_are_refused(engine, method, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export(engine, sfp.build_method(method), WORDS, tmp_path / "x.pt2")
    assert not list(tmp_path.iterdir())


def test_words_that_are_wrong(engine, tmp_path, capsys):
    for name, settings, message in (
        ("x.onx", {}, "x.onx: the file name must end with .onnx or .pt2"),
        ("x.pt2", dict(precision="int8"), "int8 for .onnx only"),
        ("x.pt2", dict(precision="fp8"), "choose from fp32, fp16, int8"),
    ):
        with pytest.raises(ExportError, match=re.escape(message)):
            export(engine, sfp.build_method("clip"), WORDS, tmp_path / name, **settings)
    command = f"export {tmp_path / 'x.txt'} --weights mini --classes sky,tree"
    assert cli.main(command.split()) == 2
    assert "must end with" in capsys.readouterr().err
