"""Detects whether PyTorch operations are intercepted or observed, for example by tracing.

PyTorch has no public API for most of this. If a version lacks one of the private functions, operations
are assumed to be observed, which only costs speed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module

PLAIN = (Tensor, nn.Parameter)


def intercepted() -> bool:
    """Whether operations may be intercepted, by tracing, modes or function transforms."""
    try:
        return (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._len_torch_function_stack() > 0
            or torch._C._functorch.peek_interpreter_stack() is not None
        )
    except AttributeError:
        return True


def observed() -> bool:
    """`intercepted`, or autocast, forward-mode derivatives or a profiler, which may count FLOPs."""
    try:
        return (
            intercepted()
            or torch.is_autocast_enabled("cpu")
            or torch.is_autocast_enabled("cuda")
            or torch.autograd._profiler_enabled()
            or forward_ad._current_level >= 0
        )
    except AttributeError:
        return True


def plain(*tensors: Tensor) -> bool:
    """Whether tensors are of PyTorch's own class, in memory, and operations are not observed.

    Subclasses (fake, distributed, quantized by torchao) have their own kernels.
    """
    return not observed() and all(type(x) in PLAIN and not x.is_meta for x in tensors)


def unshared(*modules: nn.Module) -> bool:
    """Whether the caller holds the only reference to the outputs of modules.

    True for layers that declare it (`allocates`), unless a hook or a replaced `forward` may have kept
    the outputs.
    """
    try:
        return (
            not torch.compiler.is_compiling()
            and all(
                getattr(m, "allocates", False)
                and not m._forward_hooks
                and not m._forward_pre_hooks
                and "forward" not in vars(m)
                for m in modules
            )
            and not module._global_forward_hooks
            and not module._global_forward_pre_hooks
            and not observed()
        )
    except AttributeError:
        return False
