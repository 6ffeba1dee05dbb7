"""Which checkpoints are published, where, and what their files do not tell.

A state dict says nothing of its activation, its attention heads or the normalisation of its images:
for the names in `PUBLISHED` these stand here. Sizes, activations, normalisations and repositories are
those of open_clip 3.3.0 (its model configs and table of pretrained weights); the hashes are OpenAI's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sfp.files import cache_dir, home_dir

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_MEAN = (122.771, 116.746, 104.094)  # the same in 0..255, as segmentation repositories round it
CLIP_STD = (68.501, 66.632, 70.323)
HALF = (0.5, 0.5, 0.5)
SHORT_SIDE = 336  # pixels, of the benchmarks
MINI = "mini"

RGB = tuple[float, float, float]


class WeightsError(RuntimeError):
    """Weights that cannot be had, read or trusted; the message says which and what to do."""


class LayoutError(WeightsError, ValueError):
    """Weights that are whole, but not those of a CLIP with a ViT that this package can run."""


@dataclass(frozen=True)
class Architecture:
    """The sizes of a CLIP with a ViT.

    Attributes:
        patch, image_size: in pixels.
        width, layers: of the image tower.
        text_width, text_layers: of the text tower, whose heads are 64 wide.
        embed_dim: of the joint space.
        head_width: of the image tower's attention.
    """

    patch: int
    image_size: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    embed_dim: int
    head_width: int = 64


ARCHITECTURES = {
    "ViT-B-32": Architecture(32, 224, 768, 12, 512, 12, 512),
    "ViT-B-32-256": Architecture(32, 256, 768, 12, 512, 12, 512),
    "ViT-B-16": Architecture(16, 224, 768, 12, 512, 12, 512),
    "ViT-B-16-plus-240": Architecture(16, 240, 896, 12, 640, 12, 640),
    "ViT-L-14": Architecture(14, 224, 1024, 24, 768, 12, 768),
    "ViT-L-14-336": Architecture(14, 336, 1024, 24, 768, 12, 768),
    "ViT-H-14": Architecture(14, 224, 1280, 32, 1024, 24, 1024, head_width=80),
    "ViT-H-14-378": Architecture(14, 378, 1280, 32, 1024, 24, 1024, head_width=80),
    "ViT-g-14": Architecture(14, 224, 1408, 40, 1024, 24, 1024, head_width=88),
    "ViT-bigG-14": Architecture(14, 224, 1664, 48, 1280, 32, 1280, head_width=104),
    "mini": Architecture(16, 224, 128, 12, 64, 2, 128),
}
HEAD_WIDTHS = {a.width: a.head_width for a in ARCHITECTURES.values()}  # of image towers, by width


@dataclass(frozen=True)
class Published:
    """A checkpoint that can be downloaded, or ships with this package.

    Attributes:
        file: its name in the cache folder.
        sha256: of the file on OpenAI's server, whose name states it. The Hugging Face Hub states one
            on download, and its cache names the file by it.
        repo: on the Hugging Face Hub; for OpenAI's weights the second source, in another format.
        shipped: path of a file that is part of this package.
        architecture: key of `ARCHITECTURES`, which the file is compared with; None compares nothing.
        activation: "quick_gelu" or "gelu".
        mean, std: normalisation of the images, RGB in 0..1.
        short_side: pixels to which the short side of images is resized by default.
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

    @property
    def url(self) -> str:
        """Its address, for people; OpenAI names the folder by the hash."""
        if self.sha256:
            return f"https://openaipublic.azureedge.net/clip/models/{self.sha256}/{self.file}"
        return self.hub_url

    @property
    def hub_url(self) -> str:
        """Its address on the Hugging Face Hub."""
        return f"https://huggingface.co/{self.repo}/resolve/main/{HUB_FILES[0]}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names that a copy in the cache folder may have."""
        other = Path(self.file).with_suffix(".safetensors" if self.sha256 else ".bin")
        return (self.file, str(other))


# what open_clip's repositories hold: the first of them that is there
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

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

