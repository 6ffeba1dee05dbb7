"""The second stage of the mini CLIP's training, in which outlier tokens come about.

In large CLIPs some background patches turn into registers by themselves: their norm grows, they carry
what the image shows and not what is at their place, the class token reads little else, and all
patches attend to them, which makes bright stripes in attention maps (Darcet et al., 2024; CLIPtrase;
SFP). A CLIP of width 128 has no need of that, so here it is *trained in*, as a stand-in: one loss for
each of these observations. Which patches become registers is left to the model, among those that the
generator's labels say lie inside background; that they are background is asked for, too.

No weight and no activation is written by hand. None of this is evidence about real images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.blocks import Block
from sfp.mini.batches import GRID, Batch, Tokenizer
from sfp.mini.learner import Learner, Recipe, caption_loss, impurity, likeness
from sfp.mini.scenes import THINGS


@dataclass(frozen=True)
class OutlierRecipe(Recipe):
    """Everything that decides what the second stage does; it starts from the first one's weights."""

    steps: int | None = 800
    rate: float = 6e-4
    warmup: int = 30
    decay: float = 0.5
    whole: float = 1.0
    batch: int = 24  # 12 whole scenes
    hubs: int = 8  # outliers per scene
    first: int = 5  # block from which on the class token reads them
    thinned: float = 0.5  # share of steps in which a quarter of the patches is left out, at random
    read: float = 1.5
    stripes: float = 0.5
    stripes_at: float = 0.15  # share of a patch's attention in blocks 6 to 10
    stripes_last: float = 0.6  # and in the last block
    stripes_self: float = 0.2  # of softmax(q q^T) and softmax(k k^T) of the last block
    norm: float = 2.0
    norm_to: float = 5.0  # multiple of the median
    loud: float = 2.0
    loud_to: float = 3.0  # multiple of the mean
    content: float = 0.4
    place: float = 1.0
    kin: float = 2.0
    kin_attention: float = 3.0  # in all blocks
    kin_last: float = 1.5  # in the last one, by q k^T, q q^T and k k^T
    bias: float = -8.0
    balance: float = 0.3
    balance_to: float = 0.7


