"""A CLIP: its two towers, their common parameters, and construction from a state dict."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfp.clip.blocks import HEAD_WIDTH
from sfp.clip.checkpoints.published import (
    CLIP_MEAN,
    CLIP_STD,
    NONE,
    RGB,
    LayoutError,
    in_pixels,
)
from sfp.clip.dispatch import intercepted
from sfp.clip.fingerprint import contents_digest, state_key
from sfp.clip.text_towers import BertConfig, TextConfig, TextTower, TextTransformer
from sfp.clip.vit import ImageConfig, VisionTransformer

IMAGE_SIDE = ("visual",)  # submodules that `encode_text` does not use
# parameters at the top level of OpenAI's model and files
OPENAI_TEXT = (
    "transformer",
    "token_embedding",
    "positional_embedding",
    "ln_final",
    "text_projection",
    "cls_emb",  # of CoCa
)


class CLIP(nn.Module):
    """An image tower and a text tower with a joint space.

    The constructor builds OpenAI's towers, with OpenAI's names in the state dict; `CLIP.of` joins
    towers of any family.

    Args:
        embed_dim: width C of the joint space.
        image_size, patch, width, layers: sizes of the image tower, as in `ImageConfig`.
        context, vocab, text_width, text_layers: sizes of the text tower, as in `TextConfig`.
        activation: "quick_gelu" (OpenAI) or "gelu".
        head_width, hidden: further sizes of the image tower, as in `ImageConfig`.
        text_head_width, text_hidden: further sizes of the text tower, as in `TextConfig`.

    Attributes:
        visual, text: the towers.
        logit_scale: logarithm of the inverse temperature of training.
        logit_bias: bias of the logits in training, or None.
        activation: activation of OpenAI's towers, as above.
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
        visual = VisionTransformer(
            ImageConfig(
                image_size=image_size,
                patch=patch,
                width=width,
                layers=layers,
                embed_dim=embed_dim,
                activation=activation,
                head_width=head_width,
                hidden=hidden,
            )
        )
        text = TextTransformer(
            TextConfig(
                vocab=vocab,
                context=context,
                width=text_width,
                layers=text_layers,
                embed_dim=embed_dim,
                activation=activation,
                head_width=text_head_width,
                hidden=text_hidden,
            )
        )
        self._join(visual, text, CLIP_MEAN, CLIP_STD)
        self.activation = activation

    @classmethod
    def of(
        cls,
        visual: VisionTransformer,
        text: TextTower,
        *,
        mean: RGB = CLIP_MEAN,
        std: RGB = CLIP_STD,
    ) -> CLIP:
        """The model of two towers of any family; `mean`, `std` as the attributes."""
        clip = cls.__new__(cls)
        clip._join(visual, text, mean, std)
        return clip

    def _join(self, visual: VisionTransformer, text: TextTower, mean: RGB, std: RGB) -> None:
        super().__init__()
        self.text = text
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias: nn.Parameter | None
        self.register_parameter("logit_bias", None)
        self.mean, self.std = mean, std
        self._named: dict[str, tuple[str, Hashable]] = {}  # digests, and states they belong to

    def __getattr__(self, name: str) -> Any:
        # OpenAI's model has the parts of the text tower at its top
        if name in OPENAI_TEXT and "text" in self.__dict__.get("_modules", ()):
            return getattr(self.text, name)
        return super().__getattr__(name)

    def state_dict(  # type: ignore[override]
        self, *args: Any, prefix: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        """As of every module; the text tower of an OpenAI CLIP without `text.`, as in its files."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if isinstance(self.text, TextTransformer):
            for name in [name for name in state if name.startswith(f"{prefix}text.")]:
                state[prefix + name.removeprefix(f"{prefix}text.")] = state.pop(name)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(self.text, TextTransformer):
            for name in [name for name in state_dict if name.startswith(prefix)]:
                if (bare := name.removeprefix(prefix)).partition(".")[0] in OPENAI_TEXT:
                    state_dict[f"{prefix}text.{bare}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def digest(self) -> str:
        """Identifies what the model computes; with the precision, a key for caches and journals.

        This is the file's hash as long as the weights are those of the file (rounded once, if they were
        converted to another precision); otherwise a hash of the current weights, settings and
        structure. Setting it assigns a digest to the current state.
        """
        return self._digest("all", ())

    @digest.setter
    def digest(self, value: str) -> None:
        self._named = {"all": (value, state_key(self))}
        self._named["text"] = (value, state_key(self, without=IMAGE_SIDE))

    @property
    def text_digest(self) -> str:
        """Like `digest`, but of `encode_text` only: the image tower does not matter."""
        return self._digest("text", IMAGE_SIDE)

    def _digest(self, part: str, without: tuple[str, ...]) -> str:
        key = state_key(self, without=without)
        name, state = self._named.get(part, ("", None))
        if state != key:
            name = contents_digest(self, without=without)
            self._named[part] = (name, key)
        return name

    def _still_named(self) -> dict[str, str]:
        """The digests of parts whose weights have not changed."""
        keys = {"all": state_key(self), "text": state_key(self, without=IMAGE_SIDE)}
        return {part: name for part, (name, state) in self._named.items() if state == keys[part]}

    def _name_again(self, names: Mapping[str, str]) -> None:
        keys = {"all": state_key(self), "text": state_key(self, without=IMAGE_SIDE)}
        self._named = {part: (name, keys[part]) for part, name in names.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CLIP:
        # Every .to(), .half() and .cuda(), also of a module that contains this one, calls this method.
        # Without it digests would still be correct, but no longer those of the file.
        names: dict[str, str] | None = None  # until something changes
        same = True

        def watched(x: Tensor) -> Tensor:
            nonlocal names, same
            y = fn(x)
            if y is not x:
                names = self._still_named() if names is None else names
                same = same and _rounded(x, y)
            return y

        super()._apply(watched, recurse)
        if names is not None:
            self._name_again(names if same else {})
        return self

    def share_memory(self) -> CLIP:
        """As for any module; it moves tensors in place, without `_apply`."""
        names = self._still_named()
        super().share_memory()
        self._name_again(names)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles: digests without keys, as tensors get other addresses."""
        return {**self.__dict__, "_named": self._still_named()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._name_again(state["_named"])

    @property
    def context(self) -> int:
        """Maximal length of a text in tokens."""
        return self.text.context

    @property
    def embed_dim(self) -> int:
        """Width C of the joint space."""
        return self.text.embed_dim

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.logit_scale.dtype

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels -> (B, C) embeddings, not normalised."""
        return self.visual(image)

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, up to `context`) of `text.tokenize` -> (B, C) embeddings, not normalised.

        Raises:
            ValueError: if the ids have another shape.
        """
        return self.text(ids)


def no_clip() -> CLIP:
    """A placeholder CLIP for methods that use another model: zeros of width 1 without blocks.

    Its patches have 14 pixels, and images are normalised to -1..1, as SAM 3 expects.
    """
    image = ImageConfig(image_size=14, patch=14, width=1, layers=0, embed_dim=1, head_width=1)
    text = TextConfig(vocab=49408, context=77, width=1, layers=0, embed_dim=1, head_width=1)
    half = (127.5, 127.5, 127.5)
    clip = CLIP.of(VisionTransformer(image), text.build(), mean=half, std=half)
    for weight in clip.requires_grad_(False).parameters():
        weight.zero_()
    clip.digest = NONE
    return clip.eval()


def build_clip(
    state: Mapping[str, Tensor], image: ImageConfig, text: TextConfig | BertConfig
) -> CLIP:
    """A frozen CLIP that holds `state`.

    Args:
        state, image, text: as returned by `sfp.clip.checkpoints.layouts.recognise`.

    Raises:
        LayoutError: if names are missing, left over or of a wrong shape; the message lists them.
    """
    if image.embed_dim != text.embed_dim:
        raise LayoutError(
            f"the image tower embeds in {image.embed_dim} dimensions, the text tower in "
            f"{text.embed_dim}"
        )
    try:
        with torch.device("meta"), _NoInitialisation():
            mean, std = in_pixels(image.mean, image.std)
            clip = CLIP.of(VisionTransformer(image), text.build(), mean=mean, std=std)
            if "logit_bias" in state:
                clip.logit_bias = nn.Parameter(torch.empty(()))
    except ValueError as error:  # heads that do not fill the width
        raise LayoutError(str(error)) from None
    clip.activation = image.activation
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
    """Whether `y` is a copy of `x`, or its float32 values converted to another precision."""
    if intercepted() or x.is_meta or y.is_meta or x.dtype not in (y.dtype, torch.float32):
        return False
    return torch.equal(x.to(y.device, y.dtype), y)


class _NoInitialisation(TorchFunctionMode):
    """Skips initialisation, which on the meta device would import PyTorch's compiler (4 s)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = {**dict(enumerate(args)), **(kwargs or {})}
        initialises = getattr(func, "__module__", None) == "torch.nn.init"
        if initialises or func in (Tensor.uniform_, Tensor.normal_):
            return arguments.get("tensor", arguments.get(0))
        return func(*args, **(kwargs or {}))


def _floats(x: Tensor) -> bool:
    return x.is_floating_point() and x.layout == torch.strided
