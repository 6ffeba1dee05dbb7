"""`sfp data`: from the authors' downloads to an evaluation, and exact reports of damage."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
import trees
from mmengine.config import Config
from PIL import Image
from scipy.io import savemat

from sfp import cli
from sfp.data import check, convert, ids
from sfp.data.benchmarks import DOWNLOADED
from sfp.data.datasets import (
    DATASETS,
    Cityscapes19Dataset,
    COCOStuff164kDataset,
    PascalContext59Dataset,
    PascalVOC21Dataset,
    colour_map,
)
from sfp.data.images import DataError
from sfp.evaluation import compare
from sfp.evaluation import run as evaluate
from sfp.evaluation.journal import fingerprint
from sfp.evaluation.settings import image_names

ROOT = Path(__file__).parents[2]
CONVERTED = [name for name, entry in DOWNLOADED.items() if entry.steps]


def sfp_data(*words: object) -> int:
    """The command in this process; errors are raised."""
    args = cli.build_parser().parse_args(["data", *map(str, words)])
    return args.run(args)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root of data; the catalogue expects three images in each dataset."""
    folder = tmp_path / "data"
    monkeypatch.setenv("DATA_ROOT", str(folder))
    for name, entry in DOWNLOADED.items():
        monkeypatch.setitem(DOWNLOADED, name, dataclasses.replace(entry, images=(3,)))
    return folder


# -- the table -----------------------------------------------------------------------------------


def test_entries_and_configs_agree():
    configs = {path.stem.removeprefix("cfg_") for path in ROOT.glob("configs/cfg_*.py")}
    applications = {"voc21_sam", "voc21_sam3"}
    applications |= {"coco27_unsupervised", "city_scapes27_unsupervised"}
    assert (
        set(DOWNLOADED) == {name for name in configs if not name.startswith("mini")} - applications
    )
    for name, entry in DOWNLOADED.items():
        node = Config.fromfile(ROOT / "configs" / f"cfg_{name}.py").test_dataloader.dataset
        node.pop("pipeline")
        assert Path(node.pop("data_root")).parts[-1] == Path(entry.folder).parts[-1]
        assert node == entry.dataset, name
        kind = DATASETS.get(entry.dataset["type"])
        if entry.class_file:
            names = tuple(each.strip() for each in kind.METAINFO["classes"])
            assert names == entry.class_names, name


def test_docs_say_what_prepare_says():
    page = (ROOT / "docs" / "data.md").read_text()
    for name, entry in DOWNLOADED.items():
        images = " or ".join(map(str, entry.images))
        assert f"| `cfg_{name}.py` | {images} | {entry.classes} | `{entry.folder}` |" in page
        for file in entry.downloads:
            assert f"`{file.file}`" in page
            assert file.url.split(" ")[0] in page
        for path in entry.layout:
            assert path.rsplit("/", 1)[-1] in page, path


def test_layouts_are_those_of_the_trees(root):
    for name, entry in DOWNLOADED.items():
        layout = trees.LAYOUTS[name]
        shown = {f"{entry.folder}/{path}" for path in entry.layout}
        for template in (layout.image, layout.label, layout.listing, layout.classes):
            if template:
                pattern = re.escape(template).replace(r"\{\}", ".*")
                assert any(re.fullmatch(pattern, path) for path in shown), (name, template)


def test_coarse_classes_are_a_partition():
    members = [member for group in ids.COCO_COARSE.values() for member in group]
    assert len(ids.COCO_COARSE) == 27
    assert sorted(members) == sorted(COCOStuff164kDataset.METAINFO["classes"])
    words = [line.split(", ") for line in (ROOT / "configs/cls_coco27.txt").read_text().split("\n")]
    spelled = [[m.replace(" ", "") for m in group] for group in ids.COCO_COARSE.values()]
    assert words[:-1] == spelled


