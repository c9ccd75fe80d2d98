"""Inputs, outputs and output gradients of modules, from one forward and backward pass of a private copy of a model.

The copy's parameters need no gradient: recorded outputs are the variables of differentiation, so the backward pass
computes gradients at sites and no weight gradient. Every recorded output is handed on as a clone, because an operation
in place after it would otherwise change what is differentiated; of the output itself only its place in the graph is
kept, so it takes no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._types import Batch, Loss
from ..sites import Site, open_


@dataclass(frozen=True)
class Call:
    """One call of a module: its first tensor input, the gradient of the mean loss at its output, the output if kept."""

    x: Tensor
    gradient: Tensor
    output: Tensor | None = None


@dataclass(frozen=True)
class _Place:
    """Where a module was called: its input, the version of that, its output's place in the graph, and its output.

    The output is without data unless it is kept.
    """

    x: Tensor
    version: int
    edge: GradientEdge
    output: Tensor
    device: torch.device


def private_copy(model: nn.Module, sites: Iterable[Site]) -> nn.Module:
    """Return a copy in eval mode whose parameters need no gradient, opened where modules hide some of the sites."""
    private = copy.deepcopy(model).eval()
    if not all(site.hookable for site in sites):
        open_(private)
    return private.requires_grad_(False)


class Recorder:
    """Record the calls of named modules while the context is open.

    Args:
        model: A copy that may carry hooks.
        names: Modules to record; of those that return several things the first is.
        outputs: Whether to keep outputs as well.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, outputs: bool = False) -> None:
        self._outputs = outputs
        self._model = model
        self._names = tuple(dict.fromkeys(names))
        self._calls: dict[str, list[_Place]] = {}
        self._samples: int | None = None
        self._copied: set[str] = set()
        self._answer: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Recorder:
        self._handles.append(self._model.register_forward_pre_hook(self._count, with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(self._keep_answer))
        for name in self._names:
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls, self._answer = {}, None

    def run(self, loss: Loss, batch: Batch, index: int) -> tuple[dict[str, list[Call]], int]:
        """Run one batch forward and backward.

        Args:
            loss: Mean loss of a batch.
            batch: The batch.
            index: Its number, for messages.

        Returns:
            The calls by module name, and the number of samples.

        Raises:
            ValueError: if the loss is no finite scalar, or depends on no recorded module.
        """  # noqa: DOC502
        value, places = self._checked(loss, batch, index)
        found = self._pulled(places, torch.autograd.grad(value, [p.edge for _, p in places], allow_unused=True))
        samples = self._samples if self._samples is not None else places[0][1].x.shape[0]
        self._calls = {}
        return found, samples

    def run_columns(
        self, loss: Loss, batch: Batch, index: int, columns: Callable[[Tensor, Tensor], Iterable[Tensor]]
    ) -> Iterator[dict[str, list[Call]]]:
        """Run one batch forward, and backward from the model's output with other gradients than the loss's.

        Args:
            loss: Mean loss of a batch.
            batch: The batch.
            index: Its number, for messages.
            columns: From the loss and the model's output (both in the graph) to gradients at that output.

        Yields:
            The calls by module name for each column; their gradients are those of <column, output>.

        Raises:
            ValueError: if the loss is no finite scalar, depends on no recorded module, or the model's output is not one
                tensor.
        """
        value, places = self._checked(loss, batch, index)
        answer = self._answer
        if answer is None:
            raise ValueError(
                "The model's output must be a tensor, or hold one tensor called logits, to take second derivatives of "
                'the loss there; use fisher="empirical".'
            )
        for column in columns(value, answer):
            gradients = torch.autograd.grad(
                answer, [place.edge for _, place in places], column, retain_graph=True, allow_unused=True
            )
            yield self._pulled(places, gradients)
        self._calls, self._answer = {}, None

    def _checked(self, loss: Loss, batch: Batch, index: int) -> tuple[Tensor, list[tuple[str, _Place]]]:
        value = self._forward(loss, batch)
        if self._overwritten():
            value = self._forward(loss, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"loss(model, batch) must return one number as a tensor, got {_describe(value)}.")
        if not bool(torch.isfinite(value)):
            raise ValueError(
                f"The loss of batch {index} is {float(value.detach())}; check that batch and the model's outputs."
            )
        places = [(name, place) for name, calls in self._calls.items() for place in calls]
        if not value.requires_grad or not places:
            raise ValueError(
                f"The loss of batch {index} does not depend on the output of any of {list(self._names)} in a "
                "differentiable way; call the model inside loss, without no_grad or detach."
            )
        return value, places

    def _pulled(self, places: list[tuple[str, _Place]], gradients: Sequence[Tensor | None]) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {}
        for (name, place), gradient in zip(places, gradients):
            here = torch.zeros_like(place.output, device=place.device) if gradient is None else gradient
            found.setdefault(name, []).append(Call(place.x, here, place.output if self._outputs else None))
        return found

    def _keep_answer(self, _module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        held = getattr(output, "logits", output)
        self._answer = held if isinstance(held, Tensor) else None

    def _forward(self, loss: Loss, batch: Batch) -> Tensor:
        self._calls, self._samples = {}, None
        return loss(self._model, batch)

    def _overwritten(self) -> bool:
        """Return whether an input was changed in place after its module read it; such are copied from now on."""
        stale = {
            name for name, calls in self._calls.items() if any(place.x._version != place.version for place in calls)
        }
        self._copied |= stale
        return bool(stale)

    def _count(self, _module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor) and value.dim()]
        if tensors and self._samples is None:
            self._samples = tensors[0].shape[0]

    def _hook(self, name: str) -> Callable[..., Any]:
        def record(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], given: Any) -> Any:
            several = isinstance(given, tuple) and len(given) > 0
            output = given[0] if several else given
            if not isinstance(output, Tensor):
                raise TypeError(f"Module {name!r} returns {_describe(output)}; curvature is taken at single tensors.")
            inputs = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
            x = inputs[0].detach() if inputs else output.detach()
            if name in self._copied:
                x = x.clone()
            if not output.requires_grad:
                output.requires_grad_()
            kept = output.detach() if self._outputs else torch.empty_like(output, device="meta")
            place = _Place(x, x._version, get_gradient_edge(output), kept, output.device)
            self._calls.setdefault(name, []).append(place)
            return (output.clone(), *given[1:]) if several else output.clone()

        return record


def _describe(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
