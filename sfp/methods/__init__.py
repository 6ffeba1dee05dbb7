"""Presets: one file per paper, each a function from knobs to a composition of ops."""

from sfp.methods import clip, sclip, sfp, sfp_paper

__all__ = ["clip", "sclip", "sfp", "sfp_paper"]
