"""The commands as users run them: scripts and tools, their output and exit codes."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch.distributed.run
import yaml
from packaging.requirements import Requirement
from processes import forked
from torch.distributed.launcher.api import elastic_launch

from sfp import cli
from sfp.evaluation import run as evaluate
from sfp.mini import CLASSES

ROOT = Path(__file__).parents[2]
TOOLS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in ROOT.glob("tools/**/*.py")
    if path.name != "sequential.py"  # the bench imports it
)
SCRIPTS = ["test.sh", "multi_test.sh", "distribute_test.sh"]
SHARED = "tools/benchmarks.sh"  # read by two of them
SCENES = 5  # an odd number: two processes do not share it evenly
ONE_THREAD = dict(OMP_NUM_THREADS="1")  # of any number, sums would have other last digits
FEW = ["--cfg-options", f"test_dataloader.dataset.scenes={SCENES}"]
NOISE = re.compile(r"OneDL|Traceback|[Ww]arn|Deprecat|\bWARNING\b|\bINFO\b|randomly initialized")


def run(
    script: str, *arguments: str, folder: str | Path = "/", **environment: str
) -> subprocess.CompletedProcess[str]:
    """A script, called from a folder that is not the repository's."""
    return subprocess.run(
        ["sh", str(ROOT / script), *arguments],
        env=dict(os.environ, **ONE_THREAD, PYTHON=sys.executable, PYTHONPATH=str(ROOT))
        | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def tool(
    monkeypatch: pytest.MonkeyPatch, path: str, *arguments: str, folder: Path = ROOT
) -> int | str | None:
    """A tool in this process, for its exit code; the interpreter's start is not what is tested."""
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend((ROOT / path).parent)  # as the interpreter does for a script
    try:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code or 0
    return 0


# -- scripts -------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.slow
def test_test_sh(tmp_path):
    """On a few scenes, with a picture of each image, from the folder where relative paths start."""
    words = ("--show-dir", "deep/mini/show", *FEW)
    done = run("test.sh", *words, folder=tmp_path, WORK_DIR="deep/mini")
    assert done.returncode == 0, done.stderr
    for output in (done.stdout, done.stderr):
        assert not NOISE.search(output), output
    for word in (*CLASSES, "IoU", "Acc", "mIoU", "aAcc", "mAcc", "fwIoU"):
        assert word in done.stdout
    assert f"{SCENES}/{SCENES}" in done.stderr  # the progress bar
    assert "results in deep/mini: metrics.json" in done.stdout
    folder = tmp_path / "deep/mini"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert tuple(metrics["classes"]) == CLASSES
    assert metrics["images"] == SCENES
    assert metrics["method"]["type"] == "sfp"
    assert metrics["weights"] == "mini"
    card = json.loads((folder / "card.json").read_text())
    assert "tools/test.py configs/cfg_mini.py --work-dir deep/mini" in card["command"]
    row = re.search(r"mIoU / mAcc\W+([\d.]+)\W+([\d.]+)", done.stdout)
    assert float(row[1]) == pytest.approx(metrics["mIoU"], abs=0.006)
    assert float(row[2]) == pytest.approx(metrics["mAcc"], abs=0.006)

    sheet = cv2.imread(str(folder / "sheet.png"))
    assert sheet.shape[0] > sheet.shape[1]  # five rows of four columns
    assert sheet.std() > 30
    shown = sorted((folder / "show").rglob("*.png"))
    assert len(shown) == SCENES
    for path in shown:
        picture = cv2.imread(str(path))
        assert picture.shape == (224, 448, 3)  # truth and prediction side by side
        assert picture.std() > 10


@pytest.mark.process
def test_test_sh_by_default_says_what_purification_does(tmp_path):
    """Its two commands, without running them; with a config or arguments it is the first alone."""
    first, second = run("test.sh", folder=tmp_path, PYTHON="echo").stdout.splitlines()
    assert first.endswith("tools/test.py configs/cfg_mini.py --work-dir work/cfg_mini")
    words = second.removeprefix("-m sfp ").split()
    args = cli.build_parser().parse_args(words)
    assert args.methods == ["clip", "sclip", "sfp:purify=False", "sfp"]
    assert (args.work_dir, args.paired) == ("work/cfg_mini", args.methods[2])
    for arguments, options in (((), {"CONFIG": "x.py"}), (("--method", "clip"), {})):
        said = run("test.sh", *arguments, folder=tmp_path, PYTHON="echo", **options).stdout
        assert len(said.splitlines()) == 1


def stub(path: Path, cases: str) -> str:
    """A `python` that notes what it is called with, then does what its case says."""
    path.write_text(f'#!/bin/sh\necho "$*" >>{path}.log\ncase "$*" in\n{cases}\nesac\n')
    path.chmod(0o755)
    return str(path)


def single(work: Path) -> dict[str, Any]:
    """The numbers of the same scenes in this process."""
    options = {"test_dataloader.dataset.scenes": SCENES}
    config = evaluate.load_config(ROOT / "configs/cfg_mini.py", work_dir=str(work), options=options)
    return evaluate.evaluate(config, pictures=0)


@pytest.mark.process
@pytest.mark.slow
def test_two_processes_of_distribute_test_sh_equal_one(tmp_path, capfd):
    """Its command with torchrun's own agent, whose processes are forked: imports take the longest."""
    python = stub(tmp_path / "python", "")
    where = dict(CONFIGS="configs/cfg_mini.py", WORK_DIR=str(tmp_path), PYTHON=python, GPUS="2")
    run("distribute_test.sh", *FEW, **where)
    (command,) = re.findall(
        "^-m torch.distributed.run (.*)", Path(f"{python}.log").read_text(), re.MULTILINE
    )

    def rank(path: str, *arguments: str) -> None:
        sys.argv = [path, *arguments]
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT / "tools"))
        runpy.run_path(path, run_name="__main__")

    def torchrun() -> None:
        words = torch.distributed.run.parse_args(command.split())
        config, _, (_, *tool) = torch.distributed.run.config_from_args(words)
        free = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0")  # any port, not this one
        elastic_launch(replace(config, start_method="fork", **free), rank)(*tool)

    assert forked(torchrun) == 0
    printed = capfd.readouterr()
    for output in (printed.out, printed.err):
        assert not NOISE.search(output), output
    assert printed.out.count("brick wall") == 1  # one process prints the table
    assert (tmp_path / "cfg_mini" / "sheet.png").is_file()
    assert len(list((tmp_path / "cfg_mini" / "journal").iterdir())) == 2  # one of each process
    assert forked(lambda: single(tmp_path / "one") and None) == 0
    numbers = [(tmp_path / name / "metrics.json").read_text() for name in ("cfg_mini", "one")]
    assert numbers[0] == numbers[1]