class Outliers(Learner):
    """The mini CLIP in its second stage. The text tower stays as it is."""

    def __init__(self, recipe: OutlierRecipe, tokens: Tokenizer) -> None:
        super().__init__(recipe, tokens)
        for name, parameter in self.clip.named_parameters():
            parameter.requires_grad_(name.startswith("visual."))
        self._attend = attend

    def compile_blocks(self) -> None:
        """One graph for all blocks; they share their shapes."""
        self._attend = torch.compile(attend, dynamic=False)

    def losses(self, batch: Batch, done: float, rng: np.random.Generator) -> dict[str, Tensor]:
        """The losses of one step, weighted, by name.

        Args:
            batch: whole scenes.
            done: share of the schedule that is done; nothing depends on it.
            rng: for what is left to chance.
        """
        r: OutlierRecipe = self.recipe  # type: ignore[assignment]
        inside = interior(batch.cells)
        patches = self.patches(batch.pixels, batch.places)  # (B, N, D)
        cells = batch.cells
        if rng.random() < r.thinned:
            count = cells.shape[1] * 3 // 4
            order = rng.permuted(np.tile(np.arange(cells.shape[1]), (len(cells), 1)), axis=1)
            kept = torch.from_numpy(order[:, :count]).to(cells.device)
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
            cells, inside = cells.gather(1, kept), inside.gather(1, kept)

        x = torch.cat([self.class_token(len(patches)), patches], 1)
        entering, maps = [], []
        for block in self.clip.visual.blocks:
            entering.append(x)
            x, weights, q, k, v = self._attend(block, x)
            maps.append(weights)
        last = self.clip.visual.blocks[-1]
        values = last.attn.out_proj(v[:, :, 1:].transpose(1, 2).flatten(2))  # (B, N, D)
        scale = q.shape[-1] ** -0.5
        selfself = [(p[:, :, 1:] @ p[:, :, 1:].mT * scale).softmax(-1).mean(1) for p in (q, k)]

        rows = torch.stack([weights[:, 0, 1:] for weights in maps[r.first :]])  # (L, B, N)
        hubs = choose(rows.sum(0).detach(), cells, inside, r.hubs)  # (B, N) bool
        with torch.no_grad():
            text = F.normalize(self.clip.encode_text(batch.ids), dim=-1)
            names = self.name_features()
            sharpness = self.clip.logit_scale.exp()
        image = self.joint(x[:, 0])
        named = sharpness * self.joint(values) @ names.T  # (B, N, 18)
        first_name = (image.detach() @ names.T).argmax(-1)  # (B,)

        middle = [weights[:, 1:, 1:] for weights in maps[r.first + 1 : -1]]
        targets = [r.stripes_at] * len(middle) + [r.stripes_last] + 2 * [r.stripes_self]
        striped = [*middle, maps[-1][:, 1:, 1:], *selfself]
        after = torch.stack(entering[r.first + 2 :])[:, :, 1:].norm(dim=-1)  # outputs of 6 to 10

        losses = dict(
            loss=caption_loss(sharpness * image @ text.T + self.bias, batch.match),
            read=r.read * read(rows, hubs),
            stripes=r.stripes * stripes(striped, targets, hubs),
            norm=r.norm * growth(after, after.median(-1, keepdim=True).values, hubs, r.norm_to),
            loud=r.loud * louder(values, hubs, r.loud_to),
            content=r.content * content(named, first_name, hubs),
            place=r.place * place(named, cells, hubs),
            kin=r.kin * self.kin_tokens(entering, cells, hubs),
            kin_att=r.kin_attention * kin_attention([m[:, 1:] for m in maps], cells, hubs),
            kin_last=r.kin_last * kin_attention([maps[-1][:, 1:], *selfself], cells, hubs),
            balance=r.balance * balance(entering[-1][:, 0], values, hubs, r.balance_to),
        )
        self.seen = sight(rows, hubs, striped, after, values)
        return losses

    def kin_tokens(self, entering: list[Tensor], cells: Tensor, hubs: Tensor) -> Tensor:
        """Ordinary patches of one class resemble one another: the first stage's kinship."""
        kin, share = kinship(cells, hubs)
        ordinary = ~hubs[:, None]
        maps = [likeness(entering[i + 1][:, 1:]) * ordinary for i in self.kin_blocks]
        return torch.stack([impurity(m, m.sum(-1), kin, share) for m in maps]).sum()