# open_clip's model and tag, GELU (exact or quick), repository on the Hub; half: mean = std = 0.5
_HUB = """
ViT-B-32          laion400m_e32         quick timm/vit_base_patch32_clip_224.laion400m_e32
ViT-B-32          laion2b_s34b_b79k     exact laion/CLIP-ViT-B-32-laion2B-s34B-b79K
ViT-B-32          datacomp_xl_s13b_b90k exact laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K
ViT-B-32          metaclip_400m         quick timm/vit_base_patch32_clip_224.metaclip_400m
ViT-B-32          metaclip_fullcc       quick timm/vit_base_patch32_clip_224.metaclip_2pt5b
ViT-B-32-256      datacomp_s34b_b86k    exact laion/CLIP-ViT-B-32-256x256-DataComp-s34B-b86K
ViT-B-16          laion400m_e32         exact timm/vit_base_patch16_clip_224.laion400m_e32
ViT-B-16          laion2b_s34b_b88k     exact laion/CLIP-ViT-B-16-laion2B-s34B-b88K
ViT-B-16          datacomp_xl_s13b_b90k exact laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K
ViT-B-16          dfn2b                 quick apple/DFN2B-CLIP-ViT-B-16
ViT-B-16          metaclip_400m         quick timm/vit_base_patch16_clip_224.metaclip_400m
ViT-B-16          metaclip_fullcc       quick timm/vit_base_patch16_clip_224.metaclip_2pt5b
ViT-B-16-plus-240 laion400m_e31         exact timm/vit_base_patch16_plus_clip_240.laion400m_e31
ViT-L-14          laion400m_e32         exact timm/vit_large_patch14_clip_224.laion400m_e32
ViT-L-14          laion2b_s32b_b82k     exact laion/CLIP-ViT-L-14-laion2B-s32B-b82K half
ViT-L-14          datacomp_xl_s13b_b90k exact laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K
ViT-L-14          dfn2b                 quick apple/DFN2B-CLIP-ViT-L-14
ViT-L-14          dfn2b_s39b            exact apple/DFN2B-CLIP-ViT-L-14-39B
ViT-L-14          metaclip_400m         quick timm/vit_large_patch14_clip_224.metaclip_400m
ViT-L-14          metaclip_fullcc       quick timm/vit_large_patch14_clip_224.metaclip_2pt5b
ViT-H-14          laion2b_s32b_b79k     exact laion/CLIP-ViT-H-14-laion2B-s32B-b79K
ViT-H-14          dfn5b                 quick apple/DFN5B-CLIP-ViT-H-14
ViT-H-14          metaclip_fullcc       quick timm/vit_huge_patch14_clip_224.metaclip_2pt5b
ViT-H-14          metaclip_altogether   exact timm/vit_huge_patch14_clip_224.metaclip_altogether
ViT-H-14-378      dfn5b                 quick apple/DFN5B-CLIP-ViT-H-14-378
ViT-g-14          laion2b_s12b_b42k     exact laion/CLIP-ViT-g-14-laion2B-s12B-b42K
ViT-g-14          laion2b_s34b_b88k     exact laion/CLIP-ViT-g-14-laion2B-s34B-b88K
ViT-bigG-14       laion2b_s39b_b160k    exact laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
ViT-bigG-14       metaclip_fullcc       quick timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b
"""
_MINI = Published(
    "mini.safetensors",
    architecture="mini",
    shipped=Path(__file__).parents[2] / "mini" / "mini.safetensors",
    short_side=224,  # on which it was trained
)
PUBLISHED = (
    {
        name: Published(file, sha256, repo, architecture)
        for name, (architecture, file, repo, sha256) in _OPENAI.items()
    }
    | {
        f"{architecture}:{tag}": Published(
            f"{architecture}-{tag}.safetensors",
            repo=repo,
            architecture=architecture,
            activation={"quick": "quick_gelu", "exact": "gelu"}[gelu],
            mean=HALF if half else OPENAI_MEAN,
            std=HALF if half else OPENAI_STD,
        )
        for architecture, tag, gelu, repo, *half in map(str.split, _HUB.strip().splitlines())
    }
    | {MINI: _MINI}
)
"""By name: OpenAI's, "model:tag" as open_clip prints them, and the small model of this package."""


def in_pixels(mean: RGB, std: RGB) -> tuple[RGB, RGB]:
    """A normalisation for pixels in 0..255; OpenAI's is rounded as published numbers have it."""
    if (tuple(mean), tuple(std)) == (OPENAI_MEAN, OPENAI_STD):
        return CLIP_MEAN, CLIP_STD
    return tuple(255 * x for x in mean), tuple(255 * x for x in std)  # type: ignore[return-value]


def find(weights: object) -> Published | None:
    """The row of a name, or of the path of a file that is known by its place or name."""
    if isinstance(weights, str) and weights in PUBLISHED:
        return PUBLISHED[weights]
    return row_of(Path(weights)) if isinstance(weights, (str, Path)) else None


def short_side(weights: object) -> int:
    """Pixels to which the short side of images is resized by default: the row's, else 336.

    Args:
        weights: whatever `load_clip` takes; a name may have its activation behind "@".
    """
    if isinstance(weights, str) and (bare := weights.rpartition("@")[0]) in PUBLISHED:
        weights = bare
    row = find(weights)
    return row.short_side if row else SHORT_SIDE


def on_disk(name: str) -> Path | None:
    """The file of a published name on this machine, or None; nothing is downloaded."""
    row = PUBLISHED[name]
    if row.shipped:
        return row.shipped if os.path.isfile(row.shipped) else None
    folders = [cache_dir("weights")]
    if home := home_dir():  # where OpenAI's own package keeps the same files
        folders.append(home / ".cache" / "clip")
    for folder in folders:
        for file in row.files:
            if os.path.isfile(folder / file):  # False too where the folder cannot be read
                return folder / file
    from sfp.clip.checkpoints.download import on_hub

    return on_hub(row.repo) if row.repo else None


def row_of(path: Path) -> Published | None:
    """The row of a file that is shipped, has a Hub checkpoint's name, or lies in the Hub's cache."""
    folder = path.as_posix()
    for row in PUBLISHED.values():
        if row.shipped:
            if path.name == row.file and os.path.realpath(path) == os.path.realpath(row.shipped):
                return row
        elif (path.name in row.files and not row.sha256) or (
            f"/models--{str(row.repo).replace('/', '--')}/" in folder and path.name in HUB_FILES
        ):
            return row
    return None
