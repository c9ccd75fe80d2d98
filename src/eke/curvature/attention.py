"""What the projections inside `nn.MultiheadAttention` multiply, seen while the module runs.

The module hands its packed weight to one function, so no hook of a module sees it applied. While it runs (and only
then) torch's own protocol for overriding functions is told of every linear map; one whose weight is the module's, or
a part of its rows, is reported. The arithmetic and the random numbers are those of the module itself.

Queries, keys and values are three groups of rows of the packed weight, each with its own input: a call that applies
only some of them (attention to something else) counts as zeros for the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Receive = Callable[[Tensor, Tensor, Tensor], Callable[[Tensor], None] | None]
"""Given a parameter, its input (groups, positions, batch, n) and its output: who takes the gradient there, if any."""

_PLAIN = FunctionType(
    F.multi_head_attention_forward.__code__,
    # Called from inside the override, the function must not ask for overrides once more.
    {**vars(F), "has_torch_function": lambda *_: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


class _Listener(TorchFunctionMode):
    def __init__(self, module: nn.MultiheadAttention, receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._batch = 1
        packed = module.in_proj_weight
        self._packed: Tensor | None = packed
        own = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight, module.out_proj.weight]
        self._own = [weight for weight in own if weight is not None]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _PLAIN(*args, **kwargs)
        found = func(*args, **kwargs)
        if func is F.linear and isinstance(found, Tensor) and found.requires_grad:
            self._linear(args[0].detach(), args[1], found)
        return found

    def _linear(self, x: Tensor, weight: Tensor, output: Tensor) -> None:
        packed = self._packed
        if packed is not None and (weight is packed or weight._base is packed):
            width = packed.shape[1]
            first, count = weight.storage_offset() // width**2, weight.shape[0] // width
            self._batch = x.shape[1]
            here = x[None].expand(3, *x.shape)
            if count < 3:
                covered = torch.zeros(3, 1, 1, 1, dtype=x.dtype, device=x.device)
                covered[first : first + count] = 1
                here = here * covered
            keep = self._receive(packed, here, output)
            before, after = int(first) * width, int(3 - first - count) * width

            def padded(gradient: Tensor) -> None:
                if keep is not None:
                    keep(F.pad(gradient.detach(), (before, after)) if count < 3 else gradient)

            output.register_hook(padded)  # type: ignore[no-untyped-call]
            return
        for owner in self._own:
            if weight is owner:
                if x.dim() == 3:
                    self._batch = x.shape[1]
                # The last projection works on positions times batch, flattened.
                shape, batch = x.shape, self._batch
                keep_one = self._receive(owner, x.reshape(1, -1, batch, shape[-1]), output)
                if keep_one is not None:
                    output.register_hook(_flat(keep_one, batch))  # type: ignore[no-untyped-call]


def _flat(keep: Callable[[Tensor], None], batch: int) -> Callable[[Tensor], None]:
    return lambda gradient: keep(gradient.detach().reshape(-1, batch, gradient.shape[-1]))


def watch(module: nn.MultiheadAttention, receive: Receive) -> list[Any]:
    """Report the module's own projections while it runs in training mode with gradients.

    Args:
        module: The attention.
        receive: See `Receive`; the gradient it is handed is (positions, batch, m).

    Returns:
        Handles of the two hooks.
    """
    owner = weakref.ref(module)
    running: list[_Listener] = []

    def before(here: nn.Module, _arguments: tuple[Any, ...]) -> None:
        if here is owner() and here.training and torch.is_grad_enabled():
            running.append(_Listener(module, receive))
            running[-1].__enter__()  # type: ignore[no-untyped-call]

    def after(here: nn.Module, _arguments: tuple[Any, ...], _output: Any) -> None:
        if here is owner() and running:
            running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
