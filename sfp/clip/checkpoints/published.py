"""The table of published checkpoints: where they are, and properties that their files do not contain.

A state dict does not contain its activation, its attention heads or the normalisation of images. For
the names in `PUBLISHED` these are listed here and in `table.txt`, with sources. The hashes are
OpenAI's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from sfp.files import cache_dir, home_dir

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_MEAN = (122.771, 116.746, 104.094)  # the same in 0..255, as rounded in segmentation code
CLIP_STD = (68.501, 66.632, 70.323)
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHORT_SIDE = 336  # pixels, in the benchmarks
MINI = "mini"
NONE = "none"  # no CLIP, for methods that use another model

RGB = tuple[float, float, float]


class WeightsError(RuntimeError):
    """Weights that cannot be found, read or verified; the message says which and what to do."""


class LayoutError(WeightsError, ValueError):
    """Intact weights that are not those of a supported CLIP with a ViT."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of an image-text model with a ViT.

    Attributes:
        patch, image_size: sides in pixels; the image size is rounded down to a multiple of the patch.
        width, layers: token width and number of blocks of the image tower.
        text_width, text_layers: token width and number of blocks of the text tower.
        embed_dim: width of the joint space.
    """

    patch: int
    image_size: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    embed_dim: int


HEAD_WIDTHS = {
    1280: 80,
    1408: 88,
    1664: 104,
}  # widths of heads other than 64 in open_clip's image towers, by the width of tokens


@dataclass(frozen=True)
class Published:
    """A checkpoint that can be downloaded, or ships with this package.

    Attributes:
        file: name of the file in the cache folder.
        sha256: hash of the file on OpenAI's server, where it is part of the address. The Hugging Face
            Hub states hashes on download, and its cache names files by them.
        repo: repository on the Hugging Face Hub, followed by "/file" if the file does not have
            open_clip's name, or by "/*" for any usual name; for OpenAI's weights a second source, in
            another format.
        shipped: path of a file that is part of this package.
        architecture: key of `ARCHITECTURES`, with which the file is compared; None compares nothing.
        activation: "quick_gelu" or "gelu"; "" if the layout determines it.
        mean, std: normalisation of the images, RGB in 0..1.
        short_side: pixels to which the short side of images is resized by default.
        family: name of its group in tables.
        licence: licence, if a source of the table states it.
        gated: whether its repository requires consent before a download; None if not known.
        tokenizer: repository of the vocabulary file, for models that do not use OpenAI's.
        texts: name of the row whose text tower is used, for models without one (C-RADIO).
    """

    file: str
    sha256: str | None = None
    repo: str | None = None
    architecture: str | None = None
    activation: str = "quick_gelu"
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD
    shipped: Path | None = None
    short_side: int = SHORT_SIDE
    family: str = "CLIP"
    licence: str | None = None
    gated: bool | None = None
    tokenizer: str | None = None
    texts: str | None = None

    @property
    def url(self) -> str:
        """Its address, for users; OpenAI names the folder by the hash."""
        if self.sha256:
            return f"https://openaipublic.azureedge.net/clip/models/{self.sha256}/{self.file}"
        return self.hub_url

    @property
    def hub_url(self) -> str:
        """Its address on the Hugging Face Hub: of the file, or if its name is unknown, of all files."""
        repo, names = split_place(str(self.repo))
        page = f"https://huggingface.co/{repo}"
        return f"{page}/tree/main" if len(names) > 2 else f"{page}/resolve/main/{names[0]}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names that a copy in the cache folder may have."""
        other = Path(self.file).with_suffix(".safetensors" if self.sha256 else ".bin")
        return (self.file, other.as_posix())


INDEX = ".index.json"  # end of the name of the file that lists which tensor is in which shard
# files of open_clip's repositories; the first that exists is used
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# files in folders and repositories of any library. open_clip's names come first: timm's repositories
# have only the image tower under transformers' name
WEIGHT_FILES = (
    *HUB_FILES,
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)


def split_place(place: str, names: Sequence[str] = HUB_FILES) -> tuple[str, Sequence[str]]:
    """A repository, and the candidate files in it.

    Args:
        place: "owner/repository", with "/file" for that file or "/*" for any of `WEIGHT_FILES`.
        names: candidates if `place` does not name a file.
    """
    repo, file = "/".join(place.split("/", 2)[:2]), place.split("/", 2)[2:]
    return repo, WEIGHT_FILES if file == ["*"] else (file or names)


