"""Which checkpoints are published, where, and what their files do not tell.

A state dict says nothing of its activation, its attention heads or the normalisation of its images:
for the names in `PUBLISHED` these stand here. Sizes, activations, normalisations and repositories are
those of open_clip 3.3.0 (its model configs and table of pretrained weights); the hashes are OpenAI's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB in 0..1
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_MEAN = (122.771, 116.746, 104.094)  # the same in 0..255, as segmentation repositories round it
CLIP_STD = (68.501, 66.632, 70.323)
HALF = (0.5, 0.5, 0.5)

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
}
HEAD_WIDTHS = {a.width: a.head_width for a in ARCHITECTURES.values()}  # of image towers, by width


@dataclass(frozen=True)
class Published:
    """A checkpoint that can be downloaded.

    Attributes:
        file: its name in the cache folder.
        sha256: of the file, where its publisher states it beforehand. The Hugging Face Hub states one
            on download, and its cache names the file by it.
        repo: on the Hugging Face Hub; None for OpenAI's own server.
        architecture: key of `ARCHITECTURES`, which the file is compared with; None compares nothing.
        activation: "quick_gelu" or "gelu".
        mean, std: normalisation of the images, RGB in 0..1.
    """

    file: str
    sha256: str | None = None
    repo: str | None = None
    architecture: str | None = None
    activation: str = "quick_gelu"
    mean: RGB = OPENAI_MEAN
    std: RGB = OPENAI_STD

    @property
    def url(self) -> str:
        """Its address, for people; OpenAI names the folder by the hash."""
        if self.repo:
            return f"https://huggingface.co/{self.repo}/resolve/main/{HUB_FILES[0]}"
        return f"https://openaipublic.azureedge.net/clip/models/{self.sha256}/{self.file}"

    @property
    def files(self) -> tuple[str, ...]:
        """Names that a copy in the cache folder may have."""
        return (self.file, str(Path(self.file).with_suffix(".bin"))) if self.repo else (self.file,)


# what open_clip's repositories hold: the first of them that is there
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_OPENAI = {
    "ViT-B/32": (
        "ViT-B-32",
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    "ViT-B/16": (
        "ViT-B-16",
        "ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
    "ViT-L/14": (
        "ViT-L-14",
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    "ViT-L/14@336px": (
        "ViT-L-14-336",
        "ViT-L-14-336px.pt",
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
PUBLISHED = {
    name: Published(file, sha256, architecture=architecture)
    for name, (architecture, file, sha256) in _OPENAI.items()
} | {
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
"""By name: OpenAI's, and "model:tag" as open_clip prints them."""


def in_pixels(mean: RGB, std: RGB) -> tuple[RGB, RGB]:
    """A normalisation for pixels in 0..255; OpenAI's is rounded as published numbers have it."""
    if (tuple(mean), tuple(std)) == (OPENAI_MEAN, OPENAI_STD):
        return CLIP_MEAN, CLIP_STD
    return tuple(255 * x for x in mean), tuple(255 * x for x in std)  # type: ignore[return-value]


def row_of(path: Path) -> Published | None:
    """The row of a file that has the name of a Hub checkpoint, or lies in the Hub's cache."""
    folder = path.as_posix()
    for row in PUBLISHED.values():
        if row.repo and (
            path.name in row.files
            or (f"/models--{row.repo.replace('/', '--')}/" in folder and path.name in HUB_FILES)
        ):
            return row
    return None
