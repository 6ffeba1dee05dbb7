"""Detects whether a module has changed: a cheap key, and a digest of its contents.

Values computed with weights are cached under `state_key` within a process, and on disk under
`contents_digest`. Neither relies on being notified of changes.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Hashable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sfp.clip.dispatch import PLAIN, intercepted

SAMPLES = 4096  # up to this size all values are compared; in larger matrices one per row and column
SUMMED = 2**17  # up to this size the sum is compared as well

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per value
_IGNORED = {"_compiled_call_impl"}  # of `Module.compile`, which computes the same
_HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
_STANDARD = {*vars(nn.Module())} - {"training", *_HOOKS}  # what every module has
# for each module, by `without`: its structure in the last call, and readers of its values, which are
# views: they keep the memory of that structure until the structure changes
_PROBES: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[tuple, list[_Probe]]]] = (
    WeakKeyDictionary()
)


def state_key(module: nn.Module, *, without: tuple[str, ...] = ()) -> Hashable:
    """Equal for two calls in one process if the module's weights and structure have not changed.

    It takes milliseconds for a ViT-B. It detects all changes that PyTorch records (in place,
    `load_state_dict`, replaced parameters, other dtypes or devices), and changes of submodules, their
    settings, hooks and methods. Of unrecorded changes (through `.data` or NumPy) it detects all in
    tensors of up to 2**17 values, and those of a whole row, column or head in larger ones.

    Args:
        module: any module.
        without: names of submodules to ignore.

    Returns:
        A key for comparisons. If values cannot be read (tracing, tensor subclasses) it equals no other.
    """
    if intercepted():
        return object()
    parts: list[Any] = []
    tensors = []
    for name, part in _parts(module, without):
        parts += [name, type(part), *_settings(part)]
        for key, x in _tensors(part):
            if type(x) not in PLAIN or x.layout is not torch.strided:
                return object()
            version = None if x.is_inference() else x._version
            parts += [key, x.data_ptr(), version, x.shape, x.stride(), x.dtype, x.device]
            tensors.append(x)
    structure = tuple(parts)
    known = _PROBES.setdefault(module, {})
    before, probes = known.get(without, ((), []))
    if before != structure:
        probes = _probes(tensors)
        known[without] = structure, probes
    return structure, tuple(hash(probe()) for probe in probes)


def contents_digest(module: nn.Module, *, without: tuple[str, ...] = ()) -> str:
    """SHA-256 of a module's structure, settings and values: equal in all processes, on all devices.

    It is random if values cannot be read. Methods and hooks are identified only by their names.
    """
    digest = hashlib.sha256()
    for name, part in _parts(module, without):
        settings = [s for s in _settings(part) if not isinstance(s, _Identity)]
        digest.update(repr([name, type(part).__qualname__, settings]).encode())
        for key, x in _tensors(part):
            if type(x) not in PLAIN or x.layout != torch.strided or intercepted() or x.is_meta:
                return secrets.token_hex(32)
            digest.update(repr([key, tuple(x.shape), str(x.dtype)]).encode())
            bits = x.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
            digest.update(bits.numpy().data)
    return digest.hexdigest()


class _Identity(int):
    """An `id`, which means nothing in another process."""


def _parts(module: nn.Module, without: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """Like `named_modules`, but faster, and without some submodules of the first level."""
    seen = set()
    stack = [("", module)]
    while stack:
        name, part = stack.pop()
        if part in seen:
            continue
        seen.add(part)
        yield name, part
        for key, child in reversed(part._modules.items()):
            if child is not None and (name or key not in without):
                stack.append((f"{name}.{key}" if name else key, child))


def _settings(part: nn.Module) -> Iterator[Hashable]:
    """Everything besides tensors that affects a module: numbers, names, hooks, replaced methods."""
    for name, value in vars(part).items():
        if name in _STANDARD:
            continue
        if name in _HOOKS:
            if not value:
                continue
            yield name
            yield from map(_Identity, value)  # their ids, which are never reused
        elif isinstance(value, (str, int, float, tuple)):
            yield name
            yield str(value)
        elif isinstance(digest := getattr(value, "digest", None), str):  # a tokenizer's
            yield name
            yield digest
        elif callable(value) and name not in _IGNORED:
            yield name
            yield _Identity(id(value))


def _tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for own in (part._parameters, part._buffers, vars(part)):
        for name, value in own.items():
            if name not in _STANDARD and isinstance(value, Tensor):
                yield name, value


class _Probe:
    """Reads some values of tensors of one type and device: those of `views`, and sums of `summed`."""

    def __init__(self) -> None:
        self.views: list[Tensor] = []
        self.summed: list[Tensor] = []

    def __call__(self) -> bytes:
        return b"".join(
            torch.cat(values).cpu().numpy().tobytes()
            for values in (self.views, [x.sum()[None] for x in self.summed])
            if values
        )


def _probes(tensors: Iterable[Tensor]) -> list[_Probe]:
    """Reads some values of each tensor, as integers, and the sum of all unless it is large."""
    probes: dict[tuple[torch.device, torch.dtype], _Probe] = {}
    for x in tensors:
        if x.is_meta or not x.numel():
            continue
        x = torch.view_as_real(x.detach()) if x.is_complex() else x.detach()
        flat = x.reshape(-1).view(_BITS[x.element_size()])
        probe = probes.setdefault((flat.device, flat.dtype), _Probe())
        step = _step(x.shape)
        probe.views.append(flat[::step])
        if step > 1 and len(flat) <= SUMMED:
            words = 8 // x.element_size()  # sums of int64 are the fastest
            probe.summed.append(flat[: len(flat) // words * words].view(torch.int64))
    return list(probes.values())


def _step(shape: torch.Size) -> int:
    """The distance between samples such that every row and column of a matrix is sampled.

    A step of at most the length of a row reaches every row; a step coprime to the length of a row
    reaches every column.
    """
    count = math.prod(shape)
    if count <= SAMPLES:
        return 1
    columns = count // shape[0]
    step = min(shape[0], columns) if min(shape[0], columns) > 1 else count // SAMPLES
    while math.gcd(step, columns) > 1:
        step -= 1
    return step
