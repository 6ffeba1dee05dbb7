"""Listing of images: folders, links, lists, archives, and messages about other files."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import drop_privileges, forked

from sfp.data.listing import Item, Outcome, Unit, items, list_units, read_text


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(stream, "png")
    return stream.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png())
    return root


def names(*inputs: str | Path) -> list[str]:
    return [unit.name for unit in list_units(list(inputs))]


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def read(path: Path, done=lambda name: False) -> list[Item | Outcome]:
    return [item for unit in list_units([path]) for item in items(unit, done)]


# -- folders -------------------------------------------------------------------------------------


def test_a_folder_of_images_is_listed_without_a_word(tmp_path):
    write(tmp_path, "b.png", "a/c.JPG", "a/B.Jpeg", "a/d.TIF", "a/e.webp", "a/v1.2.bmp", "z.TAR.GZ")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(tmp_path) == ["a/B", "a/c", "a/d", "a/e", "a/v1.2", "b", "z"]


def test_links_to_folders_and_files_are_followed(tmp_path):
    write(tmp_path, "photos/day1/a.png", "scratch/b.png", "scratch/deep/c.png")
    photos = tmp_path / "photos"
    (photos / "day2").symlink_to(tmp_path / "scratch")
    (photos / "d.png").symlink_to(tmp_path / "scratch/b.png")
    (tmp_path / "link").symlink_to(photos)
    expected = ["d", "day1/a", "day2/b", "day2/deep/c"]
    assert sorted(names(photos)) == expected
    assert sorted(names(tmp_path / "link")) == expected


def test_links_in_circles_end_and_are_said(tmp_path):
    write(tmp_path, "a/x.png", "b/y.png")
    for link, target in {"a/self": "a", "a/up": ".", "a/other": "b", "b/other": "a"}.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.warns(UserWarning, match=r"already searched under another name: .*self"):
        assert names(tmp_path) == ["a/x", "b/y"]


def test_a_folder_keeps_its_own_name_whatever_links_to_it(tmp_path):
    write(tmp_path, "z/x.png")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    with pytest.warns(UserWarning, match=f"already searched under another name: {tmp_path / 'a'}"):
        assert names(tmp_path) == ["z/x"]


def test_what_a_folder_holds_besides_is_said(tmp_path):
    write(tmp_path, "a.png", ".b.png", ".cache/c.png", "d.heic", "e.heic", "f.json", "README")
    with pytest.warns(UserWarning, match="skipped") as said:
        assert names(tmp_path) == ["a"]
    (message,) = (str(each.message) for each in said)
    assert message.startswith(f"{tmp_path}: skipped: hidden: ")
    for part in (".b.png", ".cache", "2 .heic", "1 .json", "1 no ending"):
        assert part in message


@pytest.mark.process
def test_a_folder_that_cannot_be_read_is_said(tmp_path):
    write(tmp_path, "a.png", "closed/b.png")
    (tmp_path / "closed").chmod(0)

    def listed() -> None:
        drop_privileges()
        with pytest.warns(UserWarning, match=r"cannot be read: .*closed"):
            assert names(tmp_path) == ["a"]

    try:
        assert not forked(listed)
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_broken_link_is_a_file_that_fails_when_it_is_read(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "nowhere.png")
    assert names(tmp_path) == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"b\.png, a broken link, does not exist"):
        names(tmp_path / "b.png")


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write(tmp_path, name)
    assert names(tmp_path) == [name.removesuffix(".png")]
    (tmp_path / "files.txt").write_bytes(b"caf\xe9.png\n")
    assert names(tmp_path / "files.txt") == [name.removesuffix(".png")]


def test_inputs_that_cannot_be(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image or archive in .*empty"):
        names(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        names(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a list of paths"):
        list_units(str(tmp_path))


# -- names ---------------------------------------------------------------------------------------


def test_names_that_collide(tmp_path):
    write(tmp_path, "in/a.jpg", "in/a.png", "x/b.png", "y/b.png")
    with pytest.raises(ValueError, match=r"both be written to a\.png"):
        names(tmp_path / "in")
    with pytest.raises(ValueError, match=r"both be written to b\.png"):
        names(tmp_path / "x", tmp_path / "y")
    tar(tmp_path / "x/s.tar", {})
    zipped(tmp_path / "x/s.zip", {})
    with pytest.raises(ValueError, match=r"s\.tar and .*s\.zip would both be written to s/"):
        names(tmp_path / "x/s.tar", tmp_path / "x/s.zip")


def test_a_folder_beside_an_archive_of_its_name(tmp_path):
    """The usual state after unpacking: images of both would share one folder of results."""
    write(tmp_path, "s/0.png", "s.png")
    tar(tmp_path / "s.tar", {"0.png": png()})
    with pytest.raises(ValueError, match=r"among the images of .*s\.tar, as s/0"):
        names(tmp_path)
    assert names(tmp_path / "s.tar", tmp_path / "s.png") == ["s", "s"]  # s/..., and s.png


def test_one_file_twice_counts_once(tmp_path):
    write(tmp_path, "a.png")
    assert names(tmp_path, tmp_path / "a.png", tmp_path) == ["a"]


# -- lists ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is read as UTF-16")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=repr)
def test_lists_as_editors_save_them(tmp_path, encoding, end):
    write(tmp_path, "ä b.png", "sub/c.png", "#1.png", "v.2")
    text = end.join(["# a comment", "ä b.png", "", "  sub/c.png ", "#1.png", "gone.png", "v.2"])
    data = b"\xfe\xff" + text.encode("utf-16-be") if "mark" in encoding else text.encode(encoding)
    (tmp_path / "files.TXT").write_bytes(data)
    units = list_units([tmp_path / "files.TXT"])
    assert [unit.name for unit in units] == ["ä b", "sub/c", "#1", "gone", "v.2"]
    assert [Path(unit.path).exists() for unit in units] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ("ä.png".encode("latin-1"), r"line 1: .*not UTF-8 text.*save the list as UTF-8"),
        ("a.png".encode("utf-16-le"), "null bytes: save it as UTF-8"),
        (b"\xff\xfea", "not UTF-16 text"),
        (b"", "lists no files"),
        (b"\n# only a comment\n", "lists no files"),
        (b"empty", "line 1: no image or archive in .*empty"),
    ],
)
def test_lists_that_are_wrong_are_named(tmp_path, data, why):
    (tmp_path / "empty").mkdir()
    (tmp_path / "files.txt").write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match=rf"files\.txt.*{why}"):
        names(tmp_path / "files.txt")


def test_folders_archives_and_far_files_in_lists(tmp_path):
    write(tmp_path, "lists/in/a.png", "lists/in/deep/b.png", "far/c.png")
    tar(tmp_path / "lists/s.tar.gz", {}, "w:gz")
    (tmp_path / "lists/files.txt").write_text(f"in\ns.tar.gz\n{tmp_path}/far/c.png\n../far/c.png\n")
    far = (tmp_path / "far/c").relative_to("/").as_posix()
    found = list_units([tmp_path / "lists/files.txt"])
    assert [unit.name for unit in found] == ["in/a", "in/deep/b", "s", far]
    assert [unit.is_archive for unit in found] == [False, False, True, False]


def test_utf16_is_said_with_the_name_of_the_list(tmp_path):
    (tmp_path / "files.txt").write_text("a.png", encoding="utf-16")
    with pytest.warns(UserWarning, match=r"files\.txt is read as UTF-16"):
        assert names(tmp_path / "files.txt") == ["a"]


def test_text_keeps_rare_letters_and_normalises_ends_of_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\u2028b\x0bc\r\nd\re".encode())
    assert read_text(tmp_path / "a.txt") == "a\u2028b\x0bc\nd\ne"


# -- archives ------------------------------------------------------------------------------------

FILES = {"a/x.png": png(1), "b.JPG": png(2), "notes.json": b"{}", "v1.2.png": png(3)}


@pytest.mark.parametrize(
    ("ending", "mode"),
    [
        (".tar", "w"),
        (".TAR", "w"),
        (".tgz", "w:gz"),
        (".tar.gz", "w:gz"),
        (".tar.bz2", "w:bz2"),
        (".tar.xz", "w:xz"),
        (".zip", ""),
        (".ZIP", ""),
    ],
)
def test_archives_give_their_images_under_their_own_name(tmp_path, ending, mode):
    path = tmp_path / f"shard.0{ending}"
    tar(path, FILES, mode) if mode else zipped(path, FILES)
    (unit,) = list_units([tmp_path])
    assert unit == Unit(str(path), "shard.0")
    assert unit.is_archive
    found = list(items(unit, lambda name: name.endswith("b")))
    assert [item.name for item in found] == ["shard.0/a/x", "shard.0/b", "shard.0/v1.2"]
    assert found[0] == Item("shard.0/a/x", data=png(1))
    assert found[1] == Outcome("shard.0/b", "skipped")
    assert found[2] == Item("shard.0/v1.2", data=png(3))


@pytest.mark.parametrize("pack", [tar, zipped])
def test_what_is_odd_in_archives_is_an_outcome(tmp_path, pack):
    files = {"../out.png": b"1", "/abs.png": b"2", "in.tar": b"3", "0.png": b"4", "0.jpg": b"5"}
    path = pack(tmp_path / "s.zip" if pack is zipped else tmp_path / "s.tar", files)
    errors = {
        item.error.partition(", ")[2] or item.error
        for item in read(path)
        if not hasattr(item, "data")
    }
    assert errors == {
        "../out.png: its path leaves the archive",
        "/abs.png: its path leaves the archive",
        "in.tar: an archive in an archive is not opened",
        f"{path} has two images of this name",
    }


@pytest.mark.parametrize("pack", [tar, zipped])
def test_hidden_files_in_archives_are_said(tmp_path, pack):
    """A Mac puts a "._" file beside each image."""
    path = tmp_path / ("s.zip" if pack is zipped else "s.tar")
    pack(path, {"a.png": png(), "._a.png": b"no image", ".cache/b.png": png()})
    with pytest.warns(UserWarning, match=r"skipped: hidden: \._a\.png, \.cache/b\.png"):
        assert [item.name for item in read(path)] == ["s/a"]


def test_links_in_tar_files_are_outcomes(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "soft.png"), (tarfile.LNKTYPE, "hard.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "a.png"
            archive.addfile(member)
    for outcome in read(tmp_path / "s.tar"):
        assert "a link; pack the files themselves" in outcome.error


def test_damaged_archives(tmp_path):
    noise = {f"{i}.png": np.random.default_rng(i).bytes(5000) for i in range(3)}
    data = tar(tmp_path / "s.tar", noise).read_bytes()
    (tmp_path / "s.tar").write_bytes(data[:9000])
    *whole, last = read(tmp_path / "s.tar")
    assert [item.name for item in whole if isinstance(item, Item)] == ["s/0"]
    assert "s.tar" in last.error

    data = bytearray(zipped(tmp_path / "s.zip", noise).read_bytes())
    data[data.index(noise["1.png"][:50]) + 100] ^= 255  # noise is stored as it is
    (tmp_path / "s.zip").write_bytes(data)
    found = {item.name: item for item in read(tmp_path / "s.zip")}
    assert "1.png" in found["s/1"].error
    assert found["s/2"] == Item("s/2", data=noise["2.png"])  # the others are had

    for name in ("t.zip", "t.tar"):
        (tmp_path / name).write_bytes(b"no archive" * 100)
        (outcome,) = read(tmp_path / name)
        assert outcome.status == "failed"
        assert name in outcome.error


@pytest.mark.parametrize("cut", [1024, 1224])
def test_tar_files_that_end_between_images(tmp_path, cut):
    """After a whole image, or within the next one's header, which tarfile takes for the end."""
    data = tar(tmp_path / "s.tar", {"0.png": b"0", "1.png": b"1"}).read_bytes()
    (tmp_path / "s.tar").write_bytes(data[:cut])
    image, outcome = items(Unit(str(tmp_path / "s.tar"), "s"), lambda name: False)
    assert image == Item("s/0", data=b"0")
    assert outcome.status == "failed"
    assert "s.tar: unexpected end of data; the rest of it is skipped" in outcome.error
