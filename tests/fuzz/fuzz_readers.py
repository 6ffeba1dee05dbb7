"""Fuzzes the file readers: weights, class files, images, text-feature caches.

Each reader may return or raise the one error it documents; anything else is a find, and is saved with
its traceback. With atheris (pip install atheris) the mutation is guided by coverage; without it a
loop of its own mutates the seeds, some of them from the inside (a pickle in an intact archive).

    python tests/fuzz/fuzz_readers.py --runs 100000 --out /tmp/finds
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import os
import pickletools
import random
import resource
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from sfp import vocabulary
from sfp.clip import text
from sfp.clip.checkpoints import archive, loading
from sfp.clip.checkpoints.loading import WeightsError, read_state
from sfp.clip.text import read_bank, write_bank
from sfp.data import images
from sfp.data.images import ImageError, read_image
from sfp.vocabulary import load_vocabulary

FOLDER = Path(
    tempfile.mkdtemp(prefix="sfp-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
)
HEADROOM = 2**31  # bytes of memory that an input of a kilobyte may ask for, generously


def _path(data: bytes, name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(data)
    return path


def _weights(data: bytes) -> None:
    state = read_state(_path(data, "clip.pt"))
    sum(float(v.float().sum()) for v in state.values())  # every number is memory that is ours


def _safetensors(data: bytes) -> None:
    read_state(_path(data, "clip.safetensors"))


def _program(data: bytes) -> None:
    """A data.pkl in an archive that is otherwise right: what a checksum would else keep out."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as parts:
        parts.writestr("a/data.pkl", data)
        for key in range(4):
            parts.writestr(f"a/data/{key}", bytes(range(64)))
    _weights(file.getvalue())


def _vocabulary(data: bytes) -> None:
    words = load_vocabulary(_path(data, "cls.txt"))
    assert len(words.queries) == len(words.index)
    assert sorted(set(words.index)) == list(range(words.num_classes))
    assert all(query == query.strip() != "" for query in words.queries)


def _image(data: bytes) -> None:
    pixels = read_image(data, max_pixels=2**20)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert 0 < pixels.shape[0] * pixels.shape[1] <= 2**20


def _bank(data: bytes) -> None:
    bank = read_bank(_path(data, "bank.safetensors"), (2, 4))
    assert bank is None or bank.shape == (2, 4)


READERS: list[tuple[Callable[[bytes], None], tuple[type[Exception], ...]]] = [
    (_weights, (WeightsError,)),
    (_safetensors, (WeightsError,)),
    (_program, (WeightsError,)),
    (_vocabulary, (ValueError,)),
    (_image, (ImageError,)),
    (_bank, ()),
]


