"""Pictures of what happens inside: pure functions from arrays and a `Trace` to a matplotlib figure.

Nothing here touches pyplot. Example::

    from sfp import visualize

    image = visualize.load_image("photo.jpg")
    trace = sfp.load_clip("ViT-B/16").visual.trace(visualize.normalised(image))
    visualize.outliers(image, trace, layers=[5, 10], detectors=["som", "lof"]).savefig("outliers.png")
"""

from sfp.palette import class_colours
from sfp.visualize.canvas import contact_sheet
from sfp.visualize.features import purification
from sfp.visualize.images import load_image, normalised
from sfp.visualize.labels import Segmented, segment, segmentation
from sfp.visualize.tokens import (
    attention_matrices,
    class_attention,
    layer_profile,
    norm_maps,
    outliers,
    patch_attention,
)

__all__ = [
    "Segmented",
    "attention_matrices",
    "class_attention",
    "class_colours",
    "contact_sheet",
    "layer_profile",
    "load_image",
    "norm_maps",
    "normalised",
    "outliers",
    "patch_attention",
    "purification",
    "segment",
    "segmentation",
]
