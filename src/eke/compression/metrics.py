"""The loop that every metric of samples goes through, and the metric of the k best classes.

A score is `score(model, batches)` and fits `Task(score=...)`; options are bound by `functools.partial`. It returns what
each sample adds to the metric (`Samples`), or how many samples were right (`Counts`), so that two models are compared
sample by sample. `regression`, `tokens`, `dense` and `retrieval` have the metrics of numbers, sequences, maps and
embeddings.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._types import Batch, Counts, Metric, Samples
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
