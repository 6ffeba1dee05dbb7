"""Reference numbers from the official implementations (see goldens/README.md), and how to compare.

`Case("sfp/som/sq")` is one case: its input image, its hyper-parameters and `check(output, value)`.
Cases come in sets, a folder each: `goldens` and its siblings `goldens2_*`, whose inputs and weights
may be those of another set. Tests find cases by the start of their names in the manifests, so that
those of another folder of the same layout run without a change:
`SFP_GOLDENS=FOLDER python -m pytest tests -k golden`; tests of other sets then collect nothing.
"""

from __future__ import annotations

import functools
import json
import os
from collections import ChainMap
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sfp

OWN = [Path(__file__).parent / "goldens", *sorted(Path(__file__).parent.glob("goldens2_*"))]
GIVEN = [Path(folder) for folder in [os.environ.get("SFP_GOLDENS")] if folder]
SETS = GIVEN or OWN  # where cases come from
BESIDE = [
    m.parent for folder in GIVEN for m in sorted(folder.resolve().parent.glob("*/manifest.json"))
]
FOLDERS = list(dict.fromkeys([*SETS, *BESIDE, *OWN]))  # where their inputs and weights may be
MANIFESTS = {folder: json.loads((folder / "manifest.json").read_text()) for folder in SETS}
MANIFEST = MANIFESTS[SETS[0]]
ROOT = next(f for f in FOLDERS if (f / "tokenizer.json").exists())  # of the set with the words
DEVICE = os.environ.get("SFP_DEVICE", "cpu")  # where methods run: a GPU's check sets it
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # what tests make meets what methods give
MEAN = torch.tensor([122.771, 116.746, 104.094], device=DEVICE)
STD = torch.tensor([68.501, 66.632, 70.323], device=DEVICE)


@functools.cache
def state_dict(weights: str = "A") -> dict[str, Tensor]:
    """Weights by their name: int8 values times one power of two per parameter."""
    files = [folder / f"weights_{weights}.safetensors" for folder in FOLDERS]
    raw = load_file(next(file for file in files if file.exists()))
    return {k[2:]: v.float() * raw[f"s/{k[2:]}"] for k, v in raw.items() if k.startswith("q/")}


@functools.cache
def clip(weights: str = "A") -> sfp.CLIP:
    return sfp.load_clip(state_dict(weights)).to(DEVICE)


@functools.cache
def _stored(folder: Path) -> dict[str, Tensor]:
    file = folder / "inputs.safetensors"
    return load_file(file, device=DEVICE) if file.exists() else {}


def inputs(folder: Path = SETS[0]) -> MutableMapping[str, Tensor]:
    """Input tensors by name: those of a set, then of all others."""
    return ChainMap(*(_stored(each) for each in dict.fromkeys([folder, *FOLDERS])))


def image(name: str, folder: Path = SETS[0]) -> Tensor:
    """A stored picture, normalised: (1, 3, H, W)."""
    return ((inputs(folder)[f"img/{name}"].float() - MEAN) / STD).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class Case:
    name: str

    @property
    def folder(self) -> Path:
        """Of its set."""
        return next(f for f, manifest in MANIFESTS.items() if self.name in manifest["cases"])

    @property
    def manifest(self) -> dict:
        """Of its set."""
        return MANIFESTS[self.folder]

    @property
    def entry(self) -> dict:
        return self.manifest["cases"][self.name]

    @property
    def hyper(self) -> dict:
        return dict(self.entry.get("hyper") or {})

    @property
    def outputs(self) -> dict:
        return self.entry["outputs"]

    @property
    def clip(self) -> sfp.CLIP:
        return clip(self.entry.get("weights", "A"))

    @property
    def official(self) -> bool:
        """Whether the release ran as it is, with its mistakes; else a wrapper corrected one."""
        return self.entry["kind"] == "official"

    @property
    def image(self) -> Tensor:
        return image(self.entry["input"], self.folder)

    @property
    def inputs(self) -> MutableMapping[str, Tensor]:
        return inputs(self.folder)

    def expected(self, output: str) -> Tensor:
        with safe_open(self.folder / self.entry["file"], "pt", DEVICE) as file:
            return file.get_tensor(self.entry["prefix"] + output)

    def check(self, output: str, value: Tensor) -> None:
        """Within the case's stated tolerance; integers exactly."""
        expected, value = self.expected(output), value.to(DEVICE)
        assert value.shape == expected.shape, f"{self.name} {output}"
        spec = self.outputs[output]
        if "atol" in spec:
            error = (value - expected).abs().max().item() if expected.numel() else 0.0
            assert error <= spec["atol"], f"{self.name} {output}: {error:.2e} > {spec['atol']:.0e}"
        elif "max_mismatch_pixels" in spec:
            wrong = int((value != expected).sum())
            assert wrong <= spec["max_mismatch_pixels"], f"{self.name} {output}: {wrong} pixels"
        else:
            assert torch.equal(value.to(expected.dtype), expected), f"{self.name} {output}"

    def check_features(self, tokens: sfp.Tokens) -> None:
        """Whichever of the feature outputs the case stores, every token or every fourth."""
        stored = [o for o in ("feats", "feats_t4") if o in self.outputs]
        assert stored, f"{self.name} stores no features"
        for output in stored:
            self.check(output, tokens.data[0, :: 4 if output.endswith("_t4") else 1])


def cases(*prefixes: str, without: tuple[str, ...] = ()) -> list[str]:
    """Names of the cases that start with a prefix; in the repository's own folders, never none."""
    known = [name for manifest in MANIFESTS.values() for name in manifest["cases"]]
    names = [n for n in known if n.startswith(prefixes) and n not in without]
    assert names or "SFP_GOLDENS" in os.environ, f"no golden case starts with {prefixes}"
    return names