@pytest.mark.process
def test_commands_of_distribute_test_sh(tmp_path):
    """One process checks each config, whose exit code torchrun would hide; then several run it."""
    python = stub(
        tmp_path / "python",
        """
        *summary.py*) exit 0 ;;
        *torch.distributed.run*cfg_crashes.py*) exit 7 ;;
        *cfg_broken.py*--check) exit 2 ;;
        *cfg_missing.py*--check) exit 3 ;;
        """,
    )
    names = ("broken", "missing", "crashes", "fine")
    codes = dict(zip(names, "2310", strict=True))
    for configs, expected in ((names, 1), (names[1:], 1), (names[1::2], 3), (names[3:], 0)):
        where = dict(CONFIGS=" ".join(f"cfg_{name}.py" for name in configs), WORK_DIR="work")
        where |= dict(GPUS="3", PORT="12345", PYTHON=python)
        done = run("distribute_test.sh", "--method", "clip", folder=tmp_path, **where)
        assert done.returncode == expected, done.stderr
        assert re.findall(r"cfg_(\w+): 3 processes", done.stdout) == list(configs)
        for name in configs:
            code = (tmp_path / f"work/cfg_{name}/exit_code").read_text()
            assert code == f"{codes[name]}\n"
    log = (tmp_path / "python.log").read_text().replace(f"{ROOT}/", "").splitlines()
    assert log[-3:] == [
        "tools/test.py cfg_fine.py --work-dir work/cfg_fine --method clip --check",
        "-m torch.distributed.run --nproc_per_node=3 --master_port=12345 tools/test.py "
        "cfg_fine.py --launcher pytorch --work-dir work/cfg_fine --method clip",
        "tools/summary.py work/cfg_fine --out work/summary",
    ]
    assert not any("distributed" in line for line in log if "broken" in line or "missing" in line)


