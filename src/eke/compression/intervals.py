"""Intervals for shares and for differences of paired shares; `spread` has those of other metrics.

`wilson` (Wilson, 1927) inverts the score test of one binomial share. `paired_drop` inverts the score test of the
difference of two dependent shares (Tango, "Equivalence test and confidence interval for the difference in proportions
for the paired-sample design", Statistics in Medicine, 1998): with b samples that only the first model gets right and c
that only the second does, it keeps its coverage down to b = c = 0, where simple intervals collapse to a point.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor

Interval = tuple[float, float]
"""Lower and upper end."""


def _quantile(confidence: float) -> float:
    """Return the two-sided standard normal quantile.

    Raises:
        ValueError: if the confidence is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(correct: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of a binomial share.

    Args:
        correct: Number of successes.
        total: Number of trials, at least one.
        confidence: Coverage.

    Returns:
        Lower and upper end, within [0, 1].

    Raises:
        ValueError: if the counts contradict each other.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(f"wilson needs 0 <= correct <= total and total >= 1, got {correct} of {total}.")
    z = _quantile(confidence)
    share = correct / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def _tango(b: int, c: int, n: int, delta: float) -> float:
    """Return the score statistic of the hypothesis that the difference of shares is `delta`."""
    p = -b - c + (2 * n - b + c) * delta
    q = -c * delta * (1 - delta)
    root = (math.sqrt(max(p * p - 8 * n * q, 0.0)) - p) / (4 * n)
    variance = n * (2 * root + delta * (1 - delta))
    shift = b - c - n * delta
    if variance <= 0:
        return 0.0 if shift == 0 else math.copysign(math.inf, shift)
    return shift / math.sqrt(variance)


def paired_difference(only_first: int, only_second: int, total: int, *, confidence: float = 0.95) -> Interval:
    """Score interval of (share of the first) - (share of the second) on the same samples.

    Args:
        only_first: Samples that only the first gets right.
        only_second: Samples that only the second gets right.
        total: Number of samples, at least one.
        confidence: Coverage.

    Returns:
        Lower and upper end, within [-1, 1].

    Raises:
        ValueError: if the counts contradict each other.
    """
    if total < 1 or min(only_first, only_second) < 0 or only_first + only_second > total:
        raise ValueError(
            "paired_difference needs discordant counts that fit into the total, got "
            f"{only_first} and {only_second} of {total}."
        )
    z = _quantile(confidence)
    estimate = (only_first - only_second) / total
    ends = []
    for sign in (-1, 1):
        near, far = estimate, float(sign)
        for _ in range(60):
            middle = (near + far) / 2
            inside = abs(_tango(only_first, only_second, total, middle)) <= z
            near, far = (middle, far) if inside else (near, middle)
        ends.append(near)
    return ends[0], ends[1]


def paired_outcomes(first: Tensor, second: Tensor, *, confidence: float = 0.95) -> tuple[float, Interval]:
    """Difference of two models' shares on the same samples, with its interval.

    Args:
        first: Bool outcomes of the first model, (samples,).
        second: Bool outcomes of the second model, (samples,).
        confidence: Coverage.

    Returns:
        The difference first - second and its interval.

    Raises:
        ValueError: if the lengths differ or there is no sample.
    """
    if first.shape != second.shape or first.numel() == 0:
        raise ValueError(
            f"Paired outcomes need equal lengths of at least 1, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    total = first.numel()
    return (only_first - only_second) / total, paired_difference(only_first, only_second, total, confidence=confidence)


def unpaired_difference(
    first: tuple[int, int], second: tuple[int, int], *, confidence: float = 0.95
) -> tuple[float, Interval]:
    """Difference of two independent shares by Newcombe's hybrid score interval (Newcombe, 1998, method 10).

    Args:
        first: (correct, total) of the first.
        second: (correct, total) of the second.
        confidence: Coverage.

    Returns:
        The difference first - second and its interval.
    """
    (k1, n1), (k2, n2) = first, second
    p1, p2 = k1 / n1, k2 / n2
    low1, high1 = wilson(k1, n1, confidence=confidence)
    low2, high2 = wilson(k2, n2, confidence=confidence)
    lower = p1 - p2 - math.sqrt((p1 - low1) ** 2 + (high2 - p2) ** 2)
    upper = p1 - p2 + math.sqrt((high1 - p1) ** 2 + (p2 - low2) ** 2)
    return p1 - p2, (lower, upper)


def samples_to_prove(drop: float, *, confidence: float = 0.95) -> int:
    """Fewest samples with which a drop of at most `drop` can be proved, even if the two models never differ.

    Args:
        drop: Largest allowed drop as a share.
        confidence: Coverage.

    Returns:
        Number of samples.
    """
    z = _quantile(confidence)
    return max(1, math.ceil(z * z * (1 - drop) / drop))
