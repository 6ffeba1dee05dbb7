"""Checkpoints: all supported formats, files that are refused, and the lookup of names."""

from __future__ import annotations

import copy
import functools
import http.server
import io
import os
import pickle
import re
import threading
import warnings
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import sfp
from sfp.clip.checkpoints import download, loading
from sfp.clip.checkpoints.loading import (
    PUBLISHED,
    Published,
    digest_of,
    load_clip,
    read_state,
    weights_digest,
)
from sfp.files import sha256_file

SIZE = dict(layers=2, vocab=40, text_layers=1, context=9)


@functools.cache
def weights() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tiny.clip(**SIZE).state_dict().items()}


class Tree(nn.Module):
    """Parameters and buffers under dotted names, as in OpenAI's archives; forward means nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def tree(state: dict[str, Tensor]) -> Tree:
    root = Tree()
    for name, value in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, Tree())
            node = node.get_submodule(part)
        if value.is_floating_point():
            node.register_parameter(last, nn.Parameter(value, requires_grad=False))
        else:
            node.register_buffer(last, value)
    return root


def openai_state() -> dict[str, Tensor]:
    """Half precision, and the three scalars."""
    state = {name: value.half() for name, value in weights().items()}
    sizes = dict(input_resolution=64, context_length=9, vocab_size=40)
    return state | {name: torch.tensor(value) for name, value in sizes.items()}


def save_torchscript(path: Path, how: str, state: dict[str, Tensor] | None = None) -> Path:
    module = tree(state or openai_state()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = (
            torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.ones(1))
        )
        torch.jit.save(scripted, str(path))
    return path


def save(path: Path, form: str) -> Path:
    """The same weights in one of the accepted formats."""
    state = openai_state()
    if form in ("script", "trace"):
        return save_torchscript(path, form)
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "nested":
        torch.save({"state_dict": state, "epoch": 32, "note": "from training"}, path)
    elif form == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    elif form == "parameters":
        torch.save({k: nn.Parameter(v, v.is_floating_point()) if v.is_floating_point() else v
                    for k, v in state.items()}, path)  # fmt: skip
    else:
        torch.save(state, path)
    return path


FORMATS = ["script", "trace", "plain", "nested", "legacy", "parameters", "safetensors"]


# -- formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_formats(tmp_path, form):
    path = save(tmp_path / "clip.pt", form)
    state = read_state(path)
    expected = openai_state()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to worry a user with
        clip = load_clip(path)
    assert clip.digest == sha256_file(path)
    for name, value in clip.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name].float()), name
    assert not clip.training
    assert not any(p.requires_grad for p in clip.parameters())
    image = tiny.images(1)
    assert clip.encode_image(image).isfinite().all()


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_reads_as_torch_jit_does(tmp_path, how):
    """Views, shared storages, other types, empty tensors: whatever an archive can hold."""
    base = torch.randn(6, 8)
    state = {
        "a.weight": base[1:4, ::2],
        "a.turned": base.T,
        "b.c.bias": torch.randn(5).bfloat16(),
        "b.c.d.weight": torch.randn(2, 3, 4).double(),
        "b.flags": torch.tensor([True, False]),
        "b.number": torch.tensor(7),
        "scale": torch.tensor(3.5),
        "nothing": torch.zeros(0, 3),
    }
    path = save_torchscript(tmp_path / "odd.pt", how, state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(path)).state_dict()
    ours = read_state(path)
    assert set(ours) == set(expected) == set(state)
    for name, value in expected.items():
        assert ours[name].dtype == value.dtype
        assert torch.equal(ours[name], value), name


def test_the_file_name_does_not_matter(tmp_path):
    path = save_torchscript(tmp_path / "clip.pt", "trace")
    for name in ("weights.pth", "weights", "ViT B 16 (copy).jit"):
        (tmp_path / name).write_bytes(path.read_bytes())
        assert torch.equal(
            load_clip(tmp_path / name).visual.proj, weights()["visual.proj"].half().float()
        )


def test_a_state_dict_in_memory():
    clip = load_clip(weights())
    for name, value in clip.state_dict().items():
        assert torch.equal(value, weights()[name])
    assert clip.digest == digest_of(weights()) == load_clip(clip.state_dict()).digest
    shuffled = dict(reversed(weights().items()))
    assert load_clip(shuffled).digest == clip.digest
    other = dict(weights(), logit_scale=weights()["logit_scale"] + 1e-6)
    assert load_clip(other).digest != clip.digest


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_model_keeps_its_weights_when_the_file_changes(tmp_path, suffix):
    """A file mapped into memory would take the model with it, in full precision at that."""
    path = tmp_path / f"clip{suffix}"
    if suffix == ".pt":
        torch.save(weights(), path)
    else:
        save_file(weights(), path)
    clip = load_clip(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, value in clip.state_dict().items():
        assert torch.equal(value, weights()[name])


def test_a_model_keeps_its_weights_when_the_state_dict_changes():
    state = {name: value.clone() for name, value in weights().items()}
    clip = load_clip(state)
    for value in state.values():
        value.zero_()
    for name, value in clip.state_dict().items():
        assert torch.equal(value, weights()[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_dicts_of_any_precision(dtype):
    clip = load_clip({name: value.to(dtype) for name, value in weights().items()})
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in clip.parameters()} == {expected}
    assert len(clip.digest) == 64


def test_activation_is_the_callers_to_say(tmp_path):
    path = save(tmp_path / "clip.pt", "plain")
    quick, exact = load_clip(path), load_clip(path, activation="gelu")
    assert not torch.allclose(
        quick.encode_image(tiny.images(1)), exact.encode_image(tiny.images(1))
    )
    assert quick.digest != exact.digest  # or they would share cached text features
    with pytest.raises(ValueError, match="'geluu'; did you mean 'gelu'"):
        load_clip(path, activation="geluu")


def test_sizes_are_read_off_the_shapes():
    clip = load_clip(weights())
    assert clip.context == 9
    assert clip.visual.native_grid == (8, 8)
    assert (len(clip.visual.blocks), len(clip.transformer.resblocks)) == (2, 1)
    one = dict(weights(), logit_scale=weights()["logit_scale"].reshape(1))
    assert load_clip(one).logit_scale.shape == ()


# -- what is no CLIP -----------------------------------------------------------------------------


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    state = dict(weights(), **{k.replace("__", "."): v for k, v in tensors.items()})
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (changed(ln_final__bias=None), "missing ln_final.bias"),
        (changed(visual__conv1__weight=None), "'visual.conv1.weight' is missing"),
        (changed(head__weight=torch.ones(3)), "unexpected head.weight"),
        (
            changed(visual__proj=torch.ones(64, 31)),
            "in 31 dimensions, the text tower in 32",
        ),
        (changed(visual__positional_embedding=torch.ones(64, 64)), "64 rows: expected a square"),
        (changed(visual__layer1__0__conv1__weight=torch.ones(3)), "this is a ResNet CLIP"),
        ({"weight": torch.ones(3)}, "not a CLIP state dict: .*; found 1 tensors: weight; accepted"),
        ({}, "not a CLIP state dict: .*; found 0 tensors: nothing; accepted"),
        (changed(token_embedding__weight=None), "'token_embedding.weight' is missing"),
        (changed(visual__proj=torch.ones(64, 32, dtype=torch.int8)), "torch.int8, not of floats"),
    ],
)
def test_wrong_layouts_say_what_is_wrong(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        load_clip(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(sfp.WeightsError, match=re.escape(str(tmp_path / "clip.pt"))):
        load_clip(tmp_path / "clip.pt")


def test_many_problems_are_not_all_listed():
    state = {k: v for k, v in weights().items() if "resblocks.1" not in k or "ln_1" in k}
    with pytest.raises(ValueError, match=r"missing visual.*; missing .* and \d+ more"):
        load_clip(state)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, "text", torch.ones(3), {"state_dict": {"a": "b"}}, {1: torch.ones(1)}],
    ids=str,
)
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises((sfp.WeightsError, ValueError), match="state dict"):
        load_clip(tmp_path / "other.pt")


def test_a_training_checkpoint_in_memory():
    """People pass what `torch.load` gave them."""
    clip = load_clip({"state_dict": weights(), "epoch": 3})
    assert torch.equal(clip.visual.proj, weights()["visual.proj"])
    with pytest.raises(ValueError, match="state dict"):
        load_clip({"visual.proj": "text"})


@pytest.mark.parametrize("name", ["nowhere.pt", "ViT-B/61", "", "some/clip.pt"])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sfp.WeightsError, match="neither a file nor a known name") as error:
        load_clip(name)
    assert repr(name) in str(error.value)
    assert (
        f"ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, mini, and {len(PUBLISHED) - 5} more"
        in str(error.value)
    )
    if name == "ViT-B/61":
        assert "did you mean 'ViT-B/16'" in str(error.value)


# -- damage and malice ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["trace", "plain", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.7, 0.999])
def test_truncated_files(tmp_path, form, share):
    path = save(tmp_path / "clip.pt", form)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(sfp.WeightsError, match="cannot read weights from") as error:
        load_clip(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ""])
@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"x", b"<html>404</html>", bytes(1000), b"\x80\x02}q\x00.", b"\x80\x04N.",
     b"PK\x03\x04xxx", b"PK\x03\x04" + bytes(99)],
)  # fmt: skip
def test_garbage(tmp_path, suffix, content):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    with pytest.raises(sfp.WeightsError, match=re.escape(str(path))):
        load_clip(path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["trace", "plain", "legacy", "safetensors"])
def test_flipped_bits_are_an_error_or_another_number(tmp_path, form):
    """No damage may end in an exception that a caller does not expect."""
    path = save(tmp_path / "clip.pt", form)
    data = path.read_bytes()
    if form == "trace":  # the parts that say what is where, not the numbers
        with zipfile.ZipFile(path) as archive:
            entry = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
        span = range(entry.header_offset, entry.header_offset + entry.file_size + 60)
    else:
        span = range(min(3000, len(data)))
    failed = 0
    for place in span[:: max(len(span) // 120, 1)]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            load_clip(path)
        except (sfp.WeightsError, ValueError):
            failed += 1
    assert failed > 5


class Attack:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def archive_with(path: Path, data: bytes) -> Path:
    """A zip that looks like OpenAI's, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", data)
        archive.writestr("model/constants.pkl", pickle.dumps(()))
        archive.writestr("model/version", "3")
    return path


