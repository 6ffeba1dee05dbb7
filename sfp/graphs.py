"""The network as CUDA graphs: kernel launches are recorded once per shape and then replayed.

With small batches a GPU waits for Python, which takes longer to launch a block's kernels than they take
to run. Replaying a graph involves no Python.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfp.feature_cache import LRUCache
from sfp.functional.kept import held

GRAPHS = 16  # recordings kept, one for each combination of batch shape, methods and words
WARM = 2  # runs before a recording, in which libraries choose algorithms and caches are filled


@dataclass(frozen=True)
class Recorded:
    """A recorded run.

    Attributes:
        graph: its kernel launches.
        windows: the tensor from which it reads its input.
        outputs: the tensors to which it writes its results.
        alive: references to everything else that it reads, which must not be freed or moved.
    """

    graph: Any
    windows: Tensor
    outputs: list[Tensor]
    alive: Any

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """The results for other windows of the same shape."""
        self.windows.copy_(windows)
        self.graph.replay()
        return [output.clone() for output in self.outputs]  # the next replay overwrites them


def recordable(windows: Tensor) -> bool:
    """Whether operations on a tensor can be recorded, that is, whether it is on CUDA."""
    return windows.is_cuda


class Graphs:
    """Records a function of windows at the first call with each key. Calls run one at a time.

    A function that cannot be recorded (a method that needs the host) runs normally, with a warning.
    """

    def __init__(self, limit: int = GRAPHS) -> None:
        self._recorded: LRUCache[Recorded | None] = LRUCache(limit)
        self._lock = threading.Lock()

    def __call__(
        self,
        key: Hashable,
        function: Callable[[Tensor], list[Tensor]],
        windows: Tensor,
        alive: Any = None,
    ) -> list[Tensor]:
        """`function(windows)`.

        Args:
            key: a key for everything that `function` reads besides its argument.
            function: returns tensors; it must not synchronise with the GPU.
            windows: (B, 3, H, W); nothing is recorded unless it is on a GPU.
            alive: references to everything that `key` stands for.
        """
        if not recordable(windows):
            return function(windows)
        key = (key, windows.shape, windows.dtype, windows.device)
        with self._lock:
            found = self._recorded.get(key)
            if found is None and not self._recorded.has(key):
                found = self._record(function, windows, alive)
                self._recorded.put(key, found)
            if found is not None:
                return found(windows)
        return function(windows)

    def _record(
        self, function: Callable[[Tensor], list[Tensor]], windows: Tensor, alive: Any
    ) -> Recorded | None:
        windows = windows.clone()
        aside = torch.cuda.Stream(windows.device)
        aside.wait_stream(torch.cuda.current_stream(windows.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                function(windows)
        torch.cuda.current_stream(windows.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # cached constants were made before the recording, outside of its memory
            with held() as constants, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(windows)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"graphs=True: this method cannot be recorded and runs without a graph ({reason})",
                stacklevel=2,
            )
            return None
        return Recorded(graph, windows, outputs, (alive, constants))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._recorded.limit,)
