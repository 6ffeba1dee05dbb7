"""The embedded mini world: generated scenes, and a small CLIP that was trained on nothing else.

The model knows the eighteen names in `CLASSES` and their `ALIASES`; any other word has an embedding
of zero. Its training used the generator's patch labels besides captions (see `train`), so that its
middle layers group patches as those of real CLIPs do. What methods score on it says whether they run
as intended, not how they fare with real CLIPs.
"""

from pathlib import Path

from sfp.mini.scenes import ALIASES, CLASSES, PALETTE, STUFF, THINGS, prepare, scene

__all__ = [
    "ALIASES",
    "CLASSES",
    "PALETTE",
    "STUFF",
    "THINGS",
    "checkpoint",
    "prepare",
    "scene",
    "short_side",
]


def checkpoint() -> Path:
    """Path of the shipped weights: OpenAI's layout, patch 16, 224 px, half-precision matrices.

    Raises:
        FileNotFoundError: If this copy of the package came without them.
    """
    path = Path(__file__).with_name("mini.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: take it from the repository, or train it with "
            f"`python -m sfp.mini.train --out runs/mini` and copy runs/mini/mini.safetensors there"
        )
    return path


def short_side(weights: object) -> int:
    """Pixels that the short side of images is resized to: the benchmarks' 336, 224 for "mini"."""
    return 224 if weights == "mini" else 336