_OPENAI = {
    "ViT-B/32": (
        "ViT-B-32",
        "ViT-B-32.pt",
        "timm/vit_base_patch32_clip_224.openai",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "ViT-B/16": (
        "ViT-B-16",
        "ViT-B-16.pt",
        "timm/vit_base_patch16_clip_224.openai",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
    "ViT-L/14": (
        "ViT-L-14",
        "ViT-L-14.pt",
        "timm/vit_large_patch14_clip_224.openai",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "ViT-L/14@336px": (
        "ViT-L-14-336",
        "ViT-L-14-336px.pt",
        "timm/vit_large_patch14_clip_336.openai",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    ),
}

_MINI = Published(
    "mini.safetensors",
    architecture="mini",
    shipped=Path(__file__).parents[2] / "mini" / "mini.safetensors",
    short_side=224,  # as in training
    family="CLIP of this package",
    licence="MIT",
    gated=False,
)
_IMAGES = {
    "openai": (OPENAI_MEAN, OPENAI_STD),
    "half": (HALF, HALF),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_ACTIVATIONS = {"quick": "quick_gelu", "exact": "gelu", "-": ""}


def _table() -> tuple[dict[str, Architecture], dict[str, Published]]:
    """The contents of table.txt."""
    sizes: dict[str, Architecture] = {}
    rows: dict[str, Published] = {}
    text = (files("sfp.clip.checkpoints") / "table.txt").read_text(encoding="utf-8")
    family = ""
    for line in text.splitlines():
        if line.startswith("["):
            family = line.strip("[]")
        elif not line or line.startswith("#"):
            continue
        elif family == "architectures":
            name, *numbers = line.split()
            sizes[name] = Architecture(*map(int, numbers))
        else:
            name, architecture, activation, images, licence, gated, tokenizer, repo = line.split()
            plain = f"{name.replace(':', '-')}.safetensors"
            texts = tokenizer[1:] if tokenizer.startswith("=") else None
            rows[name] = Published(
                # a model with a tokenizer has its own folder for both
                plain if tokenizer == "-" or texts else f"{name}/model.safetensors",
                repo=repo,
                architecture=architecture,
                activation=_ACTIVATIONS[activation],
                mean=_IMAGES[images][0],
                std=_IMAGES[images][1],
                family=family,
                licence=None if licence == "-" else licence,
                gated={"-": None, "no": False, "yes": True}[gated],
                texts=texts,
                tokenizer=None
                if texts
                else {"-": None, "own": split_place(repo)[0]}.get(tokenizer, tokenizer),
            )
    return sizes, rows


ARCHITECTURES, _ROWS = _table()
# settings that names and shapes do not determine, by architecture, as in open_clip's configurations
SETTINGS = {"MobileCLIP2-L-14": {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}}
PUBLISHED = (
    {
        name: Published(
            file, sha256, repo, architecture, family="CLIP of OpenAI", licence="MIT", gated=False
        )
        for name, (architecture, file, repo, sha256) in _OPENAI.items()
    }
    | _ROWS
    | {MINI: _MINI}
)
"""By name: OpenAI's, those of table.txt ("model:tag" as in open_clip, or short names such as
"tipsv2-l14"), and the small model of this package."""


def in_pixels(mean: RGB, std: RGB) -> tuple[RGB, RGB]:
    """A normalisation for pixels in 0..255; OpenAI's is rounded as in published results."""
    if (tuple(mean), tuple(std)) == (OPENAI_MEAN, OPENAI_STD):
        return CLIP_MEAN, CLIP_STD
    return tuple(255 * x for x in mean), tuple(255 * x for x in std)  # type: ignore[return-value]


def find(weights: object) -> Published | None:
    """The row of a name, or of a file that is known by its path or name."""
    if isinstance(weights, str) and weights in PUBLISHED:
        return PUBLISHED[weights]
    return row_of(Path(weights)) if isinstance(weights, (str, Path)) else None


def short_side(weights: object) -> int | None:
    """Pixels to which the short side of images is resized by default: the row's, else 336.

    None without a CLIP: images keep their size.

    Args:
        weights: any source for `load_clip`; a name may be followed by "@" and its activation.
    """
    if isinstance(weights, str) and (bare := weights.rpartition("@")[0]) in PUBLISHED:
        weights = bare
    if isinstance(weights, str) and weights == NONE:
        return None
    row = find(weights)
    return row.short_side if row else SHORT_SIDE


def own_templates(weights: object) -> str:
    """Name of the prompt templates of the weights' authors: TIPSv2's for its rows, else CLIP's."""
    row = find(weights)
    return "tipsv2" if row and row.family == "TIPSv2" else "imagenet"


def on_disk(name: str) -> Path | None:
    """The file of a published name on this machine, or None; nothing is downloaded."""
    row = PUBLISHED[name]
    if row.shipped:
        return row.shipped if os.path.isfile(row.shipped) else None
    folders = [cache_dir("weights")]
    if home := home_dir():  # OpenAI's own package stores the same files there
        folders.append(home / ".cache" / "clip")
    for folder in folders:
        for file in row.files:
            if os.path.isfile(folder / file):  # also False if the folder cannot be read
                return folder / file
    from sfp.clip.checkpoints.download import on_hub

    return on_hub(row.repo) if row.repo else None


def row_of(path: Path) -> Published | None:
    """The row of a file that is shipped, has the name of a Hub checkpoint, or is in the Hub's cache."""
    folder = path.as_posix()
    for row in PUBLISHED.values():
        if row.shipped:
            if path.name == row.file and os.path.realpath(path) == os.path.realpath(row.shipped):
                return row
            continue
        repo, names = split_place(str(row.repo))
        in_cache = f"/models--{repo.replace('/', '--')}/" in folder and path.name in names
        named = not row.sha256 and any(f"/{folder}".endswith(f"/{file}") for file in row.files)
        if in_cache or named:
            return row
    return None
