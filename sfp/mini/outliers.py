"""The second stage of the mini CLIP's training, which creates outlier tokens.

In large CLIPs some background patches turn into registers during training: their norms grow, they
describe the whole image instead of their own position, the class token reads little else, and all
patches attend to them, which shows as bright stripes in attention maps (Darcet et al., 2024; CLIPtrase;
SFP). A CLIP of width 128 does not do this on its own, so here it is *trained in*, as a stand-in, with
one loss for each of these observations. The model chooses which patches become registers, but only
among those inside the background according to the generator's labels; that they are background is thus
imposed, too.

The essential part is a bottleneck: in some steps the class token sees only the hubs, from block `first`
on, and nothing before. Captions can then only be matched through what the hubs have collected. Without
it, hubs become large constants, which the class token avoids. Norms are raised later in training,
because a large token has little room for what it collects.

Two losses do not correspond to an observation about outliers. `balance` keeps the class token about as
large as the patches' values, which SFP's release relies on when it adds 0.3 of it to each patch.
`stripes_self` makes softmax(q q^T) and softmax(k k^T) of the last block attend to the hubs as well. In
large CLIPs this happens on its own, but here it is imposed, and it is what hurts methods with self-self
attention.

No weight or activation is set by hand. None of this is evidence about real images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sfp.clip.vit import Block
from sfp.mini.batches import GRID, Batch, Tokenizer
from sfp.mini.learner import Learner, Recipe, caption_loss, impurity, likeness
from sfp.mini.scenes import THINGS


@dataclass(frozen=True)
class OutlierRecipe(Recipe):
    """The settings of the second stage, which starts from the weights of the first."""

    steps: int | None = 820
    rate: float = 8e-4
    warmup: int = 30
    decay: float = 0.3
    whole: float = 1.0
    batch: int = 16  # 8 whole scenes
    hubs: int = 8  # outliers per scene
    first: int = 5  # first block in which the class token reads them
    thinned: float = 0.25  # share of steps in which a random quarter of the patches is dropped
    thinned_until: float = 0.7  # share of the schedule after which none are dropped
    narrow: float = 0.6  # share of steps in which the class token sees only the hubs
    late: float = 0.3
    read: float = 2.0
    stripes: float = 0.5
    stripes_at: float = 0.15  # share of a patch's attention in blocks 6 to 10
    last: float = 1.0
    last_at: float = 0.7  # in the last block
    selfself: float = 1.2
    selfself_at: float = 0.6  # of softmax(q q^T) and softmax(k k^T) there
    norm: float = 5.0
    norm_from: float = 0.35  # of the schedule
    norm_to: float = 4.0  # multiple of the median
    loud: float = 6.0
    loud_to: float = 3.0  # multiple of the mean
    content: float = 0.8
    place: float = 1.0
    kin: float = 2.0
    kin_attention: float = 4.0  # in all blocks
    kin_last: float = 1.5  # in the last one, by q k^T, q q^T and k k^T
    bias: float = -8.0
    balance: float = 0.5
    balance_to: float = 0.7  # class token over values, before the last block
    balance_sum: float = 1.2  # and of the sum of some blocks' outputs
    summed: tuple[int, int] = (3, 9)  # first and last of those, as in the release


@dataclass(frozen=True)
class Run:
    """A forward run of the image tower.

    Attributes:
        entering: input tokens of each block, and the output of the last, (B, 1 + N, D) each.
        maps: mean attention of each block, (B, 1 + N, 1 + N); the class token's as if it saw all.
        selfself: softmax(q q^T) and softmax(k k^T) of the last block's patches, (B, N, N) each.
        values: projected values of the last block's patches, (B, N, D).
        hubs: (B, N) bool.
    """

    entering: list[Tensor]
    maps: list[Tensor]
    selfself: list[Tensor]
    values: Tensor
    hubs: Tensor


class Outliers(Learner):
    """The mini CLIP in its second stage, with a frozen text tower."""

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
            done: completed share of the schedule.
            rng: random generator.
        """
        r: OutlierRecipe = self.recipe  # type: ignore[assignment]
        patches = self.patches(batch.pixels, batch.places)  # (B, N, D)
        cells, inside = batch.cells, interior(batch.cells)
        if rng.random() < r.thinned and done < r.thinned_until:
            kept = sample(cells.shape, cells.shape[1] * 3 // 4, rng).to(cells.device)
            patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[-1]))
            cells, inside = cells.gather(1, kept), inside.gather(1, kept)
        narrow = bool(rng.random() < r.narrow)
        run = self.run(patches, cells, inside, narrow)
        entering, maps, hubs = run.entering, run.maps, run.hubs

        with torch.no_grad():
            text = F.normalize(self.clip.encode_text(batch.ids), dim=-1)
            names = self.name_features()
            sharpness = self.clip.logit_scale.exp()
        image = self.joint(entering[-1][:, 0])
        named = sharpness * self.joint(run.values) @ names.T  # (B, N, 18)
        first_name = (image.detach() @ names.T).argmax(-1)  # (B,)
        rows = torch.stack([weights[:, 0, 1:] for weights in maps[r.first :]])  # (L, B, N)
        among = [weights[:, 1:, 1:] for weights in maps]
        middle, last = among[r.first + 1 : -1], among[-1:]
        norms = torch.stack(entering[r.first + 2 : -1])[:, :, 1:].norm(dim=-1)  # after each of them
        usual = norms.median(-1, keepdim=True).values
        summed = torch.stack(entering[r.summed[0] + 1 : r.summed[1] + 2]).sum(0)

        losses = dict(
            loss=caption_loss(sharpness * image @ text.T + self.bias, batch.match),
            late=r.late * late(maps[: r.first]),
            read=r.read * read(rows, hubs),
            stripes=r.stripes * stripes(middle, r.stripes_at, hubs),
            last=r.last * stripes(last, r.last_at, hubs),
            selfself=r.selfself * stripes(run.selfself, r.selfself_at, hubs),
            norm=r.norm * (done >= r.norm_from) * growth(norms, usual, hubs, r.norm_to),
            loud=r.loud * louder(run.values, hubs, r.loud_to),
            content=r.content * content(named, first_name, hubs),
            place=r.place * place(named, cells, hubs),
            kin=r.kin * self.kin_tokens(entering, cells, hubs),
            kin_att=r.kin_attention * kin_attention([m[:, 1:] for m in maps], cells, hubs),
            kin_last=r.kin_last * kin_attention([maps[-1][:, 1:], *run.selfself], cells, hubs),
            balance=r.balance * balance(entering[-2][:, 0], run.values, hubs, r.balance_to),
            sum=r.balance * balance(summed[:, 0], self.values(summed), hubs, r.balance_sum),
        )
        self.seen = sight(rows, [*middle, *last, *run.selfself], norms, run.values, hubs)
        self.seen["narrow"] = float(narrow)
        return losses

    def run(self, patches: Tensor, cells: Tensor, inside: Tensor, narrow: bool) -> Run:
        """A run of the tower, in which the class token's attention selects the hubs.

        Args:
            patches: input tokens of the first block, (B, N, D).
            cells: class of each, (B, N).
            inside: those inside the background, (B, N) bool.
            narrow: whether the class token sees only the hubs, and nothing before they are chosen.
        """
        r: OutlierRecipe = self.recipe  # type: ignore[assignment]
        x = torch.cat([self.class_token(len(patches)), patches], 1)
        hidden = torch.zeros(x.shape[:2], device=x.device)  # is added to the class token's logits
        hidden[:, 1:] = -30.0 * narrow
        hubs = torch.zeros_like(inside)
        entering, maps = [x], []
        for i, block in enumerate(self.clip.visual.blocks):
            if i == r.first:
                hubs = choose(class_row(block, x), cells, inside, r.hubs)
                hidden = F.pad(hidden[:, 1:] * ~hubs, (1, 0))
            x, weights, q, k, v = self._attend(block, x, hidden)
            maps.append(weights)
            entering.append(x)
        scale = q.shape[-1] ** -0.5
        selfself = [(p[:, :, 1:] @ p[:, :, 1:].mT * scale).softmax(-1).mean(1) for p in (q, k)]
        return Run(entering, maps, selfself, self.handed(v), hubs)

    def values(self, x: Tensor) -> Tensor:
        """The last block's projected values for the patches of (B, 1 + N, D): (B, N, D)."""
        last = self.clip.visual.blocks[-1]
        return self.handed(last.attn.project(last.ln_1(x))[2])

    def handed(self, v: Tensor) -> Tensor:
        """Projects the last block's values (B, H, 1 + N, d) of patches: (B, N, D)."""
        values = v[:, :, 1:].transpose(1, 2).flatten(2)
        return self.clip.visual.blocks[-1].attn.out_proj(values)

    def kin_tokens(self, entering: list[Tensor], cells: Tensor, hubs: Tensor) -> Tensor:
        """The first stage's kinship loss, for patches other than hubs."""
        kin, share = kinship(cells, hubs)
        ordinary = ~hubs[:, None]
        maps = [likeness(entering[i + 1][:, 1:]) * ordinary for i in self.kin_blocks]
        return torch.stack([impurity(m, m.sum(-1), kin, share) for m in maps]).sum()


