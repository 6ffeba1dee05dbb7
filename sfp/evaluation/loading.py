"""Batches of a test set, read by worker processes, with errors that name the file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from mmengine.registry import FUNCTIONS
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from sfp.data.images import DataError
from sfp.evaluation.scores import note

OF_WORKERS = ("num_workers", "prefetch_factor", "persistent_workers", "timeout", "worker_init_fn")


class _Samples(Dataset):
    """A dataset of mmseg's kind whose errors name the files of the sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        # mmengine's own `__getitem__` may put another image in the place of one that it cannot load
        prepare = getattr(self.dataset, "prepare_data", self.dataset.__getitem__)
        try:
            sample = prepare(index)
        except Exception as error:  # of any step of any pipeline: the file is what it lacks
            text = " ".join(str(error).split())  # one line, for the way out of a worker
            if isinstance(error, DataError):
                raise type(error)(text) from error
            raise DataError(f"{self.name(index)}: {type(error).__name__}: {text}") from error
        if sample is None:
            raise DataError(f"{self.name(index)}: the pipeline gives nothing for it")
        return sample

    def name(self, index: int) -> str:
        """The files of a sample."""
        record = self.dataset.get_data_info(index)
        label = record.get("seg_map_path")
        return f"{record['img_path']} with labels {label}" if label else str(record["img_path"])


class Batches:
    """Batches of chosen samples, in order; iterated by test loops in place of a `DataLoader`.

    Workers send each batch as bytes through a pipe. PyTorch's own way, tensors in shared memory, waits
    for ever when /dev/shm is full (64 MB in a container), and a pipe is fast enough for images.

    Args:
        loader: a config's `test_dataloader`, with `num_workers`, `batch_size`, ...
        dataset: built from it.
        order: indices of the samples.

    Attributes:
        dataset: as given; mmengine's hooks look for it here.
    """

    def __init__(self, loader: Mapping[str, Any], dataset: Any, order: Sequence[int]) -> None:
        self.dataset = dataset
        self._order = list(order)
        self._samples = _Samples(dataset)
        self._node = dict(loader, dataset=self._samples, sampler=self._order)
        self._loader = self._build()

    def _build(self) -> DataLoader:
        collate = _collate(self._node.get("collate_fn", dict(type="pseudo_collate")))
        self._packed = self._node.get("num_workers", 0) > 0
        if self._packed:
            collate = partial(_pack, collate)
        return Runner.build_dataloader(dict(self._node, collate_fn=collate))

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        done, size = 0, self._loader.batch_size or 1
        batches = self._start()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError as error:
                raise DataError(_last_line(error)) from None
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                names = [self._samples.name(i) for i in self._order[done : done + size]]
                raise DataError(
                    f"{', '.join(names)}, or an image soon after: the process that loads it has "
                    "ended without a word, which mostly means that memory ran out. Fewer of them "
                    "need less: --cfg-options test_dataloader.num_workers=0 loads in the main "
                    "process"
                ) from error
            yield pickle.loads(batch) if self._packed else batch
            done += size

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self._loader)
        except OSError as error:  # no room for the workers' locks, which are files in /dev/shm
            note(f"images are loaded in the main process: no workers can be started ({error})")
            self._node = {k: v for k, v in self._node.items() if k not in OF_WORKERS}
            self._loader = self._build()
            return iter(self._loader)


def _collate(node: Any) -> Callable[[Sequence[Any]], Any]:
    """What makes a batch of samples, as mmengine's configs write it."""
    if not isinstance(node, Mapping):
        return node
    fn = node["type"]
    fn = FUNCTIONS.get(fn) if isinstance(fn, str) else fn
    return partial(fn, **{k: v for k, v in node.items() if k != "type"})


def _pack(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> bytes:
    return pickle.dumps(collate(samples), pickle.HIGHEST_PROTOCOL)


def _last_line(error: Exception) -> str:
    """What an error says; one from a worker comes as a traceback that ends with it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
        return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    return text