def test_numbers_that_other_sources_have():
    """mmseg knows the 19 training classes with their colours, and Context's classes in order."""
    for name, colour in zip(
        *map(Cityscapes19Dataset.METAINFO.get, ("classes", "palette")), strict=True
    ):
        assert ids.CITYSCAPES_27[name] == colour
    assert len(ids.CITYSCAPES_27) == 27
    lines = (ROOT / "configs/cls_city_scapes27.txt").read_text().splitlines()
    assert lines == list(ids.CITYSCAPES_27)
    names = PascalContext59Dataset.METAINFO["classes"]
    assert len(names) == len(ids.CONTEXT_59) == 59
    assert list(ids.CONTEXT_59) == sorted(ids.CONTEXT_59)  # as the names, so that order is kept
    assert list(names) == sorted(names)


def test_colours_of_many_classes():
    colours = colour_map(848)
    assert len({tuple(c) for c in colours}) == 848
    assert colours[:21] == PascalVOC21Dataset.METAINFO["palette"]  # Pascal's own
    assert colours[256] == [0, 0, 32]  # the ninth bit is the third of blue


# -- list ----------------------------------------------------------------------------------------


def test_list(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # paths are not cut
    trees.build("voc21", root)
    trees.download("city_scapes", root)
    lost = root / trees.LAYOUTS["voc21"].label.format(trees.LAYOUTS["voc21"].stems[0])
    assert sfp_data("list") == 0
    lines = {
        line.split("│")[1].strip(): line
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    }
    assert set(DOWNLOADED) == set(lines)
    assert "ready" in lines["voc20"]
    assert "3 of 3 labels missing" in lines["city_scapes"]
    assert "missing" in lines["ade847"].split("│")[6]
    assert str(root / "ade" / "ADEChallengeData2016") in lines["ade20k"]
    lost.unlink()
    assert sfp_data("list", "--data-root", root) == 0
    assert "1 of 3 labels missing" in capsys.readouterr().out
    assert sfp_data("list", "--data-root", root / "nowhere") == 0
    assert "ready" not in capsys.readouterr().out


def test_wrong_number_of_images_is_not_ready(root, monkeypatch, capsys):
    trees.build("voc21", root)
    entry = dataclasses.replace(DOWNLOADED["voc21"], images=(1449,))
    assert entry.state(root) == (3, "expected 1449 images")
    monkeypatch.setitem(DOWNLOADED, "voc21", entry)
    assert sfp_data("prepare", "voc21") == 3
    assert "voc21: 3 images, expected 1449 images" in capsys.readouterr().out


# -- prepare -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is also in")
@pytest.mark.parametrize("name", CONVERTED)
def test_prepare(name, root, capsys):
    """What is offered becomes what the dataset reads; a second time nothing is done."""
    expected = trees.download(name, root)
    assert sfp_data("prepare", name) == 0
    printed = capsys.readouterr().out
    assert "maps of" in printed
    assert "3 written, 0 already there" in printed
    assert f"{name}: 3 images, ready" in printed
    for path, labels in expected.items():
        written = cv2.imread(str(root / path), cv2.IMREAD_UNCHANGED)
        assert written.dtype == (np.uint16 if DOWNLOADED[name].classes > 256 else np.uint8)
        assert np.array_equal(written, labels), path

    dataset = DOWNLOADED[name].build(root)
    assert len(dataset.metainfo["classes"]) == DOWNLOADED[name].classes
    dataset.full_init()
    for i, labels in enumerate(expected.values()):
        truth = dataset.prepare_data(i)["data_samples"].gt_sem_seg.data[0].numpy()
        assert np.array_equal(truth, trees.evaluated(name, labels))
    assert sfp_data("check", name) == 0
    printed = capsys.readouterr().out
    assert f"{name}: no problems" in printed
    counted = [labels[labels != dataset.ignore_index] for labels in truths(dataset)]
    assert (
        f"{len(np.unique(np.concatenate(counted)))} of {DOWNLOADED[name].classes} classes"
        in printed
    )

    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert sfp_data("prepare", name) == 0
    printed = capsys.readouterr().out
    assert "0 written, 3 already there" in printed
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {path for path in root.rglob("*") if path.is_file()} == set(
        times
    )  # nothing half-written


def truths(dataset):
    for i in range(len(dataset)):
        yield dataset.prepare_data(i)["data_samples"].gt_sem_seg.data.numpy()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is also in")
@pytest.mark.parametrize("name", ["coco27", "context459"])
def test_from_download_to_metrics(name, root, tmp_path):
    trees.download(name, root)
    assert sfp_data("prepare", name) == 0
    weights = tiny.save(tmp_path / "tiny.safetensors", **dict(tiny.WORDS, patch=32, image_size=224))
    cfg = evaluate.load_config(
        ROOT / "configs" / f"cfg_{name}.py",
        weights=str(weights),
        work_dir=str(tmp_path / "work"),
        options={"test_dataloader.num_workers": 0, "model.templates": ["{}"]},
    )
    evaluate.check(cfg)
    result = evaluate.evaluate(cfg, pictures=1)
    assert result["images"] == 3
    assert len(result["classes"]) == DOWNLOADED[name].classes
    methods = {"sfp": cfg.model.method}
    cfg.work_dir = str(tmp_path / "compared")
    compared = compare.compare(
        cfg, methods, pictures=1
    )  # its own loop, with the same pixels ignored
    assert compared["methods"]["sfp"]["mIoU"] == result["mIoU"]


@pytest.mark.parametrize("name", ["voc21", "voc20", "ade20k"])
def test_nothing_to_convert(name, root, capsys):
    with pytest.raises(FileNotFoundError, match="there is no image folder"):
        sfp_data("prepare", name)
    printed = capsys.readouterr().out
    for file in DOWNLOADED[name].downloads:
        assert file.url in printed
        assert os.path.normpath(root / file.into) in printed
    assert "Terms: " in printed
    for path in DOWNLOADED[name].layout:
        assert path in printed
    trees.build(name, root)
    assert sfp_data("prepare", name) == 0
    assert f"{name}: 3 images, ready" in capsys.readouterr().out


@pytest.mark.parametrize("name", CONVERTED)
def test_nothing_downloaded(name, root, capsys):
    with pytest.raises(FileNotFoundError, match=re.escape(str(root / DOWNLOADED[name].folder))):
        sfp_data("prepare", name)
    assert DOWNLOADED[name].downloads[0].url in capsys.readouterr().out
    assert not root.exists()


def test_unknown_names(root):
    for action in ("prepare", "check"):
        with pytest.raises(ValueError, match="did you mean 'voc21'"):
            sfp_data(action, "voc20", "voc22")


def test_a_stopped_conversion_goes_on(root, capsys):
    """Maps that are there are kept, whatever they hold, and their sources are not needed."""
    expected = trees.download("coco_stuff164k", root)
    first, second, third = expected
    sfp_data("prepare", "coco_stuff164k")
    Path(root / first).write_text("mine")
    Path(root / second).unlink()
    Path(root / third.replace("_labelTrainIds", "")).unlink()
    capsys.readouterr()
    assert sfp_data("prepare", "coco_stuff164k", "--workers", "1") == 0
    assert "1 written, 2 already there" in capsys.readouterr().out
    assert (root / first).read_text() == "mine"
    with pytest.raises(
        FileNotFoundError, match=r"1 of 3 files to convert are missing, the first is .*581781"
    ):
        sfp_data("prepare", "coco_stuff164k", "--force")
    assert (root / first).read_text() == "mine"  # nothing is made then


def test_one_bad_file_does_not_stop_the_others(root):
    expected = trees.download("city_scapes", root)
    first, _, third = expected
    sources = [root / path.replace("labelTrainIds", "labelIds") for path in expected]
    sources[0].write_bytes(sources[0].read_bytes()[:60])
    labels = np.full((96, 64), 7, np.uint8)
    labels[:2, :3] = 40
    cv2.imwrite(str(sources[1]), labels)
    with pytest.raises(DataError, match=r"2 of 3 files could not be converted") as error:
        sfp_data("prepare", "city_scapes")
    assert str(sources[0]) in str(error.value)
    assert not (root / first).exists()
    assert np.array_equal(cv2.imread(str(root / third), -1), expected[third])
    with pytest.raises(DataError, match="6 pixels have the number 40"):
        convert.cityscapes_labels(sources[1], ("road",))
    cv2.imwrite(str(sources[1]), np.zeros((5, 6, 3), np.uint8))
    with pytest.raises(DataError, match=r"\(5, 6, 3\)"):
        convert.cityscapes_labels(sources[1], ("road",))
    assert not list(root.rglob(".*"))


def test_context_of_another_converter_is_kept(root, capsys):
    """mmsegmentation's label maps and list, and no .mat file."""
    trees.build("context60", root)
    assert sfp_data("prepare", "context60", "context59") == 0
    assert capsys.readouterr().out.count("0 written, 3 already there") == 2


def test_context_names(root, tmp_path):
    names = dict(zip(ids.CONTEXT_59, PascalContext59Dataset.METAINFO["classes"], strict=True))
    path = tmp_path / "labels.txt"

    def write(names: dict[int, str]) -> None:
        path.write_text("".join(f"{k}: {names.get(k, f'rarity {k}')}\n" for k in range(460)))

    write(names)
    convert.check_context_names(path)
    assert convert.read_names(path, count=459)[458] == "wood"
    write(names | {458: "water", 445: "wood"})
    with pytest.raises(DataError, match="'water' has the number 458, expected 445"):
        convert.check_context_names(path)
    for text, message in (
        ("1: a\n3: b\n", "numbered from 1"),
        ("1: a\n2: a\n", "line 2: '2: a' repeats an earlier number or name"),
        ("1: a\nb\n", "line 2: expected '<number>: <name>', found 'b'"),
        ("1: a\n", "has 1 classes, expected 2"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(message)):
            convert.read_names(path, count=2)
    assert convert.class_file(["a, b, a", "c"]) == "a, b\nc\n"


def test_context_maps(tmp_path):
    path = tmp_path / "a.mat"
    savemat(path, {"LabelMap": np.array([[0.0, 2.0], [459.0, 458.0]])})  # as MATLAB has numbers
    assert convert.context_frequent(path).tolist() == [[0, 1], [0, 59]]
    assert convert.context_all(path).tolist() == [[0, 2], [459, 458]]
    savemat(path, {"LabelMap": np.array([[460]])})
    with pytest.raises(DataError, match="1 pixels have the number 460"):
        convert.context_all(path)
    savemat(path, {"Labels": np.array([[1]])})
    with pytest.raises(DataError, match=r"a\.mat: cannot read its LabelMap"):
        convert.context_all(path)
    path.write_bytes(b"no matrix")
    with pytest.raises(DataError, match=r"a\.mat: cannot read its LabelMap"):
        convert.context_all(path)


def test_list_of_the_27_classes(root):
    """The images that papers on unsupervised segmentation evaluate, by a list of one's own."""
    trees.download("coco27", root)
    sfp_data("prepare", "coco27")
    stems = trees.LAYOUTS["coco27"].stems
    (root / "coco_stuff164k" / "curated.txt").write_text(f"{stems[2]}\n{stems[0]}\n")
    node = dict(DOWNLOADED["coco27"].dataset, ann_file="curated.txt")
    dataset = dataclasses.replace(DOWNLOADED["coco27"], dataset=node).build(root)
    assert [Path(r["img_path"]).stem for r in dataset.load_data_list()] == [stems[2], stems[0]]


# -- check ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOWNLOADED)
def test_check_of_good_files(name, root, capsys):
    files = trees.build(name, root)
    assert sfp_data("check", name) == 0
    printed = capsys.readouterr().out
    assert f"{name}: no problems" in printed
    truth = np.concatenate([trees.evaluated(name, x).ravel() for x in files.values()])
    counted = truth[truth != trees.LAYOUTS[name].ignored]
    share = 1 - len(counted) / len(truth)
    assert (
        f"{len(np.unique(counted))} of {DOWNLOADED[name].classes} classes occur, {share:.1%}"
        in printed
    )


@pytest.mark.filterwarnings("ignore:Please pay attention")  # mmseg's, of three channels
def test_check_finds_every_problem(root, monkeypatch, capsys):
    """Eight images of COCO-Stuff, each with something else."""
    entry = dataclasses.replace(DOWNLOADED["coco_stuff164k"], images=(5000,))
    monkeypatch.setitem(DOWNLOADED, "coco_stuff164k", entry)
    trees.build("coco_stuff164k", root)
    images = root / "coco_stuff164k" / "images" / "val2017"
    labels = root / "coco_stuff164k" / "annotations" / "val2017"
    size, rng = (40, 50), np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(images / f"{i}.jpg")
        Image.fromarray(np.zeros(size, np.uint8)).save(labels / f"{i}_labelTrainIds.png")

    (labels / "0_labelTrainIds.png").unlink()
    (images / "1.jpg").unlink()
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes()[:-400])
    (labels / "3_labelTrainIds.png").write_bytes(b"")
    Image.fromarray(np.zeros((50, 40), np.uint8)).save(labels / "4_labelTrainIds.png")
    wrong = np.zeros(size, np.uint8)
    wrong[3, 4:9] = 171
    Image.fromarray(wrong).save(labels / "5_labelTrainIds.png")
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(labels / "6_labelTrainIds.png")
    Image.fromarray(np.zeros(size, np.uint16)).save(labels / "7_labelTrainIds.png")

    report = check.check(entry, root, workers=2)
    lines = {
        kind: [line.split(":")[0] for line in found] for kind, found in report.problems.items()
    }
    name = "{}_labelTrainIds.png".format
    assert lines == {
        "number of images": ["10, expected 5000"],
        "label missing": [str(labels / name(0))],
        "label map without an image": [str(labels / name(1))],
        "label map of another size": [str(labels / name(4)), str(labels / name(6))],
        "label that is no class": [str(labels / name(5))],
        "damaged file": [str(images / "2.jpg"), str(labels / name(3)), str(labels / name(7))],
    }
    assert (
        "label 171 in 5 pixels, expected 0 to 170" in report.problems["label that is no class"][0]
    )
    assert "expected one number for each pixel" in report.problems["label map of another size"][0]
    assert "40x50" in report.problems["label map of another size"][0]
    assert "truncated JPEG" in report.problems["damaged file"][0]

    assert sfp_data("check", "coco_stuff164k") == 3
    printed = capsys.readouterr().out
    for kind, found in lines.items():
        assert f"coco_stuff164k: {kind}: {len(found)}\n    {found[0]}" in printed


def test_check_shows_the_first_examples(root, capsys):
    files = trees.build("voc21", root)
    more = [f"2008_00000{i}" for i in range(5)]
    listing = root / trees.LAYOUTS["voc21"].listing
    listing.write_text("".join(f"{name}\n" for name in (*trees.LAYOUTS["voc21"].stems, *more)))
    assert sfp_data("check", "voc21") == 3
    printed = capsys.readouterr().out
    assert "voc21: image missing: 5\n" in printed
    assert "voc21: label missing: 5\n" in printed
    assert "`sfp data prepare voc21` says what to download" in printed
    assert printed.count("    and 2 more\n") == 2
    assert "voc21: number of images: 1\n    8, expected 3\n" in printed
    assert f"{len(files) + 5} images" in printed


def test_check_of_nothing(root):
    with pytest.raises(FileNotFoundError, match="there is no image folder"):
        sfp_data("check", "voc21")
    with pytest.raises(FileNotFoundError, match=r"no file of class names .*prepare context459"):
        sfp_data("check", "context459")


def test_wrong_list_of_names(root):
    """Labels of a shorter list would all be refused; it says why."""
    trees.build("context459", root)
    path = root / trees.LAYOUTS["context459"].classes
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:450]))
    report = check.check(DOWNLOADED["context459"], root)
    assert report.problems["number of classes"] == ["450, expected 459"]
    assert "label that is no class" in report.problems


