"""Any vision transformer of Hugging Face's `transformers` as a guide: DINO, DINOv2 and others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfp.clip.checkpoints.published import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from sfp.registry import GUIDES, suggest
from sfp.tokens import Tokens

if TYPE_CHECKING:
    from sfp.clip.model import CLIP

PROJECTIONS = dict(q=("q_proj", "query"), k=("k_proj", "key"), v=("v_proj", "value"))
"""Names of a block's projections in current and earlier versions of `transformers`."""


class Renormalise:
    """Converts images from the normalisation of CLIP's weights to that of another model.

    Args:
        mean, std: normalisation of the result, RGB in 0..1.
        image_mean, image_std: normalisation of the input, RGB in 0..255; None for OpenAI's, until
            `follow` sets that of other weights.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        self._own = (mean, std)
        self._given = (image_mean, image_std)
        self._expect(CLIP_MEAN, CLIP_STD)

    def follow(self, clip: CLIP) -> None:
        """Expects images normalised for `clip`, unless their normalisation was given."""
        self._expect(clip.mean, clip.std)

    def _expect(self, *normalisation: Sequence[float]) -> None:
        pairs = zip(self._given, normalisation, strict=True)
        mean, std = (torch.tensor(list(own if given is None else given)) for given, own in pairs)
        own_mean, own_std = (torch.tensor(list(x)) for x in self._own)
        self._factor = std / (255 * own_std)
        self._shift = (mean / 255 - own_mean) / own_std

    @property
    def black(self) -> Tensor:
        """What a black pixel becomes, (3,)."""
        mean, std = (torch.tensor(list(x), device="cpu") for x in self._own)
        return -mean / std

    def __call__(self, image: Tensor) -> Tensor:
        """Images (..., 3, H, W) in float32."""
        factor, shift = (x.to(image.device)[:, None, None] for x in (self._factor, self._shift))
        return image.float() * factor + shift


class FrozenModel(nn.Module):
    """A frozen external model, for images normalised for a CLIP.

    Args:
        model: a model of `transformers`, or similar.
        renormalise: converts from CLIP's normalisation to the model's.
    """

    model: Any

    def __init__(self, model: nn.Module, renormalise: Renormalise) -> None:
        super().__init__()
        self.model = model
        self.model.requires_grad_(False)
        self.renormalise = renormalise
        self.eval()

    def train(self, mode: bool = True) -> FrozenModel:
        """Keeps evaluation mode."""
        return super().train(False)

    def follow(self, clip: CLIP) -> None:
        """Expects images normalised for `clip`, unless their normalisation was given."""
        self.renormalise.follow(clip)

    def resized(self, images: Tensor, size: tuple[int, ...]) -> Tensor:
        """Images (B, 3, h, w) in the model's normalisation, at a size (rows, columns).

        Bilinear with antialiasing, as the image processors of `transformers` do it.
        """
        return F.interpolate(
            self.renormalise(images), size, mode="bilinear", align_corners=False, antialias=True
        )


@GUIDES.register_module(name="transformers")
class TransformersGuide(FrozenModel):
    """A frozen vision transformer: CLIP-normalised images -> its last layer's patch tokens.

    Args:
        model: a name on the Hugging Face hub or a folder, loaded with `AutoModel`; or a model, e.g.
            one made from a config.
        mean, std: the model's normalisation, RGB in 0..1; by default ImageNet's, or none for a model
            that normalises images itself (C-RADIO).
        image_mean, image_std: normalisation of the input images, RGB in 0..255; by default
            that of the segmentor's weights, for most OpenAI's.

    Raises:
        ImportError: if a model is to be loaded and `transformers` is not installed.
    """

    def __init__(
        self,
        *,
        model: str | nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if isinstance(model, str):
            model = pretrained(model, "AutoModel", "guides")
        inside = _is_radio(model)
        mean = mean or ((0.0, 0.0, 0.0) if inside else IMAGENET_MEAN)
        std = std or ((1.0, 1.0, 1.0) if inside else IMAGENET_STD)
        super().__init__(model, Renormalise(mean, std, image_mean, image_std))
        size: int | Sequence[int] = self.model.config.patch_size
        self.patch: tuple[int, int] = (size, size) if isinstance(size, int) else (size[0], size[1])
        forward = inspect.signature(self.model.forward).parameters
        # ViT (DINO) resamples its position embedding only on request, DINOv2 always
        self._options = (
            {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in forward else {}
        )

    @torch.no_grad()
    def forward(self, image: Tensor, output: str | None = None) -> Tokens:
        """Patch tokens of images (B, 3, H, W), (B, h * w, D) without a prefix.

        Images are resized (bilinear) so that each side is the nearest multiple of the patch.

        Args:
            image: normalised for CLIP.
            output: None for the last layer's tokens; "entering" for those that enter the last block;
                "q", "k", "v" for its projections, all heads; sums like "q+k"; "stitched" for
                the result of `across`.

        Raises:
            ValueError: if the model has no such output.
        """
        if output is not None:
            entering = self.entering(image).only_patches()
            if output == "stitched":
                return self.across(entering, lambda tokens: tokens)
            return entering.with_data(last_projections(self.model, entering.data, output))
        out, grid = self._run(image)
        tokens = out.last_hidden_state  # (B, prefix + h * w, D): class token and registers first
        return Tokens(tokens[:, tokens.shape[1] - grid[0] * grid[1] :], grid, prefix=0)

    def entering(self, image: Tensor) -> Tokens:
        """The input tokens of the last block, including those before the patches."""
        out, grid = self._run(image, output_hidden_states=True)
        tokens = out.hidden_states[-2]
        return Tokens(tokens, grid, prefix=tokens.shape[1] - grid[0] * grid[1])

    @torch.no_grad()
    def across(self, entering: Tokens, join: Callable[[Tokens], Tokens]) -> Tokens:
        """The last block over the joined patches of several windows, without final norm, (1, N, D).

        As in OV-Stitcher's release, without the class token, and with the patches after the model's
        final norm as residual.

        Args:
            entering: patches that enter the last block, (W, N', D).
            join: puts the patches of all windows on one grid.
        """
        block = last_layer(self.model)
        norm = named_part(block, ("layernorm_before", "norm1"))
        final = (
            nn.Identity()
            if _is_radio(self.model)
            else named_part(self.model, ("layernorm", "norm"))
        )
        x = join(entering.with_data(norm(entering.data)))  # projections are linear: joined before
        residual = join(entering.with_data(final(entering.data)))
        heads = self.model.config.num_attention_heads
        q, k, v = (
            named_part(block, PROJECTIONS[y])(x.data).unflatten(2, (heads, -1)).transpose(1, 2)
            for y in "qkv"
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = residual.data + _scaled(block, 1, named_part(block, ("o_proj",))(mixed))
        after = named_part(block, ("layernorm_after", "norm2"))
        return x.with_data(y + _scaled(block, 2, named_part(block, ("mlp",))(after(y))))

    @torch.no_grad()
    def attention(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Attention between patches in the last block, averaged over heads, (B, N, N); and their grid.

        Rows sum to less than 1, since patches also attend to the class token and registers.

        Raises:
            ValueError: if the model does not return its attention.
        """
        if hasattr(self.model, "set_attn_implementation"):
            self.model.set_attn_implementation("eager")  # fused attention returns no weights
        out, grid = self._run(image, output_attentions=True)
        if not out.attentions or out.attentions[-1] is None:
            raise ValueError(
                f"{type(self.model).__name__} returns no attention weights: load it with "
                "attn_implementation='eager'"
            )
        patches = grid[0] * grid[1]
        weights = out.attentions[-1].float().mean(1)  # (B, T, T)
        return weights[:, -patches:, -patches:], grid

    def _run(self, image: Tensor, **options: bool) -> tuple[Any, tuple[int, int]]:
        pixels = self.renormalise(image)
        height, width = (
            max(round(length / side), 1)
            for length, side in zip(image.shape[-2:], self.patch, strict=True)
        )
        size = (height * self.patch[0], width * self.patch[1])
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        dtype = next(self.model.parameters()).dtype
        out = self.model(pixel_values=pixels.to(dtype), **self._options, **options)
        return out, (height, width)


def _is_radio(model: nn.Module) -> bool:
    """Whether it is a C-RADIO, which normalises images itself and has no final norm."""
    return hasattr(model, "input_conditioner")


def last_layer(model: nn.Module) -> nn.Module:
    """The last block of a vision transformer of `transformers`."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max(stacks, key=len)[-1]


def named_part(block: nn.Module, names: Sequence[str]) -> Any:
    """The module inside a block that has one of these names, wherever it is.

    Raises:
        ValueError: if there is none.
    """
    for name, part in block.named_modules():
        if name.rpartition(".")[2] in names:
            return part
    raise ValueError(
        f"{type(block).__name__} has no part named {' or '.join(names)}: this guide only supports its "
        "final tokens (output=None)"
    )


def last_projections(model: nn.Module, entering: Tensor, output: str) -> Tensor:
    """An output of the last block's attention, (B, T, D): see `TransformersGuide.forward`.

    Args:
        model: the guide's model.
        entering: input tokens of the last block, (B, T, D).
        output: as in `TransformersGuide.forward`.
    """
    if output == "entering":
        return entering
    parts = output.split("+")
    if unknown := [part for part in parts if part not in PROJECTIONS]:
        valid = ["entering", "stitched", *PROJECTIONS]
        raise ValueError(f"unknown output {unknown[0]!r} of a guide{suggest(unknown[0], valid)}")
    block = last_layer(model)
    x = named_part(block, ("layernorm_before", "norm1"))(entering)
    first, *rest = (named_part(block, PROJECTIONS[part])(x) for part in parts)
    for other in rest:
        first = first + other
    return first


def _scaled(block: nn.Module, number: int, x: Tensor) -> Tensor:
    """Applies a block's layer scale to a branch, if it has one (DINOv2)."""
    scale = getattr(block, f"layer_scale{number}", None)
    return x if scale is None else scale(x)


def pretrained(name: str, loader: str, extra: str) -> nn.Module:
    """Loads a model from Hugging Face's hub or from a folder.

    Args:
        name: name of the model, or path of the folder.
        loader: class of `transformers` that loads it, e.g. "AutoModel".
        extra: the extra of this package that installs `transformers`.

    Raises:
        ImportError: if `transformers` is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the model {name!r} needs the package transformers: pip install 'sfp[{extra}]'"
        ) from error
    return getattr(transformers, loader).from_pretrained(name)