def test_the_attack_works_on_a_careless_reader(tmp_path):
    pickle.loads(pickle.dumps(Attack(tmp_path / "broken")))
    assert (tmp_path / "broken").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("form", ["plain", "nested", "legacy", "raw", "archive", "suffix"])
def test_pickles_run_nothing(tmp_path, form, protocol):
    target, path = tmp_path / "broken", tmp_path / "clip.pt"
    content = dict(weights(), extra=Attack(target))
    if form == "raw":
        path.write_bytes(pickle.dumps(content, protocol))
    elif form == "archive":
        archive_with(path, pickle.dumps(Attack(target), protocol))
    elif form == "suffix":
        path = tmp_path / "clip.safetensors"
        torch.save(content, path, pickle_protocol=protocol)
    elif form == "nested":
        torch.save({"state_dict": content}, path, pickle_protocol=protocol)
    else:
        torch.save(
            content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=form == "plain"
        )
    with pytest.raises(sfp.WeightsError) as error:
        load_clip(path)
    assert str(path) in str(error.value)
    assert not target.exists()


def test_why_a_file_is_no_checkpoint(tmp_path):
    """The reason, without PyTorch's advice to run what is in the file."""
    path = tmp_path / "clip.pt"

    def reason() -> str:
        with pytest.raises(sfp.WeightsError, match="cannot read weights from") as error:
            load_clip(path)
        assert "weights_only" not in str(error.value)
        return str(error.value)

    path.write_bytes(b"\xff\xd8\xff\xe0 a photo")
    assert r"or pickle: it begins with b'\xff\xd8\xff\xe0 a p'" in reason()
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)
    assert "it holds a torch.nn.modules.linear.Linear besides tensors" in reason()
    path.write_bytes(b"\x80\x02garbage")
    assert "a pickle that torch.save did not write" in reason()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "posix system",
        "builtins eval",
        "builtins getattr",
        "torch load",
        "torch.hub load",
        "torch._utils _rebuild_tensor",
        "torch.storage _load_from_bytes",
        "collections defaultdict",
        "functools partial",
        "torch.jit._pickle_ build_intlist",
    ],
)
def test_archives_may_name_tensors_only(tmp_path, name):
    data = b"c" + name.replace(" ", "\n").encode() + b"\n(S'touch broken'\ntR."
    path = archive_with(tmp_path / "clip.pt", data)
    with pytest.raises(sfp.WeightsError, match=r"refused to load " + name.replace(" ", r"\.")):
        load_clip(path)


