"""Presets: one file per paper, each a function from knobs to a composition of ops."""

from sfp.methods import (
    clearclip,
    clip,
    clip_surgery,
    gclip,
    gem,
    itaclip,
    maskclip,
    naclip,
    scclip,
    sclip,
    segearth,
    sfp,
    sfp_paper,
)

__all__ = [
    "clearclip",
    "clip",
    "clip_surgery",
    "gclip",
    "gem",
    "itaclip",
    "maskclip",
    "naclip",
    "scclip",
    "sclip",
    "segearth",
    "sfp",
    "sfp_paper",
]
