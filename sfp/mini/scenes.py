"""Little painted scenes with a class for every pixel: the world that the mini CLIP lives in.

`scene(seed)` draws one to four *things* (ball, house, ... cat) in front of one or two kinds of
*stuff* (sky, grass, ...). Everything follows from the seed, so a benchmark is a list of integers
and needs no download. Only numpy and OpenCV are used.
"""

import colorsys
import contextlib
import errno
import functools
import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import ArrayLike

THINGS = (
    "ball",
    "house",
    "tree",
    "flower",
    "fish",
    "sun",
    "box",
    "car",
    "mushroom",
    "boat",
    "star",
    "cat",
)
STUFF = ("sky", "grass", "sand", "water", "night", "brick wall")
CLASSES = THINGS + STUFF

# Other names that the captions use for a class; "night sky" is avoided because it contains "sky".
ALIASES: dict[str, tuple[str, ...]] = {
    "ball": ("beach ball",),
    "house": ("cottage",),
    "tree": (),
    "flower": ("blossom",),
    "fish": ("goldfish",),
    "sun": (),
    "box": ("crate", "wooden crate"),
    "car": ("automobile",),
    "mushroom": ("toadstool",),
    "boat": ("sailboat", "ship"),
    "star": ("paper star",),
    "cat": ("kitten",),
    "sky": ("clouds", "cloudy sky"),
    "grass": ("lawn", "meadow"),
    "sand": ("beach", "desert"),
    "water": ("sea", "ocean"),
    "night": ("starry night",),
    "brick wall": ("bricks", "wall"),
}

PALETTE = (
    (214, 69, 65),
    (150, 92, 60),
    (38, 116, 56),
    (222, 93, 169),
    (255, 127, 80),
    (255, 200, 40),
    (176, 132, 72),
    (120, 72, 180),
    (170, 24, 60),
    (240, 240, 240),
    (255, 240, 130),
    (110, 110, 110),
    (135, 196, 240),
    (112, 190, 74),
    (232, 212, 160),
    (36, 110, 180),
    (24, 24, 72),
    (180, 84, 60),
)

# Captions for several names at once; one name alone goes into a prompt template of the caller.
SEVERAL = (
    "{}",
    "a photo of {}.",
    "a picture of {}.",
    "a painting of {}.",
    "a drawing of {}.",
    "there is {}.",
    "a scene with {}.",
)

_SUBPIXEL_BITS = 4  # OpenCV draws at 1/16 pixel


@functools.cache
def fingerprint() -> str:
    """Hash of sixteen drawn scenes, so that it changes when the pictures do and only then."""
    drawn = hashlib.sha256()
    for seed in range(16):
        for array in scene(seed):
            drawn.update(array.tobytes())
    return drawn.hexdigest()[:16]


