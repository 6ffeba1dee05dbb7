"""The configs: composition, protocol, and each benchmark's data through its own pipeline."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import trees
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

import sfp.evaluation
from sfp import build_method
from sfp.evaluation import (
    ablate,
    clusters,
    compare,
    configs,
    distributed,
    matrix,
    run,
    settings,
)
from sfp.vocabulary import load_vocabulary

FOLDER = Path(__file__).parents[2] / "configs"
APPLICATIONS = ("_sam.py", "_sam3.py", "_dino.py", "_unsupervised.py")  # see test_unsupervised.py
CONFIGS = sorted(
    path.stem.removeprefix("cfg_")
    for path in FOLDER.glob("cfg_*.py")
    if not path.name.endswith(APPLICATIONS)
)

# protocol.md, SFP's column: short side, logit scale, prob_thd, area_thd; the last four have none, and
# take the settings of the nearest benchmark
PROTOCOL = {
    "voc21": (336, 50.0, 0.15, 0.1),
    "context60": (336, 40.0, 0.15, None),
    "coco_object": (336, 55.0, 0.35, None),
    "voc20": (336, 40.0, 0.0, None),
    "context59": (336, 40.0, 0.0, None),
    "coco_stuff164k": (336, 40.0, 0.0, None),
    "ade20k": (384, 40.0, 0.0, None),
    "city_scapes": (560, 40.0, 0.0, None),
    "ade847": (384, 40.0, 0.0, None),
    "context459": (336, 40.0, 0.0, None),
    "coco27": (336, 40.0, 0.0, None),
    "city_scapes27": (560, 40.0, 0.0, None),
}


def load(name: str) -> Config:
    return Config.fromfile(str(FOLDER / f"cfg_{name}.py"))


def build_dataset(cfg: Config):
    with DefaultScope.overwrite_default_scope("mmseg"):
        return DATASETS.build(cfg.test_dataloader.dataset)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working folder that is not the repository's, and no DATA_ROOT."""
    monkeypatch.delenv("DATA_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_benchmark_has_a_config():
    assert set(CONFIGS) == {*PROTOCOL, "mini"}
    assert set(PROTOCOL) == set(trees.LAYOUTS)


@pytest.mark.parametrize("name", CONFIGS)
def test_composition(name, elsewhere):
    cfg = load(name)
    assert cfg.default_scope == "mmseg"
    assert cfg.model.type == "OpenVocabSegmentor"
    assert (cfg.model.slide_crop, cfg.model.slide_stride, cfg.model.pamr_steps) == (224, 112, 0)
    layout = trees.LAYOUTS.get(name)
    wide = layout is not None and layout.labels > 256
    if layout is not None and layout.classes:
        assert cfg.model.classes == f"data/{layout.classes}"
    else:
        assert Path(cfg.model.classes).is_file()  # from any working folder
    assert [step.type for step in cfg.test_pipeline] == [
        "LoadImageFromFile",
        "Resize",
        "LoadLabels" if wide else "LoadAnnotations",
        "PackSegInputs",
    ]
    assert cfg.test_evaluator.get("ignore_index", 255) == (layout.ignored if layout else 255)
    assert cfg.test_dataloader.dataset.pipeline == cfg.test_pipeline
    assert build_method(cfg.model.method) == build_method(
        "sfp"
    )  # the flags say what the preset does


@pytest.mark.parametrize("name", PROTOCOL)
def test_protocol(name, elsewhere):
    cfg = load(name)
    side, *model = PROTOCOL[name]
    assert cfg.test_pipeline[1].scale == (2048, side)
    assert cfg.test_pipeline[1].keep_ratio
    assert [cfg.model.logit_scale, cfg.model.prob_thd, cfg.model.area_thd] == model


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_text(path):
    text = path.read_text()
    strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    assert not [
        s for s in strings if isinstance(s, str) and s.startswith(("/", "~", "./data", ".."))
    ]
    if path.stem != "base_config":
        name = path.stem.removeprefix("cfg_")
        assert text.startswith("# ")
        assert f"CONFIG=configs/{path.name} WORK_DIR=work/{name} sh test.sh" in text


@pytest.mark.parametrize("name", PROTOCOL)
def test_data_root(name, elsewhere, monkeypatch):
    assert load(name).test_dataloader.dataset.data_root.startswith("data/")
    monkeypatch.setenv("DATA_ROOT", "/somewhere/else")
    assert load(name).test_dataloader.dataset.data_root.startswith("/somewhere/else/")


@pytest.mark.filterwarnings("ignore:.*is also in")  # see test_vocabulary.py
@pytest.mark.parametrize("name", PROTOCOL)
def test_data(name, elsewhere, monkeypatch):
    root = elsewhere / "some data"
    files = trees.build(name, root)
    monkeypatch.setenv("DATA_ROOT", str(root))
    cfg = load(name)
    dataset = build_dataset(cfg)

    layout = trees.LAYOUTS[name]
    classes = dataset.metainfo["classes"]
    assert len(classes) == len(dataset.metainfo["palette"]) == layout.labels - layout.without_zero
    assert load_vocabulary(cfg.model.classes).num_classes == len(classes)
    assert dataset.metainfo["reduce_zero_label"] == layout.without_zero
    assert dataset.ignore_index == layout.ignored
    assert len(dataset) == len(files)
    side, *_ = PROTOCOL[name]
    for item in dataset:
        sample = item["data_samples"]
        raw = files[str(Path(sample.img_path).relative_to(root))]
        labels = sample.gt_sem_seg.data.numpy()
        assert np.array_equal(labels, trees.evaluated(name, raw)[None])
        assert set(np.unique(labels)) - {layout.ignored} <= set(range(len(classes)))
        assert {0, len(classes) - 1, layout.ignored} - {255} <= set(np.unique(labels))
        assert min(item["inputs"].shape[1:]) == side
        assert sample.ori_shape == raw.shape
        assert sample.img_shape == tuple(item["inputs"].shape[1:])


@pytest.mark.parametrize(("name", "void"), [("voc21", 0), ("voc20", None), ("context459", None)])
def test_the_protocol_of_cliptrase(name, void, monkeypatch):
    monkeypatch.setenv("BENCHMARK", name)
    monkeypatch.setenv("SIZE", "224")
    config = Config.fromfile(str(FOLDER / "protocol_cliptrase.py"))
    own = Config.fromfile(str(FOLDER / f"cfg_{name}.py"))
    assert config.model.classes == own.model.classes
    model = config.model
    assert (model.slide_crop, model.prob_thd, model.area_thd) == (0, 0.0, None)
    release = dict(eps=0.7, min_samples=3)  # of its release, for 224 pixels
    assert model.method == dict(type="cliptrase", cls_logits=name == "voc20", **release)
    dataset = config.test_dataloader.dataset
    assert dataset.type == own.test_dataloader.dataset.type
    steps = {step.type: step for step in dataset.pipeline}
    assert steps["CentreCrop"] == dict(type="CentreCrop", size=224, void=void)
    labels = [step.type for step in own.test_dataloader.dataset.pipeline if "abels" in step.type]
    assert set(labels) <= set(steps)


# -- configs as arguments --------------------------------------------------------------------------

# calls of all public functions that take a config, with the folder for results
CALLS = dict(
    ablate=lambda config, _: ablate.ablate(config, "backbones", weights=["mini@gelu"]),
    beside_published=lambda config, _: compare.beside_published(config, dict(a="clip")),
    build_segmentor=lambda config, _: compare.build_segmentor(config, build_method("clip")),
    check=lambda config, _: run.check(config),
    cluster_config=lambda config, _: clusters.cluster_config(config),
    compare=lambda config, _: compare.compare(config, dict(a="clip"), words=["names"]),
    ensure_clusters=lambda config, _: clusters.ensure_clusters(config),
    evaluate=lambda config, folder: run.evaluate(config, show_dir=str(folder / "show")),
    fit_clusters=lambda config, _: clusters.fit_clusters(config, count=2),
    matrix=lambda config, folder: matrix.matrix({"mini": config}, dict(a="clip"), folder),
    measure=lambda config, _: compare.measure(config, dict(a="clip")),
    require=lambda config, _: configs.require(config, "model.type"),
    settings=lambda config, _: settings.settings(config),
    start_processes=lambda config, _: distributed.start_processes(config),
    with_words=lambda config, _: compare.with_words(config, "names"),
)
WITHOUT_WORDS = {"clusters.count": 2, "test_evaluator.type": "HungarianMetric"}


def test_every_function_that_takes_a_config_is_called():
    found = {"matrix"}  # it takes several
    for module in pkgutil.iter_modules(sfp.evaluation.__path__, "sfp.evaluation."):
        for name, part in vars(importlib.import_module(module.name)).items():
            own = inspect.isfunction(part) and part.__module__ == module.name
            if own and name[0] != "_" and part.__annotations__.get("config") == "Config":
                found.add(name)
    assert found == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_config_given_to_a_function_is_not_changed(name, own):
    words = name in ("ablate", "compare", "matrix", "measure")  # these take no clusters
    for options in ({}, {} if words else WITHOUT_WORDS):
        if not options and name in ("cluster_config", "ensure_clusters"):
            continue
        config = own.config(options=options)
        before = copy.deepcopy(config.to_dict())
        CALLS[name](config, own.root)
        assert config.to_dict() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_from", "tuned.pth"),
        ("test_cfg.fp16", True),
        ("custom_hooks", [dict(type="EmptyCacheHook")]),
    ],
)
def test_settings_of_mmengines_runner_need_it(name, value, own):
    """Otherwise journals would state them, but they would have no effect."""
    config = own.config(options={name: value})
    for call in ("measure", "compare", "ablate", "matrix"):
        with pytest.raises(configs.ConfigError, match=f"{name}.*`sfp eval`"):
            CALLS[call](config, own.root)
    if name == "load_from":
        with pytest.raises(configs.ConfigError, match=name):
            CALLS["fit_clusters"](config, own.root)


def test_a_second_evaluation_can_start_over(own, capsys):
    config = own.config()
    for resume, said in ((True, False), (True, True), (False, False)):
        run.evaluate(config, pictures=0, resume=resume)
        assert ("continuing: 3 of 3" in capsys.readouterr().err) == said
