"""Downloads from local servers that disconnect, stall, send wrong data, ignore ranges; one is a Hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import multiprocessing
import os
import re
import signal
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import tiny
import torch
from processes import forked

import sfp
from sfp.cli import main
from sfp.clip.checkpoints import download
from sfp.clip.checkpoints.download import HashError, fetch
from sfp.clip.checkpoints.loading import PUBLISHED, Published, load_clip, open_weights
from sfp.clip.checkpoints.published import on_disk
from sfp.files import sha256_file

DATA = bytes(range(256)) * 2000  # 512 kB
SHA256 = hashlib.sha256(DATA).hexdigest()


class Server:
    """One file over HTTP, served as badly as told; `asked` lists the ranges that were asked for.

    Attributes:
        data: what is served.
        cuts: bytes after which successive connections end; the others are whole.
        ranges: whether ranges are known.
        status: instead of 200.
        stall: seconds of silence after 1000 bytes, and at the start of a range.
        length: whether the length is stated.
    """

    def __init__(self) -> None:
        self.data, self.cuts, self.ranges, self.status = DATA, [], True, 200
        self.stall, self.length = 0.0, True
        self.asked: list[str | None] = []


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.fixture
def server():
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.asked.append(asked)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            if state.status != 200:
                return self.send_error(state.status)
            if start and start >= len(state.data):
                return self.send_error(416)
            body = state.data[start:]
            self.send_response(206 if start else 200)
            if start:
                place = f"bytes {start}-{len(state.data) - 1}/{len(state.data)}"
                self.send_header("Content-Range", place)
            if state.length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if state.cuts:
                body = body[: state.cuts.pop(0)]
            if state.stall:
                sent = 0 if start else 1000
                self.wfile.write(body[:sent])
                self.wfile.flush()
                time.sleep(state.stall)
                body = body[sent:]
            self.wfile.write(body)
            return None

        def log_message(self, *args):
            pass

    with serving(Handler) as address:
        state.url = f"{address}/file.pt"
        yield state


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "weights" / "file.pt"


def left(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# -- one file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [True, False])
def test_a_file(server, path, length, capfd):
    server.length = length
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert left(path) == ["file.pt"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert server.asked == [None]
    shown = capfd.readouterr()
    assert "file.pt" in shown.err
    assert shown.out == ""


def test_a_connection_that_breaks_is_taken_up_again(server, path):
    server.cuts = [100_000, 50_000, 1]
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=150000-", "bytes=150001-"]


def test_a_server_that_gives_up_is_asked_again_by_the_next_call(server, path):
    server.cuts = [100_000, 0]
    with pytest.raises(OSError, match="the connection ended after 100000 of 512000 bytes"):
        fetch(server.url, path, SHA256)
    assert left(path) == ["file.pt.part"]
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=100000-"]
    assert left(path) == ["file.pt"]


def test_a_server_without_ranges_starts_over(server, path):
    server.ranges = False
    server.cuts = [100_000, 50_000]  # the second brings less: there is no use in a third
    with pytest.raises(OSError, match="ended after 50000 of 512000"):
        fetch(server.url, path, SHA256)
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-", "bytes=50000-"]


@pytest.mark.parametrize("cut", [1, 5000, len(DATA) - 1])
def test_a_part_from_an_earlier_day(server, path, cut):
    path.parent.mkdir()
    path.with_name("file.pt.part").write_bytes(DATA[:cut])
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked == [f"bytes={cut}-"]


def test_a_part_that_is_whole(server, path):
    """Killed between the last byte and the new name."""
    path.parent.mkdir()
    path.with_name("file.pt.part").write_bytes(DATA)
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA


@pytest.mark.parametrize("part", [b"x" * 5000, b"x" * len(DATA), b"x" * (len(DATA) + 5)])
def test_a_part_of_another_file_is_thrown_away(server, path, part):
    path.parent.mkdir()
    path.with_name("file.pt.part").write_bytes(part)
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked[-1] is None
    assert left(path) == ["file.pt"]


def test_another_file_on_the_server(server, path):
    server.data = b"something else"
    with pytest.raises(HashError, match=f"{hashlib.sha256(server.data).hexdigest()}.*{SHA256}"):
        fetch(server.url, path, SHA256)
    assert left(path) == []


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_a_server_that_refuses(server, path, status):
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        fetch(server.url, path, SHA256)
    assert left(path) == []
    assert len(server.asked) == 1
    path.with_name("file.pt.part").write_bytes(DATA[:70])
    with pytest.raises(OSError, match=str(status)):
        fetch(server.url, path, SHA256)
    assert left(path) == ["file.pt.part"]  # the server may come to its senses


def test_a_server_that_falls_silent(server, path, monkeypatch):
    """What came before is kept; the connection is not waited for without end."""
    part, read, timeouts = path.with_name("file.pt.part"), http.client.HTTPResponse.read1, set()

    def impatient(self, size):
        connection = self.fp.raw._sock
        timeouts.add(connection.gettimeout())
        if part.stat().st_size == 1000:  # all that will come
            connection.settimeout(0.01)
        return read(self, size)

    server.stall = 60
    monkeypatch.setattr(http.client.HTTPResponse, "read1", impatient)
    with pytest.raises(OSError, match="timed out"):
        fetch(server.url, path, SHA256, timeout=123)
    assert timeouts == {123}
    assert part.read_bytes() == DATA[:1000]
    assert server.asked == [None, "bytes=1000-"]
    server.stall = 0
    monkeypatch.setattr(http.client.HTTPResponse, "read1", read)
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA


def test_nobody_listens(path):
    with pytest.raises(OSError, match="refused"):
        fetch("http://127.0.0.1:9/file.pt", path, SHA256)
    assert left(path) == []


def test_a_server_that_does_not_speak_http(path):
    import socketserver

    class Noise(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(100)
            self.request.sendall(b"\0\1\2 what?\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Noise) as tcp:
        threading.Thread(target=tcp.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{tcp.server_address[1]}/file.pt"
        with pytest.raises((OSError, http.client.HTTPException)):
            fetch(url, path, SHA256)
        tcp.shutdown()
    assert left(path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_gets_its_space_back(server, path, monkeypatch):
    """Also after a part has been written; and a full disk is no broken connection."""
    write, budget = download._write, [2]

    def fills_up(file, block):
        if not budget[0]:
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(block)  # the error of a real full device
        budget[0] -= 1
        write(file, block)

    monkeypatch.setattr(download, "_write", fills_up)
    monkeypatch.setattr(download, "BLOCK", 1000)
    with pytest.raises(OSError, match="No space left"):
        fetch(server.url, path, SHA256)
    assert left(path) == []
    assert len(server.asked) == 1


def _fetch(url: str, path: Path) -> None:
    fetch(url, path, SHA256)


@pytest.mark.process
def test_processes_wait_for_the_first(server, path):
    server.stall = 0.3
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_fetch, args=(server.url, path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert path.read_bytes() == DATA
    assert left(path) == ["file.pt"]
    assert server.asked == [None]


@pytest.mark.process
def test_a_killed_process_leaves_what_it_had(server, path):
    write = download._write

    def dies(file, block):
        write(file, block)
        os.kill(os.getpid(), signal.SIGKILL)

    def work():
        download._write = dies
        fetch(server.url, path, SHA256)

    server.cuts = [1000]
    assert forked(work) == -signal.SIGKILL
    kept = path.with_name("file.pt.part").stat().st_size
    assert 0 < kept <= 1000
    fetch(server.url, path, SHA256)
    assert path.read_bytes() == DATA
    assert server.asked == [None, f"bytes={kept}-"]


# -- the Hub -------------------------------------------------------------------------------------


class Hub:
    """Repositories of the Hugging Face Hub as its library sees them: files by their path.

    Attributes:
        files: contents by "repository/name".
        states: hashes that are stated for them, if not their own.
        cuts: as of `Server`.
        asked: methods and paths.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.states: dict[str, str] = {}
        self.cuts: list[int] = []
        self.asked: list[str] = []