def scene(seed: int, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Draw one scene.

    Args:
        seed: Decides everything in the picture.
        size: Side length in pixels.

    Returns:
        The RGB picture (size, size, 3) and the class indices (size, size), both uint8.
    """
    rng = np.random.default_rng(seed)
    image, labels = _background(rng, size)
    placed: list[tuple[float, float, float]] = []
    count = int(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15]))
    for name in rng.choice(THINGS, count, replace=False):
        spot = _free_spot(rng, placed, largest=0.62 if count < 3 else 0.48)
        if spot is not None:
            placed.append(spot)
            _place(image, labels, str(name), rng, *spot)
    return _photograph(rng, image), labels


def caption(names: Sequence[str], rng: np.random.Generator, templates: Sequence[str]) -> str:
    """Write a caption for class names; three mentions in ten use an alias.

    Args:
        names: One or more entries of `CLASSES`.
        rng: Source of randomness.
        templates: Prompt templates with one `{}`, used when there is a single name.

    Returns:
        For example `"a photo of a tree and a house on grass."`.
    """
    spoken = []
    for name in names:
        other = ALIASES[name] or (name,)
        spoken.append(other[rng.integers(len(other))] if rng.random() < 0.3 else name)
    if len(names) == 1:
        return templates[int(rng.integers(len(templates)))].format(spoken[0])

    things = [f"a {s}" for s, n in zip(spoken, names, strict=True) if n in THINGS]
    stuff = [s for s, n in zip(spoken, names, strict=True) if n in STUFF]
    text = " and ".join(things) or stuff.pop(0)
    if stuff:
        text += rng.choice([" and ", " with ", " on ", " by "]) + " and ".join(stuff)
    return SEVERAL[rng.integers(len(SEVERAL))].format(text)


def prepare(root: str | Path, scenes: int = 200, first_seed: int = 900_000) -> Path:
    """Make sure that the benchmark lies on disk in mmseg's layout.

    Writes `images/<seed>.png` and `labels/<seed>.png` (class indices) with a `manifest.json` that
    holds how they were drawn and a checksum of every file. An intact benchmark is left as it is.
    A new one is written beside `root` and then renamed, so that it is never seen incomplete and any
    number of processes may call this at once.

    Args:
        root: Folder of the benchmark; its parents are created.
        scenes: Number of scenes.
        first_seed: Seed of the first scene; the others count on.

    Returns:
        `root` as a path.

    Raises:
        FileExistsError: If `root` holds something that is no benchmark of this function.
    """
    root = Path(root)
    recipe = {"generator": fingerprint(), "scenes": scenes, "first_seed": first_seed}
    if _intact(root, recipe):
        return root
    if _foreign(root):
        raise FileExistsError(f"{root} holds other files; choose an empty or a new folder")

    partial = root.with_name(f".{root.name}.{uuid.uuid4().hex}")
    try:
        _write(partial, recipe)
        _swap(partial, root, recipe)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root


def _write(folder: Path, recipe: dict) -> None:
    files = {}
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for seed in range(recipe["first_seed"], recipe["first_seed"] + recipe["scenes"]):
        image, labels = scene(seed)
        for kind, pixels in (("images", image[..., ::-1]), ("labels", labels)):  # OpenCV: BGR
            data = cv2.imencode(".png", pixels)[1].tobytes()
            name = f"{kind}/{seed}.png"
            (folder / name).write_bytes(data)
            files[name] = hashlib.sha256(data).hexdigest()
    manifest = {**recipe, "classes": CLASSES, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _swap(partial: Path, root: Path, recipe: dict) -> None:
    """Put `partial` in the place of `root`, unless another process has done so meanwhile."""
    while True:
        try:
            partial.rename(root)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else: something is there
                raise
        with contextlib.suppress(FileNotFoundError):  # another process has just moved it away
            before = root.stat().st_ino
            if _intact(root, recipe):
                return
            if (
                root.stat().st_ino == before
            ):  # still the outdated one, not another process's new one
                shutil.rmtree(root.rename(partial.with_name(f"{partial.name}.old")))


def _foreign(root: Path) -> bool:
    """Whether a folder holds anything that `prepare` did not write."""
    if not root.exists() or not any(root.iterdir()):
        return False
    try:
        manifest = json.loads((root / "manifest.json").read_text())
    except (OSError, ValueError):
        return True
    names = {path.name for path in root.iterdir()}
    return "generator" not in manifest or not names <= {"images", "labels", "manifest.json"}


def _intact(root: Path, recipe: dict) -> bool:
    try:
        manifest = json.loads((root / "manifest.json").read_text())
        if any(manifest.get(key) != value for key, value in recipe.items()):
            return False
        return all(
            hashlib.sha256((root / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


# ------------------------------------------------------------------------------------ composition


def _background(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One texture, or two that meet at an uneven horizon: float picture and labels."""
    upper = str(rng.choice(["sky", "night", "brick wall"]))
    lower = str(rng.choice(["grass", "sand", "water"]))
    if rng.random() < 0.2:
        upper, lower = (str(name) for name in rng.choice(STUFF, 2, replace=False))
    if rng.random() < 0.4:
        upper = lower = str(rng.choice(STUFF))

    image = _TEXTURES[upper](rng, size)
    labels = np.full((size, size), CLASSES.index(upper), np.uint8)
    if lower != upper:
        across = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        horizon = rng.uniform(0.35, 0.7) + rng.uniform(-0.15, 0.15) * across
        horizon = horizon + 0.05 * (_noise(rng, size, 5)[0] - 0.5)
        horizon = horizon + rng.uniform(0.005, 0.04) * (_noise(rng, size, 30)[0] - 0.5)
        below = np.arange(size)[:, None] > size * horizon[None]  # (size, size)
        image[below] = _TEXTURES[lower](rng, size)[below]
        labels[below] = CLASSES.index(lower)
    return image, labels


def _free_spot(
    rng: np.random.Generator, placed: list[tuple[float, float, float]], largest: float
) -> tuple[float, float, float] | None:
    """Find a centre and extent (as fractions of the picture) that hardly overlap other objects."""
    for _ in range(30):
        extent = rng.uniform(0.30, largest)
        x, y = rng.uniform(0.42 * extent, 1 - 0.42 * extent, 2)
        if all(np.hypot(x - a, y - b) > 0.43 * (extent + c) for a, b, c in placed):
            return x, y, extent
    return None


def _place(
    image: np.ndarray,
    labels: np.ndarray,
    name: str,
    rng: np.random.Generator,
    x: float,
    y: float,
    extent: float,
) -> None:
    """Paint an object upright on its own tile, then rotate, flip and paste it (in place)."""
    size = len(labels)
    tile = _Tile(2 * int(extent * size))  # twice the final size: the warp halves it smoothly
    _THINGS[name](rng, tile)

    angle = np.deg2rad(rng.uniform(-1, 1) * _TURN.get(name, 14))
    flip = rng.choice([-1, 1])
    c, s = 0.5 * np.cos(angle), 0.5 * np.sin(angle)
    turn = np.array([[c * flip, -s], [s * flip, c]])
    shift = np.array([x, y]) * size - turn @ np.full(2, tile.side / 2)
    matrix = np.hstack([turn, shift[:, None]])
    rgb, alpha = (cv2.warpAffine(a, matrix, (size, size)) for a in (tile.rgb, tile.alpha))

    light = np.linspace(rng.uniform(0.85, 1.1), rng.uniform(0.85, 1.1), size, dtype=np.float32)
    alpha = alpha[..., None]
    # The tile is black outside the shape and the warp has multiplied by coverage already.
    np.multiply(image, 1 - alpha, out=image)
    image += rgb * light[:, None, None]
    labels[alpha[..., 0] > 0.5] = CLASSES.index(name)


def _photograph(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Light, contrast, tint, softness and grain of the whole picture; float to uint8."""
    size = len(image)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    light = 1 + rng.uniform(-0.12, 0.12) * ramp[:, None] + rng.uniform(-0.12, 0.12) * ramp[None]
    tint = rng.uniform(0.93, 1.07, 3) * rng.uniform(0.85, 1.12)
    image = image * light[..., None].astype(np.float32) * tint.astype(np.float32)
    image = 0.5 + (image - 0.5) * np.float32(rng.uniform(0.82, 1.1))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    image = image + rng.uniform(0, 0.025) * rng.standard_normal(image.shape, np.float32)
    return (image * 255 + 0.5).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------ stuff


def _noise(
    rng: np.random.Generator, size: int, cells: int, cells_x: int | None = None
) -> np.ndarray:
    """Smooth random values in about [0, 1], `cells` bumps high and `cells_x` wide: (size, size)."""
    grid = rng.random((cells, cells_x or cells), np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)


def _hue(rng: np.random.Generator, hue: tuple, saturation: tuple, value: tuple) -> np.ndarray:
    """A random colour from ranges of hue (in turns), saturation and value: (3,) float32."""
    h, s, v = (rng.uniform(*span) for span in (hue, saturation, value))
    return np.array(colorsys.hsv_to_rgb(h % 1, s, v), np.float32)


def _mix(a: np.ndarray, b: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Blend colours a to b by an (H, W) map."""
    amount = amount[..., None]
    return a * (1 - amount) + b * amount


def _sky(rng: np.random.Generator, size: int) -> np.ndarray:
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None] * np.ones(size, np.float32)
    deep = _hue(rng, (0.53, 0.64), (0.45, 0.8), (0.65, 0.95))
    image = _mix(deep, deep * 0.5 + 0.5, down * 0.8)
    puff = 0.55 * _noise(rng, size, 5, 4) + 0.3 * _noise(rng, size, 11, 9)
    puff = puff + 0.15 * _noise(rng, size, 26, 22)
    cloud = ((puff - rng.uniform(0.4, 0.52)) * 5).clip(0, 0.95)
    return _mix(image, np.array([0.99, 0.98, 0.97], np.float32), cloud)


def _grass(rng: np.random.Generator, size: int) -> np.ndarray:
    dark = _hue(rng, (0.22, 0.36), (0.6, 0.9), (0.28, 0.45))
    light = _hue(rng, (0.2, 0.34), (0.55, 0.85), (0.6, 0.85))
    blades = 0.5 * _noise(rng, size, 22, 112) + 0.35 * _noise(rng, size, 40, 160)
    return _mix(dark, light, (blades + 0.35 * _noise(rng, size, 6) - 0.1).clip(0, 1))


def _sand(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _hue(rng, (0.08, 0.13), (0.25, 0.5), (0.75, 0.95))
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    bend = 5 * _noise(rng, size, 5) + rng.uniform(-4, 4) * x
    ripples = np.sin(y * rng.uniform(45, 75) + 2 * bend)
    grain = rng.standard_normal((size, size), np.float32)
    return base * (1 + 0.07 * ripples + 0.06 * grain)[..., None]


def _water(rng: np.random.Generator, size: int) -> np.ndarray:
    deep = _hue(rng, (0.5, 0.65), (0.65, 0.95), (0.35, 0.6))
    crest = deep * 0.35 + _hue(rng, (0.48, 0.58), (0.2, 0.5), (0.85, 1.0)) * 0.65
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    bend = 1.3 * np.sin(x * rng.uniform(25, 50) + rng.uniform(0, 6)) + 3 * _noise(rng, size, 6)
    wave = np.sin(y * rng.uniform(60, 100) + bend)
    return _mix(deep, crest, (0.25 + 0.9 * wave).clip(0, 1) ** 2 * 0.85)


def _night(rng: np.random.Generator, size: int) -> np.ndarray:
    dark = _hue(rng, (0.6, 0.75), (0.3, 0.8), (0.06, 0.2))
    image = _mix(dark, dark * 1.9 + 0.02, _noise(rng, size, 5).clip(0, 1))
    for _ in range(rng.integers(90, 170)):
        at = tuple(int(v) for v in rng.integers(0, size * 16, 2))
        glow = float(rng.uniform(0.55, 1))
        radius = int(16 * rng.uniform(0.4, 1.3) * size / 224)
        cv2.circle(image, at, radius, (glow, glow, glow * 0.92), -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    return image


def _brick_wall(rng: np.random.Generator, size: int) -> np.ndarray:
    base = _hue(rng, (-0.02, 0.07), (0.4, 0.75), (0.45, 0.75))
    mortar = _hue(rng, (0.05, 0.15), (0.03, 0.15), (0.65, 0.88))
    height = rng.uniform(12, 20) * size / 224
    y, x = np.mgrid[:size, :size].astype(np.float32)
    row = (y + rng.uniform(0, height)) / height
    column = (x + rng.uniform(0, 9)) / (2.2 * height) + 0.5 * (row.astype(int) % 2)
    shade = rng.uniform(0.8, 1.2, (64, 64)).astype(np.float32)
    image = base * shade[row.astype(int) % 64, column.astype(int) % 64][..., None]
    image = image * (0.9 + 0.2 * _noise(rng, size, 70))[..., None]
    joint = 1.8 * size / 224
    gap = (row % 1 * height < joint) | (column % 1 * 2.2 * height < joint)
    image[gap] = mortar
    return image


_TEXTURES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "night": _night,
    "brick wall": _brick_wall,
}


# ----------------------------------------------------------------------------------------- things


class _Tile:
    """A square canvas in unit coordinates, x to the right and y down.

    Attributes:
        side: Side length in pixels.
        rgb: Colours premultiplied by coverage, (side, side, 3) float32.
        alpha: Coverage, (side, side) float32.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.rgb = np.zeros((side, side, 3), np.float32)
        self.alpha = np.zeros((side, side), np.float32)
        self.y, self.x = np.mgrid[:side, :side].astype(np.float32) / side

    def polygon(self, points: ArrayLike, fill: ArrayLike) -> None:
        """Fill a polygon with a colour or with a picture (side, side, 3)."""
        mask = np.zeros((self.side, self.side), np.uint8)
        cv2.fillPoly(mask, [self._fixed(points)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        self._paint(mask, fill)

    def ellipse(
        self, centre: ArrayLike, radii: ArrayLike, fill: ArrayLike, angle: float = 0.0
    ) -> None:
        """Fill an ellipse, turned by `angle` radians."""
        t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        outline = np.stack([np.cos(t), np.sin(t)], 1) * np.asarray(radii)
        self.polygon(_turned(outline, angle) + np.asarray(centre), fill)

    def line(self, points: ArrayLike, width: float, colour: ArrayLike) -> None:
        """Draw a connected line."""
        mask = np.zeros((self.side, self.side), np.uint8)
        thickness = max(1, round(width * self.side))
        cv2.polylines(
            mask, [self._fixed(points)], False, 255, thickness, cv2.LINE_AA, _SUBPIXEL_BITS
        )
        self._paint(mask, colour)

    def _fixed(self, points: ArrayLike) -> np.ndarray:
        return np.round(np.asarray(points) * self.side * 2**_SUBPIXEL_BITS).astype(np.int32)

    def _paint(self, mask: np.ndarray, fill: ArrayLike) -> None:
        x, y, w, h = cv2.boundingRect(mask)  # blend only where something changes
        box = np.s_[y : y + h, x : x + w]
        cover = mask[box].astype(np.float32) / 255
        colour = np.asarray(fill, np.float32)
        colour = colour[box] if colour.ndim == 3 else colour
        self.rgb[box] += (colour - self.rgb[box]) * cover[..., None]
        self.alpha[box] += (1 - self.alpha[box]) * cover


def _turned(points: np.ndarray, angle: float) -> np.ndarray:
    """Rotate points (..., 2) about the origin."""
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, s], [-s, c]])


def _vivid(rng: np.random.Generator) -> np.ndarray:
    """Any saturated hue, so that colour alone never gives a class away."""
    return _hue(rng, (0, 1), (0.55, 0.95), (0.6, 1.0))


def _ball(rng: np.random.Generator, tile: _Tile) -> None:
    one = _vivid(rng)
    two = np.array([0.97, 0.97, 0.95], np.float32) if rng.random() < 0.5 else _vivid(rng)
    bands = (np.sin(tile.y * rng.uniform(24, 32) + rng.uniform(0, 6)) * 4 + 0.5).clip(0, 1)
    shine = 1.12 - 0.75 * ((tile.x - 0.38) ** 2 + (tile.y - 0.35) ** 2)
    tile.ellipse((0.5, 0.5), (0.47, 0.47), _mix(one, two, bands) * shine[..., None])


def _house(rng: np.random.Generator, tile: _Tile) -> None:
    wall = _hue(rng, (0, 1), (0.15, 0.5), (0.75, 1.0))
    roof = _hue(rng, (0, 1), (0.4, 0.9), (0.3, 0.65))
    siding = 1 - 0.14 * ((tile.y * 18) % 1 < 0.2)
    tiles = 1 - 0.35 * (np.sin(tile.y * 85) > 0.3) * (np.sin(tile.x * 70) > -0.5)
    tile.polygon([(0.68, 0.1), (0.8, 0.1), (0.8, 0.4), (0.68, 0.4)], (0.5, 0.27, 0.22))
    tile.polygon([(0.12, 0.45), (0.88, 0.45), (0.88, 0.96), (0.12, 0.96)], wall * siding[..., None])
    tile.polygon([(0.02, 0.5), (0.5, 0.06), (0.98, 0.5)], roof * tiles[..., None])
    tile.polygon([(0.42, 0.64), (0.6, 0.64), (0.6, 0.96), (0.42, 0.96)], roof * 0.6)
    glass = (1.0, 0.93, 0.55) if rng.random() < 0.5 else (0.6, 0.8, 0.95)
    for left in (0.18, 0.66):
        pane = np.array([(0, 0), (0.17, 0), (0.17, 0.18), (0, 0.18)]) + np.array([left, 0.58])
        tile.polygon(pane, glass)
        tile.line([*pane, pane[0]], 0.02, (0.97, 0.97, 0.97))
        tile.line([pane[0] + (0.085, 0), pane[3] + (0.085, 0)], 0.015, (0.97, 0.97, 0.97))


def _tree(rng: np.random.Generator, tile: _Tile) -> None:
    green = _hue(rng, (0.2, 0.42), (0.55, 0.9), (0.3, 0.6))
    bark = _hue(rng, (0.05, 0.09), (0.4, 0.7), (0.3, 0.5))
    tile.polygon([(0.42, 0.6), (0.58, 0.6), (0.62, 0.98), (0.38, 0.98)], bark)
    speckle = _noise(rng, tile.side, 18)
    leaves = green * (0.6 + 0.9 * speckle)[..., None]
    if rng.random() < 0.5:
        for top, half in ((0.4, 0.4), (0.21, 0.33), (0.02, 0.25)):
            skirt = np.linspace(-1, 1, 9)
            hem = [(0.5 + half * u, top + 0.4 + 0.04 * (i % 2)) for i, u in enumerate(skirt)]
            tile.polygon([(0.5, top), *hem[::-1]], leaves)
            tile.line(hem, 0.012, green * 0.4)
    else:
        for _ in range(2):
            for angle in np.arange(6) + rng.uniform(0, 1):
                at = (0.5 + 0.22 * np.cos(angle), 0.36 + 0.17 * np.sin(angle))
                tile.ellipse(at, (0.2, 0.18), leaves)
        tile.ellipse((0.5, 0.35), (0.25, 0.2), leaves)
        fruit = _hue(rng, (-0.04, 0.14), (0.8, 1.0), (0.8, 1.0))
        for _ in range(rng.choice([0, 9])):
            angle, far = rng.uniform(0, 6.3), rng.uniform(0.05, 1)
            at = (0.5 + 0.33 * far * np.cos(angle), 0.36 + 0.27 * far * np.sin(angle))
            tile.ellipse(at, (0.032, 0.032), fruit)


def _flower(rng: np.random.Generator, tile: _Tile) -> None:
    petal, heart = _vivid(rng), _hue(rng, (0.08, 0.15), (0.7, 1.0), (0.75, 1.0))
    leaf = _hue(rng, (0.28, 0.38), (0.6, 0.9), (0.35, 0.6))
    tile.line([(0.5, 0.5), (0.5, 0.98)], 0.07, leaf)
    for side in (-1, 1):
        tile.ellipse((0.5 + 0.17 * side, 0.84), (0.19, 0.075), leaf, angle=-0.55 * side)
    count = rng.integers(6, 9)
    centre = np.array([0.5, 0.37])
    away = np.hypot(tile.x - centre[0], tile.y - centre[1])
    shade = _mix(petal * 0.55, petal * 0.65 + 0.35, ((away - 0.12) * 4.5).clip(0, 1))
    for i in range(count):
        angle = 2 * np.pi * (i + 0.25) / count
        ray = _turned(np.array([1.0, 0.0]), angle)
        tile.ellipse(centre + 0.23 * ray, (0.145, 0.1), shade, angle)
        tile.line([centre + 0.12 * ray, centre + 0.33 * ray], 0.014, petal * 0.4)
    tile.ellipse(centre, (0.12, 0.12), heart)
    for i in range(12):
        seed = centre + _turned(np.array([0.025 * np.sqrt(i + 1), 0.0]), 2.4 * i)
        tile.ellipse(seed, (0.016, 0.016), heart * 0.45)


def _fish(rng: np.random.Generator, tile: _Tile) -> None:
    skin = _vivid(rng)
    fin = _vivid(rng) * 0.85
    rays = 1 - 0.35 * (np.sin(tile.y * 95) > 0.2)
    tile.polygon([(0.68, 0.5), (0.98, 0.2), (0.91, 0.5), (0.98, 0.8)], fin * rays[..., None])
    stripes = 1 - 0.35 * (np.sin(tile.x * 95) > 0.2)
    tile.polygon([(0.28, 0.32), (0.42, 0.1), (0.66, 0.16), (0.64, 0.36)], fin * stripes[..., None])
    tile.polygon([(0.38, 0.72), (0.52, 0.9), (0.62, 0.68)], fin * stripes[..., None])
    # Scales: rows of half discs, each row shifted by half a scale.
    step = 0.085
    column = np.floor(tile.x / step)
    u = tile.x / step - column - 0.5
    v = (tile.y / step + 0.5 * (column % 2)) % 1 - 0.5
    ring = np.abs(np.hypot(u + 0.4, v * 1.4) - 0.62) < 0.13
    belly = 0.75 + 0.5 * tile.y
    body = skin * np.where(ring, 0.5, belly)[..., None]
    tile.ellipse((0.42, 0.5), (0.39, 0.27), body.clip(0, 1))
    head = (skin * 0.55 + 0.4).clip(0, 1)
    t = np.linspace(np.pi * 0.68, np.pi * 1.32, 14)
    face = np.stack([0.42 + 0.39 * np.cos(t), 0.5 + 0.27 * np.sin(t)], 1)
    tile.polygon(face, head)
    tile.ellipse((0.15, 0.45), (0.055, 0.055), (1, 1, 1))
    tile.ellipse((0.14, 0.45), (0.028, 0.028), (0.05, 0.05, 0.08))


def _sun(rng: np.random.Generator, tile: _Tile) -> None:
    gold = _hue(rng, (0.09, 0.155), (0.75, 1.0), (0.92, 1.0))
    count = int(rng.integers(11, 15))
    for i in range(count):
        angle = 2 * np.pi * i / count
        ray = np.array([(0.28, -0.085), (0.49, 0.0), (0.28, 0.085)])
        tile.polygon(_turned(ray, angle) + 0.5, gold * np.array([1, 0.82, 0.75], np.float32))
    glow = np.hypot(tile.x - 0.5, tile.y - 0.5) * 3
    disc = _mix(np.array([1, 0.98, 0.8], np.float32), gold, glow.clip(0, 1))
    tile.ellipse((0.5, 0.5), (0.31, 0.31), disc)


def _box(rng: np.random.Generator, tile: _Tile) -> None:
    wood = _hue(rng, (0.06, 0.12), (0.4, 0.85), (0.5, 0.85))
    grain = 0.88 + 0.24 * _noise(rng, tile.side, 60, 5)
    planks = wood * (grain * np.where((tile.x * 6.5) % 1 < 0.1, 0.4, 0.85))[..., None]
    tile.polygon([(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)], planks)
    beam, edge = np.minimum(wood * 1.15, 1), wood * 0.35
    beams = [[(0.14, 0.86), (0.86, 0.14)]]
    if rng.random() < 0.6:
        beams.append([(0.14, 0.14), (0.86, 0.86)])
    beams.append([(0.12, 0.12), (0.88, 0.12), (0.88, 0.88), (0.12, 0.88), (0.12, 0.12)])
    for points in beams:
        tile.line(points, 0.13, edge)
        tile.line(points, 0.095, beam)


def _car(rng: np.random.Generator, tile: _Tile) -> None:
    paint = _vivid(rng)
    tile.polygon([(0.2, 0.5), (0.32, 0.22), (0.66, 0.22), (0.82, 0.5)], paint)
    glass = (0.72, 0.87, 0.95)
    tile.polygon([(0.28, 0.48), (0.36, 0.28), (0.48, 0.28), (0.48, 0.48)], glass)
    tile.polygon([(0.53, 0.48), (0.53, 0.28), (0.63, 0.28), (0.73, 0.48)], glass)
    body = [(0.02, 0.54), (0.12, 0.46), (0.86, 0.46), (0.98, 0.56), (0.98, 0.74), (0.02, 0.74)]
    tile.polygon(body, paint * (1.08 - 0.3 * tile.y)[..., None])
    tile.line([(0.03, 0.72), (0.97, 0.72)], 0.03, paint * 0.45)
    tile.line([(0.5, 0.48), (0.5, 0.7)], 0.012, paint * 0.5)
    tile.ellipse((0.94, 0.58), (0.035, 0.035), (1, 0.95, 0.6))
    tile.ellipse((0.05, 0.59), (0.025, 0.035), (0.85, 0.15, 0.1))
    for x in (0.25, 0.75):
        tile.ellipse((x, 0.74), (0.125, 0.125), (0.1, 0.1, 0.11))
        tile.ellipse((x, 0.74), (0.06, 0.06), (0.78, 0.78, 0.8))


def _mushroom(rng: np.random.Generator, tile: _Tile) -> None:
    cap = _hue(rng, (-0.06, 0.09), (0.7, 0.95), (0.5, 0.9))
    cream = _hue(rng, (0.08, 0.14), (0.05, 0.2), (0.85, 1.0))
    fibres = 1 - 0.1 * (np.sin(tile.x * 110) > 0.3)
    stem = [(0.39, 0.5), (0.61, 0.5), (0.67, 0.97), (0.33, 0.97)]
    tile.polygon(stem, cream * fibres[..., None])
    tile.ellipse((0.5, 0.56), (0.32, 0.06), cream * 0.75)
    t = np.linspace(np.pi, 2 * np.pi, 24)
    dome = np.stack([0.5 + 0.48 * np.cos(t), 0.56 + 0.5 * np.sin(t)], 1)
    tile.polygon(dome, cap * (1.15 - 0.5 * tile.y)[..., None])
    for x, y, r in ((0.5, 0.2, 0.07), (0.27, 0.33, 0.065), (0.72, 0.32, 0.07), (0.5, 0.42, 0.06)):
        jitter = rng.uniform(-0.02, 0.02, 2)
        tile.ellipse(np.add((x, y), jitter), (r, r * 0.85), (0.98, 0.96, 0.92))
    for x in (0.14, 0.86):
        tile.ellipse((x, 0.5), (0.04, 0.035), (0.98, 0.96, 0.92))


def _boat(rng: np.random.Generator, tile: _Tile) -> None:
    hull = _hue(rng, (0, 1), (0.5, 0.9), (0.35, 0.7))
    sail = _hue(rng, (0, 1), (0.05, 0.6), (0.85, 1.0))
    trim = _vivid(rng)
    tile.line([(0.5, 0.04), (0.5, 0.76)], 0.035, (0.36, 0.23, 0.13))
    # Seams slant with the sail; one broad coloured band makes it a sail and not a tent.
    seams = np.where((tile.y * 11 + tile.x * 3) % 1 < 0.16, 0.72, 1.0)
    cloth = sail * seams[..., None]
    cloth = np.where((np.abs(tile.y - 0.5) < 0.055)[..., None], trim, cloth)
    main = [(0.53, 0.06), (0.72, 0.3), (0.9, 0.68), (0.53, 0.68)]
    tile.polygon(main, cloth)
    tile.polygon([(0.47, 0.12), (0.12, 0.68), (0.47, 0.68)], cloth * 0.9)
    planks = np.where((tile.y * 18) % 1 < 0.22, 0.55, 1.0)
    tile.polygon([(0.03, 0.72), (0.97, 0.72), (0.82, 0.96), (0.2, 0.96)], hull * planks[..., None])
    tile.line([(0.03, 0.735), (0.97, 0.735)], 0.04, (0.96, 0.95, 0.9))
    for x in (0.35, 0.5, 0.65):
        tile.ellipse((x, 0.84), (0.03, 0.03), (0.96, 0.95, 0.9))


def _star(rng: np.random.Generator, tile: _Tile) -> None:
    # Folded facets, light and dark in turn, as on a paper star.
    colour = _vivid(rng)
    light, dark = (colour * 0.6 + 0.4).clip(0, 1), colour * 0.5
    inner = rng.uniform(0.23, 0.27)
    radius = np.where(np.arange(10) % 2, inner, 0.5)
    tips = [
        (0.5 + r * np.sin(a), 0.53 - r * np.cos(a))
        for r, a in zip(radius, np.arange(10) * np.pi / 5, strict=True)
    ]
    tile.polygon(tips, colour)
    for i in range(10):
        tile.polygon([(0.5, 0.53), tips[i], tips[(i + 1) % 10]], dark if i % 2 else light)
    tile.line([*tips, tips[0]], 0.02, (colour * 0.3 + 0.7).clip(0, 1))


def _cat(rng: np.random.Generator, tile: _Tile) -> None:
    fur = _hue(rng, (0.03, 0.11), (0.05, 0.7), (0.25, 0.85))
    pink, ink = (0.95, 0.62, 0.62), (0.08, 0.07, 0.07)
    tabby = fur * (0.82 + 0.35 * _noise(rng, tile.side, 9, 22))[..., None]
    for s in (-1, 1):
        ear = np.array([(0.08 * s, -0.3), (0.42 * s, -0.46), (0.43 * s, -0.04)]) + 0.5
        tile.polygon(ear, fur * 0.85)
        tile.polygon((ear - ear.mean(0)) * 0.55 + ear.mean(0), pink)
    tile.ellipse((0.5, 0.56), (0.46, 0.4), tabby)
    for x in (0.4, 0.5, 0.6):
        tile.line([(x, 0.19), (0.5 + (x - 0.5) * 0.8, 0.32)], 0.03, fur * 0.45)
    iris = _hue(rng, (0.12, 0.5), (0.6, 0.9), (0.75, 1.0))
    muzzle = (fur * 0.4 + 0.58).clip(0, 1)
    for s in (-1, 1):
        tile.ellipse((0.5 + 0.1 * s, 0.73), (0.13, 0.1), muzzle)
        tile.ellipse((0.5 + 0.19 * s, 0.49), (0.105, 0.095), (0.98, 0.98, 0.95))
        tile.ellipse((0.5 + 0.19 * s, 0.49), (0.085, 0.085), iris)
        tile.ellipse((0.5 + 0.19 * s, 0.49), (0.025, 0.075), ink)
        for lift in (-0.05, 0.02, 0.09):
            start = np.array([0.5 + 0.15 * s, 0.72])
            tile.line([start, start + np.array([0.29 * s, lift])], 0.01, ink)
    tile.polygon([(0.44, 0.62), (0.56, 0.62), (0.5, 0.69)], pink)
    tile.line([(0.38, 0.73), (0.44, 0.78), (0.5, 0.72), (0.56, 0.78), (0.62, 0.73)], 0.018, ink)


_THINGS: dict[str, Callable[[np.random.Generator, _Tile], None]] = {
    "ball": _ball,
    "house": _house,
    "tree": _tree,
    "flower": _flower,
    "fish": _fish,
    "sun": _sun,
    "box": _box,
    "car": _car,
    "mushroom": _mushroom,
    "boat": _boat,
    "star": _star,
    "cat": _cat,
}

# Largest rotation in degrees where it is not the usual 14.
_TURN = {"ball": 180, "sun": 180, "star": 40, "fish": 30, "box": 30}