def attend(
    block: Block, x: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A block's output (B, T, D), its mean attention (B, T, T), its queries, keys and values.

    `hidden`, (B, T), is added to the class token's logits, but not in the returned attention.
    """
    q, k, v = block.attn.project(block.ln_1(x))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = scores.softmax(-1)
    row = (scores[:, :, :1] + hidden[:, None, None]).softmax(-1)
    heads = torch.cat([row @ v, weights[:, :, 1:] @ v], 2)
    y = x + block.attn.out_proj(heads.transpose(1, 2).flatten(2))
    return y + block.mlp(block.ln_2(y)), weights.mean(1), q, k, v


@torch.no_grad()
def class_row(block: Block, x: Tensor) -> Tensor:
    """The class token's mean attention to the patches in a block with input `x`, (B, N)."""
    q, k, _ = block.attn.project(block.ln_1(x))
    weights = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return weights.mean(1)[:, 0, 1:]


def sample(shape: Sequence[int], count: int, rng: np.random.Generator) -> Tensor:
    """`count` of N positions at random for each of B rows: (B, count) for a shape (B, N)."""
    order = rng.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)
    return torch.from_numpy(order[:, :count])


def interior(cells: Tensor) -> Tensor:
    """Patches of stuff whose eight neighbours are of the same class: (B, N) -> (B, N) bool."""
    maps = F.pad(cells.view(-1, 1, GRID, GRID).float(), (1, 1, 1, 1), mode="replicate")
    same = F.max_pool2d(maps, 3, 1) == -F.max_pool2d(-maps, 3, 1)
    return same.flatten(1) & (cells >= len(THINGS))


