"""Intervals for metrics of samples: means, quotients and whatever else is computed from totals.

Leaving out sample i moves the metric from t to t(-i); c_i = (n - 1) (mean t(-) - t(-i)) is what the sample does to it,
and the metric's variance is sum c^2 / (n (n - 1)) (the jackknife: Tukey, "Bias and confidence in not quite large
samples", 1958). Student's interval misses too often where a few samples weigh much, so each end is the wider one of
Student's and of Hall's, which corrects for skewness (Hall, "On the removal of skewness by transformation", 1992). Two
models on the same samples are one metric of both their sums, so what they share cancels. Cost: the metric, once a
sample.

Where fewer than ten samples differ between two models, how much they differ is hardly known; if the metric has a span,
each may differ by all of it, and the interval reaches as far as the share of such samples may (Wilson's upper end).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._types import Metric, Samples
from .intervals import Interval, wilson

FEW = 50
"""Samples from which on intervals hold what they promise; with fewer of skewed data they miss more often."""

_SPARSE = 10
_CHUNK = 4_000_000
"""Numbers of the leave-one-out totals that are in memory at a time."""


def influences(sums: Tensor, of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """Return a number computed from totals, and what each sample does to it.

    Args:
        sums: (samples, columns).
        of: The number from totals (..., columns) -> (...).

    Returns:
        The number and the centred influences (samples,); not finite where the number cannot do without a sample.
    """
    total = sums.sum(0)
    without = torch.cat([of(total - part) for part in _parts(sums)])
    estimate, influence = float(of(total)), (len(sums) - 1) * (without.mean() - without)
    # Differences of equal totals are their rounding, once a sample.
    rounding = 8 * len(sums) * torch.finfo(sums.dtype).eps * abs(estimate)
    return estimate, torch.where(influence.abs() <= rounding, 0.0, influence)


def _parts(sums: Tensor) -> Iterator[Tensor]:
    """Return the samples in parts that fit into memory."""
    rows = max(1, _CHUNK // sums.shape[1])
    return (sums[start : start + rows] for start in range(0, len(sums), rows))


def around(estimate: float, groups: Sequence[Tensor], *, confidence: float = 0.95) -> Interval:
    """Return the interval of an estimate from the influences of its samples.

    Args:
        estimate: The number.
        groups: Influences (samples,) of each independent set of samples, at least two samples each.
        confidence: Coverage.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: if the confidence is not in (0, 1).
    """
    # SciPy takes a moment to import: only who compares models pays for it.
    from scipy.special import stdtrit

    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}.")
    variances = [float(c.square().sum()) / len(c) / (len(c) - 1) for c in groups]
    error = math.sqrt(sum(variances))
    if error == 0:
        return estimate, estimate
    # Welch and Satterthwaite; with one group n - 1.
    freedom = error**4 / sum(v * v / (len(c) - 1) for v, c in zip(variances, groups))
    skew = sum(float((c / error).pow(3).sum()) / len(c) ** 3 for c in groups)
    quantile = float(stdtrit(freedom, 0.5 + confidence / 2))
    ends = [_hall(q, skew) for q in (quantile, -quantile)]
    return estimate - error * max(quantile, ends[0]), estimate + error * max(quantile, -ends[1])


def _hall(quantile: float, skew: float) -> float:
    """Return the quantile of a studentised mean of the given skewness, by inverting Hall's cubic."""
    if abs(skew) < 1e-6:
        return quantile
    inner = 1 + skew * (quantile - skew / 6)
    return 3 / skew * (math.copysign(abs(inner) ** (1 / 3), inner) - 1)


def interval(score: Samples, *, confidence: float = 0.95) -> Interval:
    """Return the interval of a metric.

    Args:
        score: At least two samples.
        confidence: Coverage.

    Returns:
        Lower and upper end, in the metric's own unit.
    """
    metric = score.metric
    scale = _logarithmic(metric, score.sums)
    estimate, influence = influences(score.sums, lambda t: scale.into(metric.of(t)))
    ends = around(estimate, [influence], confidence=confidence)
    low, high = sorted(scale.back(end) for end in ends)
    if metric.span is None:
        return low, high
    if low == high:
        reach = metric.span * wilson(0, len(score.sums), confidence=confidence)[1]
        low, high = low - reach, high + reach
    # Shares end at 0 and 1; another metric with a span has no known ends.
    return (max(low, 0.0), min(high, 1.0)) if metric.percent else (low, high)


@dataclass(frozen=True)
class Worsening:
    """By how much a second model is worse than a first one.

    Args:
        value: Positive where the second is worse.
        interval: Its ends.
        relative: Whether both are shares of the first one's metric; in the metric's own unit otherwise.
        paired: Whether the models were compared sample by sample.
    """

    value: float
    interval: Interval
    relative: bool
    paired: bool


