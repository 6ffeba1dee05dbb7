"""Label maps of folders, lists and shards; killed runs and broken images."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from processes import killed

from sfp import bulk, cli
from sfp.cli import label as label_cli
from sfp.clip.checkpoints import loading, published
from sfp.data.listing import Outcome, list_units
from sfp.files import sha256_file
from sfp.registry import METHODS
from sfp.vocabulary import load_vocabulary

ROOT = Path(__file__).parents[1]


WORDS = ["sky", "grass", ["sun", "star"]]


@pytest.fixture(scope="module")
def job() -> bulk.Job:
    settings = dict(templates=["a {}."])
    return bulk.Job("mini", load_vocabulary(WORDS), short_side=112, settings=settings)


def picture(seed: int, size: tuple[int, int] = (60, 90), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def label(job: bulk.Job, inputs: list[Path], out: Path, **knobs) -> dict[str, Outcome]:
    outcomes = bulk.Labeller(job, out, **knobs).run(list_units(inputs))
    return {outcome.name: outcome for outcome in outcomes}


def outputs(out: Path, what: str = "labels") -> dict[str, bytes]:
    files = [f for f in sorted((out / what).rglob("*")) if f.is_file()]
    return {f.relative_to(out / what).as_posix(): f.read_bytes() for f in files}


@pytest.mark.slow
def test_folder_list_and_shard_agree(tmp_path, job):
    sizes = ((60, 90), (96, 64), (40, 40), (30, 100), (60, 90))
    files = {f"a/b{i}.png": picture(i, size) for i, size in enumerate(sizes)}
    folder = write(tmp_path / "in", files)
    (tmp_path / "in" / "notes.md").write_text("no image")
    listing = tmp_path / "in" / "files.txt"
    listing.write_text("".join(f"{name}\n" for name in files))
    tar = shard(tmp_path / "s.tar", {**files, "a/b0.json": b"{}"})

    done = label(job, [folder], tmp_path / "1", confidence=True, overlay=True, batch_size=2)
    assert {o.status for o in done.values()} == {"done"}
    assert list(done) == [f"a/b{i}" for i in range(5)]
    label(job, [listing], tmp_path / "2", batch_size=2)
    label(job, [tar], tmp_path / "3", batch_size=2)
    expected = outputs(tmp_path / "1")
    assert list(expected) == [f"a/b{i}.png" for i in range(5)]
    assert outputs(tmp_path / "2") == expected
    assert outputs(tmp_path / "3") == {f"s/{name}": data for name, data in expected.items()}

    for i, (height, width) in enumerate(sizes):
        labels = Image.open(tmp_path / "1/labels" / f"a/b{i}.png")
        assert (labels.mode, labels.size) == ("P", (width, height))
        assert labels.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
        assert np.asarray(labels).max() < 3
        confidence = np.asarray(Image.open(tmp_path / "1/confidence" / f"a/b{i}.png"))
        assert confidence.shape == (height, width)
        assert confidence.min() >= 255 // 4 - 1  # four queries: the best has a quarter at least
        assert Image.open(tmp_path / "1/overlay" / f"a/b{i}.jpg").size == (width, height)


def test_equal_to_the_segmentor(tmp_path, job):
    """What is written is what `inference_model` gives for the file."""
    from mmseg.apis import inference_model, init_model

    folder = write(tmp_path / "in", {"x.jpg": picture(0, (70, 110), "JPEG")})
    label(job, [folder], tmp_path / "out")
    config = Config.fromfile(str(ROOT / "configs/base_config.py"))
    config.model.update(weights="mini", classes=WORDS, templates=["a {}."])
    config.test_pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="Resize", scale=(2048, 112), keep_ratio=True),
        dict(type="PackSegInputs"),
    ]
    assert bulk.job_from_config(config).describe() == job.describe()
    model = init_model(config, device="cpu")
    expected = inference_model(model, str(folder / "x.jpg")).pred_sem_seg.data[0]
    found = np.asarray(Image.open(tmp_path / "out/labels/x.png"))
    assert np.array_equal(found, expected.numpy())


@pytest.mark.slow
def test_what_is_done_is_skipped(tmp_path, job):
    folder = write(tmp_path / "in", {f"{i}.png": picture(i) for i in range(4)})
    tar = shard(tmp_path / "s.tar", {f"{i}.png": picture(i) for i in range(2)})
    out = tmp_path / "out"
    label(job, [folder, tar], out)
    expected = outputs(out)
    file = out / "labels/1.png"
    file.write_bytes(file.read_bytes()[:-3])  # torn, as by a crash of the machine
    (out / "labels/s/1.png").write_bytes(b"")
    (out / "labels/3.png").unlink()
    again = label(job, [folder, tar], out)
    assert {k for k, o in again.items() if o.status == "done"} == {"1", "3", "s/1"}
    assert {k for k, o in again.items() if o.status == "skipped"} == {"0", "2", "s/0"}
    assert outputs(out) == expected
    # another kind of result is wanted: the images are done again
    assert {o.status for o in label(job, [folder], out, overlay=True).values()} == {"done"}


def test_broken_images_are_recorded(tmp_path, job):
    good, photo = picture(0), picture(1, form="JPEG")
    files = {
        "0.png": good,
        "empty.png": b"",
        "text.jpg": b"not an image",
        "cut.png": good[: len(good) // 2],
        "cut.jpg": photo[: len(photo) // 2],
        "z.jpg": photo,
    }
    folder = write(tmp_path / "in", {k: v for k, v in files.items() if k != "cut.jpg"})
    write(folder, {"more/cut.jpg": files["cut.jpg"], "list.txt": b"0.png\nnowhere.png\n"})
    names = {"empty": "is empty", "text": "not an image", "cut": "truncated"}
    found = label(job, [folder], tmp_path / "1")
    assert {k for k, o in found.items() if o.status == "done"} == {"0", "z"}
    for name, error in (names | {"more/cut": "truncated"}).items():
        assert error in found[name].error
    assert set(outputs(tmp_path / "1")) == {"0.png", "z.png"}

    missing = label(job, [folder / "list.txt"], tmp_path / "2")
    assert "nowhere.png" in missing["nowhere"].error
    assert missing["0"].status == "done"

    tar = shard(
        tmp_path / "s.tar", {"0.png": good, "../out.png": good, "0.jpg": photo, "1.png": good}
    )
    found = list(bulk.Labeller(job, tmp_path / "3").run(list_units([tar])))
    assert sorted((o.name, o.status) for o in found) == [
        ("s/../out.png", "failed"),
        ("s/0", "done"),
        ("s/0", "failed"),
        ("s/1", "done"),
    ]
    errors = "".join(o.error for o in found)
    assert "leaves the archive" in errors
    assert "two images of this name" in errors
    assert set(outputs(tmp_path / "3")) == {"s/0.png", "s/1.png"}

    torn = tmp_path / "torn.tar"
    torn.write_bytes(
        shard(tmp_path / "t.tar", {f"{i}.png": good for i in range(3)}).read_bytes()[:9000]
    )
    found = label(job, [torn], tmp_path / "4")
    assert "torn.tar" in found["torn"].error


def test_one_image_does_not_fail_its_batch(tmp_path, job, monkeypatch):
    folder = write(tmp_path / "in", {f"{i}.png": picture(i, (40 + i, 60)) for i in range(4)})
    labeller = bulk.Labeller(job, tmp_path / "out", batch_size=4)
    predict = labeller.predict

    def fragile(batch):
        if any(len(entry.image) == 42 for entry in batch):
            raise RuntimeError("out of memory")
        return predict(batch)

    monkeypatch.setattr(labeller, "predict", fragile)
    found = {o.name: o.status for o in labeller.run(list_units([folder]))}
    assert found == {"0": "done", "1": "done", "2": "failed", "3": "done"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("textregion", "needs regions of the image"),
        ("sfp:layers=[20]", "layer 20 of a model with 12 blocks"),
    ],
)
def test_a_method_that_cannot_run_fails_no_images(tmp_path, capsys, method, message):
    """It ends the command, as with `sfp segment`, instead of every image."""
    folder = write(tmp_path / "in", {f"{i}.png": picture(i) for i in range(2)})
    assert cli.main([*command(folder, tmp_path / "out"), "--method", method]) == 2
    assert message in capsys.readouterr().err
    photo = [str(folder / "0.png"), "--classes", "sky, sun", "--weights", "mini"]
    assert cli.main(["segment", *photo, "--method", method]) == 2
    assert message in capsys.readouterr().err


def test_many_classes_have_16_bits(tmp_path, job):
    job = replace(job, classes=load_vocabulary([f"word {i}" for i in range(300)]))
    folder = write(tmp_path / "in", {"0.png": picture(0)})
    label(job, [folder], tmp_path / "out")
    assert Image.open(tmp_path / "out/labels/0.png").mode == "I;16"
    with pytest.raises(ValueError, match="255 classes at most"):
        bulk.Labeller(job, tmp_path / "out", overlay=True)


def test_inputs_that_cannot_be(tmp_path):
    write(tmp_path / "in", {"a.jpg": picture(0, form="JPEG"), "a.png": picture(0)})
    with pytest.raises(ValueError, match=r"both be written to a\.png"):
        list_units([tmp_path / "in"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no image"):
        list_units([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        list_units([tmp_path / "nowhere"])


def test_a_folder_belongs_to_its_settings(tmp_path, job):
    bulk.claim(tmp_path, job)
    bulk.claim(tmp_path, replace(job, settings=job.settings | dict(window_batch=3)))
    for other, what in (
        (dict(classes=load_vocabulary(["sky"])), "vocabulary"),
        (dict(method="sclip"), "method"),
        (dict(short_side=100), "protocol"),
        (dict(settings=dict(prob_thd=0.1)), "protocol"),
    ):
        with pytest.raises(ValueError, match=f"made with another {what}"):
            bulk.claim(tmp_path, replace(job, **other))


def test_a_folder_belongs_to_a_version_of_ones_own_code(tmp_path, job, monkeypatch):
    file = tmp_path / "mine.py"
    space: dict = {}
    for gain in (1, 1, 2):
        file.write_text(f"def of_mine():\n    return {gain}\n")
        exec(compile(file.read_text(), str(file), "exec"), space)
        monkeypatch.setitem(METHODS.module_dict, "of_mine", space["of_mine"])
        if gain == 1:
            bulk.claim(tmp_path / "out", job)
    with pytest.raises(ValueError, match="made with another version of your own code"):
        bulk.claim(tmp_path / "out", job)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cat, sofa|couch,floor", (["cat"], ["sofa", "couch"], ["floor"])),
        ("ade20k", (["wall"], ["building"], ["sky"])),
        ("cls.txt", (["one"], ["two", "2"])),
        ("St. Bernard", (["St. Bernard"],)),
        (",".join(f"class number {i}" for i in range(300)), (["class number 0"],)),
    ],
)
def test_classes_on_the_command_line(tmp_path, monkeypatch, words, expected):
    """As `sfp segment` reads them: names, a benchmark's or a file."""
    monkeypatch.chdir(tmp_path)
    Path("cls.txt").write_text("one\ntwo, 2\n")
    given = cli.build_parser().parse_args(["label", "in", "--out", "out", "--classes", words])
    vocabulary = label_cli._job(given).classes
    for i, queries in enumerate(expected):
        found = [q for q, own in zip(vocabulary.queries, vocabulary.index, strict=True) if own == i]
        assert found == queries


