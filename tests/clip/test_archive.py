"""Malicious archives: they must not run code, crash the interpreter or exhaust memory."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from sfp.clip.checkpoints.loading import WeightsError, read_state


def archive(path: Path, program: bytes, data: dict[str, bytes], *, compress: bool = False) -> Path:
    """A checkpoint as somebody with bad intentions would write it."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": program, **data}.items():
            file.writestr(
                f"a/{name}", content, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            )
    return path


def number(n: int) -> bytes:
    return (
        b"J" + struct.pack("<i", n) if -(2**31) <= n < 2**31 else b"\x8a\x08" + struct.pack("<q", n)
    )


def view(key="0", size=(2,), stride=(1,), offset=0, kind="FloatStorage", name="w") -> bytes:
    """The instructions for {name: tensor}."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + b"K\x02tQ"
    )
    sides, steps = (b"(" + b"".join(map(number, x)) + b"t" for x in (size, stride))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sides + steps
    return b"\x80\x02}" + text(name) + tensor + b"\x89}tRs."


def test_the_handmade_archive_is_read(tmp_path):
    path = archive(tmp_path / "a.pt", view(), {"data/0": struct.pack("<2f", 3, 4)})
    assert read_state(path)["w"].tolist() == [3, 4]


HOSTILE = {  # name: (program, data, why it is refused)
    "getattr": (
        b"\x8c\x02os\x8c\x06system\x93.",
        {},
        "refused the pickle instruction SHORT_BINUNICODE",
    ),
    "attribute of a class": (b"ctorch\nHalfStorage\n}b.", {}, "where a _Module belongs"),
    "call of a type": (b"ctorch\nHalfStorage\n(K\x01tR.", {}, "refused to call torch.HalfStorage"),
    "memo bomb": (b"}r\xff\xff\xff\x7f.", {}, "not a state dict"),
    "string of 4 GB": (b"X\xff\xff\xff\xffa.", {}, "malformed"),
    "deep key": (b"})" + b"\x85" * 100_000 + b"Ns.", {}, "where a str belongs"),
    "cycle": (
        b"c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
        {},
        "in the archive's tree tw",
    ),
    "past the end": (view(size=(3,)), {"data/0": bytes(8)}, "beyond the end"),
    "offset": (view(offset=1), {"data/0": bytes(8)}, "beyond the end"),
    "negative stride": (view(stride=(-1,)), {"data/0": bytes(8)}, "impossible layout"),
    "negative size": (view(size=(-2,)), {"data/0": bytes(8)}, "impossible layout"),
    "huge size": (
        view(size=(2**40, 2**40), stride=(0, 0)),
        {"data/0": bytes(8)},
        "larger than the file",
    ),
    "expanded": (view(size=(10**6,), stride=(0,)), {"data/0": bytes(8)}, "larger than the file"),
    "sides and steps differ": (view(stride=(1, 1)), {"data/0": bytes(8)}, "impossible layout"),
    "path": (view(key="../../../etc/passwd"), {"data/0": bytes(8)}, "is missing"),
    "no storage": (view(key="7"), {"data/0": bytes(8)}, "data/7 is missing"),
    "long name": (view(name="n" * 2000), {"data/0": bytes(8)}, "a name of 2000 characters"),
    "not ended": (view()[:-1], {"data/0": bytes(8)}, "malformed"),
    "big endian": (view(), {"data/0": bytes(8), "byteorder": b"big"}, "big-endian"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archives(tmp_path, case):
    program, data, why = HOSTILE[case]
    with pytest.raises(WeightsError, match=why):
        read_state(archive(tmp_path / "a.pt", program, data))


def test_compressed_and_overlapping_archives_cannot_unfold(tmp_path):
    path = archive(tmp_path / "a.pt", view(), {"data/0": bytes(10**6)}, compress=True)
    assert path.stat().st_size < 10_000
    with pytest.raises(WeightsError, match="compressed"):
        read_state(path)


@pytest.mark.slow
def test_a_program_in_an_archive_never_runs(tmp_path):
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.trace(tiny.clip().visual, tiny.images(1)), path)
    with zipfile.ZipFile(path, "a") as file:  # its code is not even looked at
        file.writestr("clip/code/__torch__/more.py", "this is no program")
    assert len(read_state(path)) == len(tiny.clip().visual.state_dict())
