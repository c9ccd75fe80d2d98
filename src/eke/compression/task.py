"""What a model is for: its data in three splits, its loss and its score.

The splits have one use each. Calibration: statistics, recovery and cost measurements. Selection: planning decisions
that need the score. Report: opened once, at the end, for the numbers that are published.

A batch is `(inputs, targets)`, where inputs is a tensor or a tuple of tensors, or a dictionary of keyword arguments
whose entry `labels` (or `label`) holds the targets. Anything else works with an own `forward`, `loss` and `score`.
`metrics` and its neighbours have losses and scores for other tasks than classification.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Counts, Loss, Quality

if TYPE_CHECKING:
    from .recover import Recovery

Forward = Callable[[nn.Module, Batch], Any]
"""`forward(model, batch)`: the model's outputs for a batch."""

Score = Callable[[nn.Module, Iterable[Batch]], Quality]
"""`score(model, batches)`: larger is better."""

Counting = TypeVar("Counting", bound=Callable[..., Counts])

_LABELS = ("labels", "label", "targets", "target")


def split_batch(batch: Batch) -> tuple[tuple[Any, ...] | dict[str, Any], Any]:
    """Separate a batch into what the model takes and what it should answer.

    Args:
        batch: `(inputs, targets)`, a dictionary, or a tensor of inputs.

    Returns:
        Positional or keyword inputs, and the targets (None if there are none).

    Raises:
        TypeError: if the batch has another form.
    """
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, Mapping):
        targets = next((batch[name] for name in _LABELS if name in batch), None)
        return {name: value for name, value in batch.items() if name not in _LABELS}, targets
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = batch
        if isinstance(inputs, Mapping):
            return dict(inputs), targets
        return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), targets
    raise TypeError(
        f"A batch must be (inputs, targets), a dictionary or a tensor, got {type(batch).__name__}"
        f"{f' of {len(batch)} items' if isinstance(batch, (tuple, list)) else ''}: pass your own forward=, loss= and "
        "score=."
    )


