"""Evaluations that are resumed after a kill, damage, changes, or with another number of processes."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from processes import forked, killed, mounted

from sfp import cli
from sfp.evaluation import distributed, metrics, resumable_loop
from sfp.evaluation import journal as journal_module
from sfp.evaluation import run as evaluate
from sfp.evaluation.journal import Journal, count
from sfp.evaluation.metrics import SegmentationMetric
from sfp.evaluation.scores import IGNORED, confusion

ROOT = Path(__file__).parents[2]
SCENES = 10
OPTIONS = {
    "test_dataloader.dataset.scenes": SCENES,
    "test_dataloader.num_workers": 0,
}


def _process(rank: int, processes: int, port: int, work: Path, options: dict, resume: bool) -> None:
    torch.set_num_threads(1)  # OpenMP threads do not survive a fork
    config = evaluate.load_config(
        ROOT / "configs/cfg_mini.py", work_dir=str(work), options={**OPTIONS, **options}
    )
    if processes > 1:
        os.environ.update(MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
        if "SLURM_NODELIST" in os.environ:
            os.environ.update(SLURM_PROCID=str(rank), SLURM_NTASKS=str(processes))
            config.launcher = "slurm"
        else:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="127.0.0.1")
            config.launcher = "pytorch"
    with open(work / f"output.{rank}", "w") as output:
        sys.stderr = output
        evaluate.evaluate(config, pictures=0, resume=resume)


def run(work: Path, processes: int = 1, resume: bool = True, **options) -> str:
    """Evaluates in processes of their own; what the first wrote to stderr."""
    work.mkdir(exist_ok=True)
    # as under torchrun, the parent serves what they meet at, on a port that nobody can take meanwhile
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    arguments = (processes, store.port, work, options, resume)
    torch.multiprocessing.start_processes(_process, arguments, processes, start_method="fork")
    return (work / "output.0").read_text()


def files(work: Path) -> list[Path]:
    return sorted((work / "journal").glob("*.jsonl"))


def records(work: Path) -> int:
    """How many images stand in the journal, over all files, first lines not counted."""
    return sum(len(path.read_text().splitlines()) - 1 for path in files(work))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work folder of an evaluation that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SFP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        work = tmp_path_factory.mktemp("whole")
        assert "continuing" not in run(work)
    assert records(work) == SCENES
    return work


def same(work: Path, whole: Path) -> bool:
    """Whether all numbers are equal, to the last digit, and belong to the same settings."""
    cards = [json.loads((folder / "card.json").read_text()) for folder in (work, whole)]
    for card in cards:
        card.pop("command")
    metrics = [(folder / "metrics.json").read_bytes() for folder in (work, whole)]
    return cards[0] == cards[1] and metrics[0] == metrics[1]


def part(whole: Path, work: Path, lines: int) -> Path:
    """A work folder whose journal has the first lines of a whole one; the file."""
    (work / "journal").mkdir(parents=True)
    (source,) = files(whole)
    target = work / "journal" / source.name
    target.write_bytes(b"".join(source.read_bytes().splitlines(keepends=True)[:lines]))
    return target


@pytest.mark.slow
@pytest.mark.process
def test_kill_9(tmp_path, whole):
    def half(write, file, data):
        write(file, data[: len(data) // 2])

    # the first line says whose the journal is; the fourth is of the third image
    killed(_process, 0, 1, 0, tmp_path, {}, True, at="write", call=4, before=half)
    (file,) = files(tmp_path)
    assert not file.read_bytes().endswith(b"\n")
    assert not (tmp_path / "metrics.json").exists()

    said = run(tmp_path)
    assert f"continuing: 2 of {SCENES} images" in said
    assert "incomplete or damaged records: 1 " in said
    assert same(tmp_path, whole)


@pytest.mark.process
@pytest.mark.slow
def test_torn_tail_and_bit_flip(tmp_path, whole):
    """The last record is cut, one bit of another is turned: both images are evaluated again."""
    file = part(whole, tmp_path, SCENES + 1)
    lines = file.read_bytes()[:-5].split(b"\n")
    flipped = bytearray(lines[3])
    flipped[len(flipped) // 2] ^= 1
    file.write_bytes(b"\n".join([*lines[:3], flipped, *lines[4:]]))
    said = run(tmp_path)
    assert "incomplete or damaged records: 2 " in said
    assert f"continuing: {SCENES - 2} of {SCENES}" in said
    assert same(tmp_path, whole)


@pytest.mark.process
@pytest.mark.slow
def test_other_settings_are_not_mixed(tmp_path, whole):
    part(whole, tmp_path, 4)
    said = run(tmp_path, **{"model.logit_scale": 20.0})
    assert "other settings (protocol logit_scale): starting over" in said
    assert records(tmp_path) == 3 + SCENES
    assert not same(tmp_path, whole)


@pytest.mark.process
@pytest.mark.slow
def test_no_resume(tmp_path, whole):
    file = part(whole, tmp_path, 4)
    assert "continuing" not in run(tmp_path, resume=False)
    assert not file.exists()
    assert records(tmp_path) == SCENES
    assert same(tmp_path, whole)


@pytest.mark.process
@pytest.mark.slow
def test_any_number_of_processes(tmp_path, whole):
    """Journals of one process that two and three continue, with uneven shares."""
    part(whole, tmp_path, 2)
    assert "continuing: 1 of" in run(tmp_path, processes=2)
    assert sorted(map(_lines, files(tmp_path)[1:])) == [5, 6]  # 4 and 5 images, and a first line
    assert same(tmp_path, whole)

    second = tmp_path / "second"
    part(whole, second, 3)
    assert "continuing: 2 of" in run(second, processes=3)
    assert sorted(map(_lines, files(second)[1:])) == [3, 4, 4]
    assert same(second, whole)


@pytest.mark.process
@pytest.mark.slow
def test_processes_of_slurm(tmp_path, whole, monkeypatch):
    """`srun`'s variables are set by hand, its `scontrol` knows two nodes."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        '#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && echo localhost && echo n2\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_NODELIST", "n[1-2]")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    part(whole, tmp_path / "work", 2)
    assert "continuing: 1 of" in run(tmp_path / "work", processes=2)
    assert sorted(map(_lines, files(tmp_path / "work")[1:])) == [5, 6]
    assert same(tmp_path / "work", whole)


