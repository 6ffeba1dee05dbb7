"""Constants tuned for a result, and training data of its models besides images and captions.

Tables in this field mix methods whose constants were tuned per dataset, on its labels, with methods
without such constants, and methods that use only CLIP with methods that use models trained on masks.
This does not make two numbers incomparable, but it matters for the meaning of a difference.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfp.clip.checkpoints.loading import split_activation
from sfp.clip.checkpoints.published import MINI, find, short_side
from sfp.data.benchmarks import by_dataset
from sfp.evaluation.settings import method_settings
from sfp.registry import METHODS
from sfp.segmentor import SETTINGS

# protocol settings that configs set for a dataset
CONSTANTS = (
    "logit_scale",
    "prob_thd",
    "area_thd",
    "slide_crop",
    "slide_stride",
    "slide_tiles",
    "pad_windows",
    "whole_via_input",
    "pamr_steps",
    "pamr_dilations",
    "pamr_unit",
)
# by a word in the model's name or type, in this order; from the models' own papers and pages
SEEN = {
    "sam3": "masks of concepts, named by phrases (SA-Co)",
    "sam": "1.1 billion masks of 11 million images (SA-1B)",
    "clipseg": "masks named by phrases (PhraseCut)",
    "mask2former": "labelled masks of the dataset in its name",
    "eomt": "labelled masks of the dataset in its name",
    "dinov3": "images without labels (LVD-1689M)",
    "dinov2": "images without labels (LVD-142M)",
    "dino": "images without labels (ImageNet, unless its name says otherwise)",
    "radio": "the data of its teachers: CLIP, DINOv2, SAM",
    "tips": "images with two captions each (WebLI)",
    "siglip": "images with texts in many languages (WebLI)",
    "pe-core": "images and videos with texts",
    MINI: "drawn scenes of the same generator, with the classes of their patches",
}


def constants(card: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Non-default constants of a card or config: name, value and default as text.

    A method's defaults are those of its preset. If the knob `dataset` of a preset selects constants
    that were tuned for a dataset, they are listed with it, also if they are the default but the dataset
    is the one evaluated.
    """
    method = dict(card["method"])
    name = method.get("type")
    if name in METHODS.module_dict:
        for knob, default in method_settings(name).items():
            if knob != "type" and _text(method.get(knob, default)) != _text(default):
                yield f"method {knob}", _text(method[knob]), _text(default)
        usual = method_settings(name).get("dataset")
        chosen = method.get("dataset", usual)
        tuned = getattr(sys.modules[METHODS.get(name).__module__], "DATASETS", {})
        evaluated = by_dataset(card.get("data", {}).get("dataset", ""))
        if chosen in tuned and (chosen != usual or (evaluated and chosen == evaluated.name)):
            yield f"method's constants for {chosen}", _text(tuned[chosen]), _text(tuned.get(usual))
    protocol = card["protocol"]
    for setting in CONSTANTS:
        default = SETTINGS[setting]
        if setting in protocol and _text(protocol[setting]) != _text(default):
            yield setting, _text(protocol[setting]), _text(default)
    side = short_side(card["weights"].get("name"))
    for step in protocol.get("pipeline Resize", []):
        if (short := min(step.get("scale") or [side])) != side:
            yield "short side of images", str(short), str(side)


def seen(card: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The models of a card or config that were trained on more than images and captions.

    Yields each with its training data. Unknown CLIPs and proposers without a model are left out.
    """
    weights = str(card["weights"].get("name", ""))
    name, _ = split_activation(weights)
    row = find(name)
    local = row is None and Path(name).exists()  # a user's own file name says nothing
    if known := None if local else _known(f"{weights} {row.family if row else ''}"):
        yield weights, known
    protocol = card["protocol"]
    parts = {f"guide {name}": node for name, node in (protocol.get("guides") or {}).items()}
    parts |= {name: protocol[name] for name in ("masks", "regions") if protocol.get(name)}
    for part, node in parts.items():
        for kind, model in _models(node):
            yield f"{part} ({model})", _known(f"{model} {kind}") or "unknown data"


def _models(node: Any) -> Iterator[tuple[str, str]]:
    """The type and model of each config node that has a model, including `node`."""
    if isinstance(node, Mapping):
        if isinstance(node.get("model"), str):
            yield str(node.get("type", "")), node["model"]
        for value in node.values():
            yield from _models(value)


def _known(name: str) -> str | None:
    """The training data of a model whose name contains a word of `SEEN`, e.g. "sam2.1-tiny"."""
    found = (
        text
        for part, text in SEEN.items()
        if re.search(rf"(?<![a-z]){part}(v?\d|[^a-z]|$)", name.lower())
    )
    return next(found, None)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
