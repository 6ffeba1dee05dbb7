"""CLIP's two towers, with every size read off a checkpoint's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD, HEAD_WIDTHS, LayoutError
from sfp.clip.dispatch import intercepted
from sfp.clip.fingerprint import contents_digest, state_key
from sfp.clip.vit import HEAD_WIDTH, Transformer, VisionTransformer, drawn

IMAGE_SIDE = ("visual",)  # submodules that `encode_text` does not use


class CLIP(nn.Module):
    """CLIP with a ViT image tower, under OpenAI's parameter names.

    Args:
        embed_dim: width C of the joint space.
        image_size, patch, width, layers: of the image tower.
        context, vocab, text_width, text_layers: of the text tower.
        activation: "quick_gelu" (OpenAI) or "gelu".
        head_width, hidden: of the image tower, as in `VisionTransformer`.
        text_head_width, text_hidden: of the text tower.

    Attributes:
        activation: as above.
        mean, std: normalisation of the images it was trained with, RGB in 0..255.
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
        head_width: int = HEAD_WIDTH,
        hidden: int | None = None,
        text_head_width: int = HEAD_WIDTH,
        text_hidden: int | None = None,
    ) -> None:
        super().__init__()
        self.visual = VisionTransformer(
            image_size=image_size,
            patch=patch,
            width=width,
            layers=layers,
            embed_dim=embed_dim,
            activation=activation,
            head_width=head_width,
            hidden=hidden,
        )
        self.transformer = Transformer(
            text_width, text_layers, activation, head_width=text_head_width, hidden=text_hidden
        )
        self.token_embedding = nn.Embedding(vocab, text_width)
        self.positional_embedding = drawn(context, text_width, std=0.01)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = drawn(text_width, embed_dim, std=text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.activation = activation
        self.mean, self.std = CLIP_MEAN, CLIP_STD
        self._named: dict[str, tuple[str, Hashable]] = {}  # digests, and states they belong to

    @property
    def digest(self) -> str:
        """Names what the model computes; caches and journals use it as a key, with the precision.

        That of the file, as long as the weights are those of the file (rounded once, if they have
        been moved to another precision); else a hash of weights, settings and structure as they are
        now. Setting it names the present state.
        """
        return self._digest("all", ())

    @digest.setter
    def digest(self, value: str) -> None:
        self._named = {"all": (value, state_key(self))}
        self._named["text"] = (value, state_key(self, without=IMAGE_SIDE))

    @property
    def text_digest(self) -> str:
        """As `digest`, of what `encode_text` computes: the image tower does not matter."""
        return self._digest("text", IMAGE_SIDE)

    def _digest(self, part: str, without: tuple[str, ...]) -> str:
        key = state_key(self, without=without)
        name, state = self._named.get(part, ("", None))
        if state != key:
            name = contents_digest(self, without=without)
            self._named[part] = (name, key)
        return name

    def _still_named(self) -> dict[str, str]:
        """The digests whose weights have not changed."""
        keys = {"all": state_key(self), "text": state_key(self, without=IMAGE_SIDE)}
        return {part: name for part, (name, state) in self._named.items() if state == keys[part]}

    def _name_again(self, names: Mapping[str, str]) -> None:
        keys = {"all": state_key(self), "text": state_key(self, without=IMAGE_SIDE)}
        self._named = {part: (name, keys[part]) for part, name in names.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLIP:
        # Every .to(), .half() and .cuda(), also of a module that holds this one, comes through here.
        # Without this method the digests would still be right, but not those of the file.
        names, same = self._still_named(), True

        def watched(x: Tensor) -> Tensor:
            nonlocal same
            y = fn(x)
            same = same and (y is x or _rounded(x, y))
            return y

        super()._apply(watched, recurse)
        self._name_again(names if same else {})
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose tensors lie elsewhere: digests without their states."""
        return {**self.__dict__, "_named": self._still_named()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_again(state["_named"])

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


def build_clip(
    state: Mapping[str, Tensor],
    activation: str = "quick_gelu",
    *,
    head_width: int | None = None,
    text_head_width: int | None = None,
) -> CLIP:
    """A CLIP that holds `state`, every other size inferred from the shapes.

    Args:
        state: state dict in OpenAI's layout, as `sfp.clip.checkpoints.layouts.recognise` gives it.
        activation: which the shapes cannot tell.
        head_width: of the image tower, which they cannot tell either; by default that of the published
            model of this width, or 64.
        text_head_width: of the text tower, by default 64.

    Raises:
        LayoutError: if names are missing, left over or of a wrong shape; the message lists them.
    """
    try:
        conv = state["visual.conv1.weight"]
        positions = state["visual.positional_embedding"]
        vocab, text_width = state["token_embedding.weight"].shape
        context = state["positional_embedding"].shape[0]
        embed_dim = state["text_projection"].shape[1]
        sizes = dict(width=conv.shape[0], patch=conv.shape[-1], rows=positions.shape[0])
    except (KeyError, IndexError, ValueError) as error:
        raise LayoutError(
            f"not a CLIP state dict: {error} is missing or misshapen; expected visual.*, "
            "transformer.*, token_embedding.weight, positional_embedding, ln_final.*, "
            f"text_projection and logit_scale; found {_some(state)}"
        ) from None
    if vocab > VOCABULARY:
        raise LayoutError(
            f"a vocabulary of {vocab} tokens: the text tower was trained with another tokenizer than "
            f"CLIP's ({VOCABULARY} byte pairs), which this package does not have"
        )
    side = round((sizes["rows"] - 1) ** 0.5) if sizes["rows"] else 0
    if side * side + 1 != sizes["rows"]:
        raise LayoutError(
            f"position table of {sizes['rows']} rows: expected a square grid plus CLS"
        )
    width = sizes["width"]
    try:
        with torch.device("meta"), _NoInitialisation():
            clip = CLIP(
                embed_dim=embed_dim,
                image_size=side * sizes["patch"],
                patch=sizes["patch"],
                width=width,
                layers=_count_blocks(state, "visual."),
                context=context,
                vocab=vocab,
                text_width=text_width,
                text_layers=_count_blocks(state, ""),
                activation=activation,
                head_width=head_width or HEAD_WIDTHS.get(width, HEAD_WIDTH),
                hidden=_hidden(state, "visual."),
                text_head_width=text_head_width or HEAD_WIDTH,
                text_hidden=_hidden(state, ""),
            )
    except ValueError as error:  # heads that do not fill the width
        raise LayoutError(f"{error} (head_width, text_head_width)") from None
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
        raise LayoutError("not the state dict of a CLIP: " + "; ".join(problems[:8]) + more)
    clip.load_state_dict({k: v.detach() for k, v in state.items()}, assign=True)
    return clip.requires_grad_(False).eval()


def _rounded(x: Tensor, y: Tensor) -> bool:
    """Whether `y` is `x` in another place, or the float32 numbers of `x` in another precision."""
    if intercepted() or x.is_meta or y.is_meta or x.dtype not in (y.dtype, torch.float32):
        return False
    return torch.equal(x.to(y.device, y.dtype), y)


class _NoInitialisation(TorchFunctionMode):
    """Draws no values: on the meta device that would import PyTorch's compiler, which takes 4 s."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = {**dict(enumerate(args)), **(kwargs or {})}
        initialises = getattr(func, "__module__", None) == "torch.nn.init"
        if initialises or func in (Tensor.uniform_, Tensor.normal_):
            return arguments.get("tensor", arguments.get(0))
        return func(*args, **(kwargs or {}))


VOCABULARY = 49408  # OpenAI's byte pairs, which open_clip, MetaCLIP and DFN share


def _some(state: Mapping[str, Tensor]) -> str:
    names = ", ".join(list(state)[:4])
    return f"{len(state)} tensors: {names}{', ...' if len(state) > 4 else ''}"


def _floats(x: Tensor) -> bool:
    return x.is_floating_point() and x.layout == torch.strided


def _count_blocks(state: Mapping[str, Tensor], tower: str) -> int:
    prefix = f"{tower}transformer.resblocks."
    return len({k[len(prefix) :].split(".")[0] for k in state if k.startswith(prefix)})


def _hidden(state: Mapping[str, Tensor], tower: str) -> int | None:
    """Width of the MLPs, read off the first one; 4.36 or 4.92 times the tokens' in some."""
    first = state.get(f"{tower}transformer.resblocks.0.mlp.c_fc.weight")
    return first.shape[0] if first is not None and first.ndim == 2 else None
