"""Scores and losses for regression, and the loop that every metric of samples goes through.

A score is `score(model, batches)` and fits `Task(score=...)`; options are bound by `functools.partial`. It returns what
each sample adds to the metric (`Samples`), or how many samples were right (`Counts`), so that two models are compared
sample by sample. `tokens`, `dense` and `retrieval` have the metrics of sequences, of maps and of embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Counts, Metric, Samples, quotient
from .task import Forward, counting, evaluating, forward, logits_of, targets_of


@dataclass(frozen=True)
class Answer:
    """What a model said to one batch.

    Args:
        outputs: Logits or predictions, without NaN.
        targets: What it should have said.
        batch: The batch.
        where: Words for messages, such as "batch 3".
    """

    outputs: Tensor
    targets: Tensor
    batch: Batch
    where: str


def answers(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    forward: Forward = forward,
    targets: Callable[[Batch], Tensor] = targets_of,
) -> Iterator[Answer]:
    """Go through a model's answers to batches, in evaluation mode.

    Args:
        model: Returns a tensor, or outputs with `.logits`.
        batches: With targets.
        forward: Calls the model on a batch.
        targets: Reads the targets of a batch.

    Yields:
        One answer a batch.

    Raises:
        ValueError: if there is no batch, or an output is not a number.
    """
    index = -1
    with evaluating(model):
        for index, batch in enumerate(batches):
            outputs = logits_of(forward(model, batch))
            if bool(torch.isnan(outputs).any()):
                raise ValueError(
                    f"Batch {index} of the evaluation gave {int(torch.isnan(outputs).sum())} NaN outputs: check the "
                    "model and the data."
                )
            yield Answer(outputs, targets(batch).to(outputs.device), batch, f"batch {index}")
    if index < 0:
        raise ValueError(
            f"The evaluation got {index + 1} batches: pass a list or a DataLoader, not an iterator that is used up."
        )


def fingerprint(order: hashlib._Hash, targets: Tensor) -> None:
    """Add targets to the digest of samples in their order.

    Args:
        order: A running digest.
        targets: Of one batch.
    """
    plain = targets.detach().cpu().contiguous()
    order.update(str(tuple(plain.shape)).encode() + plain.reshape(-1).view(torch.uint8).numpy().tobytes())


def gather(found: Iterable[tuple[Answer, Tensor]], metric: Metric) -> Samples:
    """Put what each sample adds together.

    Args:
        found: Answers with their sums (batch, columns).
        metric: The number that the totals give.

    Returns:
        The score.
    """
    rows, order = [], hashlib.sha256()
    for answer, sums in found:
        fingerprint(order, answer.targets)
        rows.append(sums.detach().to("cpu", torch.float64))
    return Samples(torch.cat(rows), metric, order.hexdigest())


# Classification


@counting
def top_k_accuracy(model: nn.Module, batches: Iterable[Batch], *, k: int = 5, forward: Forward = forward) -> Counts:
    """Share of samples whose target is among the k largest logits.

    Args:
        model: Returns logits (batch, classes).
        batches: With integer targets (batch,).
        k: How many logits count; of equal logits the target's comes last, so a constant model scores nothing.
        forward: Calls the model on a batch.

    Returns:
        Counts with the outcome of every sample.

    Raises:
        ValueError: if k is not in [1, classes - 1], or logits and targets do not fit.
    """
    outcomes, order = [], hashlib.sha256()
    for answer in answers(model, batches, forward=forward):
        logits, targets = answer.outputs, answer.targets
        classes = logits.shape[1] if logits.ndim == 2 else 0
        if targets.shape != logits.shape[:1] or targets.is_floating_point() or not classes:
            raise ValueError(
                f"top_k_accuracy needs integer targets (batch,) for logits (batch, classes), got {targets.dtype} "
                f"{tuple(targets.shape)} and {tuple(logits.shape)} in {answer.where}."
            )
        if not 1 <= k < classes:
            raise ValueError(f"top_k_accuracy needs k in [1, {classes - 1}] for {classes} classes, got {k!r}.")
        check_classes(targets, classes, answer.where)
        own = logits.gather(1, targets.long()[:, None])
        outcomes.append((logits >= own).sum(1) <= k)
        fingerprint(order, targets)
    right = torch.cat(outcomes).cpu()
    return Counts(int(right.sum()), right.numel(), right, order.hexdigest(), f"top-{k} accuracy")


def check_classes(targets: Tensor, classes: int, where: str) -> None:
    """Refuse targets that are no classes.

    Args:
        targets: Integers.
        classes: How many there are.
        where: Words for the message.

    Raises:
        ValueError: if one is negative or too large.
    """
    if targets.numel() and (int(targets.max()) >= classes or int(targets.min()) < 0):
        raise ValueError(
            f"Targets must lie in [0, {classes - 1}] for {classes} classes or be ignore, got {int(targets.min())} to "
            f"{int(targets.max())} in {where}."
        )


# Regression


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