@pytest.fixture
def hub(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bool) -> None:
            path = urllib.parse.unquote(self.path).lstrip("/")
            state.asked.append(f"{self.command} {path}")
            name = path.replace("/resolve/main/", "/").replace(f"/resolve/{'c' * 40}/", "/")
            if name not in state.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = state.files[name]
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            etag = state.states.get(name) or hashlib.sha256(data).hexdigest()
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if body:
                cut = state.cuts.pop(0) if state.cuts else len(data)
                self.wfile.write(data[start:][:cut])

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *args):
            pass

    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serving(Handler) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        yield state


NAME = "ViT-B-16:test"
REPO = "someone/CLIP-ViT-B-16-test"


@pytest.fixture
def row(monkeypatch) -> Published:
    row = Published("ViT-B-16-test.safetensors", repo=REPO, activation="gelu", mean=(0.5,) * 3)
    monkeypatch.setitem(PUBLISHED, NAME, row)
    return row


def content(tmp_path: Path, suffix: str) -> bytes:
    path = tmp_path / f"made{suffix}"
    state = tiny.clip(layers=2, vocab=64).state_dict()
    if suffix == ".bin":
        torch.save({k: v.clone() for k, v in state.items()}, path)
        return path.read_bytes()
    tiny.save(path, layers=2, vocab=64)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("file", "suffix"),
    [("open_clip_model.safetensors", ".safetensors"), ("open_clip_pytorch_model.bin", ".bin")],
)
def test_weights_from_the_hub(hub, row, tmp_path, file, suffix):
    hub.files[f"{REPO}/{file}"] = data = content(tmp_path, suffix)
    hub.files[f"{REPO}/README.md"] = b"nothing that is wanted"
    assert on_disk(NAME) is None
    clip = load_clip(NAME)
    assert clip.activation == "gelu"
    assert clip.mean == (127.5,) * 3
    path = on_disk(NAME)
    assert path.read_bytes() == data
    assert path.is_relative_to(tmp_path / "hub")
    asked = len(hub.asked)
    checkpoint = open_weights(NAME)  # from the cache
    assert len(hub.asked) == asked
    assert checkpoint.verified
    assert checkpoint.sha256 == hashlib.sha256(data).hexdigest()


