"""Checks of data at the boundary of `compress`: what was given, what is allowed, what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._types import Batch, Counts, Loss, Quality
from .advice import describe
from .intervals import samples_to_prove
from .task import Task, evaluating, split_batch
from .trial import check_loss, named, run_forward

_MOST_FORMS = 8
_FIRST = 512
"""Samples of one class at the beginning that make a warning: statistics are taken from the first ones."""


def count_samples(batch: Batch) -> int:
    """Return the leading dimension of a batch's first tensor, 1 if there is none."""
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return int(leaf.shape[0])
    return 1


def check_batches(
    batches: Iterable[Batch], check: Callable[[int, Batch], None] | None = None, *, classes: bool = False
) -> tuple[int, Batch]:
    """Refuse data that can be read once only, are empty or hold values that are not finite.

    Args:
        batches: Calibration batches.
        check: Called with index and batch for the first batch of every form (dtypes, shapes without the number of
            samples), for at most eight forms.
        classes: Whether targets are classes; a warning says when the first samples are all of one.

    Returns:
        Number of samples, and the first batch.

    Raises:
        TypeError: if the batches cannot be iterated.
        ValueError: if they are an iterator, a single batch, empty, cannot be read, or a floating point value is not
            finite (names the batch).
    """  # noqa: DOC502
    check_batched(batches)
    samples, first = 0, None
    forms: set[str] = set()
    labels: list[Tensor] = []
    for index, batch in read(batches, "calibration"):
        first = batch if index == 0 else first
        if classes and samples < _FIRST:
            labels += _labels(batch)
        samples += count_samples(batch)
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor):
                _check_values(leaf, index)
        form = _form(batch)
        if check is not None and form not in forms and len(forms) < _MOST_FORMS:
            forms.add(form)
            versions = _versions(batch)
            check(index, batch)
            if isinstance(batches, (list, tuple)) and versions != _versions(batch):
                raise ValueError(
                    f"Running model and loss changed calibration batch {index}, {describe(batch)}, in place, and the "
                    "next pass would read other data: clone what is changed, x = x.clone(), or pass a DataLoader."
                )
    if first is None:
        raise ValueError("batches gave 0 batches: pass a list or a DataLoader that is not empty.")
    _check_mixed(labels)
    return samples, first


def check_batched(batches: object) -> None:
    """Refuse what does not yield batch after batch, as often as asked.

    Args:
        batches: What was given for a list or a loader.

    Raises:
        TypeError: if it is something else, such as a dataset or a pair of tensors.
        ValueError: if it is an iterator.
    """
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches is an iterator ({type(batches).__name__}) that is used up after one pass, and compress reads the "
            "data several times: pass the DataLoader itself, or list(batches)."
        )
    if isinstance(batches, Mapping):
        raise TypeError(
            f"batches must be a list or a DataLoader, got a dictionary with the keys {list(batches)[:4]}: three splits "
            "make an eke.Task(calibration=..., selection=..., report=...), one batch a list, [batch]."
        )
    if isinstance(batches, Tensor) or type(batches).__module__ == "numpy":
        raise TypeError(
            f"batches must be a list or a DataLoader, got one {type(batches).__name__} {tuple(batches.shape)}: "  # type: ignore[attr-defined]
            "DataLoader(TensorDataset(inputs, targets), batch_size=64)."
        )
    if isinstance(batches, torch.utils.data.Dataset) and not isinstance(batches, torch.utils.data.IterableDataset):
        raise TypeError(
            f"batches must be a list or a DataLoader, got {type(batches).__name__}, a dataset of single samples: "
            "DataLoader(dataset, batch_size=64)."
        )
    if isinstance(batches, (str, type)) or not isinstance(batches, Iterable):
        call = ": call it and pass what it returns" if callable(batches) else ""
        raise TypeError(f"batches must be a list or a DataLoader, got {type(batches).__name__} {batches!r:.60}{call}.")
    if isinstance(batches, (tuple, list)) and len(batches) == 2 and all(hasattr(x, "shape") for x in batches):
        one, two = batches
        if tuple(one.shape[1:]) != tuple(two.shape[1:]) and tuple(one.shape[:1]) == tuple(two.shape[:1]):
            raise TypeError(
                f"batches must be a list or a DataLoader, got inputs {tuple(one.shape)} and targets "
                f"{tuple(two.shape)}: [(inputs, targets)] is a list of one batch, DataLoader(TensorDataset(inputs, "
                "targets), batch_size=64) makes many."
            )


