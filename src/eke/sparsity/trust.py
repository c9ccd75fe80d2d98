"""Pruning whose step size and damping follow how far the model of the loss can be trusted.

A step removes a share of what is left. Its removal is predicted to change the loss by at most sum |part| over the
entries removed. Where the loss rises by more than `tolerance` times that, the model was left behind: the step is taken
back and halved, and with the smallest step damping grows tenfold, which pulls the scores towards magnitude. Where it
rises by less than half of that, the next step is twice as large and damping shrinks. Few steps are spent where the
model holds, many where it does not.

Source: the trust region of Laurent et al., "Revisiting loss modelling for unstructured pruning", 2020, who tune a fixed
number of steps and a fixed damping; the control by the ratio of actual to predicted change is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from .compensate import Compensation
from .criteria import LossModel
from .masks import MaskSet, PruneStep
from .prune import Parts, Removal, check

_LARGEST = 0.5
"""Share of what is left that one step may remove."""
_DAMPINGS = 6
"""Powers of ten that damping may grow in one step."""


def prune_by_trust(
    model: nn.Module,
    criterion: LossModel,
    density: float,
    *,
    names: Sequence[str] | None = None,
    tolerance: float = 1.0,
    most_steps: int = 140,
    min_per_layer: int = 1,
    compensate: Compensation | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MaskSet:
    """Prune with steps as large, and damping as small, as predicted and actual changes of the loss allow.

    Args:
        model: Left as it is.
        criterion: A model of the loss.
        density: Share of all entries kept at the end.
        names: Parameters to prune; None for the weights of all linear layers and convolutions.
        tolerance: Rise of the loss that is accepted, relative to the absolute changes predicted.
        most_steps: The smallest step is one of so many equal shares; no more steps than twice as many are tried.
        min_per_layer: Entries of each parameter that stay whatever their scores.
        compensate: Gives survivors new values after each step.
        progress: Called with (entries removed, entries to remove).

    Returns:
        The masks; `steps` tells of each step that stayed its damping and what was predicted and measured.

    Raises:
        TypeError: if the criterion is no model of the loss.
        ValueError: if a number is out of range or scores or losses are not finite.
    """
    if not isinstance(criterion, LossModel):
        raise TypeError(
            f"prune_by_trust compares predicted with actual losses: it needs LinearModel, QuadraticModel or OBD, got "
            f"{criterion!r}; use prune for others."
        )
    removal = Removal(model, criterion, names, least=min_per_layer, compensate=compensate)
    check(density, most_steps, 0.0, min_per_layer, removal)
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    goal = removal.total - round(removal.total * (1 - density))
    least = math.log(1 / density) / most_steps
    largest = -math.log1p(-_LARGEST)
    size, damping, tried = min(largest, 8 * least), 0.0, 0
    history: list[PruneStep] = []
    parts: Parts | None = None
    while removal.kept > goal:
        tried += 1
        smallest = size <= least or tried >= 2 * most_steps
        keep = max(goal, min(removal.kept - 1, round(removal.kept * math.exp(-size))))
        masks, parts = removal.propose(lambda _, keep=keep: keep, damping, step=tried, parts=parts)  # type: ignore[misc]
        # At the smallest step with damping at its end there is nothing left to make smaller.
        last = smallest and damping >= _start(removal, parts) * 10**_DAMPINGS
        step = removal.commit(
            masks, parts, damping=damping,
            limit=None if last or tried >= 2 * most_steps else lambda s: _rise(s) <= tolerance * (s.magnitude or 0.0),
        )  # fmt: skip
        if removal.kept > keep:  # taken back: what the criterion said of this point still holds
            if smallest:
                damping = max(10 * damping, _start(removal, parts))
            size = max(least, size / 2)
            continue
        history.append(step)
        parts = None
        if _rise(step) <= 0.5 * tolerance * (step.magnitude or 0.0):
            size, damping = min(largest, 2 * size), damping / 10
        if progress is not None:
            progress(removal.total - removal.kept, removal.total - goal)
    return removal.result(history, density)


def _rise(step: PruneStep) -> float:
    assert step.after is not None  # the criterion is a model of the loss
    assert step.before is not None
    return step.after - step.before


def _start(removal: Removal, parts: Parts | None) -> float:
    """Return the damping at which 1/2 w^2 weighs a hundredth of what the criterion says, on the mean."""
    assert parts is not None  # the criterion is a model of the loss
    said = sum(float((a + b).abs().double().sum()) for a, b in parts.values())
    squares = sum(float(w.detach().double().square().sum()) for w in removal.weights.values())
    return 0.01 * said / max(0.5 * squares, torch.finfo(torch.float64).tiny)
