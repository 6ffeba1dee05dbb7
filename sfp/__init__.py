"""Training-free open-vocabulary segmentation with frozen CLIP."""

from sfp import _mmseg as mm  # first: it imports mmsegmentation quietly
from sfp import methods, ops
from sfp.data import datasets
from sfp.evaluation import metrics
from sfp.api import Model, load
from sfp.clip.checkpoints.loading import WeightsError, load_clip
from sfp.clip.model import CLIP
from sfp.data.coco import coco_document
from sfp.data.images import DataError, ImageError, as_image, read_image
from sfp.method import Method, Purify, Readout, build_method
from sfp.registry import METHODS, OPS, list_methods, list_ops, op
from sfp.result import Result
from sfp.segmentor import ImagePreprocessor, OpenVocabSegmentor
from sfp.tokens import Heads, Tokens
from sfp.trace import Trace
from sfp.version import __version__
from sfp.vocabulary import Vocabulary, load_vocabulary

__all__ = [
    "CLIP",
    "METHODS",
    "OPS",
    "DataError",
    "Heads",
    "ImageError",
    "ImagePreprocessor",
    "Method",
    "Model",
    "OpenVocabSegmentor",
    "Purify",
    "Readout",
    "Result",
    "Tokens",
    "Trace",
    "Vocabulary",
    "WeightsError",
    "__version__",
    "as_image",
    "build_method",
    "coco_document",
    "datasets",
    "list_methods",
    "list_ops",
    "load",
    "load_clip",
    "load_vocabulary",
    "methods",
    "metrics",
    "mm",
    "op",
    "ops",
    "read_image",
]
