"""From a name, a file or a state dict to a CLIP whose weights are what they claim to be.

Nothing here runs code from a checkpoint: PyTorch's archives, TorchScript among them, are read as data
(`sfp/clip/archive.py`), safetensors are nothing else, and what `torch.save` wrote before 2020 goes
through PyTorch's `weights_only` reader.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfp.cache import cache_dir, sha256_file
from sfp.clip.archive import read_archive
from sfp.clip.model import CLIP, build_clip
from sfp.clip.vit import ACTIVATIONS
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
        inner: Any = source.get("state_dict")
        if isinstance(inner, Mapping):  # a training checkpoint
            source = inner
        if not all(isinstance(value, Tensor) for value in source.values()):
            raise ValueError("not a state dict: a mapping from names to tensors is expected")
        origin, state, digest = "the state dict", dict(source), digest_of(source)
    else:
        path = locate(source)
        origin, digest = str(path), _digest(path)
        expected = PUBLISHED.get(str(source))
        if expected and digest != expected.sha256:  # before anything looks inside
            raise WeightsError(
                f"{path} is not {source}: its SHA-256 is {digest}, published is {expected.sha256}. "
                "Delete the file; it is downloaded again, or put an intact copy there."
            )
        state = read_state(path)
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}{suggest(activation, ACTIVATIONS)}")
    try:
        clip = build_clip(
            {name: _own(value) for name, value in state.items()},
            activation,
        )
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    _check_numbers(clip, origin)
    if activation != "quick_gelu":  # other features from the same weights
        digest = hashlib.sha256(f"{digest} {activation}".encode()).hexdigest()
    clip.digest = digest
    return clip


def _own(value: Tensor) -> Tensor:
    """A copy, in float32 if it is of lower precision.

    A copy even where nothing is to be converted: safetensors maps the file into memory, and a file
    that is written anew while the model runs would change its weights or end the process.
    """
    lower = value.is_floating_point() and value.dtype != torch.float64
    return value.to(torch.float32 if lower else value.dtype, copy=True)


def _digest(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise WeightsError(f"cannot read weights from {path}: {error}") from error


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
    except (OSError, http.client.HTTPException, RuntimeError) as error:  # RuntimeError: wrong hash
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
        with path.open("rb") as file:
            return read_archive(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except (
        OSError,
        ValueError,  # ArchiveError among them
        EOFError,
        RuntimeError,  # zipfile's, for features of the format that it lacks
        struct.error,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise WeightsError(
            f"cannot read weights from {path}: {_first_line(error)}. Expected safetensors, a "
            "TorchScript archive as OpenAI ships them, or a state dict saved by torch.save; the file "
            "may be truncated: fetch it again."
        ) from error


def _read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save` from before PyTorch 1.6, by PyTorch's restricted reader.

    Raises:
        ValueError: if it holds none, or PyTorch's reader is one that could be tricked.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise ValueError(
            "neither safetensors nor a zip file, which alone PyTorch < 2.6 reads safely"
        )
    file.seek(0)
    try:
        # from memory: a file would hand out as many bytes as an instruction asks for
        state = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    except Exception as error:  # its reader checks little and stumbles in every way there is
        raise ValueError(_first_line(error)) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("no state dict: a mapping from names to tensors")
    if sum(v.numel() * v.element_size() for v in state.values()) > file.seek(0, 2):
        raise ValueError("tensors larger than the file that should hold them")
    return {str(name): value for name, value in state.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_numbers(clip: CLIP, origin: str) -> None:
    """Raises `WeightsError` if a value of a parameter is NaN or infinite."""
    for name, weight in clip.named_parameters():
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise WeightsError(
                f"{origin}: {name} has {bad} NaN or infinite of {weight.numel()} values; the file is "
                "damaged or its training diverged: fetch it again or use other weights"
            )


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(str(state[name].dtype).encode())
        flat = state[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # NumPy knows no bfloat16
    return digest.hexdigest()
