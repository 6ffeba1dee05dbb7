"""CLIP: towers, weights and text."""
