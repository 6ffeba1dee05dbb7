"""Pictures of a model's inner workings: pure functions from arrays and a `Trace` to a figure.

They use matplotlib without pyplot. Example::

    from sfp import visualize

    model = sfp.load("ViT-B/16", "clip")
    image, trace = model.resized("photo.jpg"), model.trace("photo.jpg")
    visualize.outliers(image, trace, layers=[5, 10], detectors=["som", "lof"]).savefig("outliers.png")
"""

from sfp.palette import class_colours
from sfp.visualize.canvas import contact_sheet
from sfp.visualize.features import purification
from sfp.visualize.labels import segmentation
from sfp.visualize.tokens import (
    attention_matrices,
    class_attention,
    layer_profile,
    norm_maps,
    outliers,
    patch_attention,
)

__all__ = [
    "attention_matrices",
    "class_attention",
    "class_colours",
    "contact_sheet",
    "layer_profile",
    "norm_maps",
    "outliers",
    "patch_attention",
    "purification",
    "segmentation",
]