@pytest.mark.parametrize(
    ("options", "side"),
    [([], 336), (["--weights", "mini"], 224), (["--weights", "mini", "--short-side", "100"], 100)],
)
def test_size_on_the_command_line(options, side):
    given = cli.build_parser().parse_args(
        ["label", "in", "--out", "out", "--classes", "cat", *options]
    )
    assert label_cli._job(given).short_side == side


def test_no_size():
    given = ["label", "in", "--out", "out", "--classes", "cat", "--short-side", "0"]
    with pytest.raises(ValueError, match="short_side=0: expected 1 to 2048 pixels"):
        label_cli._job(cli.build_parser().parse_args(given))


def test_a_config_says_how():
    """Size, thresholds and words of a benchmark; what labelling cannot do is refused."""
    given = ["label", "in", "--out", "out", "--config", "city_scapes"]
    job = label_cli._job(cli.build_parser().parse_args(given))
    assert (job.short_side, job.classes.num_classes, job.weights) == (560, 19, "ViT-B/16")
    options = ["--cfg-options", "model.prob_thd=0.25"]
    given = ["label", "in", "--out", "out", "--classes", "cat", *options]
    job = label_cli._job(cli.build_parser().parse_args(given))
    assert (job.short_side, job.settings["prob_thd"]) == (336, 0.25)
    config = Config(dict(model=dict(weights="mini", classes=["sky"])))
    config.test_pipeline = [dict(type="LoadImageFromFile"), dict(type="RandomCrop")]
    with pytest.raises(ValueError, match="'RandomCrop'"):
        bulk.job_from_config(config)
    config.test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    assert bulk.job_from_config(config).short_side is None  # images keep their size
    config.pop("test_pipeline")
    assert bulk.job_from_config(config).short_side == 224
    config.model.data_preprocessor = dict(type="ImagePreprocessor", mean=[0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="mean"):
        bulk.job_from_config(config)
    config.model.pop("data_preprocessor")
    config.model.speed = 3
    with pytest.raises(ValueError, match="speed"):
        bulk.job_from_config(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clusters", dict(count=5)),
        ("load_from", "tuned.pth"),
        ("test_cfg", dict(type="TestLoop", fp16=True)),
        ("custom_hooks", [dict(type="EMAHook")]),
        ("data_preprocessor", dict(type="ImagePreprocessor", bgr_to_rgb=False)),
    ],
)
def test_a_config_with_what_labelling_would_ignore(name, value):
    config = Config(dict(model=dict(weights="mini", classes=["sky"])))
    (config.model if name == "data_preprocessor" else config)[name] = value
    expected = dict(data_preprocessor="bgr_to_rgb", test_cfg="fp16").get(name, name)
    with pytest.raises(ValueError, match=f"does not support .*{expected}"):
        bulk.job_from_config(config)


