"""CLIP's two towers, with every size read off a checkpoint's shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfp.clip.vit import Transformer, VisionTransformer


class CLIP(nn.Module):
    """CLIP with a ViT image tower, under OpenAI's parameter names.

    Args:
        embed_dim: width C of the joint space.
        image_size, patch, width, layers: of the image tower.
        context, vocab, text_width, text_layers: of the text tower.
        activation: "quick_gelu" (OpenAI) or "gelu".

    Attributes:
        digest: SHA-256 of the weights it was loaded from, the key of cached text features.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        image_size: int,
        patch: int,
        width: int,
        layers: int,
        context: int,
        vocab: int,
        text_width: int,
        text_layers: int,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        self.visual = VisionTransformer(
            image_size=image_size,
            patch=patch,
            width=width,
            layers=layers,
            embed_dim=embed_dim,
            activation=activation,
        )
        self.transformer = Transformer(text_width, text_layers, activation)
        self.token_embedding = nn.Embedding(vocab, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context, text_width) * 0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.digest = ""

    @property
    def context(self) -> int:
        """Longest text, in tokens."""
        return len(self.positional_embedding)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, C) embeddings, not normalised."""
        return self.visual(image)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, up to 77) -> (B, C) embeddings, not normalised.

        The text tower is causal, so everything after the longest end-of-text token cannot change the
        result and is cut off. The end-of-text token is the one with the highest id.

        Raises:
            ValueError: if the ids are no such batch.
        """
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise ValueError(
                f"expected token ids of shape (B, <= {self.context}), got {tuple(ids.shape)}"
            )
        end = ids.argmax(-1)  # (B,)
        length = int(end.max()) + 1
        x = self.token_embedding(ids[:, :length]) + self.positional_embedding[:length]
        for block in self.transformer.resblocks:
            x = block(x, causal=True)  # (B, length, D)
        x = x[torch.arange(len(x), device=x.device), end]
        return self.ln_final(x) @ self.text_projection


def build_clip(state: Mapping[str, Tensor], activation: str = "quick_gelu") -> CLIP:
    """A CLIP that holds `state`, every size inferred from the shapes.

    Args:
        state: OpenAI-layout state dict; its bookkeeping scalars are ignored.
        activation: which the shapes cannot tell.

    Raises:
        ValueError: if names are missing, left over or of a wrong shape; the message lists them.
    """
    state = {k: v for k, v in state.items() if k not in _SCALARS}
    if "logit_scale" in state:  # a scalar that some files store as (1,)
        state["logit_scale"] = state["logit_scale"].reshape(())
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError(
            "this is a ResNet CLIP: only ViT towers have the patch tokens methods need"
        )
    try:
        conv = state["visual.conv1.weight"]
        positions = state["visual.positional_embedding"]
        vocab, text_width = state["token_embedding.weight"].shape
        context = state["positional_embedding"].shape[0]
        embed_dim = state["text_projection"].shape[1]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"not a CLIP state dict in OpenAI's layout: {error} is missing or misshapen; it should "
            "hold visual.*, transformer.*, token_embedding.weight, positional_embedding, ln_final.*, "
            "text_projection and logit_scale"
        ) from None
    side = round((len(positions) - 1) ** 0.5)
    if side * side + 1 != len(positions):
        raise ValueError(
            f"position table of {len(positions)} rows: expected a square grid plus CLS"
        )
    with torch.device("meta"):
        clip = CLIP(
            embed_dim=embed_dim,
            image_size=side * conv.shape[-1],
            patch=conv.shape[-1],
            width=conv.shape[0],
            layers=_count_blocks(state, "visual.transformer.resblocks."),
            context=context,
            vocab=vocab,
            text_width=text_width,
            text_layers=_count_blocks(state, "transformer.resblocks."),
            activation=activation,
        )
    own = clip.state_dict()
    problems = [f"missing {k}" for k in own if k not in state]
    problems += [f"unexpected {k}" for k in state if k not in own]
    problems += [
        f"{k} is {tuple(v.shape)}, expected {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    problems += [f"{k} is {v.dtype}, not of floats" for k, v in state.items() if not _floats(v)]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            "not a CLIP state dict in OpenAI's layout: " + "; ".join(problems[:8]) + more
        )
    clip.load_state_dict({k: v.detach() for k, v in state.items()}, assign=True)
    return clip.requires_grad_(False).eval()


_SCALARS = ("input_resolution", "context_length", "vocab_size")


def _floats(x: Tensor) -> bool:
    return x.is_floating_point() and x.layout == torch.strided


def _count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})