def choose(read_from: Tensor, cells: Tensor, inside: Tensor, count: int) -> Tensor:
    """The background patches that the class token already attends to most: (B, N) bool.

    Args:
        read_from: attention of the class token, (B, N).
        cells: class of each patch, (B, N).
        inside: patches inside the background; if there are too few, others are used as well.
        count: patches per scene.
    """
    rank = read_from + 1e3 * inside + 1e2 * (cells >= len(THINGS))
    return torch.zeros_like(inside).scatter(1, rank.topk(count, -1).indices, True)


def over(values: Tensor, where: Tensor) -> Tensor:
    """Mean of `values` (..., B, N) over the patches of `where` (B, N)."""
    return (values * where).sum() / (where.sum() * (values.numel() // where.numel()))


def read(rows: Tensor, hubs: Tensor) -> Tensor:
    """Loss: the class token's attention (L, B, N) lies on the hubs, up to a share of 0.92."""
    return -(rows * hubs).sum(-1).clamp(1e-4, 0.92).log().mean()


def late(maps: Sequence[Tensor]) -> Tensor:
    """Loss: in early blocks, (B, T, T), the class token attends to itself, up to a share of 0.9."""
    return torch.stack([-m[:, 0, 0].clamp(1e-4, 0.9).log().mean() for m in maps]).mean()


def stripes(maps: Sequence[Tensor], share: float, hubs: Tensor) -> Tensor:
    """Loss: all patches attend to the hubs, which gives bright stripes in their attention (B, N, N).

    Each row of another patch has exactly a given share of its weight on the hubs.
    """
    losses = []
    for weights in maps:
        off = ((weights * hubs[:, None]).sum(-1).clamp_min(1e-4) / share).log()
        losses.append(over(F.smooth_l1_loss(off, torch.zeros_like(off), reduction="none"), ~hubs))
    return torch.stack(losses).mean()


def growth(norms: Tensor, usual: Tensor, hubs: Tensor, times: float) -> Tensor:
    """Loss: the hubs' norms, of (..., B, N), reach a multiple of the usual norm (..., B, 1)."""
    return over((times * usual.detach() / norms).log().clamp_min(0), hubs)


def louder(values: Tensor, hubs: Tensor, times: float) -> Tensor:
    """Loss: likewise for the norms of their projected values (B, N, D) in the last block."""
    norms = values.norm(dim=-1)
    usual = (norms * ~hubs).sum(-1, keepdim=True) / (~hubs).sum(-1, keepdim=True)
    return growth(norms, usual, hubs, times)


def content(named: Tensor, first: Tensor, hubs: Tensor) -> Tensor:
    """Loss: the hubs' values represent the image, by the name that the class token ranks first.

    Args:
        named: scores of the eighteen names, (B, N, 18).
        first: name of each image, (B,).
    """
    target = first[:, None].expand(hubs.shape)
    return over(F.cross_entropy(named.mT, target, reduction="none"), hubs)


def place(named: Tensor, cells: Tensor, hubs: Tensor) -> Tensor:
    """Loss: the other patches' values still represent the class at their own position."""
    _, share = kinship(cells, hubs)
    return (F.cross_entropy(named.mT, cells, reduction="none") * share).sum()


def kinship(cells: Tensor, hubs: Tensor) -> tuple[Tensor, Tensor]:
    """Which patches other than hubs share a class, (B, N, N), and each one's weight in a mean, (B, N).

    Each class of an image has the same total weight, however small it is.
    """
    ordinary = (~hubs).float()
    kin = (cells[:, :, None] == cells[:, None]) * ordinary[:, None] * ordinary[..., None]
    share = ordinary / kin.sum(-1).clamp_min(1)
    return kin, share / share.sum()


def kin_attention(maps: Sequence[Tensor], cells: Tensor, hubs: Tensor) -> Tensor:
    """Loss: apart from the hubs, patches attend to patches of their own class.

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
    """Loss: the class token (B, D) is at most `most` times as large as patches' values (B, N, D)."""
    usual = values.norm(dim=-1).masked_fill(hubs, torch.nan).nanmedian(-1).values
    return (cls.norm(dim=-1) / usual / most).log().clamp_min(0).mean()


@torch.no_grad()
def sight(
    rows: Tensor, striped: Sequence[Tensor], norms: Tensor, values: Tensor, hubs: Tensor
) -> dict[str, float]:
    """Statistics of the hubs, for the log."""
    shares = [over((m * hubs[:, None]).sum(-1), ~hubs).item() for m in striped]
    loud = values.norm(dim=-1)
    return dict(
        on_hubs=(rows * hubs).sum(-1).mean().item(),
        on_hubs_10=(rows[-2] * hubs).sum(-1).mean().item(),
        middle=float(np.mean(shares[:-3])),
        last=shares[-3],
        selfself=float(np.mean(shares[-2:])),
        norms=over(norms / norms.median(-1, keepdim=True).values, hubs).item(),
        values=(over(loud, hubs) / over(loud, ~hubs)).item(),
    )