def test_damage_in_the_hubs_cache_is_found(hub, row, tmp_path):
    hub.files[f"{REPO}/open_clip_model.safetensors"] = content(tmp_path, ".safetensors")
    load_clip(NAME)
    blob = on_disk(NAME).resolve()
    data = bytearray(blob.read_bytes())
    data[-7] ^= 1
    blob.write_bytes(data)
    with pytest.raises(sfp.WeightsError, match=f"is not {NAME}: its SHA-256 is"):
        load_clip(NAME)


def test_a_hub_file_that_is_not_what_the_hub_states(hub, row, tmp_path):
    file = f"{REPO}/open_clip_model.safetensors"
    hub.files[file], hub.states[file] = content(tmp_path, ".safetensors"), "a" * 64
    with pytest.raises(sfp.WeightsError, match=f"the Hub states {'a' * 64}"):
        load_clip(NAME)
    assert on_disk(NAME) is None
    del hub.states[file]
    assert load_clip(NAME).digest


def test_a_hub_download_that_breaks_off_is_continued(hub, row, tmp_path):
    hub.files[f"{REPO}/open_clip_model.safetensors"] = data = content(tmp_path, ".safetensors")
    hub.cuts = [len(data) // 2]
    with contextlib.suppress(sfp.WeightsError):  # its library may continue by itself
        load_clip(NAME)
    load_clip(NAME)
    assert on_disk(NAME).read_bytes() == data
    assert sum(asked.startswith("GET") for asked in hub.asked) == 2


def test_a_repository_without_weights(hub, row):
    hub.files[f"{REPO}/model.safetensors"] = b"another layout"
    with pytest.raises(
        sfp.WeightsError, match=r"has none of open_clip_model\.safetensors"
    ) as error:
        load_clip(NAME)
    assert f"https://huggingface.co/{REPO}/resolve/main/open_clip_model" in str(error.value)


def test_no_hub(row, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # its library tries five times
    with pytest.raises(sfp.WeightsError, match=f"could not download {NAME}") as error:
        load_clip(NAME)
    assert str(tmp_path / "cache" / "weights" / "ViT-B-16-test.safetensors") in str(error.value)


# -- the command ---------------------------------------------------------------------------------


def get(*names: str) -> int:
    return main(["weights", "get", *names])


def test_get(server, hub, row, tmp_path, monkeypatch, capsys):
    """From both kinds of server, the first one interrupted; the second time nothing is fetched."""
    server.data = content(tmp_path, ".bin")
    server.cuts = [3000]
    sha256 = hashlib.sha256(server.data).hexdigest()
    monkeypatch.setitem(PUBLISHED, "ViT-B/16", Published("ViT-B-16.pt", sha256))
    monkeypatch.setattr(Published, "url", property(lambda self: server.url))
    hub.files[f"{REPO}/open_clip_model.safetensors"] = content(tmp_path, ".safetensors")
    for _ in range(2):
        assert get("ViT-B/16", NAME) == 0
        lines = capsys.readouterr().out.splitlines()
        path = tmp_path / "cache" / "weights" / "ViT-B-16.pt"
        assert lines[0].startswith(f"ViT-B/16: {path} (")
        assert lines[0].endswith(f"SHA-256 {sha256}, verified")
        assert lines[1].endswith(f"SHA-256 {sha256_file(on_disk(NAME))}, verified")
    assert server.asked == [None, "bytes=3000-"]
    path.write_bytes(b"damaged")
    assert get("ViT-B/16") == 3
    assert "Delete the file" in capsys.readouterr().err


def test_get_says_that_a_part_is_kept(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(PUBLISHED, "ViT-B/16", Published("ViT-B-16.pt", SHA256))
    monkeypatch.setattr(Published, "url", property(lambda self: server.url))
    server.cuts = [3000, 0]
    assert get("ViT-B/16") == 3
    assert "kept, and the next attempt continues" in capsys.readouterr().err
    server.cuts = [0]
    server.status = 404
    (tmp_path / "cache" / "weights" / "ViT-B-16.pt.part").unlink()
    assert get("ViT-B/16") == 3
    assert "kept" not in capsys.readouterr().err