def worsening(first: Samples, second: Samples, *, relative: bool = True, confidence: float = 0.95) -> Worsening:
    """Compare two models, sample by sample where the order is the same.

    Args:
        first: The first model's score, at least two samples.
        second: The second model's score by the same metric.
        relative: Whether to divide by the first one's metric. Where that is zero, with a sample left out or not, the
            difference stays in the metric's own unit.
        confidence: Coverage.

    Returns:
        The worsening with its interval.

    Raises:
        ValueError: if the metrics differ.
    """
    metric = first.metric
    if metric.name != second.metric.name or first.sums.shape[1] != second.sums.shape[1]:
        raise ValueError(
            f"Two models are compared by one metric, got {metric.name!r} with {first.sums.shape[1]} columns and "
            f"{second.metric.name!r} with {second.sums.shape[1]}."
        )
    paired = first.sums.shape == second.sums.shape and first.order == second.order
    change = _change(first, second, relative=relative)
    found = _influences(first, second, change, paired=paired)
    if not all(bool(torch.isfinite(group).all()) for group in found[1]):
        relative, change = False, _change(first, second, relative=False)
        found = _influences(first, second, change, paired=paired)
    low, high = sorted(change.back(end) for end in around(*found, confidence=confidence))
    value = change.back(found[0])
    differ = int((first.sums != second.sums).any(1).sum()) if paired else len(first.sums)
    if metric.span is not None and (low == high or (paired and differ < _SPARSE)):
        fewest = min(len(first.sums), len(second.sums))
        reach = metric.span * wilson(min(differ, fewest) if paired else 0, fewest, confidence=confidence)[1]
        reach /= abs(first.value) if relative else 1.0
        low, high = min(low, -reach), max(high, reach)
    return Worsening(value, (low, high), relative, paired)


def paired_difference(first: Samples, second: Samples, *, confidence: float = 0.95) -> tuple[float, Interval]:
    """Return by how much the first model's metric exceeds the second's, with its interval.

    Args:
        first: The first model's score.
        second: The second model's score by the same metric.
        confidence: Coverage.

    Returns:
        The difference first - second in the metric's own unit, and its interval; paired where the order is the same.
    """
    found = worsening(first, second, relative=False, confidence=confidence)
    if not first.metric.lower_is_better:
        return found.value, found.interval
    return -found.value, (-found.interval[1], -found.interval[0])


@dataclass(frozen=True)
class _Scale:
    """Where intervals are made, and the way back."""

    into: Callable[[Tensor], Tensor]
    back: Callable[[float], float]


@dataclass(frozen=True)
class _Change:
    """A difference of two models' totals, and the way back from where its interval is made."""

    of: Callable[[Tensor, Tensor], Tensor]
    back: Callable[[float], float]


def _logarithmic(metric: Metric, sums: Tensor) -> _Scale:
    """Return the logarithm for a metric that stays positive whichever sample is left out, the metric itself else."""
    if metric.positive and _positive(metric, sums):
        return _Scale(torch.log, math.exp)
    return _Scale(lambda x: x, lambda x: x)


def _positive(metric: Metric, sums: Tensor) -> bool:
    _, influence = influences(sums, lambda t: torch.log(metric.of(t)))
    return bool(torch.isfinite(influence).all())


def _change(first: Samples, second: Samples, *, relative: bool) -> _Change:
    metric = first.metric
    sign = 1.0 if metric.lower_is_better else -1.0
    if not relative:
        return _Change(lambda a, b: sign * (metric.of(b) - metric.of(a)), lambda x: x)
    if metric.positive and _positive(metric, first.sums) and _positive(metric, second.sums):
        return _Change(lambda a, b: torch.log(metric.of(b) / metric.of(a)), lambda x: sign * math.expm1(min(x, 700.0)))
    return _Change(lambda a, b: sign * (metric.of(b) - metric.of(a)) / metric.of(a).abs(), lambda x: x)


def _influences(first: Samples, second: Samples, change: _Change, *, paired: bool) -> tuple[float, list[Tensor]]:
    """Return a change and what each sample does to it, in one group if paired and in two if not."""
    columns = first.sums.shape[1]
    if paired:
        both = torch.cat([first.sums, second.sums], 1)
        estimate, influence = influences(both, lambda t: change.of(t[..., :columns], t[..., columns:]))
        return estimate, [influence]
    totals = first.sums.sum(0), second.sums.sum(0)
    estimate, one = influences(first.sums, lambda t: change.of(t, totals[1]))
    _, other = influences(second.sums, lambda t: change.of(totals[0], t))
    return estimate, [one, other]
