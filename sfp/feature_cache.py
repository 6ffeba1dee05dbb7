"""A cache for features of recent images, so that other words need no second forward pass."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.method import Method
from sfp.ops.comparisons import cosines
from sfp.tokens import Tokens, cosine_logits
from sfp.trace import Trace

T = TypeVar("T")


class LRUCache(Generic[T]):
    """Keeps the most recently used values, up to a total size. Thread-safe.

    Copies and pickles of it are empty, since cached values can be recomputed.

    Args:
        limit: largest total size of the values; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()  # least recent first
        self._lock = threading.Lock()
        self.size = 0

    def get(self, key: Hashable) -> T | None:
        """The value of a key, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: T, size: int = 1) -> None:
        """Stores a value unless it exceeds the limit, and evicts the least recently used ones."""
        with self._lock:
            if size > self.limit:
                return
            if key in self._entries:
                self.size -= self._entries.pop(key)[1]
            self._entries[key] = (value, size)
            self.size += size
            while self.size > self.limit:
                self.size -= self._entries.popitem(last=False)[1][1]

    def has(self, key: Hashable) -> bool:
        """Whether there is a value for a key; the value may be None."""
        with self._lock:
            return key in self._entries

    def clear(self) -> None:
        """Removes all values."""
        with self._lock:
            self._entries.clear()
            self.size = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.limit,)


@dataclass(frozen=True)
class Features:
    """The cached values of a batch of windows, independent of words.

    Attributes:
        read: output of the readouts, or None if they depend on words (ResCLIP's feedback).
        trace: the run of the trunk, or None if it is not needed again, because `read` is known and is
            only followed by cosines.
    """

    read: Tokens | None
    trace: Trace | None

    def logits(self, method: Method, context: Mapping[str, Any]) -> Tensor:
        """Query logits (B, Q, h, w) for the words of `context`, bitwise equal to a new run's."""
        if self.trace is None:
            assert self.read is not None
            return cosine_logits(self.read, context["text"])
        trace = self.trace.with_words(context["text"], context["index"], context.get("words"))
        read = method.read(trace) if self.read is None else self.read
        return method.compare(read, trace)

    @property
    def nbytes(self) -> int:
        """Memory used by its tensors."""
        storages = [x.untyped_storage() for x in self._tensors()]  # views share storage
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def _tensors(self) -> Iterator[Tensor]:
        if self.trace is not None:
            yield from self.trace.tensors()
        if self.read is not None:
            yield self.read.data


def run(
    method: Method, vit: VisionTransformer, windows: Tensor, context: Mapping[str, Any]
) -> tuple[Tensor, Features | None]:
    """Query logits (B, Q, h, w) of windows (B, 3, H, W), and the features to cache for other words.

    There are none if the method's edits of the trunk depend on words.
    """
    trace = method.run(vit, windows, **context)
    read = method.read(trace)
    logits = method.compare(read, trace)
    if method.words_in_trunk:
        return logits, None
    worded = method.words_in_readouts
    again = worded or method.refiners or method.comparison is not cosines
    kept = trace.with_words(None, None) if again else None
    return logits, Features(None if worded else read, kept)


class FeatureCache(LRUCache[Features]):
    """Features of the most recent batches of windows, by their pixels, method and weights.

    Args:
        limit: largest memory in bytes, on the device of the model; 0 keeps nothing.
    """

    def logits(
        self,
        method: Method,
        vit: VisionTransformer,
        windows: Tensor,
        context: Mapping[str, Any],
        weights: Hashable,
    ) -> Tensor:
        """The logits of `run`, without a forward pass if the features are cached.

        Args:
            method, vit, windows, context: as for `run`.
            weights: a key that changes with the weights of `vit` and the guides (`state_key`).
        """
        if not self.limit or not is_hashable(method):
            return run(method, vit, windows, context)[0]
        digest = hashlib.blake2b(digest_size=16)
        whole = context.get("whole")
        where = None if whole is None else whole.grid.key
        masks = None if whole is None else whole.regions
        for part in (windows, context.get("regions"), masks):
            if part is not None:
                digest.update(f"{tuple(part.shape)}{part.dtype}".encode())
                digest.update(part.contiguous().cpu().numpy().data)
        key = (method, weights, windows.shape, where, digest.digest())
        if (features := self.get(key)) is not None:
            return features.logits(method, context)
        logits, features = run(method, vit, windows, context)
        if features is not None:
            self.put(key, features, features.nbytes)
        return logits

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return self.size


def is_hashable(method: Method) -> bool:
    """Whether a method can be a cache key; one built by hand from lists cannot."""
    try:
        hash(method)
    except TypeError:
        return False
    return True