@pytest.mark.parametrize(
    "data",
    [
        b"c__torch__.os\nsystem\n(S'true'\ntR.",  # a class of the archive, called with arguments
        b"ctorch\nHalfStorage\n(S'7'\ntR.",
        b"ctorch\nNoSuchStorage\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
        b"ccollections\nOrderedDict\n.",
        b"c__torch__\nTree\n)\x81I3\nb.",
        b"N.",
        b"]\x94.",
        b"(I1\nI2\nd",
        b"0",
        b"",
        b"(S'storage'\nI3\nS'0'\nS'cpu'\nI4\ntQ.",
        b"I5\nQ.",
        b"c__torch__\nTree\n)\x81}S'a'\nctorch._utils\n_rebuild_tensor_v2\n((S'storage'\n"
        b"ctorch\nFloatStorage\nS'0'\nS'cpu'\nI9\ntQI0\n(I3\nt(I1\ntI00\nNtRsb.",  # data/0 is missing
    ],
)
def test_archives_that_make_no_sense(tmp_path, data):
    path = archive_with(tmp_path / "clip.pt", data)
    with pytest.raises((sfp.WeightsError, ValueError)) as error:
        load_clip(path)
    if isinstance(error.value, sfp.WeightsError):
        assert str(path) in str(error.value)


