"""Class colours, without matplotlib or mmsegmentation."""

from __future__ import annotations

from collections.abc import Sequence

from sfp.vocabulary import BACKGROUND

# Okabe and Ito's colours, distinguishable with any kind of colour vision; black is left for text
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE, GREY = OKABE_ITO = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
)
Colour = tuple[int, int, int]  # red, green, blue, 0 to 255


def colour_map(count: int) -> list[list[int]]:
    """The colours of Pascal VOC: the bits of a label spread over red, green and blue.

    Args:
        count: number of labels.

    Returns:
        `[red, green, blue]` of each label.

    Example:
        >>> colour_map(3)
        [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    """
    return [
        [
            sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        ]
        for label in range(count)
    ]


def class_colours(count: int) -> list[Colour]:
    """Colours for `count` classes: Okabe and Ito's, then darker and lighter ones, then repeated.

    Example:
        >>> class_colours(2)
        [(230, 159, 0), (86, 180, 233)]
    """
    base = [tuple(bytes.fromhex(colour[1:])) for colour in OKABE_ITO]
    shades = [
        (int(factor * red + white), int(factor * green + white), int(factor * blue + white))
        for factor, white in ((1.0, 0), (0.55, 0), (0.5, 127))
        for red, green, blue in base
    ]
    return [shades[i % len(shades)] for i in range(count)]


def class_palette(names: Sequence[str]) -> list[Colour]:
    """A colour for each class: 24 of `class_colours`, then Pascal VOC's; background is black."""
    colours = [*class_colours(24), *((r, g, b) for r, g, b in colour_map(256)[24:])]
    return [
        (0, 0, 0) if name == BACKGROUND else colours[i % len(colours)]
        for i, name in enumerate(names)
    ]