@pytest.mark.process
def test_multi_test_sh(tmp_path):
    """What it makes of the exit codes of tools/test.py, which are those of `test_exit_codes`."""
    python = stub(
        tmp_path / "python",
        f"""
        *summary.py*) test -z "$SUMMARY" || exec {sys.executable} "$@"; exit 0 ;;
        *_broken.py*) echo "error: broken" >&2; exit 2 ;;
        *_missing.py*) echo "error: there is no image folder" >&2; exit 3 ;;
        *)
            echo "on $CUDA_VISIBLE_DEVICES"
            echo '{{"mIoU": 50, "mAcc": 60, "aAcc": 70, "fwIoU": 80, "images": 5}}' >"$4/metrics.json"
            ;;
        """,
    )
    work = tmp_path / "work"
    (work / "cfg_missing").mkdir(parents=True)
    (work / "cfg_missing/metrics.json").write_text("{}")  # from an earlier run, with data
    configs = [
        "cfg_broken.py cfg_missing.py cfg_fine.py",
        "cfg_missing.py cfg_fine.py",
        "cfg_fine.py",
    ]
    for names, code in zip(configs, (1, 3, 0), strict=True):
        where = dict(GPUS="0", CONFIGS=names, WORK_DIR="work", PYTHON=python)
        where["SUMMARY"] = "1" if code == 3 else ""
        done = run("multi_test.sh", folder=tmp_path, **where)
        assert done.returncode == code, done.stderr
        assert "cfg_fine: done" in done.stdout
        said = "cfg_missing: skipped. error: there is no image folder"
        assert (said in done.stdout) == (code > 0)
        if code == 3:
            summary = json.loads((work / "summary.json").read_text())
            assert (summary["missing"], summary["fine"]["mIoU"]) == (None, 50)
            markdown = (work / "summary.md").read_text().splitlines()
            assert markdown[2] == "| missing | - | - | - | - | - |"
            assert markdown[3].startswith("| fine | 50.00 |")
    assert (work / "cfg_broken/output.txt").read_text() == "error: broken\n"
    # a worker uses one of the GPUs that the script was given, and keeps it
    where.update(CONFIGS="cfg_a.py cfg_b.py cfg_c.py", GPUS="2", SUMMARY="")
    for given, used in (("5,GPU-7", ("5", "GPU-7", "5")), ("", ("0", "1", "0"))):
        done = run("multi_test.sh", folder=tmp_path, **where, CUDA_VISIBLE_DEVICES=given)
        assert done.returncode == 0, done.stderr
        for name, gpu in zip("abc", used, strict=True):
            assert (work / f"cfg_{name}/output.txt").read_text() == f"on {gpu}\n"
    done = run("multi_test.sh", folder=tmp_path, **where, CUDA_VISIBLE_DEVICES="5")
    assert done.returncode == 2
    assert done.stderr == "error: GPUS=2, but CUDA_VISIBLE_DEVICES=5 has fewer\n"


@pytest.mark.process
@pytest.mark.parametrize("script", [*SCRIPTS, SHARED])
def test_scripts_are_what_their_first_line_says(script):
    text = (ROOT / script).read_text()
    assert text.startswith("#!/bin/sh\n" if script in SCRIPTS else "# shellcheck shell=sh\n")
    assert os.access(ROOT / script, os.X_OK) == (script in SCRIPTS)
    for shell in filter(shutil.which, ("sh", "dash")):
        subprocess.run([shell, "-n", str(ROOT / script)], check=True)
    header = re.match(r"(?:#.*\n)+", text)[0]
    for variable in set(re.findall(r"\$\{(\w+):-", text)):
        assert variable in header, f"{script} does not say what {variable} is"
    assert not re.search(r"\[\[|\bfunction\b|\bsource \b|<\(|\$'|\blocal\b", text)


def test_scripts_name_the_eight_benchmarks():
    text = (ROOT / SHARED).read_text()
    assert re.findall(r"configs/cfg_(\w+)\.py", text) == [
        *("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff164k"),
        *("ade20k", "city_scapes"),
    ]
    assert all((ROOT / path).is_file() for path in re.findall(r"configs/\w+\.py", text))
    for script in ("multi_test.sh", "distribute_test.sh"):
        assert '. "$TOOLS/benchmarks.sh"' in (ROOT / script).read_text()


# -- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TOOLS)
def test_help(path, monkeypatch, capsys):
    assert tool(monkeypatch, path, "--help") == 0
    printed = capsys.readouterr()
    assert not printed.err
    assert printed.out.startswith("usage: ")
    assert "xample" in (ROOT / path).read_text() or "converters" in path
    assert not NOISE.search(printed.out)


