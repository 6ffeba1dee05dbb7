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
    """Wraps an mmseg dataset so that errors name the files of the sample."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        # mmengine's own `__getitem__` may replace an image that it cannot load by another one
        prepare = getattr(self.dataset, "prepare_data", self.dataset.__getitem__)
        try:
            sample = prepare(index)
        except Exception as error:  # from any step of a pipeline: add the file's name
            text = " ".join(str(error).split())  # one line, to be passed on by a worker
            if isinstance(error, DataError):
                raise type(error)(text) from error
            raise DataError(f"{self.name(index)}: {type(error).__name__}: {text}") from error
        if sample is None:
            raise DataError(f"{self.name(index)}: the pipeline returned nothing for this sample")
        return sample

    def name(self, index: int) -> str:
        """The files of a sample."""
        record = self.dataset.get_data_info(index)
        label = record.get("seg_map_path")
        return f"{record['img_path']} with labels {label}" if label else str(record["img_path"])


class Batches:
    """Batches of given samples, in order; replaces a `DataLoader` in test loops.

    Workers send each batch as bytes through a pipe. PyTorch's own way, tensors in shared memory, hangs
    when /dev/shm is full (64 MB in a container), and a pipe is fast enough for images.

    Args:
        loader: a config's `test_dataloader`, with `num_workers`, `batch_size`, ...
        dataset: the dataset built from it.
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
                # without references the iterator ends its workers at once; if the garbage collector
                # finds it, queues are already closed, and it waits for seconds
                error.__traceback__ = None
                del batches
                raise DataError(_last_line(error)) from None
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                names = [self._samples.name(i) for i in self._order[done : done + size]]
                raise DataError(
                    f"{', '.join(names)}, or an image soon after: the worker process that loads it "
                    "died without an error, probably because memory ran out. Use fewer workers; "
                    "--cfg-options test_dataloader.num_workers=0 loads images in the main process"
                ) from error
            yield pickle.loads(batch) if self._packed else batch
            done += size

    def _start(self) -> Iterator[Any]:
        try:
            return iter(self._loader)
        except OSError as error:  # the workers' locks are files in /dev/shm, which may be full
            note(f"loading images in the main process: cannot start workers ({error})")
            self._node = {k: v for k, v in self._node.items() if k not in OF_WORKERS}
            self._loader = self._build()
            return iter(self._loader)


def _collate(node: Any) -> Callable[[Sequence[Any]], Any]:
    """The collate function named by a config node of mmengine."""
    if not isinstance(node, Mapping):
        return node
    fn = node["type"]
    fn = FUNCTIONS.get(fn) if isinstance(fn, str) else fn
    return partial(fn, **{k: v for k, v in node.items() if k != "type"})


def _pack(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> bytes:
    return pickle.dumps(collate(samples), pickle.HIGHEST_PROTOCOL)


def _last_line(error: Exception) -> str:
    """An error's message; errors of a worker hold a traceback that ends with it."""
    text = str(error).strip()
    if "Traceback (most recent call last)" in text:
        text = text.splitlines()[-1]
        return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    return text