@pytest.mark.parametrize("name", ["ViT-B/16", "tipsv2-b14"])
def test_weights_that_are_fetched_first(tmp_path, monkeypatch, job, name):
    """A run that had to download its weights is continued by one that finds them."""
    fetched: list[str] = []
    mirror = tmp_path / "mirror.safetensors"  # of another name than the publisher's file

    def download(name: str) -> Path:
        fetched.append(name)
        shutil.copy(published.PUBLISHED["mini"].shipped, mirror)
        return mirror

    monkeypatch.setattr(loading, "on_disk", lambda name: mirror if mirror.is_file() else None)
    monkeypatch.setattr(loading, "download", download)
    monkeypatch.setattr(loading, "verify", lambda name, path: (sha256_file(path), True))
    for _ in range(2):
        bulk.claim(tmp_path / "out", replace(job, weights=name))
    assert fetched == [name]
    described = json.loads((tmp_path / "out/settings.json").read_text())
    assert described["weights"]["sha256"] == loading.open_weights(name).digest


def command(folder: Path, out: Path) -> list[str]:
    """Of `sfp label`, in words."""
    arguments = ["--weights", "mini", "--short-side", "112", "--batch-size", "1"]
    arguments += ["--classes", "sky, sun|star"]
    return ["label", str(folder), "--out", str(out), *arguments]


