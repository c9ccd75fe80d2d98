"""Pruning in steps: score, remove the lowest, look again at the masked point.

A model of the loss is local, so removing a share at once trusts it where it is wrong. In `steps` steps with the
exponential schedule each removes the same share of what is left: kept after step t is
P - round(P (1 - density^(t / steps))). The term damping / 2 w^2 penalises long moves. Nothing is retrained in between;
masks are nested.

Source: Laurent et al., "Revisiting loss modelling for unstructured pruning", 2020.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..sites import find
from .criteria import Criterion, LossModel, chosen
from .masks import MaskSet, PruneStep

Schedule = Literal["exponential", "linear", "cubic"]
Scope = Literal["global", "layer", "row"]


def kept_after(step: int, *, steps: int, total: int, density: float, schedule: Schedule = "exponential") -> int:
    """Return how many of `total` entries are kept after a step of the schedule.

    Args:
        step: From 1 to `steps`.
        steps: Number of steps.
        total: Entries at the start.
        density: Share kept at the end.
        schedule: "exponential" removes the same share of what is left in each step, "linear" the same number, "cubic"
            most at first: 1 - (1 - density) (1 - (1 - t)^3).

    Returns:
        The number.
    """
    t = step / steps
    if schedule == "exponential":
        share = density**t if density > 0 else float(t < 1)
    elif schedule == "linear":
        share = 1 - (1 - density) * t
    else:
        share = 1 - (1 - density) * (1 - (1 - t) ** 3)
    return total - round(total * (1 - share))


def prune(
    model: nn.Module,
    criterion: Criterion,
    density: float,
    *,
    names: Sequence[str] | None = None,
    steps: int = 140,
    schedule: Schedule = "exponential",
    scope: Scope = "global",
    damping: float = 0.0,
    min_per_layer: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> MaskSet:
    """Choose which entries of a model's weights to keep; the model is not changed (`MaskSet.apply_` does).

    Args:
        model: The model.
        criterion: Scores entries; the lowest go first.
        density: Share of all entries that is kept at the end.
        names: Parameters to prune; None for the weights of all linear layers and convolutions.
        steps: How often scores are computed.
        schedule: See `kept_after`.
        scope: Compare entries of the whole model, within each parameter, or within each row (output) of it.
        damping: Weight of 1/2 w^2, added to the scores.
        min_per_layer: Entries of each parameter that stay whatever their scores; where this changes what is kept, it is
            said once.
        progress: Called with (step, steps).

    Returns:
        The masks, with `steps` telling predicted and actual loss where the criterion is a model of the loss.

    Raises:
        ValueError: if a number is out of range, a name is unknown, scores are not finite, or density leaves fewer
            entries than `min_per_layer` needs.
    """
    private = copy.deepcopy(model)
    if names is None:
        names = [s.parameter_name for s in find(private) if s.kind in {"linear", "conv", "conv_transpose"}]
    weights = chosen(private, names)
    total = sum(weight.numel() for weight in weights.values())
    _check(density, steps, damping, min_per_layer, total, len(weights))
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    history: list[PruneStep] = []
    known = criterion if isinstance(criterion, LossModel) else None
    before = None if known is None else mean_loss(private, known)
    clamped = False
    for step in range(1, steps + 1):
        parts = None if known is None else known.parts(private, names)
        raw = {n: (a + b).abs() for n, (a, b) in parts.items()} if parts is not None else criterion(private, names)
        scores = {}
        for name, weight in weights.items():
            score = raw[name] + (0.5 * damping * weight.detach().square() if damping else 0.0)
            if not bool(torch.isfinite(score).all()):
                raise ValueError(f"Scores of {name!r} are not finite in step {step}; check the data and the loss.")
            # What is gone stays gone.
            scores[name] = torch.where(masks[name], score, -torch.inf)

        def goal(entries: int, step: int = step) -> int:
            return kept_after(step, steps=steps, total=entries, density=density, schedule=schedule)

        chosen_masks, moved = _select(scores, goal, scope, min_per_layer)
        clamped |= moved
        gone = {name: masks[name] & ~mask for name, mask in chosen_masks.items()}
        masks = {name: masks[name] & mask for name, mask in chosen_masks.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.mul_(masks[name])
        kept = sum(int(mask.sum()) for mask in masks.values())
        if known is None or parts is None:
            history.append(PruneStep(kept))
        else:
            predicted = sum(float((a + b)[gone[name]].double().sum()) for name, (a, b) in parts.items())
            after = mean_loss(private, known)
            history.append(PruneStep(kept, predicted, before, after))
            before = after
        if progress is not None:
            progress(step, steps)
    if clamped:
        warnings.warn(
            f"Some layers would have kept fewer than {min_per_layer} entries at density {density}: their best ones "
            "stay in place of others.",
            stacklevel=2,
        )
    return MaskSet({name: mask.clone() for name, mask in masks.items()}, tuple(history))


@torch.no_grad()
def mean_loss(model: nn.Module, criterion: LossModel) -> float:
    """Return the mean of a criterion's loss over its batches, in eval mode."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        values = [float(criterion.loss(model, batch)) for batch in criterion.batches]
    finally:
        for module, training in flags:
            module.training = training
    return math.fsum(values) / max(1, len(values))


def _select(
    scores: dict[str, Tensor], goal: Callable[[int], int], scope: Scope, least: int
) -> tuple[dict[str, Tensor], bool]:
    """Return masks of the highest scores, and whether `least` changed them."""
    moved = False
    held = {}
    for name, score in scores.items():
        flat = score.flatten()
        top = flat.topk(min(least, flat.numel())).indices if least else flat.new_empty(0, dtype=torch.long)
        held[name] = flat.clone()
        held[name][top] = torch.inf
    if scope == "global":
        everything = torch.cat(list(held.values()))
        keep = _highest(everything[None], goal(everything.numel()))[0]
        # What the scores alone would have kept.
        free = _highest(torch.cat([score.flatten() for score in scores.values()])[None], int(keep.sum()))[0]
        masks, start = {}, 0
        for name, score in scores.items():
            end = start + score.numel()
            masks[name] = keep[start:end].view_as(score)
            moved |= int(free[start:end].sum()) < min(least, score.numel())
            start = end
        return masks, moved
    masks = {}
    for name, flat in held.items():
        rows = flat.view(scores[name].shape[0], -1) if scope == "row" else flat[None]
        count = goal(rows.shape[1])
        count, moved = max(count, 1 if scope == "row" else least), moved or count < (1 if scope == "row" else least)
        masks[name] = _highest(rows, min(count, rows.shape[1])).view_as(scores[name])
    return masks, moved


def _highest(rows: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(rows, dtype=torch.bool)
    return mask.scatter_(1, rows.topk(count, dim=1).indices, value=True) if count else mask


def _check(density: float, steps: int, damping: float, least: int, total: int, layers: int) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if steps < 1 or damping < 0 or least < 0:
        raise ValueError(
            f"steps must be >= 1, damping >= 0 and min_per_layer >= 0, got steps={steps}, damping={damping}, "
            f"min_per_layer={least}."
        )
    if not layers:
        raise ValueError("There are no weights to prune: the model has no linear layer or convolution; give names=.")
    if round(total * density) < least * layers:
        raise ValueError(
            f"density {density} keeps {round(total * density)} of {total} entries, fewer than min_per_layer={least} "
            f"for each of {layers} parameters."
        )
