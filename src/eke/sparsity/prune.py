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
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..sites import find
from .compensate import Compensation
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
    compensate: Compensation | None = None,
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
        compensate: Gives survivors new values after each step (`Refit`, `Sweep`); None leaves them.
        progress: Called with (step, steps).

    Returns:
        The masks, with `steps` telling predicted and actual loss where the criterion is a model of the loss. What is
        predicted is the removal alone, without what survivors make up for.

    Raises:
        ValueError: if a number is out of range, a name is unknown, scores or losses are not finite, or density leaves
            fewer entries than `min_per_layer` needs.
    """  # noqa: DOC502
    removal = Removal(model, criterion, names, scope=scope, least=min_per_layer, compensate=compensate)
    check(density, steps, damping, min_per_layer, removal)
    history = []
    for step in range(1, steps + 1):

        def goal(entries: int, step: int = step) -> int:
            return kept_after(step, steps=steps, total=entries, density=density, schedule=schedule)

        history.append(removal.commit(*removal.propose(goal, damping, step=step), damping=damping))
        if progress is not None:
            progress(step, steps)
    return removal.result(history, density)


Parts = Mapping[str, tuple[Tensor, Tensor]]


class Removal:
    """A private copy of a model from which entries are taken in steps that can be looked at before they are kept.

    Args:
        model: Left as it is.
        criterion: Scores entries.
        names: Parameters; None for all linear layers and convolutions.
        scope: What is compared with what.
        least: Entries of each parameter that stay.
        compensate: Gives survivors new values.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        names: Sequence[str] | None,
        *,
        scope: Scope = "global",
        least: int = 1,
        compensate: Compensation | None = None,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.names = prunable(self.model) if names is None else list(names)
        self.weights = chosen(self.model, self.names)
        self.total = sum(weight.numel() for weight in self.weights.values())
        self.criterion, self.scope, self.least, self.compensate = criterion, scope, least, compensate
        self.known = criterion if isinstance(criterion, LossModel) else None
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        self.clamped = False
        self._loss: float | None = None

    @property
    def kept(self) -> int:
        """Entries that are left."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def propose(
        self, goal: Callable[[int], int], damping: float, *, step: int, parts: Parts | None = None
    ) -> tuple[dict[str, Tensor], Parts | None]:
        """Score what is left and choose.

        Args:
            goal: Entries to keep of so many.
            damping: Weight of 1/2 w^2 in the scores.
            step: For messages.
            parts: What the criterion says, if it was asked at this point before.

        Returns:
            The masks after the step, within those before it, and the parts of the scores.

        Raises:
            ValueError: if scores are not finite.
        """
        if parts is None and self.known is not None:
            parts = self.known.parts(self.model, self.names)
        if parts is not None:
            raw: Mapping[str, Tensor] = {name: (a + b).abs() for name, (a, b) in parts.items()}
        else:
            raw = self.criterion(self.model, self.names)
        scores = {}
        for name, weight in self.weights.items():
            score = raw[name] + (0.5 * damping * weight.detach().square() if damping else 0.0)
            if not bool(torch.isfinite(score).all()):
                raise ValueError(f"Scores of {name!r} are not finite in step {step}; check the data and the loss.")
            # What is gone stays gone.
            scores[name] = torch.where(self.masks[name], score, -torch.inf)
        found, moved = _select(scores, goal, self.scope, self.least)
        self.clamped |= moved
        return {name: self.masks[name] & mask for name, mask in found.items()}, parts

    @torch.no_grad()
    def commit(
        self,
        masks: dict[str, Tensor],
        parts: Parts | None,
        *,
        damping: float,
        limit: Callable[[PruneStep], bool] | None = None,
    ) -> PruneStep:
        """Remove what the masks leave out.

        Args:
            masks: What `propose` returned.
            parts: What it returned with them.
            damping: Told in the report.
            limit: Whether the step may stay; otherwise all is as it was.

        Returns:
            How it went.
        """
        before = self._loss if self._loss is not None or self.known is None else mean_loss(self.model, self.known)
        old = {name: weight.clone() for name, weight in self.weights.items()}
        values = None if self.compensate is None else self.compensate(self.model, masks)
        for name, weight in self.weights.items():
            weight.copy_((weight if values is None else values[name]) * masks[name])
        kept = sum(int(mask.sum()) for mask in masks.values())
        if self.known is None or parts is None:
            self.masks = masks
            return PruneStep(kept, damping=damping)
        gone = {name: self.masks[name] & ~mask for name, mask in masks.items()}
        removed = [(a + b)[gone[name]].double() for name, (a, b) in parts.items()]
        predicted, magnitude = (math.fsum(float(f(r)) for r in removed) for f in (torch.sum, lambda r: r.abs().sum()))
        after = mean_loss(self.model, self.known)
        step = PruneStep(kept, predicted, before, after, damping, magnitude)
        if limit is None or limit(step):
            self.masks, self._loss = masks, after
        else:
            self._loss = before
            for name, weight in self.weights.items():
                weight.copy_(old[name])
        return step

    def result(self, history: Sequence[PruneStep], density: float) -> MaskSet:
        """Return the masks, with values where survivors got new ones; layers that had to be kept are told once."""
        if self.clamped:
            warnings.warn(
                f"Some layers would have kept fewer than {self.least} entries at density {density}: their best ones "
                "stay in place of others.",
                stacklevel=3,
            )
        values = None
        if self.compensate is not None:
            values = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return MaskSet({name: mask.clone() for name, mask in self.masks.items()}, tuple(history), values=values)


def prunable(model: nn.Module) -> list[str]:
    """Return the names of the weights of all linear layers and convolutions."""
    return [site.parameter_name for site in find(model) if site.kind in {"linear", "conv", "conv_transpose"}]


@torch.no_grad()
def mean_loss(model: nn.Module, criterion: LossModel) -> float:
    """Return the mean of a criterion's loss over its batches, in eval mode.

    Args:
        model: The model.
        criterion: Its loss and data.

    Returns:
        The mean.

    Raises:
        ValueError: if there are no batches, or the mean is not finite.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        values = [float(criterion.loss(model, batch)) for batch in criterion.batches]
    finally:
        for module, training in flags:
            module.training = training
    if not values or not math.isfinite(sum(values)):
        raise ValueError(
            f"The loss over {len(values)} batches is {sum(values) if values else 'unknown'}: pass a list or a loader "
            "with data, not an iterator that was read before, and check that the loss is finite."
        )
    return math.fsum(values) / len(values)


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


def check(density: float, steps: int, damping: float, least: int, removal: Removal) -> None:
    """Refuse numbers that make no pruning.

    Args:
        density: In (0, 1].
        steps: At least 1.
        damping: At least 0.
        least: At least 0, and no more than density leaves.
        removal: Its parameters count.

    Raises:
        ValueError: if one is out of range, or there is nothing to prune.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if steps < 1 or not 0 <= damping < math.inf or least < 0:
        raise ValueError(
            f"steps must be >= 1, damping >= 0 and min_per_layer >= 0, got steps={steps}, damping={damping}, "
            f"min_per_layer={least}."
        )
    total, layers = removal.total, len(removal.names)
    if not layers:
        raise ValueError(
            f"There are no weights to prune: {type(removal.model).__name__} has no linear layer or convolution whose "
            "weight is a plain parameter (parametrized ones are left alone: take that out first); give names=."
        )
    if round(total * density) < least * layers:
        raise ValueError(
            f"density {density} keeps {round(total * density)} of {total} entries, fewer than min_per_layer={least} "
            f"for each of {layers} parameters."
        )