def forward(model: nn.Module, batch: Batch) -> Any:
    """Call the model on the inputs of a batch.

    Args:
        model: Any module.
        batch: See `split_batch`.

    Returns:
        What the model returns.
    """
    inputs, _ = split_batch(batch)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits_of(outputs: Any) -> Tensor:
    """The tensor of logits in a model's outputs: itself, `.logits`, ["logits"], ["out"], or the first tensor.

    Args:
        outputs: What a model returned.

    Returns:
        Logits, (batch, classes, ...).

    Raises:
        TypeError: if there is no tensor in it.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        found = outputs.get("logits", outputs.get("out"))
    else:
        found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"No logits in the model's output of type {type(outputs).__name__}: pass your own loss= and score=."
        )
    return found


def targets_of(batch: Batch) -> Tensor:
    """The tensor of targets in a batch.

    Args:
        batch: See `split_batch`.

    Returns:
        Targets, (batch, ...).

    Raises:
        TypeError: if there is none.
    """
    _, targets = split_batch(batch)
    if not isinstance(targets, Tensor):
        raise TypeError(
            f"The batch has no tensor of targets, got {type(targets).__name__}: yield (inputs, targets) or pass your "
            "own loss=."
        )
    return targets


def cross_entropy(model: nn.Module, batch: Batch, *, forward: Forward = forward) -> Tensor:
    """Mean cross-entropy of a classifier, the default loss.

    Args:
        model: Returns logits (batch, classes, ...).
        batch: With integer targets (batch, ...).
        forward: Calls the model on the batch.

    Returns:
        Scalar tensor.

    Raises:
        ValueError: if targets and logits do not fit.
    """
    targets, logits = targets_of(batch), logits_of(forward(model, batch))
    classes = logits.shape[1] if logits.ndim > 1 else 0
    if targets.dtype != torch.long or logits.ndim < 2 or targets.shape[:1] != logits.shape[:1]:
        raise ValueError(
            "cross_entropy needs int64 targets (batch, ...) for logits (batch, classes, ...), got targets "
            f"{targets.dtype} {tuple(targets.shape)} and logits {tuple(logits.shape)}: convert the loader's targets or "
            "pass your own loss=."
        )
    if targets.numel() and (int(targets.max()) >= classes or int(targets.min()) < 0):
        raise ValueError(
            f"Targets must lie in [0, {classes - 1}] for logits {tuple(logits.shape)}, got {int(targets.min())} to "
            f"{int(targets.max())}."
        )
    return F.cross_entropy(logits, targets)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode without gradients; every module's flag is restored at the end.

    Args:
        model: Any module.

    Yields:
        The model.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, flag in flags:
            module.training = flag


def counting(score: Counting) -> Counting:
    """Mark a score that counts one sample once, right or wrong: how many samples prove a drop is then known beforehand.

    Args:
        score: The function.

    Returns:
        The function.
    """
    score.counts_samples = True  # type: ignore[attr-defined]
    return score


@counting
def accuracy(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = forward) -> Counts:
    """Share of samples whose largest logit is the target, the default score.

    Args:
        model: Returns logits (batch, classes).
        batches: With integer targets (batch,).
        forward: Calls the model on a batch.

    Returns:
        Counts with the outcome of every sample.

    Raises:
        ValueError: if there is no batch, a logit is not a number, or logits and targets are not (batch, classes) and
            (batch,).
    """
    outcomes, order = [], hashlib.sha256()
    with evaluating(model):
        for index, batch in enumerate(batches):
            logits = logits_of(forward(model, batch))
            if bool(torch.isnan(logits).any()):
                raise ValueError(f"Batch {index} of the evaluation gave {int(torch.isnan(logits).sum())} NaN logits.")
            if logits.ndim != 2:
                raise ValueError(
                    f"accuracy needs logits (batch, classes), got {tuple(logits.shape)} in batch {index}: pass your "
                    "own score=, where each sample counts once."
                )
            targets = targets_of(batch)
            if logits.shape[1] < 2 or targets.shape != logits.shape[:1] or targets.is_floating_point():
                raise ValueError(
                    "accuracy needs logits (batch, classes) of two classes and more and whole targets (batch,), got "
                    f"logits {tuple(logits.shape)} and targets {targets.dtype} {tuple(targets.shape)} in batch "
                    f"{index}: convert them or pass your own score=."
                )
            order.update(targets.detach().cpu().contiguous().numpy().tobytes())
            outcomes.append(logits.argmax(1) == targets)
    if not outcomes:
        raise ValueError("The evaluation got 0 batches: pass a list or a DataLoader, not an iterator that is used up.")
    right = torch.cat(outcomes)
    return Counts(int(right.sum()), right.numel(), right, order.hexdigest())


@dataclass(frozen=True)
class Task:
    """Data in three splits with the loss and the score that go with it.

    Args:
        calibration: Batches for statistics and recovery; iterated more than once.
        selection: Batches on which plans are compared.
        report: Batches for the published numbers.
        loss: Mean loss of a batch.
        score: Score of a model on batches.
        forward: Calls the model on a batch; eke's losses and scores call the model in the same way.
        name: Shown in reports.
        recovery: The recovery that suits the model and its answers; None for the default one.
    """

    calibration: Iterable[Batch]
    selection: Iterable[Batch]
    report: Iterable[Batch]
    loss: Loss = cross_entropy
    score: Score = accuracy
    forward: Forward = forward
    name: str = "task"
    recovery: Recovery | None = None

    def __post_init__(self) -> None:
        if self.forward is forward:
            return
        for name in ("loss", "score"):
            if _calls_by_default(getattr(self, name)):
                object.__setattr__(self, name, functools.partial(getattr(self, name), forward=self.forward))

    @property
    def counts_samples(self) -> bool:
        """Whether the score is one of eke's that counts one sample once, right or wrong."""
        return bool(getattr(getattr(self.score, "func", self.score), "counts_samples", False))


def _calls_by_default(function: Callable[..., Any]) -> bool:
    """Return whether a loss or score takes `forward` and calls the model as batches are called by default."""
    try:
        parameter = inspect.signature(function).parameters.get("forward")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.default is forward
