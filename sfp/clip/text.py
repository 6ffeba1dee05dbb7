"""Text features of class names: prompts, tokens, an ensemble, and a cache on disk."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.model import CLIP
from sfp.clip.templates import TEMPLATES
from sfp.clip.tokenizer import tokenize as tokenize
from sfp.files import atomic_write, cache_dir
from sfp.registry import pick

BATCH = 512  # prompts per forward pass
CHUNK = 1024  # queries whose prompts are in memory at once
FORMAT = 2  # version of cached files; increase it when tokens, prompts or averaging change


def prompt_templates(templates: str | Sequence[str]) -> list[str]:
    """Templates with one `{}` each, from a list or the name of a set in `TEMPLATES`.

    Raises:
        ValueError: if the set is unknown or a template has no `{}` for the name.
    """
    if isinstance(templates, str):
        templates = pick("prompt templates", templates, TEMPLATES)
    if not templates:
        raise ValueError("the list of prompt templates is empty: give at least one, such as '{}'")
    for template in templates:
        try:
            fits = template.format("x") != template.format("y")
        except (AttributeError, IndexError, KeyError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"prompt template {template!r} must have one {{}} for the name")
    return list(templates)


def model_templates(templates: str | Sequence[str], own: str = "imagenet") -> list[str]:
    """Like `prompt_templates`; "auto" is the set of the model's authors, `TextTower.templates`."""
    return prompt_templates(own if templates == "auto" else templates)


@torch.inference_mode()
def encode_queries(clip: CLIP, queries: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Unit text features, (Q, C) float32: the normalised mean of normalised prompt features.

    Prompts of many queries are encoded together, sorted by length, so that each batch is as short as
    possible.

    Raises:
        ValueError: if a prompt is too long, or the checkpoint has another vocabulary.
        FloatingPointError: if features are NaN or infinite; the message names the query.
    """
    distinct = list(dict.fromkeys(queries))  # equal names get equal features, to the last bit
    parts = [
        _encode(clip, distinct[i : i + CHUNK], templates) for i in range(0, len(distinct), CHUNK)
    ]
    features = torch.cat(parts)
    for query, row in zip(distinct, features.isfinite().all(-1).tolist(), strict=True):
        if not row:
            raise FloatingPointError(
                f"NaN or infinite text features, first of {query!r}, in {clip.dtype}"
                ": the text tower's weights are damaged or too large for this precision"
            )
    place = {query: i for i, query in enumerate(distinct)}
    return features[[place[query] for query in queries]]


def _encode(clip: CLIP, queries: Sequence[str], templates: Sequence[str]) -> Tensor:
    prompts = [template.format(query) for query in queries for template in templates]
    ids = clip.text.tokenize(prompts)
    if int(ids.max()) >= clip.text.vocab:
        raise ValueError(
            f"this checkpoint has {clip.text.vocab} tokens, but its tokenizer gives ids up to "
            f"{int(ids.max())}: pass `query_features` computed with the right tokenizer"
        )
    device = clip.device
    order = clip.text.ends(ids).argsort(stable=True)
    with torch.autocast(device.type, enabled=False):  # cached values must depend only on the model
        batches = [
            F.normalize(clip.encode_text(ids[rows].to(device)).float(), dim=-1)
            for rows in order.split(BATCH)
        ]
    features = torch.cat(batches)[order.argsort()]  # (Q * templates, C)
    return F.normalize(features.unflatten(0, (len(queries), -1)).mean(1), dim=-1)


def text_bank(
    clip: CLIP,
    queries: Sequence[str],
    templates: str | Sequence[str] = "auto",
    *,
    folder: Path | None = None,
) -> Tensor:
    """`encode_queries`, computed once per weights, names, templates and precision.

    Args:
        clip: the model; its `text_digest` is part of the key.
        queries: Q names.
        templates: as in `model_templates`.
        folder: folder of the cached files; by default `text` in the cache folder. A damaged file is
            recomputed; an unwritable folder only means that nothing is cached.

    Returns:
        (Q, C) float32 on the model's device.
    """
    templates = model_templates(templates, clip.text.templates)
    key = [FORMAT, clip.text_digest, list(queries), templates, str(clip.dtype)]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = (folder or cache_dir("text")) / f"{name}.safetensors"
    features = read_bank(path, (len(queries), clip.embed_dim))
    if features is not None:
        return features.to(clip.device)
    features = encode_queries(clip, queries, templates)
    try:
        write_bank(path, features)
    except (OSError, safetensors.SafetensorError) as error:  # the latter from a full disk
        warnings.warn(f"text features are not cached: {path.parent}: {error}", stacklevel=2)
    return features.clone()  # not an inference tensor


def write_bank(path: Path, features: Tensor) -> None:
    """Writes a cache file atomically, with a checksum of the features (Q, C)."""
    bank = features.cpu().contiguous()
    with atomic_write(path) as temporary:
        save_file({"features": bank}, temporary, metadata={"sha256": _checksum(bank)})


def read_bank(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The features in a cache file, or None if it is absent or damaged."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            intact = (file.metadata() or {}).get("sha256") == _checksum(features)
    except (OSError, safetensors.SafetensorError):
        return None
    return features if intact and features.shape == shape else None


def _checksum(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
