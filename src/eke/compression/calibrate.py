"""Predictions corrected by a few measurements: the loss of single decisions, and of whole plans.

The quadratic form is right for small changes and the average direction; strong changes cost more than it says, some
sites are worse than their factors tell, and changes of several sites do not simply add. So some options are carried out
and their loss increase is measured on calibration samples: of every decision one or two of each family (widths,
grids, supports, ranks, blocks). One factor for all quadratic terms brings predictions to their level (the second moment
of the labels' gradients is not the Hessian). Between and beyond these anchors a prediction is multiplied by
measured/predicted, interpolated in log-log. Then some random plans are carried out whole, and
measured = c * sum**gamma is fitted to them (beyond them measured / sum stays as it is at their ends): monotone, so it
changes what is reported, not which plan is best.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .. import cost
from .._types import Batch
from ..structures import LowRank, Structure, Supported, UniformGrid
from . import measure
from .apply import Draft
from .candidates import Decisions
from .checks import count_samples
from .job import Job
from .task import evaluating

SAMPLES = 512
"""Most calibration samples on which a loss increase is measured."""

WORK = 4e10
"""Multiply-adds of one evaluation from which fewer samples are taken."""

ANCHORS = 64
"""Most options that are carried out alone."""

PLANS = 10
"""Most random plans that are carried out whole."""

TOTAL = 2.5e12
"""Multiply-adds of all evaluations from which fewer options and plans are carried out."""

_FEWEST = {"anchors": 12, "plans": 4}

_MOST = math.log(20.0)
"""Largest correction of a prediction, as a logarithm."""


class Meter:
    """Measures the loss increase of changed models on some calibration samples.

    Args:
        job: What was asked.
        samples: Samples after which no further batch is taken; None for what `affordable` says.
    """

    def __init__(self, job: Job, *, samples: int | None = None) -> None:
        self._loss, self._batches = job.loss, list[Batch]()
        samples, seen = samples or affordable(job), 0
        for batch in job.batches:
            self._batches.append(batch)
            seen += count_samples(batch)
            if seen >= samples:
                break
        self._base = self._losses(job.model)

    def __call__(self, net: nn.Module) -> tuple[float, float]:
        """Return the loss increase of a net, and its standard error over batches."""
        change = self._losses(net) - self._base
        error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
        return float(change.mean()), error

    def _losses(self, net: nn.Module) -> torch.Tensor:
        with evaluating(net):
            return torch.tensor([float(self._loss(net, batch)) for batch in self._batches], dtype=torch.float64)


def affordable(job: Job) -> int:
    """Return on how many samples a loss increase is measured: fewer for larger models, whatever the clock says."""
    macs = cost.flops(job.model, *measure.positional(job.inputs)) / 2 / (measure.batch_size(job.inputs) or 1)
    return max(16, min(SAMPLES, int(WORK / max(macs, 1.0))))


def share(job: Job) -> float:
    """Return which share of what could be carried out and measured is: less for larger models, whatever the clock."""
    macs = cost.flops(job.model, *measure.positional(job.inputs)) / 2 / (measure.batch_size(job.inputs) or 1)
    return min(1.0, TOTAL / max(1.0, ANCHORS * affordable(job) * macs))


@dataclass(frozen=True)
class Anchor:
    """One decision carried out alone.

    Args:
        choice: Name of the decision.
        option: Index of the option.
        family: Of the option.
        predicted: Loss that the curvature predicts.
        measured: Loss increase that was measured.
        error: Its standard error.
    """

    choice: str
    option: int
    family: str
    predicted: float
    measured: float
    error: float = 0.0

    @property
    def correction(self) -> float:
        """Logarithm of measured / predicted; what noise hides counts as at most twice its error."""
        seen = max(self.measured, 2 * self.error, 1e-12)
        if self.measured < 2 * self.error and self.predicted <= seen:
            return 0.0
        return float(np.clip(math.log(seen / max(self.predicted, 1e-12)), -_MOST, _MOST))


@dataclass(frozen=True)
class Calibration:
    """Corrections of predictions.

    Args:
        anchors: Decisions that were carried out alone; `predicted` has the level of all.
        level: Factor of all quadratic terms.
        plans: (sum of corrected predictions, measured) of whole plans.
        scale: c of measured = c * sum**gamma.
        gamma: Its exponent.
    """

    anchors: tuple[Anchor, ...] = ()
    level: float = 1.0
    plans: tuple[tuple[float, float], ...] = ()
    scale: float = 1.0
    gamma: float = 1.0

    def whole(self, loss: float) -> float:
        """Return the loss predicted for a whole plan whose corrected predictions sum to `loss`."""
        if loss <= 0 or not self.plans:
            return max(0.0, loss)
        sums = [total for total, _ in self.plans]
        inside = min(max(loss, min(sums)), max(sums))
        return float(loss * self.scale * inside ** (self.gamma - 1))

    def corrected(self, decisions: Decisions) -> Decisions:
        """Return the decisions with corrected losses."""
        losses = {}
        for choice, found in levelled(decisions, self.level).items():
            families = families_of(decisions, choice)
            losses[choice] = [
                value * math.exp(self._correction(choice, family, value)) if value > 0 else 0.0
                for value, family in zip(found, families)
            ]
        return decisions.with_losses(losses)

    def _correction(self, choice: str, family: str, value: float) -> float:
        own = [a for a in self.anchors if a.choice == choice and a.family == family]
        if not own:
            # What was not measured is corrected as its family was elsewhere.
            others = [a.correction for a in self.anchors if a.family == family]
            return float(np.median(others)) if others else 0.0
        points = sorted((math.log(max(a.predicted, 1e-12)), a.correction) for a in own)
        return float(np.interp(math.log(value), [p for p, _ in points], [c for _, c in points]))

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "anchors": [vars(anchor) for anchor in self.anchors],
            "level": self.level,
            "plans": [list(plan) for plan in self.plans],
            "scale": self.scale,
            "gamma": self.gamma,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Calibration:
        """Return what `to_json` described."""
        anchors = tuple(Anchor(**anchor) for anchor in document["anchors"])
        plans = tuple((p, m) for p, m in document["plans"])
        return cls(anchors, document["level"], plans, document["scale"], document["gamma"])


def levelled(decisions: Decisions, level: float) -> dict[str, list[float]]:
    """Return the predicted losses with all quadratic terms multiplied by `level`, by decision."""
    rises = decisions.rises
    return {
        choice: [level * (loss - rise) + rise for loss, rise in zip(found, rises[choice])]
        for choice, found in decisions.losses.items()
    }


def best_level(anchors: Sequence[Anchor], rises: Mapping[str, Sequence[float]]) -> float:
    """Return the factor of the quadratic terms that brings predictions nearest to what was measured.

    Args:
        anchors: With the predictions of level 1.
        rises: First-order parts of the predictions, by decision.

    Returns:
        The factor with the least median of |log(predicted / measured)| over the anchors clear of noise; 1 for fewer
        than four.
    """
    clear = [a for a in anchors if a.measured > 2 * a.error and a.predicted > 0]
    if len(clear) < 4:
        return 1.0
    rise = np.asarray([rises[a.choice][a.option] for a in clear])
    bent = np.asarray([a.predicted for a in clear]) - rise
    measured = np.asarray([a.measured for a in clear])
    levels = np.geomspace(0.25, 16.0, 49)
    apart = [float(np.median(np.abs(np.log(np.maximum(k * bent + rise, 1e-12) / measured)))) for k in levels]
    return float(levels[int(np.argmin(apart))])


def family(structure: Structure | None) -> str:
    """Return the family of a matrix's candidate: its predictions err alike."""
    if structure is None:
        return "as it is"
    if isinstance(structure, UniformGrid):
        return "grid"
    if isinstance(structure, LowRank):
        return "rank"
    return "support" if isinstance(structure, Supported) else type(structure).__name__