def test_slurm_without_scontrol(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in (("PROCID", "1"), ("NTASKS", "2"), ("NODELIST", "n7")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    given = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="n7", MASTER_PORT="29500")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert distributed.slurm_group() == given
    monkeypatch.setenv("SLURM_NODELIST", "n[7-8]")
    with pytest.raises(ValueError, match=r"first of the nodes n\[7-8\] .*: set MASTER_ADDR"):
        distributed.slurm_group()


def test_slurm_without_srun(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    config = evaluate.load_config(ROOT / "configs/cfg_mini.py")
    config.launcher = "slurm"
    with pytest.raises(ValueError, match="'SLURM_PROCID' is not set: start it with srun"):
        evaluate.evaluate(config)


def _lines(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.process
@pytest.mark.slow
def test_batches_stay_together(tmp_path):
    """With a batch of 3 a batch that is done in part is done again, whole."""
    run(tmp_path / "a", **{"test_dataloader.batch_size": 3})
    part(tmp_path / "a", tmp_path / "b", 1 + 4)
    run(tmp_path / "b", **{"test_dataloader.batch_size": 3})
    assert records(tmp_path / "b") == 4 + SCENES - 3
    assert same(tmp_path / "b", tmp_path / "a")


def test_count_is_exact():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (30, 40), generator=generator)
    predicted = torch.randint(0, 4, (30, 40), generator=generator)
    truth[:3] = 255
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    for t, p in zip(truth[3:].flatten().tolist(), predicted[3:].flatten().tolist(), strict=True):
        matrix[t, p] += 1
    entries = count(predicted, truth, 5, 255)
    assert torch.equal(confusion([entries], 5), matrix)
    assert torch.equal(confusion([entries, entries], 5), 2 * matrix)
    ignored = count(predicted, torch.full_like(truth, 255), 5, 255)
    assert ignored.tolist() == [[IGNORED], [IGNORED], [truth.numel()]]
    assert not confusion([ignored], 5).any()
    many = count(predicted + 4990, truth.clamp(max=4), 5000, 255)  # memory follows what occurs
    assert many[2].sum() == truth.numel()
    assert many[1].min() == 4990


@pytest.mark.parametrize(
    ("predicted", "truth", "message"),
    [((4, 4), (4, 5), "differ in size"), ((4, 4), (4, 4), "ground truth has labels 7..7")],
)
def test_labels_that_do_not_fit(predicted, truth, message):
    with pytest.raises(ValueError, match=message):
        count(torch.zeros(predicted).long(), torch.full(truth, 7), 5, 255)


def test_a_journal_of_others(tmp_path):
    """Files of another evaluation are neither read nor removed; nor is one that nobody can claim."""
    one, two = (Journal(tmp_path, dict(run=dict(x=x))) for x in (1, 2))
    for journal in (one, two):
        journal.append(f"{journal.settings}.png", torch.ones(3, 1).long())
        journal.close()
    for journal, other in ((one, two), (two, one)):
        assert list(journal.read()) == [f"{journal.settings}.png"]
        assert journal.others == [other.settings]
    one.clear()
    assert not one.read()
    (file,) = tmp_path.iterdir()
    assert len(two.read()) == 1
    file.write_bytes(b"x" + file.read_bytes()[1:])  # damages the line that says whose it is
    assert not two.read()


def test_a_journal_survives_a_cut_at_every_byte(tmp_path):
    """Whatever is left of a file, its whole records come back and nothing else."""
    journal = Journal(tmp_path / "a", dict(run=dict(x=1)))
    for i in range(3):
        journal.append(f"{i}.png", torch.tensor([[0], [1], [i]]))
    journal.close()
    (file,) = (tmp_path / "a").iterdir()
    data = file.read_bytes()
    ends = [i for i, byte in enumerate(data) if byte == ord("\n")]
    cut = Journal(tmp_path / "b", journal.settings)
    (tmp_path / "b").mkdir()
    for size in range(len(data) + 1):
        (tmp_path / "b" / file.name).write_bytes(data[:size])
        found = cut.read()
        # a record is whole with its last byte; the newline after it adds nothing
        assert list(found) == [f"{i}.png" for i in range(3) if size >= ends[i + 1]]


def test_a_journal_of_an_older_version(tmp_path):
    """Other groups in its first line, or none: another evaluation's, whatever it was."""
    journal = Journal(tmp_path, dict(run=dict(x=1)))
    for i, header in enumerate(
        (dict(settings=dict(old=1)), dict(settings=None), dict(), dict(v=2))
    ):
        older = Journal(tmp_path / "older", dict(i=i))
        older.append("a.png", torch.ones(3, 1).long())
        older.close()
        (file,) = (tmp_path / "older").iterdir()
        body = json.dumps(dict(header, fingerprint="other")).encode()
        first = journal_module._checksum(body) + b" " + body + b"\n"
        file.write_bytes(first + file.read_bytes().split(b"\n", 1)[1])
        file.rename(tmp_path / file.name)
    assert journal.read() == {}
    assert len(journal.others) == 4
    assert journal.damaged == 0


def test_two_runs_in_one_folder(tmp_path):
    """Of the same evaluation: both are right. If the other starts over, there is an error."""
    one, two = (Journal(tmp_path, dict(run=dict(x=1))) for _ in range(2))
    for name in ("a", "b"):
        for journal in (one, two):
            journal.append(name, torch.tensor([[0], [0], [5]]))
    assert one.read().keys() == two.read().keys() == {"a", "b"}
    assert confusion(one.read().values(), 1).item() == 10  # none counts twice
    metric = SegmentationMetric()
    metric.dataset_meta = dict(classes=["c"])
    metric.keep(one, ["a", "b"], ["a", "b"])
    assert metric.evaluate(2)["aAcc"] == 100
    two.clear()
    with pytest.raises(
        RuntimeError, match=r"2 of 2 images, the first a, are missing in .*--no-resume"
    ):
        metric.evaluate(2)


@pytest.mark.process
def test_a_read_only_work_folder(own, capsys):
    """An error that names the folder, with the exit code of what is wrong with files."""
    with mounted(own.root / "work", "ro") as work:
        assert cli.main(["eval", str(own.file()), "--pictures", "0"]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(work) in last
    assert "Read-only" in last


@pytest.mark.process
def test_importing_again(own):
    """Notebooks reload modules; names of mmengine's registries then stand for the new classes."""

    def reload() -> bool:
        config = own.config()
        first = evaluate.evaluate(config, pictures=0)
        for module in (metrics, resumable_loop, distributed, evaluate):
            importlib.reload(module)
        return evaluate.evaluate(config, pictures=1) != first

    assert forked(reload) == 0


@pytest.mark.process
@pytest.mark.slow
def test_clusters_are_fitted_by_one_process(tmp_path):
    """The others wait, and all of them use the same file."""
    options = {"clusters.count": 18, "test_evaluator.type": "HungarianMetric"}
    results = []
    for processes in (1, 2):
        said = run(tmp_path / str(processes), processes=processes, **options)
        assert said.count("clustering the patches of 10 images") == 1
        results.append((tmp_path / str(processes) / "metrics.json").read_text())
        outputs = sorted((tmp_path / str(processes)).glob("output.*"))
        assert ["clustering" in path.read_text() for path in outputs] == [True, False][:processes]
    assert results[0] == results[1]
