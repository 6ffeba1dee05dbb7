"""Maps a tower's tokens to the embedding space of another model: from C-RADIO to SigLIP 2.

AM-RADIO (Ranzinger et al., CVPR 2024, arXiv:2312.06709) is trained to predict the features of several
teachers; an adaptor for each teacher maps the tower's class token to the teacher's embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from sfp.clip.blocks import Linear


@dataclass(frozen=True)
class AdaptorConfig:
    """The sizes of an `Adaptor`.

    Attributes:
        hidden: width of the hidden layers.
        layers: number of residual layers.
        norm: whether tokens are normalised and activated before the first layer.
    """

    hidden: int
    layers: int = 0
    norm: bool = False


class Adaptor(nn.Module):
    """A residual MLP, (..., D) -> (..., C), under its publisher's parameter names.

    y = W_1 x, then y + W_i GELU(LN(y)) for each residual layer, then W GELU(LN(y)).

    Args:
        config: sizes.
        width: token width D.
        embed_dim: width C of the other model's space.
    """

    def __init__(self, config: AdaptorConfig, width: int, embed_dim: int) -> None:
        super().__init__()
        hidden = config.hidden
        self.pre_norm = nn.Sequential(nn.LayerNorm(width), nn.GELU()) if config.norm else None
        self.fc1 = Linear(width, hidden)
        self.blocks = nn.ModuleList(_layer(hidden, hidden) for _ in range(config.layers))
        self.final = _layer(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., C)."""
        y = self.fc1(x if self.pre_norm is None else self.pre_norm(x))
        for block in self.blocks:
            y = y + block(y)
        return self.final(y)


def _layer(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), Linear(width, out))
