"""Loads a CLIP from a name, a file or a state dict, and verifies its weights.

No code from a checkpoint is run: PyTorch's archives, including TorchScript, are read as data
(`archive.py`), safetensors contain only data, and files that `torch.save` wrote before 2020 are read by
PyTorch's `weights_only` reader.
"""

from __future__ import annotations

import difflib
import hashlib
import http.client
import io
import os
import pickle
import re
import struct
import urllib.error
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfp.clip.blocks import ACTIVATIONS
from sfp.clip.checkpoints.archive import read_archive
from sfp.clip.checkpoints.layouts import ACCEPTED, Recognised, lacks_texts, recognise, text_part
from sfp.clip.checkpoints.metadata import WRONG, Facts, facts, settled_facts, unusable
from sfp.clip.checkpoints.published import (
    ARCHITECTURES,
    HUB_FILES,
    NONE,
    PUBLISHED,
    SETTINGS,
    WEIGHT_FILES,
    LayoutError,
    Published,
    WeightsError,
    on_disk,
    row_of,
)
from sfp.clip.checkpoints.sources import (
    COMPANIONS,
    configuration,
    is_index,
    main_file,
    parts,
    repository,
    weight_map,
)
from sfp.clip.model import CLIP, build_clip, no_clip
from sfp.clip.text_towers import BertConfig, TextConfig
from sfp.clip.tokenizers import FILES, FileTokenizer, MissingTokenizer, Tokenizer, beside
from sfp.clip.vit import ImageConfig
from sfp.files import cache_dir, sha256_file
from sfp.registry import suggest

TEXTS = "text"  # folder beside weights without a text tower, with the model that has it


def load_clip(
    source: str | Path | Mapping[str, Tensor],
    *,
    activation: str | None = None,
    head_width: int | None = None,
    text_head_width: int | None = None,
    tokenizer: str | Path | None = None,
    texts: str | Path | Mapping[str, Tensor] | None = None,
) -> CLIP:
    """A frozen image-text model in float32 on the CPU.

    Args:
        source: a published name ("ViT-B/16", "tipsv2-l14", see `PUBLISHED`; found on disk or
            downloaded, and verified); "mini", the small model trained on drawn scenes that ships with
            this package; "none", for methods that use another model; a local file (TorchScript
            archive, `torch.save` or safetensors), a folder, or the index of a model in several files;
            a repository on the Hugging Face Hub ("org/name"); or a state dict. The layouts of OpenAI,
            open_clip and transformers are recognised by their names of tensors. "path@gelu" is short
            for `activation="gelu"`.
        activation: "quick_gelu" or "gelu", which a state dict does not contain. By default it is taken
            from the table of published weights, from a configuration file beside the checkpoint
            (`open_clip_config.json`, transformers' `config.json`), or from its name if that contains
            "quickgelu"; otherwise it is guessed with a warning: GELU for weights that can only be
            open_clip's, else QuickGELU.
        head_width: width of the image tower's attention heads; by default 80, 88 and 104 in ViT-H,
            ViT-g and ViT-bigG, else 64, unless a configuration file states another.
        text_head_width: width of the text tower's attention heads.
        tokenizer: vocabulary file of a model that does not use OpenAI's; by default the one beside the
            weights or in the Hub's cache. Without one the model loads, but cannot encode texts.
        texts: for image towers that project into another model's space (C-RADIO): that model, as
            `source`, whose text tower is used; by default that of the table, or the folder text/
            beside the weights.

    Raises:
        WeightsError: if the weights cannot be found, downloaded, verified or read.
        LayoutError: if they are not a ViT with texts in a known layout; a `WeightsError` and
            `ValueError`.
        ValueError: for an unknown activation.
    """
    if isinstance(source, str) and source == NONE:
        return no_clip()
    checkpoint = open_weights(
        source,
        activation=activation,
        head_width=head_width,
        text_head_width=text_head_width,
        tokenizer=tokenizer,
        texts=texts,
    )
    if not checkpoint.facts.certain:
        warnings.warn(
            f"{checkpoint.origin}: it is not recorded which activation these weights were trained "
            f"with; using {checkpoint.facts.activation}, {checkpoint.facts.because}. The wrong one "
            "silently costs accuracy: pass activation=, or append @gelu or @quick_gelu to the path",
            stacklevel=2,
        )
    return checkpoint.build()


