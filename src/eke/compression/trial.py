"""Model and loss tried on a batch, on a private copy: do they run, and does the loss lead back to the parameters?

What fails inside the model, the loss or the score is raised again with the batch, what was returned and what to do; the
error itself stays in the chain. Errors that eke raises in its own words pass.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._errors import error_line, own_words
from .._types import Batch, Evaluate, Loss, Quality
from . import advice
from .advice import describe
from .task import Forward, evaluating

_WORDED = (TypeError, ValueError)


@contextmanager
def differentiable() -> Iterator[None]:
    """Let gradients be taken, whatever mode the caller is in.

    Yields:
        Nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield


def check_runs(model: nn.Module, batch: Batch, *, loss: Loss, forward: Forward, index: int = 0) -> None:
    """Run model and loss on a batch, and say what does not fit.

    Args:
        model: The model.
        batch: A calibration batch.
        loss: `loss(model, batch)`.
        forward: Calls the model on a batch.
        index: Number of the batch, for messages.

    Raises:
        TypeError: if the model or the loss returns no tensor.
        ValueError: if the model cannot run on the batch, or the loss is no finite scalar.
    """  # noqa: DOC502
    with evaluating(model):
        outputs = run_forward(model, batch, forward, where=f"calibration batch {index}")
        _check_outputs(outputs, index)
        value = _run_loss(model, batch, loss, outputs=outputs, index=index)
    check_loss(float(value), index)


def check_gradients(model: nn.Module, batch: Batch, *, loss: Loss, forward: Forward, index: int = 0) -> None:
    """Refuse a loss that does not lead back to the parameters of the model it was given, or that changes them.

    Args:
        model: A private copy; its parameters are made to require gradients.
        batch: A calibration batch.
        loss: `loss(model, batch)`.
        forward: Calls the model on a batch.
        index: Number of the batch, for messages.

    Raises:
        ValueError: if the loss has no gradient, called backward, or wrote to the parameters; says which.
    """
    own = {id(p) for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)
    before = [p._version for p in model.parameters()]
    with evaluating(model), torch.enable_grad():
        outputs = run_forward(model, batch, forward, where=f"calibration batch {index} with gradients")
        value = _run_loss(model, batch, loss, outputs=outputs, index=index)
    if any(p.grad is not None for p in model.parameters()):
        raise ValueError(f"loss(model, batch) called backward on calibration batch {index}: only return the mean loss.")
    if before != [p._version for p in model.parameters()]:
        raise ValueError(f"loss(model, batch) changed parameters on calibration batch {index}: only return the loss.")
    tracked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(outputs))
    if not tracked and not _leads_to(value, own):
        raise ValueError(
            f"The output of {type(model).__name__} on calibration batch {index}, {describe(outputs)}, has no gradient: "
            "take torch.no_grad(), inference_mode() and detach() out of its forward."
        )
    if not value.requires_grad:
        raise ValueError(
            f"loss(model, batch) has no gradient on calibration batch {index}: return it without item(), detach(), "
            "float() or torch.no_grad()."
        )
    if not _leads_to(value, own):
        raise ValueError(
            f"loss(model, batch) does not depend on the parameters of the model it is given (calibration batch "
            f"{index}): it must call that model, and no other one from outside."
        )


def _leads_to(value: Tensor, own: set[int]) -> bool:
    """Return whether the history of a value reaches one of these parameters."""
    if id(value) in own:
        return True
    stack, seen = [value.grad_fn], set[Any]()
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in own:
            return True
        stack += [following for following, _ in node.next_functions]
    return False


def _check_outputs(outputs: Any, index: int) -> None:
    """Refuse outputs without a tensor."""  # noqa: DOC501
    if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs)):
        return
    kind = type(outputs).__name__
    mend = "return a tensor, or a tuple or dictionary of tensors"
    if dataclasses.is_dataclass(outputs):
        mend = f"make its fields known once, torch.export.register_dataclass({kind})"
    raise TypeError(f"The model returned {kind} on calibration batch {index}, in which no tensor can be seen: {mend}.")


def run_forward(model: nn.Module, batch: Batch, forward: Forward, *, where: str) -> Any:
    """Call a model on a batch.

    Args:
        model: The model.
        batch: The batch.
        forward: Calls the model on it.
        where: Names the batch, for messages.

    Returns:
        Its outputs.

    Raises:
        ValueError: if it cannot run on it; names the batch.
    """
    try:
        return forward(model, batch)
    except Exception as error:
        wanted = next((p.dtype for p in model.parameters()), None)
        raise ValueError(
            f"The model does not run on {where}, {describe(batch)} (parameters are {wanted}): {error_line(error)}. "
            f"{advice.on_batch(model, batch, error)}"
        ) from error


def _run_loss(model: nn.Module, batch: Batch, loss: Loss, *, outputs: Any, index: int) -> Tensor:
    """Call a loss on a batch.

    Returns:
        The loss, one number.

    Raises:
        TypeError: if it returns no tensor.
        ValueError: if it fails, or returns several numbers; names the batch and what the model returned.
    """
    where = f"calibration batch {index}, {describe(batch)}, where the model returned {describe(outputs)}"
    try:
        value: Any = loss(model, batch)
    except Exception as error:
        mend = advice.on_loss(loss, batch, outputs=outputs, error=error)
        if isinstance(error, _WORDED) and own_words(error):
            raise type(error)(f"On {where}: {error}{mend}") from error
        raise ValueError(f"loss(model, batch) raised {named(error)} on {where}.{mend}") from error
    if not isinstance(value, Tensor):
        raise TypeError(f"loss(model, batch) must return a scalar tensor, got {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(
            f"loss(model, batch) must return a scalar tensor, got shape {tuple(value.shape)}: take the mean."
        )
    return value


def check_called(model: nn.Module, inputs: Any, *, which: str, do: str) -> None:
    """Refuse inputs on which a model does not run.

    Args:
        model: The model.
        inputs: A tuple of positional or a dictionary of keyword arguments.
        which: Names them, for the message.
        do: What to do where they do not fit.

    Raises:
        ValueError: if it does not run.
    """
    try:
        with evaluating(model):
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    except Exception as error:
        raise ValueError(f"The model does not run on {which}, {describe(inputs)}: {error_line(error)}. {do}") from error


def guarded(name: str, function: Evaluate) -> Evaluate:
    """Return an evaluation whose failures name it.

    Args:
        name: How it is called.
        function: `evaluate(model)`.
    """

    def called(model: nn.Module) -> Quality:
        try:
            return function(model)
        except Exception as error:
            if own_words(error):
                raise
            raise ValueError(
                f"{name} raised {named(error)}: it is called with the model in evaluation mode and returns a float, "
                "larger is better, or eke.Counts."
            ) from error

    return called


def check_loss(value: float, index: int) -> None:
    """Refuse a loss that is not finite.

    Args:
        value: The loss.
        index: Number of the batch, for messages.

    Raises:
        ValueError: if it is not; names the batch.
    """
    if not math.isfinite(value):
        raise ValueError(f"loss(model, batch) is {value} on calibration batch {index}: check the loss and its targets.")


def named(error: BaseException) -> str:
    """Return type and first line of an error."""
    line = error_line(error)
    kind = type(error).__name__
    return line if line.startswith(kind) else f"{kind}: {line}"
