"""Slow, simple reference implementations, written from the papers and not from the package's code."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def filled(x: Tensor, mask: Tensor, alone: str = "nearest") -> Tensor:
    """Outliers replaced by the mean of clean neighbours, cell by cell: x (h, w, D), mask (h, w).

    `alone` says what happens without a clean neighbour, as in `neighbour_mean`.
    """
    h, w = mask.shape
    out = x.clone()
    clean = [(r, c) for r in range(h) for c in range(w) if not mask[r, c]]
    for r, c in itertools.product(range(h), range(w)):
        if not mask[r, c]:
            continue
        far = {(a, b): max(abs(a - r), abs(b - c)) for a, b in clean}
        around = [cell for cell, distance in far.items() if distance == 1]
        if not around and alone == "nearest" and clean:
            around = [cell for cell, d in far.items() if d == min(far.values())]
        if around:
            out[r, c] = torch.stack([x[cell] for cell in around]).mean(0)
        elif alone == "zero":
            out[r, c] = 0
    return out


class Tower:
    """CLIP's image tower for one image of the native size, from a state dict, in float64."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.state = {k: v.double() for k, v in state.items() if k.startswith("visual.")}
        self.width = self["class_embedding"].shape[0]
        self.layers = sum(key.endswith("ln_1.weight") for key in self.state)

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"visual.{name}"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.width,), self[f"{name}.weight"], self[f"{name}.bias"])

    def embed(self, image: Tensor) -> Tensor:
        """(3, H, W) -> (T, D)."""
        kernel = self["conv1.weight"]
        maps = F.conv2d(image.double()[None], kernel, stride=kernel.shape[-1])[0]
        x = torch.cat([self["class_embedding"][None], maps.flatten(1).T])
        return self.norm(x + self["positional_embedding"], "ln_pre")

    def projections(self, x: Tensor, i: int) -> dict[str, Tensor]:
        """q, k, v of block i, each (H, T, 64)."""
        name = f"transformer.resblocks.{i}"
        y = self.norm(x, f"{name}.ln_1")
        y = y @ self[f"{name}.attn.in_proj_weight"].T + self[f"{name}.attn.in_proj_bias"]
        parts = y.split(self.width, dim=1)
        return {
            key: torch.stack(part.split(64, dim=1)) for key, part in zip("qkv", parts, strict=True)
        }

    def weights(self, heads: Mapping[str, Tensor], pair: str) -> Tensor:
        """softmax(a b^T / 8), (H, T, T)."""
        return torch.softmax(heads[pair[0]] @ heads[pair[1]].transpose(1, 2) / 8, dim=-1)

    def attend(self, weights: Tensor, heads: Mapping[str, Tensor], i: int) -> Tensor:
        """Values mixed, heads joined, projected: (T, D)."""
        name = f"transformer.resblocks.{i}.attn.out_proj"
        joined = torch.cat(list(weights @ heads["v"]), dim=1)
        return joined @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def mlp(self, x: Tensor, i: int) -> Tensor:
        name = f"transformer.resblocks.{i}"
        y = self.norm(x, f"{name}.ln_2") @ self[f"{name}.mlp.c_fc.weight"].T
        y = y + self[f"{name}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        return y @ self[f"{name}.mlp.c_proj.weight"].T + self[f"{name}.mlp.c_proj.bias"]

    def project(self, x: Tensor) -> Tensor:
        return self.norm(x, "ln_post") @ self["proj"]


def sfp_paper(
    state: Mapping[str, Tensor],
    image: Tensor,
    *,
    purify: bool = True,
    enhancer: str = "qq+kk",
    integrator: bool = True,
    first: int = 0,
) -> tuple[Tensor, dict[int, list[int]]]:
    """The poster's SFP for one square image: features (T, C), and the outliers of each layer.

    SOM after every block but the last: patch i with A[i, i] < A[cls, i] takes the mean of its clean
    neighbours, and the next block reads that. SAE: sum of self-attentions, no residual, no FFN. HAI:
    the mean of all layers' head-averaged patch attention, rows of sum 1, times the last patches.
    """
    tower = Tower(state)
    x = tower.embed(image)
    side = round((len(x) - 1) ** 0.5)
    maps, outliers = [], {}
    for i in range(tower.layers - 1):
        heads = tower.projections(x, i)
        attention = tower.weights(heads, "qk")
        mean = attention.mean(0)
        maps.append(mean[1:, 1:])
        x = x + tower.attend(attention, heads, i)
        x = x + tower.mlp(x, i)
        marked = mean[0, 1:] > mean.diagonal()[1:]
        outliers[i] = marked.nonzero()[:, 0].tolist()
        if purify:
            patches = filled(x[1:].view(side, side, -1), marked.view(side, side))
            x = torch.cat([x[:1], patches.flatten(0, 1)])
    last = tower.layers - 1
    heads = tower.projections(x, last)
    x = tower.attend(sum(tower.weights(heads, pair) for pair in enhancer.split("+")), heads, last)
    if integrator:
        hai = torch.stack(maps[first:]).mean(0)
        x = torch.cat([x[:1], hai / hai.sum(1, keepdim=True) @ x[1:]])
    return tower.project(x), outliers
