"""Exported files give the engine's labels, and what cannot be exported is refused with the reason."""

from __future__ import annotations

import json
import logging
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
from sfp import export as exporting
from sfp.engine import Engine
from sfp.export import ExportError, WindowModel, export
from sfp.method import self_contained_methods

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
    built = sfp.build_method(method)
    (sheets,) = engine.logits([built], inputs, sizes, queries)
    labels = [
        engine.label(x, sheet, queries.index, method=built).labels
        for x, sheet in zip(inputs, sheets, strict=True)
    ]
    return torch.stack(labels).numpy()


@pytest.mark.parametrize("method", self_contained_methods())
def test_every_method_labels_as_the_engine_does_or_is_refused(engine, images, method):
    """Before it is traced, which takes too long for all of them."""
    built = sfp.build_method(method)
    if built.decision is not None:
        with pytest.raises(ExportError, match=f"its decision, {built.decision.fn.__name__}"):
            WindowModel(engine, built, engine.queries(WORDS))
        return
    model = WindowModel(engine, built, engine.queries(WORDS))
    _, labels, _ = model(torch.from_numpy(images[0])[None])
    assert (labels.numpy() == expected(engine, method, images[:1])).mean() > 0.9999


@pytest.mark.slow
def test_a_program(engine, images, tmp_path):
    """With its words inside; batches of another size than the one it was traced with."""
    out = tmp_path / "sfp.pt2"
    files = export(engine, sfp.build_method("sfp"), WORDS, out)
    # so that an export as ONNX, with other words, replaces none of them
    assert [file.name for file in files] == ["sfp.pt2", "sfp.pt2.safetensors", "sfp.pt2.json"]
    program = torch.export.load(out).module()
    ours = expected(engine, "sfp", images)
    for count in (1, 3):
        batch = torch.from_numpy(np.stack(images[:count]))
        logits, labels, confidence = program(image=batch)
        assert logits.shape == (count, 5, 14, 14)
        assert (labels.numpy() == ours[:count]).mean() > 0.9999  # ties within rounding
        assert confidence[labels > 0].min() >= 0.3


@pytest.mark.slow
def test_onnx(engine, images, tmp_path, monkeypatch, capsys, caplog):
    """With words as an input; and the program of the documentation runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = tmp_path / "any.onnx"
    command = f"export {out} --weights mini --words-as-input --threshold 0.3 --method sclip"
    assert cli.main([*command.split(), "--classes", "grass|meadow,sky,house,tree"]) == 0
    # the exporter's, about packages that are not needed
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    session = onnxruntime.InferenceSession(str(out))
    words = load_file(Path(f"{out}.safetensors"))["queries"].numpy()
    _, labels, _ = session.run(None, {"image": np.stack(images), "words": words})
    ours = expected(engine, "sclip", images)
    assert (np.array(WORDS.index)[labels] == ours).mean() > 0.9999
    _, fewer, _ = session.run(None, {"image": np.stack(images[:1]), "words": words[:3]})
    assert fewer.max() < 3
    about = json.loads(Path(f"{out}.json").read_text())
    assert about["classes"] == list(WORDS.queries)

    program, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
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
        (dict(type="cliptrase"), "op 'cluster_vote': it decides on the host, with aten"),
        (dict(type="proxyclip"), "needs the guide 'dino'"),
        (dict(type="sfp", pm="isolation_forest"), "op 'isolation_forest': "),
        (dict(type="sfp", pm="weight_norm_channel"), r"as ONNX: .*aten\.median.* a \.pt2 file can"),
    ],
)
def test_methods_that_are_refused(engine, method, reason, tmp_path):
    with pytest.raises(ExportError, match=reason):
        export(
            engine,
            sfp.build_method(method),
            WORDS,
            tmp_path / f"x.{'onnx' if 'ONNX' in reason else 'pt2'}",
        )
    assert not list(tmp_path.iterdir())


def test_words_that_are_wrong(engine, tmp_path, capsys):
    for name, settings, message in (
        ("x.onx", {}, "x.onx: the file name must end with .onnx or .pt2"),
        ("x.pt2", dict(precision="int8"), "int8 for .onnx only"),
        ("x.pt2", dict(precision="fp8"), "choose from fp32, fp16, int8"),
    ):
        with pytest.raises(ExportError, match=re.escape(message)):
            export(engine, sfp.build_method("clip"), WORDS, tmp_path / name, **settings)
    command = f"export {tmp_path / 'x.txt'} --weights none.pt --classes sky,tree"
    assert cli.main(command.split()) == 2  # before weights are looked for
    assert "must end with" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command.split(), "--threshold", "7"])
    assert "expected a number from 0 to 1, got 7" in capsys.readouterr().err


def test_models_that_are_too_large_for_onnx(engine, tmp_path, monkeypatch):
    """PyTorch would put their weights into a second file, under the name of the temporary one."""
    monkeypatch.setattr(exporting, "ONNX_BYTES", 7 * 2**20)  # the mini CLIP's tower has 9 MiB
    with pytest.raises(ExportError, match=r"export a \.pt2 file, or with precision='fp16'"):
        export(engine, sfp.build_method("clip"), WORDS, tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())
