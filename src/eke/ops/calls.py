"""Who watches a call: what decides between an operator that torch knows and the kernel itself."""

from __future__ import annotations

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter


def direct(*tensors: Tensor) -> bool:
    """Return whether nobody watches this call: no gradient, no tracing, no mode, no subclass of Tensor."""
    if torch.compiler.is_compiling() or _C._len_torch_dispatch_stack():
        return False
    if _C._get_tracing_state() is not None or transformed():
        return False
    grad = torch.is_grad_enabled()
    for tensor in tensors:  # a loop: a generator costs more than what it asks
        kind = type(tensor)
        if (kind is not Tensor and kind is not Parameter) or (grad and tensor.requires_grad) or not tensor.is_cpu:
            return False
        if tensor.is_neg():  # its data have the other sign
            return False
    return True


def transformed() -> bool:
    """Return whether torch.func or forward derivatives transform this call: torch's own operations know how."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _C._functorch.peek_interpreter_stack() is not None
