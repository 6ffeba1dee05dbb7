"""Whether PyTorch's plain kernels alone see an operation, or something stands in between.

PyTorch has no public question for most of that. Where a version lacks one of the private ones, the
answer is that something does, which costs speed only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module

PLAIN = (Tensor, nn.Parameter)


def intercepted() -> bool:
    """Whether operations may not run as they are called: tracing, modes, function transforms."""
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
    """Whether tensors are of PyTorch's own class, in memory, and nothing looks on.

    Subclasses (fake, distributed, quantised by torchao) have kernels of their own.
    """
    return not observed() and all(type(x) in PLAIN and not x.is_meta for x in tensors)


def unshared(*modules: nn.Module) -> bool:
    """Whether the outputs of modules are tensors that nobody but the caller holds.

    Those of layers that say so (`allocates`), unless a hook or a method put in place of `forward` may
    have kept them.
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
