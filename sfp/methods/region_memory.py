"""A memory of regions of unlabelled images, for any preset: the second version of CorrCLIP.

For every region of some images, `sfp fit memory` stores two vectors: a key, the mean of a guide's
features, and a value, the mean of the preset's own features, which are compared with words. A region
of a new image takes the mean of the values of the regions with the most similar keys. Its cosines with
the words are averaged with the preset's own. Labels are not needed, and nothing is trained.

| | here | description |
| --- | --- | --- |
| guide | any | C-RADIOv3-L at the nearest size that it supports |
| regions | given, or any proposer | EntitySeg's (a Mask2Former) |
| second memory from DFN's B/16 with its own words, averaged with the first | no | yes |
| windows | padded with zeros, as everywhere in this package | padded by replication |
| pixels without a region | keep the preset's own logits | not stated |

Published on CorrCLIP without merging of regions (`base=dict(type="corrclip", eps=None)`): short side
448, windows of 336, stride 112; regions of COCO's training images, or of synthetic ones. Written from
a description, without code or numbers of the authors to compare with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.vit import VisionTransformer
from sfp.files import atomic_write, read_once
from sfp.functional.clusters import resize
from sfp.functional.precision import upcast
from sfp.functional.regions import cells_of_masks
from sfp.ops.image import window_grid
from sfp.registry import METHODS, Count, composition, op
from sfp.tokens import Tokens
from sfp.trace import Trace

BUDGET = 2**24  # products in memory at once
PROBE = 4  # weights of each parameter by which the model of a memory is recognised


def means_in_regions(maps: Tensor, member: Tensor) -> Tensor:
    """Unit mean of a map's unit vectors over each region's pixels, (R, D).

    Args:
        maps: (D, h, w), resampled to the pixels of the masks.
        member: masks, (R, H, W), 1 inside and 0 outside.
    """
    unit = F.normalize(upcast(maps), dim=0).flatten(1)  # (D, N)
    weights = cells_of_masks(member.to(unit), (maps.shape[1], maps.shape[2]))  # (R, N)
    return F.normalize(weights @ unit.T, dim=-1)  # the mean's length does not matter


def region_keys(trace: Trace, member: Tensor, *, guide: str, output: str | None) -> Tensor:
    """Keys of the regions of an image, unit vectors (R, D): the means of a guide's features.

    Args:
        trace: trace of all windows of an image.
        member: masks of the regions, (R, H, W), 1 inside and 0 outside.
        guide, output: as in `Trace.guide`; the guide sees the whole image.
    """
    (maps,) = trace.guide_of_image(guide, output).as_map()
    return means_in_regions(maps, member)


def region_values(trace: Trace, features: Tokens, member: Tensor) -> Tensor:
    """Values of the regions of an image, unit vectors (R, C): means of features comparable with words.

    Args:
        trace: trace of all windows of an image.
        features: features in the joint space, of the windows or on one grid of the whole image.
        member: as in `region_keys`.
    """
    maps = F.normalize(upcast(features.as_map()), dim=1)
    if len(maps) > 1:
        maps = window_grid(trace).stitch(maps)
    return means_in_regions(maps[0], member)


def remember(
    reads: Iterable[tuple[Tokens, Trace]], *, guide: str, output: str | None
) -> tuple[Tensor, Tensor]:
    """Keys (M, D) and values (M, C) of all regions of some images, in half precision on the host.

    Args:
        reads: for each image, a method's features of its windows and their trace
            (`sfp.engine.Engine.read`).
        guide, output: as in `region_keys`.

    Raises:
        ValueError: if there are no regions.
    """
    keys, values = [], []
    for features, trace in reads:
        member = (trace.region_masks() > 0).float()
        keys.append(region_keys(trace, member, guide=guide, output=output).half().cpu())
        values.append(region_values(trace, features, member).half().cpu())
    if not sum(map(len, keys)):
        raise ValueError("there is nothing to remember: no image has a region")
    return torch.cat(keys), torch.cat(values)


def probe(vit: VisionTransformer) -> dict[str, list[float]]:
    """Some weights of each parameter of a model, by which it is recognised."""
    chosen = {}
    for name, x in vit.named_parameters():
        flat = x.detach().flatten()
        chosen[name] = flat[:: max(len(flat) // PROBE, 1)][:PROBE].float().tolist()
    return chosen


def same_model(a: Mapping[str, list[float]], b: Mapping[str, list[float]]) -> bool:
    """Whether two results of `probe` are those of one model, in any two precisions.

    Only parameters that both have are compared, as layers of 8 bits have none.
    """
    both = [name for name in a if name in b]
    one, other = (torch.tensor([v for name in both for v in x[name]]) for x in (a, b))
    # bf16 keeps 8 binary digits, fp16 no numbers below 6e-8
    return bool(both) and torch.allclose(one, other, rtol=2**-8, atol=1e-6)


def write_memory(
    path: Path, keys: Tensor, values: Tensor, vit: VisionTransformer, **made: str
) -> None:
    """Writes a memory as a safetensors file.

    Args:
        path: file to write.
        keys, values: from `remember`.
        vit: model that computed the values.
        **made: how the memory was made, as strings: at least `guide` and `output`.
    """
    tensors = dict(keys=keys.contiguous(), values=values.contiguous())
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata=dict(made, probe=json.dumps(probe(vit))))


@read_once(2)
def _memory(path: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contents of a file of regions."""
    with torch.inference_mode(False):  # they are also used by calls with gradients
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                found = {name: file.get_tensor(name) for name in ("keys", "values")}
                made = dict(file.metadata() or {})
                return found, dict(made, probe=json.loads(made["probe"]))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"memory={path!r}: expected a file that `sfp fit memory` wrote ({error})"
            ) from None


