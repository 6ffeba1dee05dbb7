"""Workers that load images: in order, without shared memory, and with their errors passed on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from mmseg.registry import DATASETS, TRANSFORMS
from processes import forked, mount, own_mounts

from sfp import cli
from sfp.data.images import DataError
from sfp.evaluation import run as evaluate
from sfp.evaluation.loading import Batches
from sfp.evaluation.settings import image_names


def built(config):
    evaluate.init_default_scope("mmseg")
    dataset = DATASETS.build(config.test_dataloader.dataset)
    dataset.full_init()
    return dataset


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_workers_give_what_the_process_itself_would(own, size):
    config = own.config()
    order = [2, 0, 1]
    batches = {}
    for workers in (0, 2):
        loader = dict(config.test_dataloader, num_workers=workers, batch_size=size)
        found = Batches(loader, built(config), order)
        assert len(found) == -(-3 // size)
        batches[workers] = list(found)
    assert [len(batch["inputs"]) for batch in batches[2]] == {1: [1] * 3, 2: [2, 1], 4: [3]}[size]
    names = []
    for one, two in zip(batches[0], batches[2], strict=True):
        for a, b in zip(one["inputs"], two["inputs"], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(one["data_samples"], two["data_samples"], strict=True):
            assert torch.equal(a.gt_sem_seg.data, b.gt_sem_seg.data)
            assert a.metainfo == b.metainfo
            names.append(Path(b.img_path).name)
    assert names == ["2.png", "0.png", "1.png"]


@pytest.mark.process
def test_workers_use_no_shared_memory(own):
    """What would wait for ever in a container, where /dev/shm is full after 64 MB."""
    config = own.config()
    loader = dict(config.test_dataloader, num_workers=1)
    for batch in Batches(loader, built(config), [0, 1, 2]):
        assert not any(image.is_shared() for image in batch["inputs"])


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "content"),
    [("images/1.png", b""), ("images/1.png", b"no picture"), ("labels/1.png", b"\x89PNG\r\n")],
)
def test_a_file_that_cannot_be_read_is_named(own, capsys, workers, name, content):
    """Of any dataset of mmseg's; the exit code says that data are wrong."""
    path = own.root / name
    path.write_bytes(content)
    command = ["eval", str(own.file()), "--pictures", "0"]
    options = ["--cfg-options", f"test_dataloader.num_workers={workers}"]
    assert cli.main([*command, *options]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in last
    assert str(path) in last


@pytest.mark.parametrize("damaged", [False, True])
def test_the_progress_bar_gives_the_terminal_back(own, monkeypatch, capsys, damaged):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    if damaged:
        (own.root / "labels/1.png").write_bytes(b"")
    assert cli.main(["eval", str(own.file()), "--pictures", "0"]) == 3 * damaged
    said = capsys.readouterr().err
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert said.count(hidden) == said.count(shown) == 1
    assert said.index(hidden) < said.index("/3") < said.index(shown)
    assert ("3/3" in said) == (not damaged)


def test_no_other_image_takes_the_place_of_one_that_gives_nothing(own, monkeypatch):
    """mmengine's datasets draw another one; an evaluation would count that twice."""

    class Nothing:
        def __call__(self, results: dict):
            return None if "1.png" in results["img_path"] else results

    monkeypatch.setitem(TRANSFORMS.module_dict, "NothingForATest", Nothing)
    config = own.config()
    config.test_dataloader.dataset.pipeline.insert(1, dict(type="NothingForATest"))
    with pytest.raises(DataError, match=r"1\.png.* the pipeline returned nothing for this sample"):
        evaluate.evaluate(config, pictures=0)


class Killed(torch.utils.data.Dataset):
    """Its third sample ends the process that loads it, as the kernel does when memory runs out."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return dict(inputs=torch.zeros(1), data_samples=index)

    def get_data_info(self, index: int) -> dict:
        return dict(img_path=f"image{index}.jpg")


@pytest.mark.process
def test_a_worker_that_is_killed(own):
    batches = Batches(dict(batch_size=1, num_workers=1), Killed(), range(6))
    with pytest.raises(
        DataError, match=r"image[0-2]\.jpg, or an image soon after: .*num_workers=0"
    ):
        list(batches)


@pytest.mark.process
def test_no_room_for_workers(own, monkeypatch, capsys):
    config = own.config()
    loader = dict(config.test_dataloader, num_workers=2, prefetch_factor=4, persistent_workers=True)
    batches = Batches(loader, built(config), [0, 1, 2])
    whole = [batch["inputs"][0] for batch in batches]

    def full(self):
        if self.num_workers:
            raise OSError(28, "No space left on device")
        return original(self)

    original = torch.utils.data.DataLoader.__iter__
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    found = [batch["inputs"][0] for batch in Batches(loader, built(config), [0, 1, 2])]
    assert all(map(torch.equal, whole, found))
    assert "loading images in the main process: cannot start workers ([Errno 28]" in (
        capsys.readouterr().err
    )


@pytest.mark.process
def test_a_full_dev_shm(own):
    """As root in a mount namespace of its own: what containers have, made smaller still."""
    for i in range(3):
        own.image(f"{i}.png", np.full((600, 800, 3), 40 * i, np.uint8))
        own.label(f"{i}.png", np.zeros((600, 800), np.uint8))
    config = own.config(options={"test_dataloader.num_workers": 2, "model.slide_crop": 0})

    def run() -> int:
        if not own_mounts() or not mount("/dev/shm", "size=1m"):
            return 77
        evaluate.evaluate(config, pictures=0)
        return 0

    code = forked(run)
    if code == 77:
        pytest.skip("mounting is not permitted here")
    assert code == 0
    assert (own.root / "work/metrics.json").is_file()


# -- names ---------------------------------------------------------------------------------------


def test_an_image_with_two_label_maps_is_refused(own):
    """Its name stands for one evaluated image."""
    dataset = built(own.config())
    records = [dataset.get_data_info(i) for i in (0, 1)]
    records[1]["img_path"] = records[0]["img_path"]
    dataset.get_data_info = records.__getitem__
    dataset.__class__ = type("Two", (dataset.__class__,), {"__len__": lambda self: 2})
    with pytest.raises(ValueError, match=r"0\.png is in the test set with two label maps"):
        image_names(dataset)


@pytest.mark.slow
def test_several_datasets_in_one(own, tmp_path):
    """mmengine's `ConcatDataset`, which has no folder of images."""
    config = own.config()
    node = config.test_dataloader.dataset
    other = dict(node, data_root=str(own.root.parent / "other"))
    type(own)(Path(other["data_root"]), count=2)
    config.test_dataloader.dataset = dict(type="ConcatDataset", datasets=[dict(node), other])
    result = evaluate.evaluate(config, pictures=0)
    assert result["images"] == 5
    assert evaluate.evaluate(own.config("fresh"), pictures=0)["images"] == 3