def read(batches: Iterable[Batch], split: str) -> Iterator[tuple[int, Batch]]:
    """Go through batches; what stops the reading names the batch.

    Args:
        batches: A list or a loader.
        split: Its name, for messages.

    Yields:
        Number and batch.

    Raises:
        ValueError: if a batch cannot be read.
    """
    index = 0
    source: Iterator[Batch] = iter(())
    while True:
        try:
            source = iter(batches) if index == 0 else source
            batch = next(source)
        except StopIteration:
            return
        except Exception as error:
            ragged = "stack expects each tensor" in str(error)
            mend = "pad the samples to one size in collate_fn=" if ragged else "mend the dataset or its loader"
            raise ValueError(f"Reading {split} batch {index} failed, {named(error)}: {mend}.") from error
        yield index, batch
        index += 1


def _check_values(leaf: Tensor, index: int) -> None:
    """Refuse tensors without values or with values that are not finite, unless it is a mask of 0 and -inf."""  # noqa: DOC501
    if leaf.is_meta:
        raise ValueError(
            f"Calibration batch {index} has no values, {describe(leaf)}: give tensors on the model's device."
        )
    if leaf.is_inference():
        raise ValueError(
            f"Calibration batch {index} was made under torch.inference_mode(), {describe(leaf)}, and cannot be "
            "differentiated: make the data outside of it, or clone them."
        )
    if leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
        if bool(((leaf == 0) | (leaf == -math.inf)).all()):
            return
        bad = int((~torch.isfinite(leaf)).sum())
        raise ValueError(f"Calibration batch {index} holds {bad} values that are not finite: clean the data.")


def _versions(batch: Batch) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def _labels(batch: Batch) -> list[Tensor]:
    """Return the targets of a batch where they are whole numbers, one a sample."""
    try:
        targets = split_batch(batch)[1]
    except TypeError:
        return []
    plain = isinstance(targets, Tensor) and targets.ndim == 1 and not targets.is_floating_point()
    return [targets] if plain else []


def _check_mixed(labels: list[Tensor]) -> None:
    found = torch.cat(labels) if labels else torch.empty(0)
    if found.numel() > 1 and bool((found == found[0]).all()):
        warnings.warn(
            f"The first {found.numel()} calibration targets are all {int(found[0])}, and statistics are taken from the "
            "first samples: are the data sorted by class? Shuffle them once, in a fixed order.",
            stacklevel=4,
        )


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
            check_loss(losses[-1], index)
    return sum(losses) / len(losses)


def check_report(score: Quality, drop: float | None) -> None:
    """Refuse a budget on the drop that so few samples could never prove.

    Args:
        score: Of the original model; only counts have a least number of samples.
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
        TypeError: if a split is no list or loader.
        ValueError: if a split is an iterator, empty or too small, or the model does not run on a batch of it.
    """
    for name in ("selection", "report"):
        split = getattr(task, name)
        if not isinstance(split, Iterable):
            raise TypeError(f"The {name} split must be a list or a DataLoader, got {type(split).__name__}.")
        if isinstance(split, Iterator):
            raise ValueError(
                f"The {name} split is an iterator ({type(split).__name__}) that is used up after one pass: pass the "
                "DataLoader itself, or a list."
            )
        total, forms = 0, set[str]()
        for index, batch in read(split, name):
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
            run_forward(model, batch, task.forward, where=where)
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


def shared_splits(task: Task) -> list[str]:
    """Return a sentence for each two splits that are the same data."""
    names = ("calibration", "selection", "report")
    data = {name: getattr(getattr(task, name), "dataset", getattr(task, name)) for name in names}
    pairs = [(one, two) for place, one in enumerate(names) for two in names[place + 1 :] if data[one] is data[two]]
    return [
        f"The {one} and the {two} split are the same data: numbers on samples that something was chosen or learned "
        "from are better than those of new data."
        for one, two in pairs
    ]


def _form(batch: Batch) -> str:
    """Return types, dtypes and shapes of a batch without the number of samples."""
    return describe(pytree.tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.ndim else x, batch))