def families_of(decisions: Decisions, choice: str) -> list[str]:
    """Return the family of every option of a decision."""
    for form in decisions.forms:
        if form.choice == choice:
            return [family(structure) for structure in form.structures]
    kind = choice.partition(":")[0]
    return [kind] * len(decisions.losses[choice])


def anchor_options(decisions: Decisions) -> list[tuple[str, int]]:
    """Return the options to carry out alone, most telling first: of every family of a decision the strongest one (not
    the very smallest width), then the middle one.
    """  # noqa: D205
    first, second = [], []
    # Kinds take turns, so that all of them are known where not everything can be carried out.
    kinds = [
        [b.choice for b in decisions.blocks],
        [a.choice for a in decisions.attentions],
        [w.choice for w in decisions.widths],
        [f.choice for f in decisions.forms],
    ]
    turns = [choice for turn in itertools.zip_longest(*kinds) for choice in turn if choice is not None]
    for choice in turns:
        losses = decisions.losses[choice]
        families = families_of(decisions, choice)
        for name in dict.fromkeys(families):
            options = [i for i, f in enumerate(families) if f == name and losses[i] > 0]
            if name == "channels" and len(options) > 2:
                options = options[:-1]
            if options:
                first.append((choice, options[-1]))
            if len(options) > 2:
                second.append((choice, options[len(options) // 2]))
    return [*first, *second]


@dataclass
class Random:
    """Random plans of many strengths, as sensible as a planner's: options of like predicted loss together.

    Args:
        decisions: The candidates.
        seed: Of the draws.
    """

    decisions: Decisions
    seed: int = 0
    _generator: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def order(self, count: int) -> list[int]:
        """Return a random order of so many things."""
        return [int(i) for i in self._generator.permutation(count)]

    def draw(self, strength: float | None = None) -> dict[str, int]:
        """Return the options of a random plan, of a strength from 0 (weak) to 1; None draws it too."""
        losses = self.decisions.losses
        positive = sorted(value for found in losses.values() for value in found if value > 0)
        if not positive:
            return dict.fromkeys(losses, 0)
        low, high = (math.log(positive[int(q * (len(positive) - 1))]) for q in (0.1, 0.8))
        level = low + (high - low) * (self._generator.random() if strength is None else strength)
        picks = {}
        for choice, found in losses.items():
            limit = math.exp(level + self._generator.normal())
            allowed = [i for i, value in enumerate(found) if value <= limit]
            stay = self._generator.random() < 0.25
            picks[choice] = 0 if stay or not allowed else int(self._generator.choice(allowed[-3:]))
        return picks


def calibrate(
    decisions: Decisions,
    meter: Meter,
    carry_out: Callable[[Mapping[str, int]], Draft],
    *,
    plans: int | None = None,
    effort: float = 1.0,
    seed: int = 0,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Calibration:
    """Carry out some decisions alone and some random plans, and correct the predictions by what they cost.

    Args:
        decisions: The candidates, with the losses that the curvature predicts.
        meter: Measures loss increases.
        carry_out: Makes the model of a plan.
        plans: Whole plans; None for what the effort allows.
        effort: Share of the options and plans that are carried out, see `share`; some are in any case.
        seed: Of the random plans.
        progress: Called with the share that is done.

    Returns:
        The calibration.
    """
    anchors: list[Anchor] = []
    options = anchor_options(decisions)[: _part("anchors", ANCHORS, effort)]
    plans = _part("plans", PLANS, effort) if plans is None else plans
    for number, (choice, option) in enumerate(options):
        progress(0.7 * number / len(options), f"{choice}, option {option}, alone")
        measured, error = meter(carry_out({choice: option}).finished())
        name = families_of(decisions, choice)[option]
        anchors.append(Anchor(choice, option, name, decisions.losses[choice][option], measured, error))
    level = best_level(anchors, decisions.rises)
    losses = levelled(decisions, level)
    anchors = [replace(a, predicted=losses[a.choice][a.option]) for a in anchors]
    found = Calibration(tuple(anchors), level)
    corrected = found.corrected(decisions)
    drawn = Random(corrected, seed)
    pairs: list[tuple[float, float]] = []
    weights: list[float] = []
    for number in range(plans):
        progress(0.7 + 0.3 * number / plans, f"random plan {number + 1}")
        picks = drawn.draw((number + 0.5) / plans)
        measured, error = meter(carry_out(picks).finished())
        total = plan_loss(corrected, picks)
        if total > 0:
            # What noise hides is taken as its error, with little weight.
            pairs.append((total, max(measured, error, 1e-12)))
            weights.append(1 / (0.15 + (error / pairs[-1][1]) ** 2))
    scale, gamma = power_law(pairs, weights)
    return Calibration(tuple(anchors), level, tuple(pairs), scale, gamma)


def _part(what: str, most: int, effort: float) -> int:
    return most if effort >= 1 else max(_FEWEST[what], round(most * effort))


def plan_loss(decisions: Decisions, picks: Mapping[str, int]) -> float:
    """Return the sum of the predicted losses of a plan's options; nothing for what a block that is left out holds."""
    gone = [block for block in decisions.blocks if picks.get(block.choice, 0)]
    held = {f.choice for f in decisions.forms if any(block.holds(f.site.module_name) for block in gone)}
    held |= {a.choice for a in decisions.attentions if any(block.holds(a.name) for block in gone)}
    losses = decisions.losses
    return sum(losses[choice][option] for choice, option in picks.items() if choice not in held)


def power_law(pairs: Sequence[tuple[float, float]], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Fit measured = scale * sum**gamma by least squares of logarithms.

    Args:
        pairs: (sum, measured), positive.
        weights: Of the pairs, None for the same.

    Returns:
        scale and gamma; gamma is kept within 0.3 and 1.5, and is 1 for fewer than four pairs.
    """
    if not pairs:
        return 1.0, 1.0
    x, y = (np.log([pair[i] for pair in pairs]) for i in (0, 1))
    share = np.ones(len(pairs)) if weights is None else np.asarray(weights)
    gamma = 1.0
    if len(pairs) >= 4 and float(x.std()) > 0.3:
        gamma = float(np.clip(np.polyfit(x, y, 1, w=np.sqrt(share))[0], 0.3, 1.5))
    return float(math.exp(_weighted_median(y - gamma * x, share))), gamma


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return the value that has half of the weight on either side; between two, their mean."""
    order = np.argsort(values)
    below = np.cumsum(weights[order]) / weights.sum()
    low, high = (int(np.searchsorted(below, 0.5 + shift)) for shift in (-1e-9, 1e-9))
    return float(values[order[low]] + values[order[min(high, len(values) - 1)]]) / 2