def test_there_are_tools():
    assert {"tools/test.py", "tools/summary.py", "tools/bench.py"} <= set(TOOLS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: config"),
        (["configs/cfg_voc22.py"], 2, "there is no config configs/cfg_voc22.py"),
        (["configs/cfg_voc21.py"], 3, "there is no image folder"),
        (["configs/cfg_mini.py", "--method", "scilp"], 2, "did you mean 'sclip'"),
        (["configs/cfg_mini.py", "--method", "proxyclip"], 2, "needs the guide"),
        (
            [
                "configs/cfg_mini.py",
                "--method",
                "sfp_paper",
                "--cfg-options",
                "model.method.integrator_start=11",
            ],
            2,
            "layer 11 comes after layer -2",
        ),
        (["configs/cfg_mini.py", "--weights", "ViT-B/61"], 3, "did you mean 'ViT-B/16'"),
        (["configs/cfg_mini.py", "--launcher", "mpi"], 2, "invalid choice: 'mpi'"),
        (["configs/cfg_mini.py", "--pictures", "many"], 2, "at least 0, got many"),
        (["configs/cfg_mini.py", "--pictures", "-1"], 2, "pictures"),
        (
            ["configs/cfg_mini.py", "--cfg-options", "model.method.pm=dbscn"],
            2,
            "did you mean 'dbscan'",
        ),
        (
            ["configs/cfg_mini.py", "--cfg-options", "model.method.enhancer=qv"],
            2,
            "unknown enhancer='qv'",
        ),
        (["configs/cfg_mini.py", "--cfg-options", "model.method.layers=-2"], 2, "layers=-2"),
        (["configs/cfg_mini.py", "--cfg-options", "model.prob_th=0.2"], 2, "no setting 'prob_th'"),
        (["configs/cfg_mini.py", "--cfg-options", "model.precision=fp8"], 2, "'fp8'"),
        (["configs/cfg_mini.py", "--cfg-options", "test_dataloader.dataset.scnes=3"], 2, "scnes"),
        (["configs/cfg_mini.py", "--cfg-options", "model.type=OpenVocabSegmenter"], 2, "Segmenter"),
        (["configs/cfg_mini.py", "--cfg-options", "model.method.pre_layer=12"], 2, "layer 12"),
        (["README.md"], 2, "README.md"),
        (["configs/cls_mini.txt"], 2, "cls_mini.txt"),
    ],
    ids=str,
)
def test_exit_codes(arguments, code, message, monkeypatch, capsys, tmp_path):
    """2: the command line or config is wrong; 3: data or weights are missing. No traceback."""
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    if arguments and arguments[0] == "configs/cfg_mini.py":
        own = arguments.index("--cfg-options") if "--cfg-options" in arguments else len(arguments)
        work = ["--work-dir", str(tmp_path / "work")]
        arguments = [*arguments[:own], *work, *FEW, *arguments[own + 1 :]]
    assert tool(monkeypatch, "tools/test.py", *arguments) == code
    printed = capsys.readouterr()
    assert message in printed.err.replace("\n", " ")
    assert code == 2 or re.search("^error: ", printed.err, re.MULTILINE)  # as multi_test.sh expects
    assert not re.search("Traceback", printed.err)
    assert not printed.out


def test_a_broken_config(monkeypatch, capsys, tmp_path):
    (tmp_path / "cfg_broken.py").write_text("model = dict(\n")
    assert tool(monkeypatch, "tools/test.py", str(tmp_path / "cfg_broken.py")) == 2
    assert "cfg_broken.py" in capsys.readouterr().err


def test_check_only_looks(monkeypatch, capsys, tmp_path):
    arguments = ["configs/cfg_mini.py", "--check", "--work-dir", str(tmp_path / "work"), *FEW]
    assert tool(monkeypatch, "tools/test.py", *arguments) == 0
    assert not capsys.readouterr().err
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_run_without_pictures_and_with_another_method(monkeypatch, capsys, tmp_path):
    arguments = ["--method", "sclip", "--pictures", "0", "--work-dir", str(tmp_path), *FEW]
    assert tool(monkeypatch, "tools/test.py", "configs/cfg_mini.py", *arguments) == 0
    printed = capsys.readouterr()
    assert f"sclip, {SCENES} images" in printed.out
    assert "sheet" not in printed.out
    assert json.loads((tmp_path / "metrics.json").read_text())["method"] == {"type": "sclip"}
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.slow
def test_log_level_brings_the_log_back(monkeypatch, capfd, tmp_path):
    arguments = ["--pictures", "0", "--work-dir", str(tmp_path), "--method", "clip", *FEW]
    assert (
        tool(monkeypatch, "tools/test.py", "configs/cfg_mini.py", *arguments, "log_level=INFO") == 0
    )
    printed = capfd.readouterr()
    assert "per class results" in printed.out + printed.err


