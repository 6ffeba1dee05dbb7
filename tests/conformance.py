"""Reference numbers from the official implementations (see goldens/README.md), and how to compare.

`case("sfp/som/sq")` gives one case: its input image, its hyper-parameters and `check(output, value)`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import sfp

ROOT = Path(__file__).parent / "goldens"
MANIFEST = json.loads((ROOT / "manifest.json").read_text())
MEAN = torch.tensor([122.771, 116.746, 104.094])
STD = torch.tensor([68.501, 66.632, 70.323])


@functools.cache
def state_dict() -> dict[str, Tensor]:
    """Weights A: int8 values times one power of two per parameter."""
    raw = load_file(ROOT / "weights_A.safetensors")
    return {k[2:]: v.float() * raw[f"s/{k[2:]}"] for k, v in raw.items() if k.startswith("q/")}


@functools.cache
def clip() -> sfp.CLIP:
    return sfp.load_clip(state_dict())


@functools.cache
def inputs() -> dict[str, Tensor]:
    return load_file(ROOT / "inputs.safetensors")


def image(name: str) -> Tensor:
    """A stored picture, normalised: (1, 3, H, W)."""
    return ((inputs()[f"img/{name}"].float() - MEAN) / STD).permute(2, 0, 1)[None]


@dataclass(frozen=True)
class Case:
    name: str

    @property
    def entry(self) -> dict:
        return MANIFEST["cases"][self.name]

    @property
    def hyper(self) -> dict:
        return dict(self.entry.get("hyper") or {})

    @property
    def outputs(self) -> dict:
        return self.entry["outputs"]

    @property
    def image(self) -> Tensor:
        return image(self.entry["input"])

    def expected(self, output: str) -> Tensor:
        with safe_open(ROOT / self.entry["file"], "pt") as file:
            return file.get_tensor(self.entry["prefix"] + output)

    def check(self, output: str, value: Tensor) -> None:
        """Within the case's stated tolerance; integers exactly."""
        expected = self.expected(output)
        assert value.shape == expected.shape, f"{self.name} {output}"
        spec = self.outputs[output]
        if "atol" in spec:
            error = (value - expected).abs().max().item()
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
    """Names of the cases that start with a prefix; never an empty list."""
    names = [n for n in MANIFEST["cases"] if n.startswith(prefixes) and n not in without]
    assert names, f"no golden case starts with {prefixes}"
    return names