def read_memory(
    path: str, trace: Trace, *, guide: str, output: str | None
) -> tuple[Tensor, Tensor]:
    """Keys (M, D) and values (M, C) of a file, for the model and the guide of a trace.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a memory, or was made with another model or guide, which is named.
    """
    found, made = _memory(path, trace.image.device)
    asked = dict(guide=guide, output=str(output))
    if other := {name: made.get(name) for name in asked if made.get(name) != asked[name]}:
        raise ValueError(f"memory={path!r} was made with {other}, but the method uses {asked}")
    if not same_model(made["probe"], probe(trace.vit)):
        raise ValueError(
            f"memory={path!r} was made with other weights ({made.get('weights', 'not known')}): run "
            "`sfp fit memory` with these"
        )
    return found["keys"], found["values"]


def recalled(own: Tensor, keys: Tensor, values: Tensor, count: int) -> Tensor:
    """Unit mean of the values of the most similar keys, for each region, (R, C).

    Args:
        own: keys of the regions of an image, (R, D).
        keys: keys of the memory, (M, D), in any precision.
        values: values of the memory, (M, C), in any precision.
        count: number of keys for each region.
    """
    step = max(BUDGET // max(len(own), 1), count)
    best, rows = own.new_empty(len(own), 0), own.new_empty(len(own), 0, dtype=torch.long)
    for start in range(0, len(keys), step):  # keeps the best of all portions so far
        products = own @ keys[start : start + step].to(own).T
        value, index = products.topk(min(count, products.shape[1]), dim=1)
        best, rows = torch.cat([best, value], 1), torch.cat([rows, index + start], 1)
        best, order = best.topk(min(count, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return F.normalize(values[rows].to(own).mean(1), dim=-1)


@op("refiner", words=True, whole=True, regions=True)
def remembered_regions(
    logits: Tensor,
    trace: Trace,
    *,
    memory: str,
    guide: str = "dino",
    output: str | None = "q+k",
    count: Count = 20,
    share: float = 0.5,
) -> Tensor:
    """Cosines of an image's pixels, mixed with those of similar regions of other images.

    A region takes the unit mean of the values of the `count` regions in memory with the most similar
    keys. Where regions overlap, their cosines are averaged; pixels without a region keep their own.

    Args:
        memory: file that `sfp fit memory` wrote.
        guide, output: as in `region_keys`; the same with which the memory was made.
        count: number of similar regions.
        share: share of the memory in the result.

    Returns:
        (1, Q, rows, columns), rows and columns those of the regions.
    """
    joined = logits if len(logits) == 1 else window_grid(trace).stitch(logits)
    member = (trace.region_masks() > 0).to(joined)  # (R, H, W)
    size = (member.shape[1], member.shape[2])
    keys, values = read_memory(memory, trace, guide=guide, output=output)
    own = region_keys(trace, member, guide=guide, output=output)
    text = trace.query_features().to(own)
    scores = text @ recalled(own, keys, values, count).T  # (Q, R)
    covered = member.sum(0)
    painted = (scores.to(member) @ member.flatten(1)).unflatten(1, size) / covered.clamp_min(1)
    up = resize(joined, size)
    return torch.where(covered > 0, (1 - share) * up + share * painted, up)


@METHODS.register_module()
def region_memory(
    *,
    base: str | Mapping[str, Any] = "corrclip",
    memory: str | None = None,
    guide: str = "dino",
    output: str | None = "q+k",
    count: Count = 20,
    share: float = 0.5,
) -> dict[str, Any]:
    """Another preset, mixed with similar regions of unlabelled images; needs regions and a guide.

    Args:
        base: the preset, by name or with knobs; published: CorrCLIP with `eps=None`.
        memory: file that `sfp fit memory` wrote; without one, the base itself.
        guide, output, count, share: as in `remembered_regions`.
    """
    if memory is None:
        return composition(base)
    refiner = dict(
        type="remembered_regions",
        memory=memory,
        guide=guide,
        output=output,
        count=count,
        share=share,
    )
    return dict(composition(base, refiners=[refiner]), direct=True)