@pytest.mark.slow
@pytest.mark.process
def test_kill_9_and_continue(tmp_path, job):
    """A killed run of the tool continues; its label maps equal those of one that was left alone."""
    count = 8
    folder = write(tmp_path / "in", {f"{i:03}.png": picture(i, (100, 140)) for i in range(count)})
    write(folder, {"000.png": b"broken"})
    out = tmp_path / "out"
    killed(cli.main, command(folder, out), at="replace", call=5)
    (left,) = (out / "labels").glob(".*")  # what was written and had not got its name
    assert left.suffix == ".part"
    left.unlink()
    before = outputs(out)
    assert 2 <= len(before) <= 4
    assert all(bulk.whole(out / "labels" / name) for name in before)

    assert cli.main(command(folder, out)) == 1  # one image is broken
    report = json.loads((out / "report.json").read_text())
    assert (report["done"], report["skipped"], report["failed"]) == (
        count - 1 - len(before),
        len(before),
        1,
    )
    assert report["images_per_second"] > 0
    (line,) = (out / "failures.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "000"
    whole = bulk.Job("mini", load_vocabulary(["sky", ["sun", "star"]]), short_side=112)
    label(whole, [folder], tmp_path / "whole", batch_size=1)
    assert outputs(out) == outputs(tmp_path / "whole")


def test_ray_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sfp\[scale\]'"):
        bulk.run_on_ray([], {})


def test_processes_of_ray_import_modules_first(tmp_path, job):
    module = tmp_path / "methods_of_a_file.py"
    module.write_text(
        "from sfp.registry import METHODS\n"
        "@METHODS.register_module()\n"
        "def of_a_file():\n    return dict(readouts=[dict(ffn=False)])\n"
    )
    knobs = dict(job=replace(job, method="of_a_file"), out=tmp_path / "out")
    try:
        labeller = bulk._RayLabeller(knobs, [str(module)]).labeller
    finally:
        METHODS.module_dict.pop("of_a_file", None)
    assert not labeller.method.readouts[0].ffn


def test_ray(tmp_path, job):
    pytest.importorskip("ray")
    files = {f"{i}.png": picture(i) for i in range(6)}
    inputs = [write(tmp_path / "in", files), shard(tmp_path / "s.tar", files)]
    label(job, inputs, tmp_path / "local", batch_size=1)
    knobs = dict(job=job, out=tmp_path / "ray", batch_size=1)
    found = list(bulk.run_on_ray(list_units(inputs), knobs, processes=2))
    assert sorted(o.name for o in found) == sorted(
        [*map(str, range(6)), *(f"s/{i}" for i in range(6))]
    )
    assert outputs(tmp_path / "ray") == outputs(tmp_path / "local")
