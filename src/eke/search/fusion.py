"""Several scores as one, and how much of a score is only size.

    fuse(scores)[i] = sum over proxies of weight * ln(rank_i / m),  ranks 1..m, the best has m, ties share their mean

The logarithm punishes being bad at one proxy more than it rewards being good at another. What is not a number ranks
last, with `-inf`. `partial_correlation` is Spearman's of the parts of x and y that z does not explain:

    (r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2)).

Sources: J. Lee and B. Ham, AZ-NAS, 2024 (the fusion, as recalled); M. Kendall, "Partial rank correlation", 1942.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def fuse(scores: Mapping[str, ArrayLike], *, weights: Mapping[str, float] | None = None) -> Floats:
    """Return one score for each architecture from several.

    Args:
        scores: (architectures,) by proxy, larger is better; ranks do as well as scores.
        weights: Of the proxies, 1 each if not given; a negative one is for a proxy where less is better.

    Returns:
        (architectures,), at most 0, larger is better. Comparable within one call only.

    Raises:
        ValueError: if nothing is given, lengths differ, or a weight is of no proxy.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in scores.items()}
    lengths = {name: values.shape for name, values in columns.items()}
    if not columns or len(set(lengths.values())) > 1 or any(len(shape) != 1 for shape in lengths.values()):
        raise ValueError(f"fuse needs scores of the same architectures for each proxy, got shapes {lengths}.")
    given = dict.fromkeys(columns, 1.0) if weights is None else dict(weights)
    if unknown := sorted(set(given) - set(columns)):
        raise ValueError(f"fuse got weights for {unknown}, and scores for {sorted(columns)} only.")
    total = np.zeros(next(iter(lengths.values())))
    for name, weight in given.items():
        values = columns[name]
        total += abs(weight) * np.log(ranks(values if weight >= 0 else -values) / max(1, len(values)))
    return total


def ranks(values: ArrayLike) -> Floats:
    """Return ranks 1..m, the largest value has m, equal ones share the mean of theirs.

    Args:
        values: (m,); what is not a number counts as the least.

    Returns:
        (m,).
    """
    from scipy.stats import rankdata

    numbers = np.asarray(values, dtype=np.float64)
    return np.asarray(rankdata(np.where(np.isnan(numbers), -np.inf, numbers)), dtype=np.float64)


@dataclass(frozen=True)
class Correlation:
    """A rank correlation with its interval.

    Args:
        value: The correlation.
        interval: Its ends, from resampling the architectures.
        confidence: Of the interval.
        count: Number of architectures.
    """

    value: float
    interval: tuple[float, float]
    confidence: float
    count: int


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    given: ArrayLike | None = None,
    kind: Literal["spearman", "kendall"] = "spearman",
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> Correlation:
    """Return the rank correlation of two lists with a percentile bootstrap interval.

    Args:
        x: (m,), such as scores.
        y: (m,), such as accuracies.
        given: (m,), such as sizes: the partial correlation given it, of Spearman's kind.
        kind: Spearman's rho or Kendall's tau-b.
        confidence: Of the interval.
        resamples: Number of resamples of the m pairs.
        seed: Of the resamples.

    Returns:
        The correlation; `nan` where a list is constant.

    Raises:
        ValueError: if lengths differ, there are fewer than three, or Kendall's kind is asked with `given`.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (x, y, *(() if given is None else (given,)))]
    count = len(columns[0])
    if count < 3 or any(column.shape != (count,) for column in columns):
        raise ValueError(
            f"A rank correlation needs lists of the same length of at least 3, got {[c.shape for c in columns]}."
        )
    if kind == "kendall" and given is not None:
        raise ValueError(f"A partial correlation is of Spearman's kind here, got kind={kind!r}; leave it out.")
    rng = np.random.default_rng(seed)
    value = _correlation(columns, kind)
    drawn = (_correlation([column[chosen] for column in columns], kind) for chosen in _choices(rng, count, resamples))
    spread = [r for r in drawn if math.isfinite(r)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(spread, [tail, 1 - tail]) if spread else (float("nan"), float("nan"))
    return Correlation(value, (float(low), float(high)), confidence, count)


def partial_correlation(x: ArrayLike, y: ArrayLike, given: ArrayLike) -> float:
    """Return Spearman's correlation of x and y given a third list, such as the size of the architectures.

    Args:
        x: (m,).
        y: (m,).
        given: (m,).

    Returns:
        The correlation; `nan` where it has no meaning (a constant list, or one that `given` determines).
    """
    return _correlation([np.asarray(column, dtype=np.float64) for column in (x, y, given)], "spearman")


def _choices(rng: np.random.Generator, count: int, resamples: int) -> Sequence[NDArray[np.int64]]:
    return [rng.integers(0, count, count) for _ in range(resamples)]


def _correlation(columns: Sequence[Floats], kind: str) -> float:
    if kind == "kendall":
        from scipy.stats import kendalltau

        clean = [ranks(column) for column in columns]
        return float(kendalltau(clean[0], clean[1]).statistic) if min(map(np.ptp, clean)) else float("nan")
    clean = [ranks(column) for column in columns]
    if min(map(np.ptp, clean)) == 0:
        return float("nan")
    r = np.atleast_2d(np.corrcoef(clean))
    if len(clean) == 2:
        return float(r[0, 1])
    free = (1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2)
    return float((r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt(free)) if free > 1e-12 else float("nan")
