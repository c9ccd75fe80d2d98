"""Checks at the boundary of `compress`: what was given, what is allowed, what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._types import Batch, Counts, Loss
from .intervals import samples_to_prove
from .task import Forward, Task, evaluating

_MOST_FORMS = 8


def count_samples(batch: Batch) -> int:
    """Return the leading dimension of a batch's first tensor, 1 if there is none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return 1


def check_batches(batches: Iterable[Batch], check: Callable[[int, Batch], None] | None = None) -> tuple[int, Batch]:
    """Refuse data that can be read once only, are empty or hold values that are not finite.

    Args:
        batches: Calibration batches.
        check: Called with index and batch for the first batch of every form (dtypes, shapes without the number of
            samples), for at most eight forms.

    Returns:
        Number of samples, and the first batch.

    Raises:
        TypeError: if the batches cannot be iterated.
        ValueError: if they are an iterator, empty, or a floating point value is not finite (names the batch).
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator ({type(batches).__name__}) that is used up after one pass, and compress reads the "
            "data several times: pass the DataLoader itself, or list(batches)."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be a list or a DataLoader, got {type(batches).__name__}.")
    samples, first = 0, None
    forms: set[str] = set()
    for index, batch in enumerate(batches):
        first = batch if index == 0 else first
        samples += count_samples(batch)
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                bad = int((~torch.isfinite(leaf)).sum())
                raise ValueError(f"Calibration batch {index} holds {bad} values that are not finite: clean the data.")
        form = _form(batch)
        if check is not None and form not in forms and len(forms) < _MOST_FORMS:
            forms.add(form)
            check(index, batch)
    if first is None:
        raise ValueError("batches gave 0 batches: pass a list or a DataLoader that is not empty.")
    return samples, first


def check_runs(model: nn.Module, batch: Batch, *, loss: Loss, forward: Forward, index: int = 0) -> None:
    """Run model and loss on a batch, and say what does not fit.

    Args:
        model: The model.
        batch: A calibration batch.
        loss: `loss(model, batch)`.
        forward: Calls the model on a batch.
        index: Number of the batch, for messages.

    Raises:
        TypeError: if the loss returns no tensor.
        ValueError: if the model cannot run on the batch, or the loss is no finite scalar.
    """
    with evaluating(model):
        _run_forward(model, batch, forward, where=f"calibration batch {index}")
        value: Any = loss(model, batch)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss(model, batch) must return a scalar tensor, got {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(
            f"loss(model, batch) must return a scalar tensor, got shape {tuple(value.shape)}: take the mean."
        )
    _check_loss(float(value), index)


def _run_forward(model: nn.Module, batch: Batch, forward: Forward, *, where: str) -> None:
    """Call a model on a batch.

    Raises:
        ValueError: if it cannot run on it; names the batch.
    """
    try:
        forward(model, batch)
    except (RuntimeError, TypeError, IndexError, ValueError, KeyError, AttributeError) as error:
        wanted = next((p.dtype for p in model.parameters()), None)
        raise ValueError(
            f"The model does not run on {where}, {describe(batch)} (parameters are {wanted}): {_first_line(error)}. "
            "Make the loader yield what the model takes, or pass forward=."
        ) from error


def mean_loss(model: nn.Module, batches: Iterable[Batch], *, loss: Loss) -> float:
    """Return the mean of a loss over batches, with the model in evaluation mode.

    Args:
        model: The model.
        batches: At least one batch.
        loss: `loss(model, batch)`.

    Returns:
        The mean over batches.

    Raises:
        ValueError: if the loss of a batch is not finite; names the batch.
    """  # noqa: DOC502
    losses = []
    with evaluating(model):
        for index, batch in enumerate(batches):
            losses.append(float(loss(model, batch)))
            _check_loss(losses[-1], index)
    return sum(losses) / len(losses)


def _check_loss(value: float, index: int) -> None:
    """Refuse a loss that is not finite.

    Raises:
        ValueError: if it is not; names the batch.
    """
    if not math.isfinite(value):
        raise ValueError(f"loss(model, batch) is {value} on calibration batch {index}: check the loss and its targets.")


def check_report(score: float | Counts, drop: float | None) -> None:
    """Refuse a budget on the drop that so few samples could never prove.

    Args:
        score: Of the original model.
        drop: Largest allowed drop as a share.

    Raises:
        ValueError: if even two models that never differ would not prove it; says how many samples are needed.
    """  # noqa: DOC502
    if isinstance(score, Counts) and drop is not None:
        check_samples(score.total, drop)


def check_task(task: Task, drop: float | None, model: nn.Module | None = None) -> None:
    """Refuse a task whose splits are empty, can be read once only, are too small, or do not fit the model.

    Args:
        task: The splits. Of the report split only the number of samples is looked at, and whether the model runs.
        drop: Largest allowed drop as a share.
        model: Called on the first batch of every form of a split, for at most eight forms; None calls nothing. With a
            score of the user's own, which may call it in another way, a batch that does not fit is a warning.

    Raises:
        ValueError: if a split is an iterator, empty or too small, or the model does not run on a batch of it.
    """
    for name in ("selection", "report"):
        split = getattr(task, name)
        if isinstance(split, Iterator):
            raise ValueError(
                f"The {name} split is an iterator ({type(split).__name__}) that is used up after one pass: pass the "
                "DataLoader itself, or a list."
            )
        total, forms = 0, set[str]()
        for index, batch in enumerate(split):
            total += count_samples(batch)
            if model is not None and len(forms) < _MOST_FORMS and (form := _form(batch)) not in forms:
                forms.add(form)
                _check_fits(model, batch, task, where=f"{name} batch {index}")
        if total == 0:
            raise ValueError(f"The {name} split gave 0 samples: pass a list or a DataLoader that is not empty.")
        if name == "report" and drop is not None and task.counts_samples:
            check_samples(total, drop)


def _check_fits(model: nn.Module, batch: Batch, task: Task, *, where: str) -> None:
    """Refuse a batch on which the model does not run; warn where the user's own score may know better.

    Raises:
        ValueError: if it does not run, and accuracy is to be counted on it.
    """
    try:
        with evaluating(model):
            _run_forward(model, batch, task.forward, where=where)
    except ValueError as error:
        if task.counts_samples:
            raise
        warnings.warn(f"{error} Your own score has to cope with it.", stacklevel=4)


def check_samples(total: int, drop: float) -> None:
    """Refuse a report split that is too small to prove a drop.

    Args:
        total: Its samples.
        drop: Largest allowed drop as a share.

    Raises:
        ValueError: if even two models that never differ would not prove it; says how many samples are needed.
    """
    needed = samples_to_prove(drop)
    if total < needed:
        raise ValueError(
            f"{total} samples cannot prove a drop of at most {100 * drop:g} points with 95 % confidence, even if the "
            f"models never differ: at least {needed} are needed. Give more samples or allow a larger drop."
        )


def describe(tree: Any) -> str:
    """Return a batch written as types and shapes."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {tuple(tree.shape)}"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key}: {describe(value)}" for key, value in tree.items()) + "}"
    if isinstance(tree, (tuple, list)):
        return "(" + ", ".join(describe(value) for value in tree) + ")"
    return type(tree).__name__


def _form(batch: Batch) -> str:
    """Return types, dtypes and shapes of a batch without the number of samples."""
    return describe(pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.ndim else x, batch))


def _first_line(error: BaseException) -> str:
    line = str(error).strip().split("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if isinstance(error, (KeyError, AttributeError)) else line