def test_tensors_cannot_reach_beyond_their_data(tmp_path):
    """Sizes and strides that point outside of a storage are memory of somebody else."""
    path = save_torchscript(tmp_path / "clip.pt", "trace", {"a": torch.arange(6.0)})
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (key,) = (name for name in parts if "/data/" in name)
    parts[key] = parts[key][:8]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(sfp.WeightsError, match="cannot read"):
        read_state(path)


def test_an_archive_changes_nothing_in_this_process(tmp_path):
    """Setting attributes of what it may name must not outlive it."""
    data = b"ctorch\nHalfStorage\n(N}S'dtype'\nI3\nstb."
    path = archive_with(tmp_path / "clip.pt", data)
    with pytest.raises((sfp.WeightsError, ValueError)):
        load_clip(path)
    assert torch.HalfStorage.dtype == torch.float16
    load_clip(save_torchscript(tmp_path / "good.pt", "trace"))


# -- published names -----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Neither the user's caches nor the network: an empty home, and a cache folder inside it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SFP_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def published(tmp_path_factory, monkeypatch) -> Path:
    """A file that stands for ViT-B/16's, published with its own hash."""
    path = save_torchscript(tmp_path_factory.mktemp("published") / "ViT-B-16.pt", "trace")
    monkeypatch.setitem(PUBLISHED, "ViT-B/16", Published(path.name, sha256_file(path)))
    return path


