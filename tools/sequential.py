"""The sequential reference of `bench.py`: SFP the way its repository runs it, with the same results.

It processes one window at a time, with `nn.MultiheadAttention` that returns the weights of every block
and head, all of which are kept; LND layout and OpenAI's expression for QuickGELU; and logits of every
window at full resolution, summed over the image. It is plain PyTorch, written from the steps of the
method; of `sfp` it uses only the weights.

Like ours it differs from the release in two respects: an outlier without a valid neighbour becomes the
mean of the nearest ring that has one, not zero; and layer numbers move with the depth of the model.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sfp

CROP, STRIDE = 224, 112


class SequentialSFP:
    """SFP's preset with the released settings, on the weights of a CLIP model.

    Args:
        clip: whose image tower is read; its parameters are shared.
    """

    def __init__(self, clip: sfp.CLIP) -> None:
        self.visual = clip.visual
        self.attentions = []
        for block in clip.visual.blocks:
            own = block.attn
            attention = nn.MultiheadAttention(own.in_proj_weight.shape[1], own.num_heads).eval()
            attention.in_proj_weight, attention.in_proj_bias = own.in_proj_weight, own.in_proj_bias
            attention.out_proj.weight, attention.out_proj.bias = (
                own.out_proj.weight,
                own.out_proj.bias,
            )
            self.attentions.append(attention)

    @torch.inference_mode()
    def __call__(
        self, image: Tensor, queries: Tensor, size: tuple[int, int], scale: float
    ) -> Tensor:
        """Normalised image (1, 3, h, w) and unit queries (Q, C) -> labels (H, W)."""
        height, width = image.shape[2:]
        logits = image.new_zeros(1, len(queries), height, width, dtype=torch.float32)
        covered = image.new_zeros(1, 1, height, width)
        for y, x in product(places(height), places(width)):
            window = image[..., y : y + CROP, x : x + CROP]
            full = F.interpolate(self.window(window, queries), window.shape[2:], mode="bilinear")
            across, down = window.shape[3], window.shape[2]
            margins = (x, width - x - across, y, height - y - down)
            logits += F.pad(full, margins)  # as mmsegmentation's slide_inference does
            covered[..., y : y + down, x : x + across] += 1
        logits = F.interpolate(logits / covered, size, mode="bilinear")
        return (logits * scale).softmax(1)[0].argmax(0)

    def window(self, window: Tensor, queries: Tensor) -> Tensor:
        """Cosine logits of one window, (1, 3, H, W) -> (1, Q, h, w)."""
        grid, outputs, maps = self.trunk(window)
        layer = [(i + 1) * len(self.attentions) // 12 - 1 for i in range(12)]
        outliers = drawn_to(maps[-1][0].mean(0))
        last = without(outputs[-1][1:, 0], outliers, grid)  # (N, D)
        before = similarity(without(outputs[layer[8]][1:, 0], outliers, grid))
        after = rows_to_one(similarity(outputs[layer[3]][1:, 0]))
        guided = 3 * (before - before.mean())
        guided = guided.masked_fill(guided < 0, -torch.inf).softmax(-1)
        heads = self.attentions[-1].num_heads
        guided = guided.repeat(heads, 1, 1)  # (H, N, N)

        q, k, v = self.projections(rows_to_one(before) @ last)
        attention = (weights(q, q) + weights(k, k) + guided) / 3
        first = after @ self.mixed(attention, v, outputs[-1])
        summed = torch.stack([outputs[layer[i]] for i in range(3, 10)]).sum(0)
        v = self.projections(summed[1:, 0])[2]
        second = after @ self.mixed(guided, v, summed)
        features = self.visual.ln_post(first + second) @ self.visual.proj
        unit = F.normalize(features.float(), dim=-1)
        return (queries @ unit.T).view(1, -1, *grid)

    def trunk(self, window: Tensor) -> tuple[tuple[int, int], list[Tensor], list[Tensor]]:
        """The grid, and of every block but the last the output (T, 1, D) and map (1, H, T, T)."""
        embedded = self.visual.embed(window)
        x = embedded.data.permute(1, 0, 2)
        outputs, maps = [], []
        for block, attention in zip(self.visual.blocks[:-1], self.attentions, strict=False):
            y = block.ln_1(x)
            mixed, kept = attention(y, y, y, need_weights=True, average_attn_weights=False)
            x = x + mixed
            fc, proj = block.mlp.get_submodule("c_fc"), block.mlp.get_submodule("c_proj")
            y = F.linear(block.ln_2(x), fc.weight, fc.bias)
            y = y * torch.sigmoid(1.702 * y)
            x = x + F.linear(y, proj.weight, proj.bias)
            outputs.append(x)
            maps.append(kept)
        return embedded.grid, outputs, maps

    def projections(self, patches: Tensor) -> list[Tensor]:
        """Queries, keys and values of the last block, (N, D) -> (H, N, d) each."""
        attention = self.attentions[-1]
        y = self.visual.blocks[-1].ln_1(patches)
        packed = F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
        return [
            part.unflatten(1, (attention.num_heads, -1)).transpose(0, 1)
            for part in packed.chunk(3, -1)
        ]

    def mixed(self, attention: Tensor, v: Tensor, source: Tensor) -> Tensor:
        """The reduced last block with a share of the class token, (N, D)."""
        out = self.attentions[-1].out_proj
        mixed = (attention @ v).transpose(0, 1).flatten(1)
        return F.linear(mixed, out.weight, out.bias) + 0.3 * source[0]


def places(side: int) -> list[int]:
    """Where windows begin along a side; the last one is moved back into the image."""
    steps = max(-(-(side - CROP) // STRIDE), 0) + 1
    return [max(min(i * STRIDE, side - CROP), 0) for i in range(steps)]


def drawn_to(attention: Tensor) -> list[int]:
    """SOM: the at most ten patches with 1.5 A[cls, i] > A[i, i], A (T, T) the mean over heads."""
    row, own = 1.5 * attention[0, 1:], attention.diagonal()[1:]
    found = (row > own).nonzero()[:, 0]
    return found[row[found].argsort(descending=True)][:10].tolist()


def without(patches: Tensor, outliers: list[int], grid: tuple[int, int]) -> Tensor:
    """Patches (N, D) with each outlier the mean of the nearest ring that holds others."""
    height, width = grid
    replaced = patches.clone()
    for i in outliers:
        row, column = divmod(i, width)
        for ring in range(1, max(grid)):  # if all patches are outliers none is replaced
            square = product(
                range(max(row - ring, 0), min(row + ring + 1, height)),
                range(max(column - ring, 0), min(column + ring + 1, width)),
            )
            near = [
                y * width + x
                for y, x in square
                if max(abs(y - row), abs(x - column)) == ring and y * width + x not in outliers
            ]
            if near:
                replaced[i] = patches[near].mean(0)
                break
    return replaced


def similarity(patches: Tensor) -> Tensor:
    """Cosines of patches (N, D), those below 0.4 set to 0: (N, N)."""
    unit = F.normalize(patches, dim=-1)
    cosine = unit @ unit.T
    return cosine.masked_fill(cosine < 0.4, 0)


def rows_to_one(affinity: Tensor) -> Tensor:
    """Rows divided by their sums."""
    return affinity / (affinity.sum(-1, keepdim=True) + 1e-6)


def weights(a: Tensor, b: Tensor) -> Tensor:
    """softmax(a b^T / sqrt(d)), (H, N, d) each -> (H, N, N)."""
    return (a @ b.mT * a.shape[-1] ** -0.5).softmax(-1)
