"""Scores and the loss for dense prediction: one class a pixel, a voxel or another place.

A sample is an image, for its pixels are not independent. Pixel accuracy and mean intersection over union are computed
from totals over all images, as is usual: mean IoU is no mean over images, but the mean over classes of the total
intersection divided by the total union. Logits that are smaller than the targets are enlarged bilinearly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Metric, Samples, quotient
from .metrics import Answer, answers, check_classes, gather
from .task import Forward, forward, logits_of, targets_of

IGNORE = 255
"""Class of places that do not count, as in most data sets of segmentation."""

_MODES = {3: "linear", 4: "bilinear", 5: "trilinear"}


def pixel_accuracy(
    model: nn.Module, batches: Iterable[Batch], *, ignore: int = IGNORE, forward: Forward = forward
) -> Samples:
    """Share of pixels whose largest logit is the target; a sample is an image.

    Args:
        model: Returns logits (batch, classes, height, width), or outputs with "out" or "logits".
        batches: With integer targets (batch, height, width).
        ignore: Class of pixels that do not count.
        forward: Calls the model on a batch.

    Returns:
        The score.
    """

    def found() -> Iterator[tuple[Answer, Tensor]]:
        for answer in answers(model, batches, forward=forward):
            logits, targets = _fitted(answer.outputs, answer.targets, ignore=ignore, where=answer.where)
            counted = (targets != ignore).flatten(1)
            right = (logits.argmax(1) == targets).flatten(1) & counted
            yield answer, torch.stack([right.sum(1), counted.sum(1)], 1)

    return _with_pixels(gather(found(), Metric("pixel accuracy", quotient, span=1.0, percent=True)), ignore)


def mean_iou(
    model: nn.Module, batches: Iterable[Batch], *, ignore: int = IGNORE, forward: Forward = forward
) -> Samples:
    """Mean over classes of intersection over union; a sample is an image.

    Args:
        model: Returns logits (batch, classes, height, width), or outputs with "out" or "logits".
        batches: With integer targets (batch, height, width).
        ignore: Class of pixels that do not count, in targets and predictions.
        forward: Calls the model on a batch.

    Returns:
        The score; classes that no image has and no pixel was taken for are left out.
    """

    def found() -> Iterator[tuple[Answer, Tensor]]:
        for answer in answers(model, batches, forward=forward):
            logits, targets = _fitted(answer.outputs, answer.targets, ignore=ignore, where=answer.where)
            yield answer, _overlaps(logits.argmax(1), targets, logits.shape[1], ignore)

    return _with_pixels(gather(found(), Metric("mean IoU", overlap, span=1.0, percent=True)), ignore)


def _overlaps(predicted: Tensor, targets: Tensor, classes: int, ignore: int) -> Tensor:
    """Return intersections and unions of each image (batch, classes, 2), flattened."""
    images = torch.arange(len(targets), device=targets.device).view(-1, *[1] * (targets.ndim - 1)).expand_as(targets)
    counted = targets != ignore
    cells = (images * classes + targets)[counted], (images * classes + predicted)[counted]
    both = cells[0][cells[0] == cells[1]]
    size = len(targets) * classes
    wanted, given, shared = (torch.bincount(c.flatten(), minlength=size) for c in (*cells, both))
    return torch.stack([shared, wanted + given - shared], 1).view(len(targets), -1)


def overlap(totals: Tensor) -> Tensor:
    """Return the mean IoU from totals (..., classes * 2) of intersections and unions; empty classes are left out."""
    shared, union = totals[..., 0::2], totals[..., 1::2]
    known = union > 0
    shares = torch.where(known, shared / union.clamp_min(1), torch.zeros_like(union))
    return shares.sum(-1) / known.sum(-1)


def dense_cross_entropy(model: nn.Module, batch: Batch, *, ignore: int = IGNORE, forward: Forward = forward) -> Tensor:
    """Mean cross-entropy of the labelled pixels, the loss of dense prediction.

    Args:
        model: Returns logits (batch, classes, height, width), or outputs with "out" or "logits".
        batch: With integer targets (batch, height, width).
        ignore: Class of pixels that do not count.
        forward: Calls the model on the batch.

    Returns:
        Scalar tensor; zero if the batch has no labelled pixel.
    """
    logits = logits_of(forward(model, batch))
    logits, targets = _fitted(logits, targets_of(batch).to(logits.device), ignore=ignore, where="the batch")
    costs: Tensor = F.cross_entropy(logits, targets, ignore_index=ignore, reduction="sum")
    return costs / (targets != ignore).sum().clamp_min(1)


def _fitted(logits: Tensor, targets: Tensor, *, ignore: int, where: str) -> tuple[Tensor, Tensor]:
    """Return logits at the size of the targets, and the targets as int64.

    Raises:
        ValueError: if they do not fit.
    """
    fits = logits.ndim in _MODES and targets.ndim == logits.ndim - 1 and len(targets) == len(logits)
    if not fits or targets.is_floating_point():
        raise ValueError(
            f"Integer targets (batch, height, width) are needed for logits (batch, classes, height, width), got "
            f"{targets.dtype} {tuple(targets.shape)} and {tuple(logits.shape)} in {where}."
        )
    targets = targets.long()
    check_classes(targets[targets != ignore], logits.shape[1], where)
    if logits.shape[2:] != targets.shape[1:]:
        logits = F.interpolate(logits, size=targets.shape[1:], mode=_MODES[logits.ndim], align_corners=False)
    return logits, targets


def _with_pixels(score: Samples, ignore: int) -> Samples:
    """Return the score.

    Raises:
        ValueError: if no pixel counts.
    """
    if float(score.sums.sum(0)[1::2].sum()) == 0:
        raise ValueError(f"No pixel counts in {len(score.sums)} images: all targets are ignore={ignore}.")
    return score