@pytest.fixture
def server(published, monkeypatch):
    """Serves the folder of `published` in place of OpenAI's address; lists what was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(published.parent))

        def log_message(self, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{httpd.server_port}"
        monkeypatch.setattr(Published, "url", property(lambda self: f"{address}/{self.file}"))
        yield asked
        httpd.shutdown()
        thread.join()


def never(*args, **kwargs):
    raise AssertionError("nothing should be downloaded")


@pytest.mark.parametrize("folder", ["cache/weights", ".cache/clip"])
def test_a_published_file_is_found(home, published, monkeypatch, folder):
    monkeypatch.setattr(loading, "download", never)
    (home / folder).mkdir(parents=True)
    (home / folder / "ViT-B-16.pt").write_bytes(published.read_bytes())
    clip = load_clip("ViT-B/16")
    assert torch.equal(clip.visual.proj, openai_state()["visual.proj"].float())
    assert clip.digest == PUBLISHED["ViT-B/16"].sha256


@pytest.mark.parametrize("content", ["other", "cut", "garbage"])
def test_a_file_with_the_wrong_hash(home, published, content):
    """The hash is looked at first: nothing is read from a file that is not what it should be."""
    path = home / "cache" / "weights" / "ViT-B-16.pt"
    path.parent.mkdir(parents=True)
    if content == "other":
        save(path, "plain")
    else:
        path.write_bytes(published.read_bytes()[:5000] if content == "cut" else b"garbage")
    with pytest.raises(sfp.WeightsError, match="is not ViT-B/16") as error:
        load_clip("ViT-B/16")
    for part in (str(path), sha256_file(path), PUBLISHED["ViT-B/16"].sha256, "Delete the file"):
        assert part in str(error.value)


def test_download(home, published, server, capfd):
    clip = load_clip("ViT-B/16")
    assert torch.equal(clip.visual.proj, openai_state()["visual.proj"].float())
    path = home / "cache" / "weights" / "ViT-B-16.pt"
    assert path.read_bytes() == published.read_bytes()
    assert list(path.parent.iterdir()) == [path]
    assert "100" in capfd.readouterr().err  # per cent
    load_clip("ViT-B/16")
    assert server == ["/ViT-B-16.pt"]  # once


def test_a_download_with_the_wrong_hash_leaves_nothing(home, published, server, capfd):
    expected = PUBLISHED["ViT-B/16"].sha256
    published.write_bytes(b"something else")
    with pytest.raises(sfp.WeightsError, match="could not download ViT-B/16") as error:
        load_clip("ViT-B/16")
    assert expected in str(error.value)
    assert sha256_file(published) in str(error.value)
    assert list((home / "cache" / "weights").iterdir()) == []


@pytest.fixture
def second_source(tmp_path, monkeypatch):
    """A copy in the Hub's cache, which nothing has fetched yet; OpenAI's server cannot be reached."""
    row = Published("ViT-B-16.pt", 64 * "0", "timm/some.openai", activation="quick_gelu")
    monkeypatch.setitem(PUBLISHED, "ViT-B/16", row)
    monkeypatch.setattr(Published, "url", property(lambda self: "http://127.0.0.1:9/ViT-B-16.pt"))
    path = tmp_path / "models--timm--some.openai" / "open_clip_model.safetensors"
    path.parent.mkdir()
    save_file({k: v.contiguous() for k, v in weights().items()}, path)
    return path


def test_the_hub_where_openai_cannot_be_reached(home, second_source, monkeypatch):
    monkeypatch.setattr(download, "from_hub", lambda repo: second_source)
    expected = PUBLISHED["ViT-B/16"].sha256
    assert weights_digest("ViT-B/16") == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the table knows the activation
        clip = load_clip("ViT-B/16")
        assert load_clip(second_source).digest == clip.digest
    assert clip.digest == sha256_file(second_source) != expected
    monkeypatch.setattr(download, "on_hub", lambda repo: second_source)
    assert weights_digest("ViT-B/16") == clip.digest  # of what would be loaded now


def test_neither_source_can_be_reached(home, second_source, monkeypatch):
    def fail(repo):
        raise OSError("the Hub is out of reach")

    monkeypatch.setattr(download, "from_hub", fail)
    with pytest.raises(sfp.WeightsError, match=r"refused.*; the Hub is out of reach") as error:
        load_clip("ViT-B/16")
    check_advice(error, home)
    assert "huggingface.co/timm/some.openai" in str(error.value)
    by_hand = home / "cache" / "weights" / "ViT-B-16.safetensors"
    by_hand.write_bytes(second_source.read_bytes())
    assert load_clip("ViT-B/16").digest == sha256_file(second_source)


def check_advice(error: pytest.ExceptionInfo, home: Path) -> None:
    """Which file to put where, and what works without."""
    for part in (
        "could not download ViT-B/16",
        PUBLISHED["ViT-B/16"].url,
        str(home / "cache" / "weights" / "ViT-B-16.pt"),
        PUBLISHED["ViT-B/16"].sha256,
        "weights 'mini'",
    ):
        assert part in str(error.value)


def test_no_network(home, published, monkeypatch):
    address = "http://127.0.0.1:9/ViT-B-16.pt"  # nobody listens at the discard port
    monkeypatch.setattr(Published, "url", property(lambda self: address))
    with pytest.raises(sfp.WeightsError) as error:
        load_clip("ViT-B/16")
    check_advice(error, home)
    assert not any((home / "cache" / "weights").iterdir())


def test_the_server_has_no_such_file(home, published, server):
    published.unlink()
    with pytest.raises(sfp.WeightsError, match="404") as error:
        load_clip("ViT-B/16")
    check_advice(error, home)


def test_a_connection_that_breaks_off(home, published, server, monkeypatch, capfd):
    send = http.server.SimpleHTTPRequestHandler.copyfile
    broken = lambda self, source, target: send(self, io.BytesIO(source.read(2000)), target)  # noqa: E731
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", broken)
    with pytest.raises(sfp.WeightsError, match="next attempt continues") as error:
        load_clip("ViT-B/16")
    check_advice(error, home)
    assert [p.name for p in (home / "cache" / "weights").iterdir()] == ["ViT-B-16.pt.part"]
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "copyfile", send)
    assert load_clip("ViT-B/16").digest == PUBLISHED["ViT-B/16"].sha256


def test_a_cache_folder_that_cannot_be(home, published, monkeypatch):
    (home / "cache").write_text("a file")
    with pytest.raises(sfp.WeightsError) as error:
        load_clip("ViT-B/16")
    check_advice(error, home)


def test_published_addresses():
    for name, sha in {
        "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    }.items():
        file = name.replace("/", "-").replace("@", "-") + ".pt"
        assert (PUBLISHED[name].file, PUBLISHED[name].sha256) == (file, sha)
        assert re.fullmatch(r"timm/vit_.*\.openai", PUBLISHED[name].repo)
        assert PUBLISHED[name].url == f"https://openaipublic.azureedge.net/clip/models/{sha}/{file}"


def test_mini_is_a_name():
    clip = load_clip("mini")
    assert clip.visual.native_grid == (14, 14)
    assert clip.token_embedding.num_embeddings == 49408


# -- the model itself ----------------------------------------------------------------------------


def test_encode_text_refuses_what_it_cannot_read():
    clip = load_clip(weights())
    for shape in [(3,), (2, 10), (1, 2, 3)]:
        with pytest.raises(ValueError, match=r"shape \(B, <= 9\), got"):
            clip.encode_text(torch.ones(shape, dtype=torch.long))


def test_towers_against_torchs_own_modules():
    """`nn.MultiheadAttention` and friends, with the same weights."""
    clip = copy.deepcopy(tiny.clip()).double()
    image = tiny.images(2).double()
    visual = clip.visual
    maps = visual.conv1(image).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), maps], 1)
    x = visual.ln_pre(x + visual.positional_embedding)
    for block in visual.blocks:
        attention = nn.MultiheadAttention(64, 1, batch_first=True).double()
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        x = x + attention(y, y, y, need_weights=False)[0]
        y = block.mlp.c_fc(block.ln_2(x))
        x = x + block.mlp.c_proj(y * torch.sigmoid(1.702 * y))
    expected = visual.ln_post(x[:, 0]) @ visual.proj
    torch.testing.assert_close(clip.encode_image(image), expected)