# -- manifests -----------------------------------------------------------------------------------


def test_manifest(root, tmp_path, capsys):
    files = trees.build("voc21", root)
    assert sfp_data("check", "voc21", "--write-manifest") == 0
    path = root / "voc21.manifest.json"
    content = json.loads(path.read_text())
    assert content["images"] == 3
    assert len(content["sha256"]) == 6
    dataset = DOWNLOADED["voc21"].build(root)
    dataset.full_init()
    _, names = image_names(dataset)
    assert content["list_sha256"] == fingerprint(dict(images=names))  # as on the card of a result

    other = tmp_path / "other machine"  # another compression, no palette: the same labels
    trees.build("voc21", other)
    for label in (other / "VOCdevkit/VOC2012/SegmentationClass").iterdir():
        numbers = np.array(Image.open(label))
        cv2.imwrite(str(label), numbers, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    capsys.readouterr()
    assert sfp_data("check", "voc21", "--data-root", other, "--manifest", path) == 0
    assert f"voc21: agrees with {path}" in capsys.readouterr().out

    label = other / next(iter(files)).replace("JPEGImages", "SegmentationClass").replace(
        "jpg", "png"
    )
    numbers = np.array(Image.open(label))
    numbers[0, 0] ^= 1
    cv2.imwrite(str(label), numbers)
    image = other / list(files)[2]
    image.write_bytes(image.read_bytes() + b"\xff\xd9")
    assert sfp_data("check", "voc21", "--data-root", other, "--manifest", path) == 3
    printed = capsys.readouterr().out
    assert f"voc21: differs from {path}: 2\n" in printed
    assert f"    {label.relative_to(other).as_posix()}\n" in printed
    assert f"    {image.relative_to(other).as_posix()}\n" in printed

    path.write_text(path.read_text().replace('"images": 3', '"images": "3'))
    with pytest.raises(DataError, match=r"voc21\.manifest\.json is not a manifest"):
        sfp_data("check", "voc21")  # it is found where it was written
    with pytest.raises(ValueError, match="belongs to one dataset"):
        sfp_data("check", "voc21", "voc20", "--manifest", path)


def test_manifest_of_another_list(root):
    trees.build("voc21", root)
    ours = check.manifest(DOWNLOADED["voc21"], root)
    path = root / "theirs.json"
    check.write_manifest(path, dict(ours, images=1449, list_sha256="0"))
    assert check.compare(path, ours) == [f"the list of images differs: 3 here, 1449 in {path}"]


def test_manifest_samples_evenly(root, monkeypatch):
    trees.build("voc21", root)
    monkeypatch.setattr(check, "SAMPLE", 2)
    content = check.manifest(DOWNLOADED["voc21"], root)
    names = [Path(path).stem for path in content["sha256"]]
    assert names == ["2007_000033", "2007_000033", "2007_000042", "2007_000042"]


# -- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["prepare"], ["check"], ["chekc"], ["check", "a", "--workers", "0"]]
)
def test_wrong_command_lines(words, capsys):
    with pytest.raises(SystemExit) as error:
        sfp_data(*words)
    assert error.value.code == 2
    assert "usage: sfp data" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["list", "prepare", "check"])
def test_help(action, capsys):
    with pytest.raises(SystemExit) as error:
        sfp_data(action, "--help")
    assert error.value.code == 0
    printed = capsys.readouterr().out
    assert "Examples:" in printed
    assert "--data-root" in printed


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("prepare voc22", 2, "unknown dataset 'voc22'; did you mean 'voc21'"),
        ("prepare voc21", 3, "there is no image folder"),
        ("check voc21", 3, "there is no image folder"),
        ("check context459", 3, "there is no file of class names"),
        ("prepare city_scapes", 3, "there is no image folder"),
    ],
)
def test_exit_codes(words, code, message, root, capsys):
    assert cli.main(["data", *words.split()]) == code
    assert "error: " in (printed := capsys.readouterr().err)
    assert message in printed