@dataclass(frozen=True)
class Checkpoint:
    """Weights that were read and recognised.

    Attributes:
        origin: description for messages, a path or "the state dict".
        path: path of the file, if there is one.
        sha256: hash of the file, or of the names and values of a state dict.
        verified: whether the hash is the one stated by the publisher.
        layout: name of the layout, from `sfp.clip.checkpoints.layouts`.
        state: tensors under the names of `CLIP`, as stored.
        image, text: sizes and switches of the towers.
        facts: properties that the state does not contain.
        settled: whether the activations in `image` and `text` come from the layout or a configuration
            instead of `facts`.
        tokenizer: tokenizer of a text tower that does not use OpenAI's.
        row: row of the table, for weights given by name.
        texts: origin of the text tower, if it comes from other weights.
    """

    origin: str
    path: Path | None
    sha256: str
    verified: bool
    layout: str
    state: dict[str, Tensor]
    image: ImageConfig
    text: TextConfig | BertConfig
    facts: Facts
    settled: bool = False
    tokenizer: Tokenizer | None = None
    row: Published | None = None
    texts: str | None = None

    @property
    def digest(self) -> str:
        """Identifies what the model computes: the hash, and everything else that changes features."""
        if not self.settled and self.tokenizer is None:
            return _digest(self.sha256, self.facts)
        read_by = self.tokenizer.digest if self.tokenizer else ""
        words = [self.sha256, repr(self.image), repr(self.text), read_by]
        return hashlib.sha256(" ".join(words).encode()).hexdigest()

    def build(self) -> CLIP:
        """The model, in float32.

        Raises:
            LayoutError: if names or shapes are not those of a CLIP, or not those of the row.
            WeightsError: if a value is NaN or infinite.
        """
        try:
            clip = build_clip(
                {name: _own(value) for name, value in self.state.items()}, self.image, self.text
            )
        except LayoutError as error:
            raise LayoutError(
                f"{self.origin}: {error}; read as the layout of {self.layout}; {ACCEPTED}"
            ) from None
        if self.tokenizer is not None:
            clip.text.tokenizer = self.tokenizer
        _check_sizes(self)
        _check_numbers(clip, self.origin)
        clip.digest = self.digest
        return clip


