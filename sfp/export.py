"""Exports a method as a file that runs without this package: windows and words in, labels out.

`export` writes the image side as an ONNX model or a `torch.export` program, for windows of one size and
batches of any size. Methods that branch on values in Python or need other models cannot be exported;
the error says why.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sfp.clip.vit import VisionTransformer
from sfp.engine import Engine, Queries
from sfp.files import atomic_write
from sfp.method import Method
from sfp.registry import Op, guides_of
from sfp.vocabulary import Vocabulary

FORMATS = (".onnx", ".pt2")
PRECISIONS = ("fp32", "fp16", "int8")
ONNX_BYTES = 3 * 2**29  # above this PyTorch would put the weights into a second file
# operators whose output shape depends on values, or which return values to Python
DATA_DEPENDENT = {
    *("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}


class ExportError(ValueError):
    """A method that cannot be exported; the message says why."""


class Static(TorchDispatchMode):
    """Raises `ExportError` if Python code or a tensor's shape depends on a tensor's values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Checks the operator and calls it."""
        name = func.__name__.split(".")[0]
        by_mask = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in DATA_DEPENDENT or by_mask:
            raise ExportError(f"it decides on the host, with {func}")
        return func(*args, **(kwargs or {}))


class WindowModel(nn.Module):
    """An image tower, a method and words, from pixels to labels.

    Args:
        engine: provides the tower, normalisation, logit scale and threshold.
        method: the method.
        queries: the words; if None, `forward` takes text features.
    """

    words: Tensor | None
    classes: Tensor | None
    mean: Tensor
    std: Tensor

    def __init__(self, engine: Engine, method: Method, queries: Queries | None) -> None:
        super().__init__()
        if method.decision is not None:
            raise ExportError(
                f"this method cannot be exported: its decision, {method.decision}, needs the merged "
                "logits of a whole image"
            )
        # here, because surgery looks at the weights, which the tracer does not let it do
        self.visual = method.operate(engine.clip.visual)
        self.method = replace(method, surgery=())
        self.scale = engine.logit_scale
        if not isinstance(engine.prob_thd, (int, float)):
            raise ExportError(
                f"prob_thd={engine.prob_thd!r} is another one for each image: export takes a number"
            )
        self.prob_thd = engine.prob_thd
        self.index = None if queries is None else tuple(queries.index)
        mean, std = (torch.tensor(x)[:, None, None] for x in (engine.clip.mean, engine.clip.std))
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.register_buffer("words", None if queries is None else queries.features.clone())
        self.register_buffer("classes", None if queries is None else torch.tensor(self.index))

    def forward(self, image: Tensor, words: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Labels windows.

        Args:
            image: RGB, (B, S, S, 3) uint8.
            words: unit text features, (Q, C) float32, if the model does not contain them.

        Returns:
            Cosines at patch resolution (B, Q, h, w) float32, the label of every pixel (B, S, S) int64,
            and its class's probability (B, S, S) float32. Labels are those of `Engine.label` without
            an area threshold and masks.
        """
        pixels = (image.permute(0, 3, 1, 2).float() - self.mean) / self.std
        words = self.words if words is None else words
        assert words is not None
        logits, _ = self.method.logits(self.visual, pixels, words, index=self.index)
        size = (image.shape[1], image.shape[2])
        full = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        confidence, labels = (full * self.scale).softmax(1).max(1)
        if self.classes is not None:
            labels = self.classes[labels]
        return logits, torch.where(confidence < self.prob_thd, 0, labels), confidence


