"""What the network saw in recent images, so that other words cost no second look at them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sfp.clip.vit import VisionTransformer
from sfp.method import Method
from sfp.tokens import Tokens, cosine_logits
from sfp.trace import Trace


@dataclass(frozen=True)
class Seen:
    """What is kept of a batch of windows, free of any words.

    Attributes:
        features: what the method read, or None if the words had a part in it (ResCLIP's feedback).
        trace: the run of the trunk, or None where nothing asks for it again: `features` are there
            and no refiner follows.
    """

    features: Tokens | None
    trace: Trace | None

    def logits(self, method: Method, context: Mapping[str, Any]) -> Tensor:
        """Query logits (B, Q, h, w) for the words of `context`, to the last bit those of a new run."""
        if self.trace is None:
            assert self.features is not None
            return cosine_logits(self.features, context["text"])
        trace = self.trace.with_words(context["text"], context["index"])
        features = method.read(trace) if self.features is None else self.features
        return method.compare(features, trace)

    @property
    def nbytes(self) -> int:
        """Memory that its tensors hold."""
        tensors = [] if self.trace is None else [*self.trace.tensors()]
        if self.features is not None:
            tensors.append(self.features.data)
        storages = [x.untyped_storage() for x in tensors]  # views share theirs
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def look(
    method: Method, vit: VisionTransformer, windows: Tensor, context: Mapping[str, Any]
) -> tuple[Tensor, Seen | None]:
    """A new run: query logits (B, Q, h, w) of windows (B, 3, H, W), and what other words can use.

    That is nothing if the trunk depends on the words.
    """
    trace = method.run(vit, windows, **context)
    features = method.read(trace)
    logits = method.compare(features, trace)
    if method.words_in_trunk:
        return logits, None
    worded = method.words_in_readouts
    kept = trace.with_words(None, None) if worded or method.refiners else None
    return logits, Seen(None if worded else features, kept)


def _hashable(method: Method) -> bool:
    """Whether a method can be looked up: one that was put together from lists by hand cannot."""
    try:
        hash(method)
    except TypeError:
        return False
    return True


class Memory:
    """The batches of windows that were seen last, by their pixels and the method.

    Args:
        limit: bytes that are kept at most, on the device of the model; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._seen: OrderedDict[Hashable, tuple[Seen, int]] = OrderedDict()  # oldest use first
        self._lock = threading.Lock()

    def logits(
        self, method: Method, vit: VisionTransformer, windows: Tensor, context: Mapping[str, Any]
    ) -> Tensor:
        """As `look`, from memory if these windows were seen with this method."""
        if not self.limit or not _hashable(method):
            return look(method, vit, windows, context)[0]
        pixels = windows.contiguous().cpu().numpy().data
        digest = hashlib.blake2b(pixels, digest_size=16).digest()
        key = (method, vit.proj.dtype, windows.shape, digest)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
            seen = self._seen.get(key, (None,))[0]
        if seen is not None:
            return seen.logits(method, context)
        logits, seen = look(method, vit, windows, context)
        if seen is not None:
            self._keep(key, seen)
        return logits

    def _keep(self, key: Hashable, seen: Seen) -> None:
        size = seen.nbytes
        with self._lock:
            if size > self.limit or key in self._seen:
                return
            self._seen[key] = (seen, size)
            while self.nbytes > self.limit:
                self._seen.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return sum(size for _, size in self._seen.values())

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._seen.clear()
