"""Reads tensors from PyTorch's zip archives as data.

`torch.save` and TorchScript write the same files: `data.pkl`, which describes tensors and their tree
by instructions of the pickle format, and `data/<key>` with their values (TorchScript also stores its
programs under `code/`). For any file, including malicious ones:

* none of its code runs: nothing is imported, called or changed in this process;
* the result is tensors or an error, and the interpreter never crashes;
* memory stays within a small multiple of the file's size.

A `pickle.Unpickler` that refuses names only guarantees the first: a memo index makes it allocate
gigabytes (7 bytes for 4 GB), and hashing a deep tuple as a key overflows the C stack. Therefore the few
instructions that occur are interpreted here, and sizes are compared with the size of the file before
memory is allocated.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

MAX_PROGRAM = 2**24  # bytes of data.pkl; that of a ViT-L/14 has about 250,000
MAX_NAME = 1000  # characters of a parameter's dotted name
MAX_SIDES = 8  # dimensions of a tensor

STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
REBUILD = "torch._utils _rebuild_tensor_v2"
FIRST_ARGUMENT = (  # functions that return their first argument: parameters, typed lists
    "torch._utils _rebuild_parameter",
    "torch.jit._pickle build_intlist",
    "torch.jit._pickle build_doublelist",
    "torch.jit._pickle build_boollist",
    "torch.jit._pickle build_tensorlist",
    "torch.jit._pickle restore_type_tag",
)


class ArchiveError(ValueError):
    """An archive that is damaged, or has contents that do not occur in checkpoints."""


class _Global(NamedTuple):
    """The name of a class or function, "module name"; only ever compared."""

    name: str


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype


class _View(NamedTuple):
    """A tensor that has not yet been compared with the size of its storage."""

    storage: Any
    offset: Any
    size: Any
    stride: Any


class _Module:
    """An object of a TorchScript archive, with only its attributes."""

    attributes: dict[Any, Any] | None = None


def read_archive(file: BinaryIO) -> dict[str, Tensor]:
    """The state dict in an archive of `torch.save`, or a TorchScript module's tensors by dotted name.

    A state dict may be under the key "state_dict" of a larger checkpoint, whose rest is ignored.

    Raises:
        ArchiveError: if the archive is damaged, claims sizes larger than it, or is neither of these.
        zipfile.BadZipFile: if it is not a zip file, or a checksum is wrong.
    """
    with zipfile.ZipFile(file) as archive:
        roots = [
            n[: -len("data.pkl")] for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)
        ]
        if len(roots) != 1:
            raise ArchiveError("a zip file without the data.pkl of a checkpoint")
        parts = _Parts(archive, roots[0])
        try:
            tree = _interpret(parts.read("data.pkl", MAX_PROGRAM))
        except ArchiveError:
            raise
        except (
            ValueError,
            LookupError,
            TypeError,
        ) as error:  # invalid use of the stack or the memo
            raise ArchiveError(f"data.pkl is malformed: {error}") from error
        if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
            tree = tree["state_dict"]
        return parts.tensors(_flat(tree))


def _interpret(program: bytes) -> Any:  # noqa: C901 - a case per instruction
    """The value described by the instructions of a data.pkl.

    Each instruction pushes at most one value, so memory stays in proportion to the program.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO":
                pass
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "GLOBAL":
                stack.append(_global(argument))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[len(stack) - count :])]
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _a(list, stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _a(list, stack[-1]).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                key, value = stack.pop(-2), stack.pop()
                _a(dict, stack[-1])[_key(key)] = value
            case "SETITEMS":
                items = since_mark()
                keys = map(_key, items[::2])
                _a(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "NEWOBJ":
                _a(tuple, stack.pop())
                stack[-1] = _call(_a(_Global, stack[-1]).name, None)
            case "REDUCE":
                arguments = _a(tuple, stack.pop())
                stack[-1] = _call(_a(_Global, stack[-1]).name, arguments)
            case "BUILD":
                state = _a(dict, stack.pop())
                if not isinstance(stack[-1], dict):  # that of a dict holds only version numbers
                    _a(_Module, stack[-1]).attributes = state
            case "STOP":
                return stack.pop()
            case name:
                raise ArchiveError(f"refused the pickle instruction {name}")
    raise ArchiveError("data.pkl does not end")


def _a(kind: type, value: Any) -> Any:
    """The value, if it has a type. Messages never show values: nested ones could be endless."""
    if type(value) is not kind:
        raise ArchiveError(f"data.pkl has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(value: Any) -> str | int:
    """A key of a mapping. It is not nested: hashing a deep tuple overflows the interpreter's stack."""
    if type(value) is int:
        return value
    if len(_a(str, value)) > MAX_NAME:
        raise ArchiveError(f"a name of {len(value)} characters: {value[:60]!r}...")
    return value


def _global(name: str) -> _Global:
    """A name that occurs in archives, "module name"; any other is refused."""
    known = (*STORAGES, *FIRST_ARGUMENT, REBUILD, "collections OrderedDict")
    if name not in known and not name.startswith("__torch__"):
        raise ArchiveError(f"refused to load {name.replace(' ', '.')[:100]}")
    return _Global(name)


def _storage(pid: Any) -> _Storage:
    """The storage for ("storage", type, key, device, elements) in data.pkl."""
    _, kind, key, _, _ = _a(tuple, pid)
    if _a(_Global, kind).name not in STORAGES:
        raise ArchiveError("data.pkl has a storage without a type")
    return _Storage(_a(str, key), STORAGES[kind.name])


def _call(name: str, arguments: tuple | None) -> Any:
    """The value of a call; without arguments, of a new object."""
    if arguments is None and name.startswith("__torch__"):
        return _Module()
    if arguments and name == REBUILD:
        return _View(*arguments[:4])
    if arguments and name in FIRST_ARGUMENT:
        return arguments[0]
    if arguments == () and name == "collections OrderedDict":
        return {}
    raise ArchiveError(f"refused to call {name.replace(' ', '.')[:100]}")


def _flat(tree: Any) -> dict[str, _View]:
    """Tensors by name: those of a state dict, or the attributes of a tree of modules."""
    if isinstance(tree, dict):
        if not tree or not all(isinstance(v, _View) for v in tree.values()):
            raise ArchiveError("not a state dict: expected a mapping from names to tensors")
        for name in tree:
            _a(str, name)
        return tree
    views: dict[str, _View] = {}
    seen: set[int] = set()
    waiting = [("", _a(_Module, tree))]
    while waiting:
        prefix, module = waiting.pop()
        attributes = _a(dict, module.attributes)
        if id(attributes) in seen:  # a cycle, or a tree that could be endless
            raise ArchiveError(f"module {prefix!r} is in the archive's tree twice")
        seen.add(id(attributes))
        for key, value in attributes.items():
            if isinstance(value, (_View, _Module)):
                name = str(_key(prefix + _a(str, key)))
                if isinstance(value, _View):
                    views[name] = value
                else:
                    waiting.append((f"{name}.", value))
    return views


class _Parts:
    """The files in an archive; in total they must not be larger than it, even if they overlap."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self.archive, self.root = archive, root
        assert archive.fp is not None
        self.size = self.unread = archive.fp.seek(0, 2)

    def read(self, name: str, limit: float = math.inf) -> bytes:
        """Reads one file, of at most `limit` bytes, and verifies its checksum."""
        try:
            info = self.archive.getinfo(self.root + name)
        except KeyError:
            raise ArchiveError(f"{self.root}{name} is missing") from None
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            # PyTorch stores values uncompressed; compressed files could expand to any size
            raise ArchiveError(f"{info.filename} is compressed or encrypted")
        if info.file_size > min(limit, self.unread):
            raise ArchiveError(f"{info.filename} claims {info.file_size} bytes: too many")
        self.unread -= info.file_size
        return self.archive.read(info)

    def tensors(self, views: Mapping[str, _View]) -> dict[str, Tensor]:
        """The tensors; each must fit in its storage, and all of them in the size of the file."""
        self._check_order()
        left = self.size
        storages: dict[_Storage, Tensor] = {}
        state = {}
        for name, view in views.items():
            storage = _a(_Storage, view.storage)
            sides, steps = _a(tuple, view.size), _a(tuple, view.stride)
            if not len(sides) == len(steps) <= MAX_SIDES or not all(
                type(n) is int and 0 <= n < 2**48 for n in (view.offset, *sides, *steps)
            ):
                raise ArchiveError(f"{name} has an impossible layout")
            left -= math.prod(sides) * storage.dtype.itemsize
            if left < 0:
                raise ArchiveError(f"{name}, {view.size}: larger than the file that should hold it")
            if storage not in storages:
                data = bytearray(self.read(f"data/{storage.key}"))
                flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
                storages[storage] = flat[: len(data) - len(data) % storage.dtype.itemsize].view(
                    storage.dtype
                )
            flat = storages[storage]
            last = sum((n - 1) * step for n, step in zip(sides, steps, strict=True))
            if math.prod(sides) and view.offset + last >= len(flat):
                raise ArchiveError(f"{name}, {view.size}: beyond the end of data/{storage.key}")
            state[name] = (
                flat.as_strided(sides, steps, view.offset)
                if math.prod(sides)
                else flat.new_empty(sides)
            )
        return state

    def _check_order(self) -> None:
        name = f"{self.root}byteorder"
        if name in self.archive.namelist() and self.read("byteorder", 16) != b"little":
            raise ArchiveError("written on a big-endian machine")
