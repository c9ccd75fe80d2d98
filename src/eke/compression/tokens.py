"""Scores and losses for sequences: token classification and language modelling.

Logits have the layout (batch, length, classes) that language models return. A sample is a sequence, for its tokens are
not independent: intervals come from the differences between sequences. Tokens whose label is `ignore`, and those that
an `attention_mask` in the batch hides, count nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Metric, Samples, quotient
from .metrics import Answer, answers, check_classes, gather
from .task import Forward, forward, logits_of, split_batch, targets_of

IGNORE = -100
"""Label of tokens that do not count, as everywhere in torch."""


def token_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, ignore: int = IGNORE, forward: Forward = forward
) -> Samples:
    """Share of tokens whose largest logit is the label; a sample is a sequence.

    Args:
        model: Returns logits (batch, length, classes).
        batches: With integer labels (batch, length).
        ignore: Label of tokens that do not count.
        forward: Calls the model on a batch.

    Returns:
        The score.
    """

    def found() -> Iterator[tuple[Answer, Tensor]]:
        for answer in answers(model, batches, forward=forward):
            labels = _labels(answer.outputs, answer.targets, answer.batch, ignore=ignore, where=answer.where)
            counted = labels != ignore
            right = (answer.outputs.argmax(-1) == labels) & counted
            yield answer, torch.stack([right.sum(1), counted.sum(1)], 1)

    return _with_labels(gather(found(), Metric("token accuracy", quotient, span=1.0, percent=True)), ignore)


def perplexity(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    shift: bool = True,
    ignore: int = IGNORE,
    forward: Forward = forward,
) -> Samples:
    """Perplexity, exp of the mean negative log likelihood of all tokens; a sample is a sequence.

    Args:
        model: Returns logits (batch, length, vocabulary).
        batches: With labels (batch, length); without any, `input_ids` are the labels.
        shift: Whether logits predict the next label, as language models of `transformers` do; False if the labels are
            shifted already.
        ignore: Label of tokens that do not count.
        forward: Calls the model on a batch.

    Returns:
        The score, lower is better.

    Raises:
        ValueError: if a label is given the likelihood zero.
    """  # noqa: DOC502

    def found() -> Iterator[tuple[Answer, Tensor]]:
        for answer in answers(model, batches, forward=forward, targets=_next_tokens):
            logits, labels = _causal(answer.outputs, answer.targets, answer.batch, shift=shift, ignore=ignore)
            counted = labels != ignore
            costs = _costs(logits, labels, ignore)
            if bool(torch.isinf(costs).any()):
                raise ValueError(
                    f"{int(torch.isinf(costs).sum())} labels in {answer.where} have the likelihood zero, so the "
                    "perplexity is infinite: check masked logits."
                )
            yield answer, torch.stack([costs.double().sum(1), counted.sum(1).double()], 1)

    metric = Metric("perplexity", _exponential, lower_is_better=True, positive=True)
    return _with_labels(gather(found(), metric), ignore)


def _exponential(totals: Tensor) -> Tensor:
    return torch.exp(quotient(totals))


def token_cross_entropy(model: nn.Module, batch: Batch, *, ignore: int = IGNORE, forward: Forward = forward) -> Tensor:
    """Mean cross-entropy of the labelled tokens, the loss of token classification.

    Args:
        model: Returns logits (batch, length, classes).
        batch: With integer labels (batch, length).
        ignore: Label of tokens that do not count.
        forward: Calls the model on the batch.

    Returns:
        Scalar tensor; zero if the batch has no labelled token.
    """
    logits = logits_of(forward(model, batch))
    labels = _labels(logits, targets_of(batch).to(logits.device), batch, ignore=ignore, where="the batch")
    return _mean_cost(logits, labels, ignore)


def causal_cross_entropy(
    model: nn.Module, batch: Batch, *, shift: bool = True, ignore: int = IGNORE, forward: Forward = forward
) -> Tensor:
    """Mean negative log likelihood of the next token, the loss of language models.

    Args:
        model: Returns logits (batch, length, vocabulary).
        batch: With labels (batch, length); without any, `input_ids` are the labels.
        shift: Whether logits predict the next label; False if the labels are shifted already.
        ignore: Label of tokens that do not count.
        forward: Calls the model on the batch.

    Returns:
        Scalar tensor; zero if the batch has no labelled token.
    """
    logits = logits_of(forward(model, batch))
    labels = _next_tokens(batch).to(logits.device)
    return _mean_cost(*_causal(logits, labels, batch, shift=shift, ignore=ignore), ignore)


def _mean_cost(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    return _costs(logits, labels, ignore).sum() / (labels != ignore).sum().clamp_min(1)


def _costs(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Return the negative log likelihood of each label (batch, length), zero where it is ignored."""
    costs: Tensor = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignore, reduction="none")
    return costs.view(labels.shape)


def _next_tokens(batch: Batch) -> Tensor:
    """Return the labels of a batch, or its input_ids."""
    inputs, targets = split_batch(batch)
    words = inputs.get("input_ids") if targets is None and isinstance(inputs, Mapping) else None
    return words if isinstance(words, Tensor) else targets_of(batch)


def _causal(logits: Tensor, labels: Tensor, batch: Batch, *, shift: bool, ignore: int) -> tuple[Tensor, Tensor]:
    """Return logits, at least float32, and the labels that they predict."""
    labels = _labels(logits, labels, batch, ignore=ignore, where="the batch")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)


def _labels(logits: Tensor, labels: Tensor, batch: Batch, *, ignore: int, where: str) -> Tensor:
    """Return the labels (batch, length) with what the attention mask hides ignored.

    Raises:
        ValueError: if logits, labels and mask do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
        raise ValueError(
            f"Integer labels (batch, length) are needed for logits (batch, length, classes), got {labels.dtype} "
            f"{tuple(labels.shape)} and {tuple(logits.shape)} in {where}: logits (batch, classes, ...) belong to "
            "cross_entropy and dense_cross_entropy."
        )
    inputs, _ = split_batch(batch)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    labels = labels.long()
    if isinstance(mask, Tensor):
        if mask.shape != labels.shape:
            raise ValueError(
                f"The attention mask must be (batch, length) = {tuple(labels.shape)}, got {tuple(mask.shape)} in "
                f"{where}."
            )
        labels = labels.masked_fill(mask.to(labels.device) == 0, ignore)
    check_classes(labels[labels != ignore], logits.shape[2], where)
    return labels


def _with_labels(score: Samples, ignore: int) -> Samples:
    """Return the score.

    Raises:
        ValueError: if no token counts.
    """
    if float(score.sums[:, 1].sum()) == 0:
        raise ValueError(
            f"No token counts in {len(score.sums)} sequences: all labels are ignore={ignore} or hidden by the "
            "attention mask."
        )
    return score
