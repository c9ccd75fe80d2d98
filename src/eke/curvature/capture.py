"""What layers were called with and the gradients at their outputs, seen during the user's own passes.

A forward hook on each layer registers a hook on its output tensor, which hands over (input, gradient) when the backward
pass reaches it. Nothing is held by the layers: hooks know the capture weakly and the graph owns what waits, so a graph
that is dropped leaves nothing behind. Nothing happens in eval mode, without gradients, or for copies of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import watch

Calls = list[tuple[tuple[int, int], Tensor, Tensor]]
"""Numbers of the forward and backward pass, input of a module and gradient of the loss at its output, for each call."""


class Capture:
    """Collect the calls of modules until they are taken.

    Args:
        model: Its forward passes are counted, so that two calls in one pass differ from two passes.
        modules: Modules to watch.
        attentions: Attentions whose own projections are watched; their calls are taken by the parameter.

    Attributes:
        listening: Whether gradients are kept.
        turn: Number of the backward pass, for those who run several through one forward pass.
        nearest: The first gradient kept since the last `clear`: that of the call nearest to the loss.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[nn.Module], attentions: Iterable[nn.MultiheadAttention] = ()
    ) -> None:
        self._calls: dict[int, Calls] = {}
        self._passes = 0
        self.listening = True
        self.turn = 0
        self.nearest: Tensor | None = None
        this = weakref.ref(self)
        handles = [module.register_forward_hook(_hook(this, weakref.ref(module))) for module in modules]
        for attention in attentions:
            handles += watch(attention, _receiver(this))
        handles.append(model.register_forward_pre_hook(_counter(this)))
        weakref.finalize(self, _remove, handles)

    def begin(self) -> None:
        """Count a forward pass."""
        self._passes += 1

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self._passes

    def add(self, owner: object, number: int, x: Tensor, gradient: Tensor) -> None:
        """Keep one call of a module (or a parameter), made in the forward pass of that number, if listening."""
        if self.listening:
            self.nearest = gradient.detach() if self.nearest is None else self.nearest
            self._calls.setdefault(id(owner), []).append(((number, self.turn), x, gradient.detach()))

    def take(self, owner: object) -> Calls:
        """Return the calls of a module (or a parameter) since the last time, and forget them."""
        return self._calls.pop(id(owner), [])

    def clear(self) -> None:
        """Forget all calls."""
        self._calls.clear()
        self.nearest = None


def _hook(capture: weakref.ref[Capture], owner: weakref.ref[nn.Module]) -> Any:
    def forward(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        here = capture()
        # A copy of the model carries the hooks of the original.
        if here is None or module is not owner() or not module.training or not torch.is_grad_enabled():
            return
        if isinstance(output, Tensor) and output.requires_grad and arguments and isinstance(arguments[0], Tensor):
            x, number = arguments[0].detach(), here.passes

            def backward(gradient: Tensor) -> None:
                keeper = capture()
                if keeper is not None:
                    keeper.add(module, number, x, gradient)

            output.register_hook(backward)  # type: ignore[no-untyped-call]

    return forward


def _receiver(capture: weakref.ref[Capture]) -> Any:
    def receive(parameter: Tensor, x: Tensor, output: Tensor) -> Any:
        here = capture()
        if here is None:
            return None
        number, owner = here.passes, weakref.ref(parameter)

        def keep(gradient: Tensor) -> None:
            keeper, known = capture(), owner()
            if keeper is not None and known is not None:
                keeper.add(known, number, x, gradient)

        return keep

    return receive


def _counter(capture: weakref.ref[Capture]) -> Any:
    def count(_module: nn.Module, _arguments: tuple[Any, ...]) -> None:
        here = capture()
        if here is not None:
            here.begin()

    return count


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