def one_input(data: bytes) -> bool:
    """One input; its first byte chooses the reader. Whether it was read without an error."""
    if not data:
        return False
    reader, expected = READERS[data[0] % len(READERS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(data[1:])
        except expected:
            return False
    return True


def seeds() -> list[bytes]:
    """Small intact files of every format, with the byte that sends them to their reader."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(3, 2).half()
            self.register_buffer("steps", torch.arange(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.part(x.half())

    state = Model().state_dict()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is old, and that is why it is read here
        traced = io.BytesIO()
        torch.jit.save(torch.jit.trace(Model(), torch.ones(1, 3)), traced)
    files = [traced]
    for content in (state, {"state_dict": state, "epoch": 3, "more": [1.5, None, (True, "a")]}):
        for modern in (True, False):
            files.append(io.BytesIO())
            torch.save(content, files[-1], _use_new_zipfile_serialization=modern)
    for file in files:
        found.append(b"\x00" + file.getvalue())
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                (name,) = (n for n in parts.namelist() if n.endswith("/data.pkl"))
                found.append(b"\x02" + parts.read(name))
    found.append(b"\x01" + save({k: v.clone() for k, v in state.items()}))
    found += [
        b"\x03" + line.encode() for line in ("sky, wall\ncat\ntv, screen\n", "\ufeffa\r\nb, c\r\n")
    ]
    found += [b"\x04" + data for data in _pictures()]
    folder = Path(tempfile.mkdtemp())
    write_bank(folder / "bank.safetensors", torch.eye(2, 4))
    found.append(b"\x05" + (folder / "bank.safetensors").read_bytes())
    return found


def _pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    rotated = Image.Exif()
    rotated[0x112] = 6
    found = []
    for kind in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM"):
        for mode in ("RGB", "L", "RGBA", "P", "CMYK"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):  # not every format has every mode
                more = (
                    {"exif": rotated} if mode == "RGB" and kind in ("JPEG", "PNG", "TIFF") else {}
                )
                rgb.convert(mode).save(file, kind, **more)
                found.append(file.getvalue())
    deep = rng.integers(0, 65536, (9, 13, 3)).astype(np.uint16)
    for pixels in (deep, deep[..., 0]):
        found += [cv2.imencode(kind, pixels)[1].tobytes() for kind in (".png", ".tiff")]
    return found


def mutate(data: bytes, rng: random.Random, pool: list[bytes]) -> bytes:
    """A neighbour of an input: a few of the changes that files suffer, or that attackers make."""
    changed = bytearray(data[1:])
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64)), len(changed) - at)
        match rng.randrange(8):
            case 0:
                changed[at : at + length] = rng.randbytes(length)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
            case 3:
                del changed[at:]
            case 4 if length:
                changed[at] ^= 1 << rng.randrange(8)
            case 5:  # sizes and counts at their limits
                number = rng.choice(
                    (0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
                )
                size = rng.choice((1, 2, 4, 8))
                order = rng.choice(("little", "big"))
                changed[at : at + size] = (number % 256**size).to_bytes(size, order)  # type: ignore[arg-type]
            case 6:  # a piece of another file
                other = rng.choice(pool)
                start = rng.randrange(len(other))
                changed[at : at + length] = other[start : start + rng.choice((4, 16, 256))]
            case _:  # instructions of pickles, among them all that this reader refuses
                changed[at : at + rng.randrange(2)] = rng.choice(INSTRUCTIONS)
    return data[:1] + bytes(changed)


INSTRUCTIONS = (
    *(
        bytes([code])
        for code in b"(.0123NTU)]}{lpqrtubaeoRQPVXcijghsdJKMLGIFS\x80\x81\x82\x85\x86\x87\x88\x89"
    ),
    *(bytes([code]) for code in b"\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97\x98"),
    b"cos\nsystem\n",
    b"ctorch\nFloatStorage\n",
    b"c__torch__\nM\n",
    b"r\xff\xff\xff\x7f",
)


def limit_memory() -> None:
    """A file that asks for memory far beyond its size becomes a `MemoryError`, hence a find."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, resource.RLIM_INFINITY))


def loop(runs: int, seed: int, out: Path | None) -> tuple[Counter[str], int]:
    """Mutates seeds, and whatever was still read, for a number of runs.

    Returns:
        How often each reader ran, and how many inputs were finds.
    """
    rng = random.Random(seed)
    intact = seeds()
    pools: dict[int, list[bytes]] = {}  # of each reader, so that all have the same share
    for data in intact:
        pools.setdefault(data[0], []).append(data)
    counts: Counter[str] = Counter()
    finds = 0
    for run in range(runs):
        if run < len(intact):
            data, pool = intact[run], []
        else:
            pool = pools[run % len(pools)]
            data = mutate(rng.choice(pool), rng, pool)
        counts[READERS[data[0]][0].__name__.strip("_")] += 1
        try:
            if one_input(data) and len(data) < 2**14:  # read in spite of the change: a new seed
                if len(pool) < 500:
                    pool.append(data)
                else:
                    pool[rng.randrange(len(pool) // 10, len(pool))] = data
        except Exception:
            finds += 1
            if out is None:
                raise
            out.mkdir(parents=True, exist_ok=True)
            (out / f"{finds}.bin").write_bytes(data)
            (out / f"{finds}.txt").write_text(traceback.format_exc())
        if out is not None and run % 10_000 == 0:
            print(f"{run} inputs, {finds} finds", flush=True)
    return counts, finds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("finds"))
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; no --out")
    args = parser.parse_args()
    limit_memory()
    if args.atheris:
        import atheris

        corpus = FOLDER / "corpus"
        corpus.mkdir()
        for i, seed in enumerate(seeds()):
            (corpus / str(i)).write_bytes(seed)
        for module in (archive, images, loading, text, vocabulary, pickletools, zipfile):
            for function in vars(module).values():
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)  # in place
        atheris.Setup(
            [
                sys.argv[0],
                f"-runs={args.runs}",
                "-max_len=16384",
                "-rss_limit_mb=6000",
                str(corpus),
            ],
            one_input,
        )
        atheris.Fuzz()
    counts, finds = loop(args.runs, args.seed, args.out)
    print(f"{sum(counts.values())} inputs, {finds} finds; {dict(counts)}")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