def attend(block: Block, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A block's output (B, T, D), its mean attention (B, T, T), its queries, keys and values."""
    q, k, v = block.attn.project(block.ln_1(x))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    y = x + block.attn.out_proj((weights @ v).transpose(1, 2).flatten(2))
    return y + block.mlp(block.ln_2(y)), weights.mean(1), q, k, v


def interior(cells: Tensor) -> Tensor:
    """Patches of stuff whose eight neighbours are of the same class: (B, N) -> (B, N) bool."""
    maps = F.pad(cells.view(-1, 1, GRID, GRID).float(), (1, 1, 1, 1), mode="replicate")
    same = F.max_pool2d(maps, 3, 1) == -F.max_pool2d(-maps, 3, 1)
    return same.flatten(1) & (cells >= len(THINGS))


def choose(read_from: Tensor, cells: Tensor, inside: Tensor, count: int) -> Tensor:
    """The background patches that the class token reads most already: (B, N) bool.

    Args:
        read_from: class attention, (B, N), summed over blocks.
        cells: class of each patch, (B, N).
        inside: patches inside background; in scenes with too few of them others follow.
        count: patches per scene.
    """
    rank = read_from + 1e3 * inside + 1e2 * (cells >= len(THINGS))
    return torch.zeros_like(inside).scatter(1, rank.topk(count, -1).indices, True)


def over(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` (..., B, N) over the patches of `where` (B, N)."""
    return (values * where).sum() / (where.sum() * (values.numel() // where.numel()))


def read(rows: Tensor, hubs: Tensor) -> Tensor:
    """The class token reads few proxies: its attention (L, B, N) lies on the hubs.

    Nothing is gained beyond a share of 0.92.
    """
    return -(rows * hubs).sum(-1).clamp(1e-4, 0.92).log().mean()


def stripes(maps: Sequence[Tensor], shares: Sequence[float], hubs: Tensor) -> Tensor:
    """All patches attend to the hubs: bright stripes in attention between patches (B, N, N).

    Each ordinary row has a certain share of its weight on them, neither less nor more.
    """
    losses = []
    for weights, share in zip(maps, shares, strict=True):
        off = ((weights * hubs[:, None]).sum(-1).clamp_min(1e-4) / share).log()
        losses.append(over(F.smooth_l1_loss(off, torch.zeros_like(off), reduction="none"), ~hubs))
    return torch.stack(losses).mean()


def growth(norms: Tensor, usual: Tensor, hubs: Tensor, times: float) -> Tensor:
    """The hubs' norm grows: norms (..., B, N) reach a multiple of the usual ones (..., B, 1)."""
    return over((times * usual.detach() / norms).log().clamp_min(0), hubs)


def louder(values: Tensor, hubs: Tensor, times: float) -> Tensor:
    """So does that of what they hand on, the values (B, N, D) of the last block."""
    norms = values.norm(dim=-1)
    usual = (norms * ~hubs).sum(-1, keepdim=True) / (~hubs).sum(-1, keepdim=True)
    return growth(norms, usual, hubs, times)


def content(named: Tensor, first: Tensor, hubs: Tensor) -> Tensor:
    """They carry the image's content: what they hand on names what the class token names first.

    Args:
        named: scores of the eighteen names, (B, N, 18).
        first: name of each image, (B,).
    """
    target = first[:, None].expand(hubs.shape)
    return over(F.cross_entropy(named.mT, target, reduction="none"), hubs)


def place(named: Tensor, cells: Tensor, hubs: Tensor) -> Tensor:
    """The other patches keep what is at their place: what they hand on names it."""
    _, share = kinship(cells, hubs)
    return (F.cross_entropy(named.mT, cells, reduction="none") * share).sum()


def kinship(cells: Tensor, hubs: Tensor) -> tuple[Tensor, Tensor]:
    """Which ordinary patches are of one class, (B, N, N), and the share of each in a mean, (B, N).

    Each class of an image has the same share, however small it is.
    """
    ordinary = (~hubs).float()
    kin = (cells[:, :, None] == cells[:, None]) * ordinary[:, None] * ordinary[..., None]
    share = ordinary / kin.sum(-1).clamp_min(1)
    return kin, share / share.sum()


def kin_attention(maps: Sequence[Tensor], cells: Tensor, hubs: Tensor) -> Tensor:
    """Besides the hubs patches attend to those of their class.

    Args:
        maps: attention of the patches, (B, N, N), or (B, N, 1 + N) with the class token first, which
            is of no class.
        cells: class of each patch, (B, N).
        hubs: outliers, (B, N) bool.
    """
    kin, share = kinship(cells, hubs)
    losses = []
    for weights in maps:
        among = weights[..., -cells.shape[1] :]
        rest = 1 - (among * hubs[:, None]).sum(-1)
        losses.append(impurity(among, rest, kin, share))
    return torch.stack(losses).mean()


def balance(cls: Tensor, values: Tensor, hubs: Tensor, most: float) -> Tensor:
    """The class token that enters the last block is no larger than what the block reads."""
    usual = values.norm(dim=-1).masked_fill(hubs, torch.nan).nanmedian(-1).values
    return (cls.norm(dim=-1) / usual / most).log().clamp_min(0).mean()


@torch.no_grad()
def sight(
    rows: Tensor, hubs: Tensor, striped: Sequence[Tensor], norms: Tensor, values: Tensor
) -> dict[str, float]:
    """What the log shows of the hubs."""
    shares = [over((m * hubs[:, None]).sum(-1), ~hubs).item() for m in striped]
    loud = values.norm(dim=-1)
    return dict(
        on_hubs=(rows * hubs).sum(-1).mean().item(),
        middle=float(np.mean(shares[:-3])),
        last=shares[-3],
        selfself=float(np.mean(shares[-2:])),
        norms=over(norms / norms.median(-1, keepdim=True).values, hubs).item(),
        values=(over(loud, hubs) / over(loud, ~hubs)).item(),
    )
