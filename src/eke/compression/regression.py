"""Scores and the loss for regression.

    mean squared error    sum e^2 / values
    mean absolute error   sum |e| / values
    R2                    1 - sum e^2 / sum (y - mean y)^2, its mean over several outputs

A sample is one entry of a batch with all its values. Errors are computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Metric, Samples, quotient
from .metrics import Answer, answers, gather
from .task import Forward, forward, logits_of, targets_of


def _pair(outputs: Tensor, targets: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as (batch, values), in at least float32.

    Raises:
        ValueError: if their shapes differ by more than a last dimension of 1: broadcasting would compare all with all.
    """
    if outputs.shape != targets.shape and outputs.ndim == targets.ndim + 1 and outputs.shape[-1] == 1:
        outputs = outputs.squeeze(-1)
    if outputs.shape != targets.shape or not outputs.ndim:
        raise ValueError(
            f"Predictions and targets must have one shape, got {tuple(outputs.shape)} and {tuple(targets.shape)} in "
            f"{where}: reshape one of them."
        )
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return outputs.to(wide).flatten(1) if outputs.ndim > 1 else outputs.to(wide)[:, None], (
        targets.to(wide).flatten(1) if targets.ndim > 1 else targets.to(wide)[:, None]
    )


def squared_loss(model: nn.Module, batch: Batch, *, forward: Forward = forward) -> Tensor:
    """Mean squared error of a batch, the loss of regression.

    Args:
        model: Returns predictions (batch, ...), or outputs with `.logits`.
        batch: With targets of the same shape; a last dimension of 1 may be missing.
        forward: Calls the model on the batch.

    Returns:
        Scalar tensor.
    """
    return F.mse_loss(*_pair(logits_of(forward(model, batch)), targets_of(batch), "the batch"))


def mean_squared_error(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = forward) -> Samples:
    """Mean squared error over all values; a sample is one entry of a batch with all its values.

    Args:
        model: Returns predictions (batch, ...), or outputs with `.logits`.
        batches: With targets of the same shape; a last dimension of 1 may be missing.
        forward: Calls the model on a batch.

    Returns:
        The score, lower is better.
    """
    metric = Metric("mean squared error", quotient, lower_is_better=True, positive=True)
    return _errors(model, batches, torch.square, metric=metric, forward=forward)


def mean_absolute_error(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = forward) -> Samples:
    """Mean absolute error over all values; a sample is one entry of a batch with all its values.

    Args:
        model: Returns predictions (batch, ...), or outputs with `.logits`.
        batches: With targets of the same shape; a last dimension of 1 may be missing.
        forward: Calls the model on a batch.

    Returns:
        The score, lower is better.
    """
    metric = Metric("mean absolute error", quotient, lower_is_better=True, positive=True)
    return _errors(model, batches, torch.abs, metric=metric, forward=forward)


def _errors(
    model: nn.Module,
    batches: Iterable[Batch],
    of: Callable[[Tensor], Tensor],
    *,
    metric: Metric,
    forward: Forward,
) -> Samples:
    def found() -> Iterator[tuple[Answer, Tensor]]:
        for answer in answers(model, batches, forward=forward):
            outputs, targets = _pair(answer.outputs, answer.targets, answer.where)
            errors = of(outputs.double() - targets.double())
            yield answer, torch.stack([errors.sum(1), torch.full_like(errors[:, 0], errors.shape[1])], 1)

    return gather(found(), metric)


def r_squared(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = forward) -> Samples:
    """Coefficient of determination, 1 - sum (y - prediction)^2 / sum (y - mean y)^2, its mean over several outputs.

    Args:
        model: Returns predictions (batch,) or (batch, outputs), or outputs with `.logits`.
        batches: With targets of the same shape; a last dimension of 1 may be missing.
        forward: Calls the model on a batch.

    Returns:
        The score.

    Raises:
        ValueError: if the targets of an output do not vary.
    """

    def found() -> Iterator[tuple[Answer, Tensor]]:
        shift: Tensor | None = None
        for answer in answers(model, batches, forward=forward):
            outputs, targets = (x.double() for x in _pair(answer.outputs, answer.targets, answer.where))
            # Squares of values far from zero would cancel: all are taken around the first target.
            shift = targets[:1] if shift is None else shift
            moved = targets - shift
            parts = torch.stack([torch.ones_like(moved), moved, moved.square(), (outputs - targets).square()], 2)
            yield answer, parts.flatten(1)

    score = gather(found(), Metric("R\u00b2", determination))
    count, first, second, _ = _columns(score.sums.sum(0))
    spread = second - first.square() / count
    if not bool((spread > 0).all()):
        raise ValueError(
            f"R\u00b2 needs targets that vary, but output {int(spread.argmin())} has the same one for all "
            f"{len(score.sums)} samples: score mean_absolute_error instead."
        )
    return score


def determination(totals: Tensor) -> Tensor:
    """Return R2 from totals (..., 4 a output): count, sum and sum of squares of the targets, squared errors."""
    count, first, second, errors = _columns(totals)
    return torch.mean(1 - errors / (second - first.square() / count), -1)


def _columns(totals: Tensor) -> tuple[Tensor, ...]:
    return tuple(totals[..., start::4] for start in range(4))