def export(
    engine: Engine,
    method: Method,
    vocabulary: Vocabulary,
    out: Path,
    *,
    side: int | None = None,
    words_as_input: bool = False,
    precision: str = "fp32",
) -> list[Path]:
    """Writes a method as an ONNX model or a `torch.export` program, with its accompanying files.

    Args:
        engine: an engine on a CPU, in float32.
        method: a method that does not branch on values and needs no other model.
        vocabulary: the words.
        out: a path that ends with .onnx or .pt2. Beside it, `<out>.safetensors` holds the text
            features as "queries", (Q, C) float32, and `<out>.json` describes labels and inputs.
        side: side of the windows in pixels; by default that of the engine's windows.
        words_as_input: make text features a second input, with any number of queries, each a class of
            its own, instead of part of the model.
        precision: precision of the blocks: "fp32"; "fp16", for GPUs; or "int8", with weights and
            products quantized by onnxruntime (.onnx only).

    Returns:
        The files written.

    Raises:
        ExportError: if the method cannot be exported, the format or precision is unknown, or the
            model is too large for an ONNX file.
        ModuleNotFoundError: if a package that the format needs is missing.
    """
    check_format(out, precision)
    check_method(method)
    queries = engine.queries(vocabulary)
    side = side or engine.slide_crop or engine.clip.visual.usual_grid[0] * engine.clip.visual.patch
    model = WindowModel(engine, method, None if words_as_input else queries).eval()
    if precision == "fp16":
        model.visual = _half(model.visual)
    size = sum(x.numel() * x.element_size() for x in model.parameters())
    if out.suffix == ".onnx" and size > ONNX_BYTES:
        raise ExportError(
            f"{out}: {size / 2**30:.1f} GiB of weights, but an ONNX file holds at most "
            f"{ONNX_BYTES / 2**30:.1f}: export a .pt2 file"
            + (
                ", or with precision='fp16'"
                if size <= 2 * ONNX_BYTES and precision != "fp16"
                else ""
            )
        )
    example = torch.zeros(2, side, side, 3, dtype=torch.uint8)
    example[:, ::3] = 255  # some contrast, for methods that depend on it
    inputs: dict[str, Tensor] = dict(image=example)
    if words_as_input:
        inputs["words"] = queries.features
    program = _program(model, inputs)
    with atomic_write(out) as temporary:
        if out.suffix == ".onnx":
            _save_onnx(program, temporary, precision)
        else:
            # by way of memory, since PyTorch's own writer aborts the process on a full disk
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            temporary.write_bytes(buffer.getbuffer())
    # their names contain that of the model, for one exported as .onnx and .pt2 with other settings
    bank, about = (out.with_name(out.name + suffix) for suffix in (".safetensors", ".json"))
    with atomic_write(bank) as temporary:
        save_file({"queries": queries.features.contiguous()}, temporary)
    names = vocabulary.queries if words_as_input else vocabulary.names
    record = dict(
        classes=list(names),
        side=side,
        input="RGB, (B, side, side, 3) uint8",
        outputs=["logits", "labels", "confidence"],
        words="input, (Q, C) float32" if words_as_input else "in the model",
        method=repr(method),
        precision=precision,
        weights_sha256=engine.clip.digest,
    )
    with atomic_write(about) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return [out, bank, about]


def check_format(out: Path, precision: str) -> None:
    """Raises an `ExportError` for a file name or precision that cannot be written."""
    if out.suffix not in FORMATS:
        raise ExportError(f"{out}: the file name must end with {' or '.join(FORMATS)}")
    if precision not in PRECISIONS or (precision == "int8" and out.suffix != ".onnx"):
        raise ExportError(
            f"precision={precision!r}: choose from {', '.join(PRECISIONS)} (int8 for .onnx only)"
        )


def check_method(method: Method) -> None:
    """Raises an `ExportError` for a method that needs other models or regions."""
    needs = [f"the guide {name!r}" for name in sorted(guides_of(method))]
    if needs := [*needs, *["regions"] * method.needs_regions]:
        raise ExportError(f"this method cannot be exported: it needs {' and '.join(needs)}")


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    """Discards what exporters and quantizers warn about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _program(model: WindowModel, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """Exports the model for batches of any size, and for any number of queries if they are an input."""
    shapes: dict[str, Any] = {"image": {0: torch.export.Dim("batch", min=1, max=256)}}
    if "words" in inputs:
        shapes["words"] = {0: torch.export.Dim("queries", min=2, max=4096)}
    try:
        with torch.no_grad(), Static():
            model(**inputs)
        with torch.no_grad(), _without_notices():
            return torch.export.export(model, (), kwargs=inputs, dynamic_shapes=shapes)
    except Exception as error:  # the tracer raises many kinds for code it cannot trace
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ExportError(
            f"this method cannot be exported: {_raised_in(error)}{first[0]}"
        ) from error


def _raised_in(error: Exception) -> str:
    """Names the innermost op of a method in which an error was raised; "" if there is none."""
    ops = [
        frame.f_locals["self"].fn.__name__
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code is Op.__call__.__code__
    ]
    return f"op {ops[-1]!r}: " if ops else ""


def _half(visual: VisionTransformer) -> VisionTransformer:
    """A copy in float16; the methods' similarities and logits stay in float32."""
    return copy.deepcopy(visual).half()


def _save_onnx(program: torch.export.ExportedProgram, path: Path, precision: str) -> None:
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX files need more packages ({error}): pip install 'sfp[export]'", name=error.name
        ) from None
    try:
        with _without_notices():
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                external_data=False,
                output_names=["logits", "labels", "confidence"],
            )
    except torch.onnx.OnnxExporterError as error:  # it wraps the error that names the operator
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).splitlines()[0]
        raise ExportError(
            f"this method cannot be exported as ONNX: {reason}; a .pt2 file can hold any operator"
        ) from error
    assert onnx is not None
    onnx.save(path)
    if precision == "int8":
        _quantise(path)


def _quantise(path: Path) -> None:
    """Quantizes matrix products in an ONNX file to 8 bits: weights now, inputs at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = path.with_name(f"{path.name}.int8")
    try:
        with _without_notices():
            quantize_dynamic(
                path,
                rounded,
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QInt8,
                per_channel=True,
            )
        rounded.replace(path)
    finally:
        rounded.unlink(missing_ok=True)
