"""From a name, a file or a state dict to a CLIP whose weights are what they claim to be.

Nothing here runs code from a checkpoint: OpenAI's TorchScript archives are read as data (their
tensors, never their programs), pickles with `weights_only=True`, safetensors as they are.
"""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfp.cache import cache_dir, sha256_file
from sfp.clip.model import CLIP, build_clip
from sfp.registry import suggest


@dataclass(frozen=True)
class Published:
    """A checkpoint that OpenAI publishes (MIT licence)."""

    file: str
    sha256: str

    @property
    def url(self) -> str:
        """Its address; the folder is named by the hash."""
        return f"https://openaipublic.azureedge.net/clip/models/{self.sha256}/{self.file}"


PUBLISHED = {
    "ViT-B/32": Published(
        "ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
    ),
    "ViT-B/16": Published(
        "ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"
    ),
    "ViT-L/14": Published(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
    ),
    "ViT-L/14@336px": Published(
        "ViT-L-14-336px.pt", "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    ),
}
MINI = "mini"


class WeightsError(RuntimeError):
    """Weights that cannot be had, read or trusted; the message says which and what to do."""


def load_clip(source: str | Path | Mapping[str, Tensor], *, activation: str = "quick_gelu") -> CLIP:
    """A frozen CLIP in float32 on the CPU.

    Args:
        source: a published name ("ViT-B/16", see `PUBLISHED`; found in the cache folder or
            downloaded, and checked against the published SHA-256); "mini", the small model trained
            on drawn scenes that ships with this package; a local `.pt` (TorchScript archive as
            OpenAI ships them, or a state dict) or `.safetensors`; or a state dict. All in OpenAI's
            layout, from which every size is inferred.
        activation: "quick_gelu" (OpenAI) or "gelu"; shapes cannot tell.

    Raises:
        WeightsError: if the weights cannot be found, downloaded, verified or read.
        ValueError: if they are not a ViT CLIP in OpenAI's layout.
    """
    if isinstance(source, Mapping):
        state, digest = dict(source), digest_of(source)
    else:
        path = locate(source)
        state, digest = read_state(path), sha256_file(path)
        expected = PUBLISHED.get(str(source))
        if expected and digest != expected.sha256:
            raise WeightsError(
                f"{path} is not {source}: its SHA-256 is {digest}, published is {expected.sha256}. "
                "Delete the file; it is downloaded again, or put an intact copy there."
            )
    clip = build_clip(
        {
            k: v.float() if v.is_floating_point() and v.dtype != torch.float64 else v
            for k, v in state.items()
        },
        activation,
    )
    clip.digest = digest
    return clip


def locate(source: str | Path) -> Path:
    """The file of a name or path, downloaded if it is a published name without a file.

    Raises:
        WeightsError: if there is none; the message says which file to put where.
    """
    name = str(source)
    if name == MINI:
        from sfp.mini import checkpoint

        return checkpoint()
    if name in PUBLISHED:
        file = PUBLISHED[name].file
        # the second folder is where OpenAI's own package keeps the same files
        for folder in (cache_dir("weights"), Path.home() / ".cache" / "clip"):
            if (folder / file).is_file():
                return folder / file
        return download(name)
    path = Path(source).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"no weights {name!r}: neither a file nor a known name{suggest(name, [*PUBLISHED, MINI])}"
        )
    return path


def download(name: str) -> Path:
    """Fetches a published checkpoint into the cache folder, with a progress bar, and verifies it.

    The file appears under its name only when it is whole and its hash is right.
    """
    published = PUBLISHED[name]
    path = cache_dir("weights", published.file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise WeightsError(
            f"could not download {name}: {error}. Fetch {published.url} on a machine that has a "
            f"network and put it at {path} (SHA-256 {published.sha256}), or give the path of a local "
            "copy instead of the name. Without any weights, configs/cfg_mini.py still runs."
        ) from error
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file, without running anything in it.

    Raises:
        WeightsError: if the file is damaged or of no known layout.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(n.endswith("/constants.pkl") for n in archive.namelist()):
                    return read_torchscript(archive)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise WeightsError(
            f"cannot read weights from {path}: {_first_line(error)}. "
            "Expected a TorchScript archive as OpenAI ships them, a state dict saved by torch.save, "
            "or safetensors; the file may be truncated: fetch it again."
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping from names to tensors)")
    return dict(state)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class _Module:
    """Stands in for every class of a TorchScript archive: attributes and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _TensorsOnly(pickle.Unpickler):
    """Reads a TorchScript archive's `data.pkl`: tensors and bags of attributes, no other global."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        if module == "torch.jit._pickle":  # typed lists of ints and the like
            return lambda data, *rest: data
        raise pickle.UnpicklingError(f"refused to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, _ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
        return torch.storage.TypedStorage(
            wrap_storage=self.storages[key], dtype=kind.dtype, _internal=True
        )


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The parameters and buffers in a TorchScript archive, by dotted name."""
    root = archive.namelist()[0].split("/")[0]
    state: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> None:
        for key, value in vars(node).items():
            if isinstance(value, Tensor):
                state[name + key] = value
            elif isinstance(value, _Module):
                walk(value, f"{name}{key}.")

    walk(_TensorsOnly(archive, root).load(), "")
    return state


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(str(state[name].dtype).encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