def open_weights(
    source: str | Path | Mapping[str, Tensor],
    *,
    activation: str | None = None,
    head_width: int | None = None,
    text_head_width: int | None = None,
    tokenizer: str | Path | None = None,
    texts: str | Path | Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Finds, verifies, reads and recognises weights; arguments and errors as in `load_clip`."""
    if not isinstance(source, Mapping):
        source, suffix = split_activation(source)
        activation = activation or suffix
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}{suggest(activation, ACTIVATIONS)}")
    file = _open(source)
    path, row, reads = file.path, file.row, file
    if lacks_texts(file.state):
        texts = _whose_texts(file, texts)
    elif texts is not None and text_part(file.state):
        raise LayoutError(f"{file.origin} has its own text tower: omit texts=")
    if texts is not None:
        reads = _open(texts)
        file = _joined(file, reads)
    recognised = _recognise(file)
    image, text, known = _settle(recognised, path, row, activation, head_width, text_head_width)
    return Checkpoint(
        file.origin,
        path,
        file.sha256,
        file.verified,
        recognised.layout,
        recognised.state,
        image,
        text,
        known,
        recognised.settled,
        find_tokenizer(text, tokenizer, reads.path, reads.row) if text.rules else None,
        row,
        None if texts is None else reads.origin,
    )


@dataclass(frozen=True)
class _Opened:
    """Weights that were read, with the attributes of `Checkpoint`, and configurations beside them."""

    origin: str
    path: Path | None
    row: Published | None
    sha256: str
    verified: bool
    state: dict[str, Tensor]
    config: dict[str, Any]
    words: dict[str, Any] | None = None  # configuration of the text tower, if it is another model's


def _open(source: str | Path | Mapping[str, Tensor]) -> _Opened:
    if isinstance(source, Mapping):
        inner: Any = source.get("state_dict")
        if isinstance(inner, Mapping):  # a training checkpoint
            source = inner
        if not all(isinstance(value, Tensor) for value in source.values()):
            raise LayoutError("not a state dict: expected a mapping from names to tensors")
        return _Opened(
            "the state dict", None, None, digest_of(source), False, dict(source), config={}
        )
    path = locate(source)
    sha256, verified = verify(str(source), path)  # before the file is parsed
    row, config = PUBLISHED.get(str(source)), configuration(path)
    if known := row or row_of(path):
        config = SETTINGS.get(str(known.architecture), {}) | config
    return _Opened(str(path), path, row, sha256, verified, read_state(path), config)


def _whose_texts(
    file: _Opened, given: str | Path | Mapping[str, Tensor] | None
) -> str | Path | Mapping[str, Tensor] | None:
    """The source of the text tower for a model without one: the given one, a folder, or the table."""
    row = file.row or (row_of(file.path) if file.path else None)
    beside = file.path.parent / TEXTS if file.path else None
    if given is None and beside and beside.is_dir():
        return beside
    return given if given is not None or row is None else row.texts


def _joined(file: _Opened, texts: _Opened) -> _Opened:
    """An image tower with another model's text tower."""
    sha256 = hashlib.sha256(f"{file.sha256} {texts.sha256}".encode()).hexdigest()
    return replace(
        file,
        sha256=sha256,
        verified=file.verified and texts.verified,
        state=file.state | text_part(texts.state),
        words=texts.config,
    )


def _recognise(file: _Opened) -> Recognised:
    try:
        return recognise(file.state, file.config, file.words)
    except LayoutError as error:
        raise LayoutError(f"{file.origin}: {error}; {ACCEPTED}") from None
    except WRONG as error:
        if not file.path or not file.config:
            raise
        raise unusable(file.path, error) from error


def _settle(
    recognised: Recognised,
    path: Path | None,
    row: Published | None,
    activation: str | None,
    head_width: int | None,
    text_head_width: int | None,
) -> tuple[ImageConfig, TextConfig | BertConfig, Facts]:
    """The towers' configurations and known facts, from the caller, the layout, the table and files."""
    if recognised.settled:
        known = settled_facts(path, recognised.image, row)
    else:
        known = facts(path, recognised.layout, row)
    if activation is not None:
        known = replace(known, activation=activation, because="the caller", certain=True)
    known = replace(
        known,
        head_width=head_width or known.head_width,
        text_head_width=text_head_width or known.text_head_width,
    )
    image = replace(
        recognised.image,
        activation=known.activation,
        head_width=known.head_width or recognised.image.head_width,
        mean=known.mean,
        std=known.std,
    )
    text = recognised.text
    if not recognised.text_settled:
        text = replace(text, activation=known.activation)
    return image, replace(text, head_width=known.text_head_width or text.head_width), known


def find_tokenizer(
    text: TextConfig | BertConfig,
    given: str | Path | None,
    path: Path | None,
    row: Published | None,
) -> Tokenizer:
    """The tokenizer of a text tower that does not use OpenAI's, or one that says what is missing.

    Args:
        text: configuration of the tower.
        given: vocabulary file from the caller.
        path: path of the weights, beside which the file may be.
        row: row of the table, with the file's repository; it is looked up in the Hub's cache.

    Raises:
        WeightsError: if the given file cannot be read.
    """
    assert text.rules is not None
    if given is not None:
        if not os.path.isfile(given):
            raise WeightsError(f"no tokenizer {str(given)!r}: expected a file ({', '.join(FILES)})")
        return FileTokenizer(text.rules, text.context, Path(given))
    repo = (row.tokenizer or row.repo) if row else None
    if path is not None and (found := beside(path.parent)):
        return FileTokenizer(text.rules, text.context, found)
    from sfp.clip.checkpoints.download import on_hub

    if repo and (found := on_hub(repo, FILES)):
        return FileTokenizer(text.rules, text.context, found)
    where = f" of huggingface.co/{repo}" if repo else " that was published with them"
    put = f"put {FILES[0]} (or {', '.join(FILES[1:])}){where} into {path.parent}" if path else ""
    get = "`sfp weights get` fetches it with the weights; or " if row else ""
    return MissingTokenizer(
        f"no tokenizer for the texts of {path or 'a state dict'}: {get}{put}"
        f"{', or ' if put else ''}give the file, load_clip(..., tokenizer=FILE)"
    )


def weights_digest(source: str | Path) -> str | None:
    """The digest that `load_clip(source)` would have, or None if the weights are not on this machine.

    Raises:
        WeightsError, ValueError: as in `load_clip`.
    """
    if source == NONE:
        return NONE
    bare, suffix = split_activation(source)
    row = PUBLISHED.get(str(bare))
    path = None if row is None else on_disk(str(bare))
    if row is not None and row.sha256 and (path is None or path.name == row.file):
        known = facts(None, "", row)
        return _digest(row.sha256, replace(known, activation=suffix or known.activation))
    if row is not None and (path is None or (row.texts and on_disk(row.texts) is None)):
        return None
    return open_weights(source).digest


def split_activation(source: str | Path) -> tuple[str | Path, str | None]:
    """A source without the activation after its last "@", and that activation or None."""
    bare, at, suffix = str(source).rpartition("@")
    if at and suffix in ACTIVATIONS and not os.path.isfile(os.path.expanduser(source)):
        return bare, suffix
    return source, None


def _digest(sha256: str, known: Facts) -> str:
    words = [] if known.activation == "quick_gelu" else [known.activation]
    if known.head_width or known.text_head_width:
        words.append(f"heads {known.head_width} {known.text_head_width}")
    if not words:
        return sha256
    return hashlib.sha256(" ".join([sha256, *words]).encode()).hexdigest()


def _own(value: Tensor) -> Tensor:
    """A copy, in float32 if it is of lower precision.

    It is copied even without a conversion: safetensors maps the file into memory, and overwriting the
    file while the model runs would change its weights or crash the process.
    """
    lower = value.is_floating_point() and value.dtype != torch.float64
    return value.to(torch.float32 if lower else value.dtype, copy=True).contiguous()


def verify(name: str, path: Path) -> tuple[str, bool]:
    """The SHA-256 of weights, and whether it could be compared with a stated one.

    For a model in several files, it is the hash of all their names and hashes.

    Raises:
        WeightsError: if a file is not what is published under `name`, or cannot be read.
    """
    row = PUBLISHED.get(name)
    found, stated = {}, True
    for part in parts(path):
        try:
            found[part.name] = sha256_file(part)
        except OSError as error:
            raise WeightsError(f"cannot read weights from {part}: {error}") from error
        expected = _stated(row, part)
        if expected and found[part.name] != expected:
            raise WeightsError(
                f"{part} is not {name}: its SHA-256 is {found[part.name]}, the published one is "
                f"{expected}. Delete the file to download it again, or put an intact copy there."
            )
        stated = stated and expected is not None
    if not is_index(path):
        return found[path.name], stated
    digest = hashlib.sha256()
    for file in (path.name, *found):
        digest.update(f"{file} {found.get(file) or sha256_file(path)}\n".encode())
    return digest.hexdigest(), stated


def complete(row: Published) -> None:
    """Fetches the other files of a row: configuration and tokenizer."""
    from sfp.clip.checkpoints.download import companions

    if row.repo and (row.tokenizer or not row.activation):
        companions(row.repo, COMPANIONS)
    if row.tokenizer:
        companions(row.tokenizer, FILES)


def _stated(row: Published | None, path: Path) -> str | None:
    """The hash stated for a file of this row by its publisher or the Hub's cache, or None."""
    if row is None or row.shipped:
        return None
    if row.sha256 and path.name == row.file:
        return row.sha256
    from sfp.clip.checkpoints.download import stated_hash

    return stated_hash(path)


def locate(source: str | Path) -> Path:
    """The file of a source; published names and Hub repositories are downloaded if necessary.

    Raises:
        WeightsError: if there is none; the message says which file to put where.
    """
    source, _ = split_activation(source)
    name = str(source)
    if name in PUBLISHED:
        return on_disk(name) or download(name)
    path = Path(os.path.expanduser(source))
    if name and os.path.exists(path):
        return main_file(path)
    if isinstance(source, str) and (repo := repository(source)):
        return _from_repository(repo)
    raise WeightsError(f"no weights {name!r}: neither a file nor a known name{known_names(name)}")


def _is_whole(path: Path) -> bool:
    try:
        return bool(parts(path))
    except WeightsError:  # missing shards
        return False


def _from_repository(repo: str) -> Path:
    from sfp.clip.checkpoints.download import companions, from_hub, on_hub

    if (path := on_hub(repo, WEIGHT_FILES)) and _is_whole(path):
        return path
    try:
        path = from_hub(repo, WEIGHT_FILES)
    except (OSError, ImportError) as error:
        raise WeightsError(
            f"no weights {repo!r}: there is no such file or folder, it is not a known name, and the "
            f"Hugging Face Hub did not provide it: {error}{known_names(repo)}. Without a network, "
            f"download https://huggingface.co/{repo} elsewhere and give its folder"
        ) from error
    companions(repo, (*COMPANIONS, *FILES))
    return path


def known_names(name: str) -> str:
    """The end of an error message: the closest name, and some of the valid ones."""
    close = difflib.get_close_matches(name, PUBLISHED, n=1)
    short = [n for n, row in PUBLISHED.items() if row.sha256 or row.shipped]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return (
        f"; {hint}valid: {', '.join(short)}, and {len(PUBLISHED) - len(short)} more such as "
        "ViT-B-16:laion2b_s34b_b88k and tipsv2-l14 (sfp weights list)"
    )


def download(name: str) -> Path:
    """Fetches a published checkpoint, with a progress bar, and verifies it.

    OpenAI's are stored in sfp's cache folder, those of the Hugging Face Hub in the Hub's. A file gets
    its name only when it is complete and its hash is right.

    Raises:
        WeightsError: if that fails; the message says which file to put where.
    """
    from sfp.clip.checkpoints.download import fetch, from_hub, is_full

    row = PUBLISHED[name]
    if row.shipped:
        raise WeightsError(
            f"{row.shipped} is missing: take it from the repository, or train it with "
            "`python -m sfp.mini.train --out runs/mini` and copy runs/mini/mini.safetensors there"
        )
    path = cache_dir("weights", row.file)
    problems: list[Exception] = []
    if row.sha256:
        try:
            fetch(row.url, path, row.sha256)
            return path
        except (OSError, http.client.HTTPException) as error:
            problems.append(error)
    if row.repo and not any(map(is_full, problems)):
        try:
            path = from_hub(row.repo)
            complete(row)
            return path
        except (OSError, ImportError) as error:
            problems.append(error)
    part = path.with_name(f"{path.name}.part")
    kept = (
        "What has arrived is kept, and the next attempt continues it. "
        if os.path.isfile(part)
        else ""
    )
    what = f"{path} (SHA-256 {row.sha256})" if row.sha256 else path
    second = row.hub_url if row.sha256 else f"{HUB_FILES[1]} from there"
    other = f" (or {second}, as {row.files[1]})" if row.repo else ""
    reasons = "; ".join(map(_reason, problems))
    raise WeightsError(
        f"could not download {name}: {reasons}. {kept}Download {row.url} on a "
        f"machine with a network and put it at {what}{other}, or give the path of a local copy "
        "instead of the name. The weights 'mini' need no download."
    ) from problems[0]


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint file or the shards of an index, without running anything in it.

    Raises:
        WeightsError: if a file is damaged, has no known format, or lacks tensors of the index.
    """
    if not is_index(path):
        return _read_file(path)
    state: dict[str, Tensor] = {}
    for part in parts(path):
        state |= _read_file(part)
    if missing := [name for name in weight_map(path) if name not in state]:
        raise WeightsError(
            f"{path} lists {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, "
            "which its parts do not contain: they belong to different models; download all again"
        )
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return read_archive(file)
            file.seek(8)  # after the length of a safetensors header, which is JSON
            if file.read(1) == b"{" or path.suffix == ".safetensors":
                return load_file(path)
            return _read_legacy(file)
    except (
        OSError,
        ValueError,  # ArchiveError among them
        EOFError,
        RuntimeError,  # from zipfile, for unsupported features of the format
        struct.error,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise WeightsError(
            f"cannot read weights from {path}: {_first_line(error)}. Expected safetensors, a "
            "TorchScript archive as OpenAI ships them, or a state dict saved by torch.save; the file "
            "may be truncated: download it again."
        ) from error


def _read_legacy(file: BinaryIO) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save` from before PyTorch 1.6, by PyTorch's restricted reader.

    Raises:
        ValueError: if it holds none, or if this version of PyTorch's reader is not safe.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # CVE-2025-32434
        raise ValueError(
            "neither safetensors nor a zip file, the only formats that PyTorch < 2.6 reads safely"
        )
    file.seek(0)
    data = file.read()
    if not data:
        raise ValueError("the file is empty")
    if data[:1] != pickle.PROTO:
        raise ValueError(f"no safetensors, zip file or pickle: it begins with {data[:8]!r}")
    try:
        # from memory: reading from a file would allocate as many bytes as an instruction claims
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message advises to run the file's code
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"it holds a {found[1]} besides tensors: save the model's state_dict()"
            ) from error
        raise ValueError("a pickle that torch.save did not write") from error
    except Exception as error:  # malformed files raise all kinds of errors in PyTorch's reader
        raise ValueError(_first_line(error)) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("not a state dict: expected a mapping from names to tensors")
    if sum(v.numel() * v.element_size() for v in state.values()) > file.seek(0, 2):
        raise ValueError("tensors larger than the file that should hold them")
    return {str(name): value for name, value in state.items()}


def _reason(error: Exception) -> str:
    """What went wrong in a download, without urllib's brackets and the final full stop."""
    inner = error.reason if type(error) is urllib.error.URLError else error
    return str(inner).rstrip(".")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raises `LayoutError` if a file does not have the architecture of its name."""
    row = checkpoint.row
    if row is None or row.architecture is None:
        return
    expected = ARCHITECTURES[row.architecture]
    image, text = checkpoint.image, checkpoint.text
    rows = [
        ("patch", image.patch, expected.patch),
        ("image size", image.image_size, expected.image_size),
        ("width", image.width, expected.width),
        ("blocks", image.layers, expected.layers),
        ("text width", text.width, expected.text_width),
        ("text blocks", text.layers, expected.text_layers),
        ("embedding", image.embed_dim, expected.embed_dim),
    ]
    wrong = [f"{what} {found}, expected {right}" for what, found, right in rows if found != right]
    if wrong:
        raise LayoutError(
            f"{checkpoint.origin} is not a {row.architecture}: {'; '.join(wrong)}. It is another file "
            "with the same name: delete it, or put the right one there"
        )


def _check_numbers(clip: CLIP, origin: str) -> None:
    """Raises `WeightsError` if a value of a parameter is NaN or infinite."""
    for name, weight in clip.named_parameters():
        if not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise WeightsError(
                f"{origin}: {name} has {bad} NaN or infinite of {weight.numel()} values; the file is "
                "damaged or its training diverged: download it again or use other weights"
            )


def digest_of(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict's names and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(str(state[name].dtype).encode())
        flat = state[name].detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()
