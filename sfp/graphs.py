"""The network as CUDA graphs: its launches are recorded once for a shape, and replayed as one.

At small batches a GPU waits for Python, which takes longer to launch a block's kernels than they take
to run. A recorded run has no Python in it.
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

GRAPHS = 16  # shapes of batches, or methods, or words, that are kept
WARM = 2  # runs before a recording: libraries choose algorithms, what is cached gets made


@dataclass(frozen=True)
class Recorded:
    """A run that can be repeated.

    Attributes:
        graph: its launches.
        windows: where it reads its input.
        outputs: where it leaves its results.
        alive: what else it reads, which has to stay where it is.
    """

    graph: Any
    windows: Tensor
    outputs: list[Tensor]
    alive: Any

    def __call__(self, windows: Tensor) -> list[Tensor]:
        """The results for other windows of that shape."""
        self.windows.copy_(windows)
        self.graph.replay()
        return [output.clone() for output in self.outputs]  # the next replay writes over them


def recordable(windows: Tensor) -> bool:
    """Whether what is done with a tensor can be recorded: on CUDA."""
    return windows.is_cuda


class Graphs:
    """Runs of a function of windows, recorded at the first call of a key, one at a time.

    What cannot be recorded (a method that decides on the host) runs as it is, with a warning.
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
            key: changes with everything that `function` reads besides its argument.
            function: gives tensors; neither it nor what it calls may wait for the GPU.
            windows: (B, 3, H, W) on a GPU; elsewhere nothing is recorded.
            alive: what `key` stands for.
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
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                outputs = function(windows)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(
                f"graphs=True: a method cannot be recorded and runs without ({reason})",
                stacklevel=2,
            )
            return None
        return Recorded(graph, windows, outputs, alive)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._recorded.limit,)