def test_summary(monkeypatch, capsys, tmp_path):
    numbers = {"a": 40.0, "cfg_b": 61.5}
    for name, value in numbers.items():
        (tmp_path / name).mkdir()
        metrics = dict(mIoU=value, mAcc=value + 1, aAcc=value + 2, fwIoU=value + 3, images=7)
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "cfg_none").mkdir()
    folders = ["a", "cfg_b", "cfg_none"]
    assert (
        tool(monkeypatch, "tools/summary.py", *folders, "--out", "all/summary", folder=tmp_path)
        == 0
    )
    assert (tmp_path / "all" / "summary.md").read_text().splitlines() == [
        "| benchmark | mIoU | mAcc | aAcc | fwIoU | images |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a | 40.00 | 41.00 | 42.00 | 43.00 | 7 |",
        "| b | 61.50 | 62.50 | 63.50 | 64.50 | 7 |",
        "| none | - | - | - | - | - |",
        "| mean of 2 | 50.75 | 51.75 | 52.75 | 53.75 |  |",
    ]
    assert json.loads((tmp_path / "all" / "summary.json").read_text())["none"] is None
    assert "50.75" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_gives_the_numbers_of_single_runs(capsys, tmp_path):
    arguments = ["--methods", "clip", "sfp", "--work-dir", str(tmp_path), *FEW]
    assert cli.main(["compare", "mini", *arguments]) == 0
    assert "sfp" in capsys.readouterr().out
    record = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)
    metrics = single(tmp_path / "one")
    for key in ("mIoU", "mAcc", "aAcc", "fwIoU"):
        assert record["methods"]["sfp"][key] == metrics[key]
    assert {k: v["IoU"] for k, v in metrics["classes"].items()} == record["methods"]["sfp"]["IoU"]
    assert cv2.imread(str(tmp_path / "compare.png")) is not None


# -- imports and environments --------------------------------------------------------------------


def pins(text: str, python: str) -> dict[str, str]:
    """The versions that constraints.txt gives for a version of Python."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                (version,) = pin.specifier
                assert version.operator == "=="
                assert pin.name.lower() not in found, f"{pin.name} twice for Python {python}"
                found[pin.name.lower()] = version.version
    return found


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for, the extras `docs`, `mmseg` and `test` included."""
    text = (ROOT / "pyproject.toml").read_text()  # tomllib is of Python 3.11
    groups = r"^(?:dependencies|docs|mmseg|test) = \[(.*?)\]$"
    lists = re.findall(groups, text, re.DOTALL | re.MULTILINE)
    assert len(lists) == 4
    names = [name for one in lists for name in re.findall(r'"(.+?)"|\'(.+?)\'', one)]
    return [Requirement(double or single) for double, single in names]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12"])
def test_constraints_pin_every_dependency(python):
    fixed = pins((ROOT / "constraints.txt").read_text(), python)
    assert fixed["torch"] == "2.13.0"
    for requirement in requirements():
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        assert requirement.name.lower() in fixed, requirement.name
        assert requirement.specifier.contains(fixed[requirement.name.lower()])


def test_the_conda_environment_agrees_with_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (python,) = (entry.split("=")[1] for entry in plain if entry.startswith("python="))
    (listed,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert "-e ." in listed
    pinned = {r.name.lower(): r for r in map(Requirement, (x for x in listed if x != "-e ."))}
    fixed = pins((ROOT / "constraints.txt").read_text(), python)
    for name, requirement in pinned.items():
        (version,) = requirement.specifier
        assert version.operator == "=="
        if name == "torchvision":  # torch 2.n goes with torchvision 0.(n + 15)
            minor = int(fixed["torch"].split(".")[1])
            assert version.version.startswith(f"0.{minor + 15}.")
        else:
            assert version.version == fixed[name], name
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r"^(?:dependencies|mmseg) = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert len(needed) == 2
    names = {Requirement(name).name for text in needed for name in re.findall(r'"(.+?)"', text)}
    assert names <= set(pinned)
