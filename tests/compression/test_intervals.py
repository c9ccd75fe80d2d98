"""Intervals against scipy, against a likelihood that is maximised numerically, and against their own promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm

from eke.compression.intervals import (
    paired_difference,
    paired_outcomes,
    samples_to_prove,
    unpaired_difference,
    wilson,
)

Z = norm.ppf(0.975)


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 7), (4624, 5000), (1, 100_000)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_is_the_one_of_scipy(correct, total, confidence):
    wanted = binomtest(correct, total).proportion_ci(confidence, method="wilson")
    assert wilson(correct, total, confidence=confidence) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def score_statistic(b: int, c: int, n: int, delta: float) -> float:
    """Score statistic of p12 - p21 = delta, its nuisance p21 found by maximising the trinomial likelihood."""

    def deviance(p21: float) -> float:
        cells = ((b, p21 + delta), (c, p21), (n - b - c, 1 - 2 * p21 - delta))
        return -sum(count * math.log(max(p, 1e-300)) for count, p in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    found = minimize_scalar(deviance, bounds=(low, high), method="bounded", options={"xatol": 1e-14})
    p21 = min((found.x, low, high), key=deviance)
    return (b - c - n * delta) / math.sqrt(n * (2 * p21 + delta * (1 - delta)))


CASES = [(1, 1, 60), (9, 2, 50), (0, 5, 40), (25, 0, 200), (120, 100, 5000), (3, 3, 10), (40, 10, 60)]


@pytest.mark.parametrize(("b", "c", "n"), CASES)
def test_the_paired_interval_ends_where_the_score_test_rejects(b, c, n):
    low, high = paired_difference(b, c, n)
    assert low < (b - c) / n < high
    # The optimiser finds p21 to about 1e-8 of its range.
    assert score_statistic(b, c, n, low) == pytest.approx(Z, abs=2e-5)
    assert score_statistic(b, c, n, high) == pytest.approx(-Z, abs=2e-5)


@pytest.mark.parametrize(("b", "c", "n"), [*CASES, (0, 0, 30), (0, 0, 1), (5, 0, 5)])
def test_swapping_the_models_mirrors_the_interval(b, c, n):
    low, high = paired_difference(b, c, n)
    assert paired_difference(c, b, n) == pytest.approx((-high, -low), abs=1e-12)
    assert -1 <= low <= high <= 1


@pytest.mark.parametrize("n", [1, 10, 381, 5000])
def test_models_that_never_differ_keep_an_interval_with_a_width(n):
    # With b = c = 0 the test of delta has z^2 = n delta / (1 - delta).
    end = Z * Z / (n + Z * Z)
    assert paired_difference(0, 0, n) == pytest.approx((-end, end), abs=1e-9)


def test_the_interval_narrows_with_less_confidence():
    wide, narrow = paired_difference(9, 4, 80, confidence=0.99), paired_difference(9, 4, 80, confidence=0.8)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize("p", [(0.05, 0.02), (0.01, 0.01), (0.004, 0.0), (0.2, 0.1)])
def test_the_paired_interval_covers_the_truth_as_often_as_it_says(p):
    rng = np.random.default_rng(7)
    n, runs = 300, 1500
    drawn = rng.multinomial(n, [p[0], p[1], 1 - sum(p)], size=runs)
    known = {tuple(x): paired_difference(int(x[0]), int(x[1]), n) for x in np.unique(drawn, axis=0)}
    covered = sum(known[tuple(x)][0] <= p[0] - p[1] <= known[tuple(x)][1] for x in drawn) / runs
    # Three standard errors of a share of 0.95 over 1500 runs are 0.017; discreteness may only add coverage near zero.
    assert covered > 0.95 - 0.02


def test_the_unpaired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(11)
    p, n, runs = (0.9, 0.85), 200, 1500
    pairs = rng.binomial(n, p, size=(runs, 2))
    intervals = [unpaired_difference((int(a), n), (int(b), n))[1] for a, b in pairs]
    covered = sum(low <= p[0] - p[1] <= high for low, high in intervals) / runs
    assert abs(covered - 0.95) < 0.02


def test_the_unpaired_interval_is_newcombes():
    # Newcombe, 1998, table II, example (a), method 10: 56/70 - 48/80 has (0.0524, 0.3339).
    difference, interval = unpaired_difference((56, 70), (48, 80))
    assert difference == pytest.approx(0.2, abs=1e-12)
    assert interval == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_outcomes_count_what_only_one_model_gets_right():
    first = torch.tensor([True, True, True, False, False, True])
    second = torch.tensor([True, False, False, True, False, True])
    difference, interval = paired_outcomes(first, second)
    assert difference == pytest.approx(1 / 6)
    assert interval == paired_difference(2, 1, 6)


def test_pairing_narrows_the_interval_of_models_that_agree():
    paired = paired_difference(30, 25, 5000)
    _, unpaired = unpaired_difference((4600, 5000), (4595, 5000))
    assert paired[1] - paired[0] < 0.5 * (unpaired[1] - unpaired[0])


@pytest.mark.parametrize("drop", [0.5, 0.1, 0.01, 0.003, 0.9])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_samples_to_prove_are_just_enough_for_models_that_never_differ(drop, confidence):
    n = samples_to_prove(drop, confidence=confidence)
    assert paired_difference(0, 0, n, confidence=confidence)[1] <= drop
    if n > 1:
        assert paired_difference(0, 0, n - 1, confidence=confidence)[1] > drop


def test_the_demo_has_enough_samples_for_one_point():
    assert samples_to_prove(0.01) == math.ceil(Z * Z * 99)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_counts_that_contradict_each_other(correct, total):
    with pytest.raises(ValueError, match=rf"0 <= correct <= total and total >= 1, got {correct} of {total}"):
        wilson(correct, total)


@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 0), (-1, 0, 4), (3, 2, 4)])
def test_paired_difference_refuses_counts_that_contradict_each_other(b, c, n):
    with pytest.raises(ValueError, match=rf"discordant counts that fit into the total, got {b} and {c} of {n}"):
        paired_difference(b, c, n)


@pytest.mark.parametrize("confidence", [0, 1, 95, -0.1])
def test_confidence_must_be_a_share(confidence):
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {confidence}"):
        wilson(1, 2, confidence=confidence)


@pytest.mark.parametrize("lengths", [(3, 4), (0, 0)])
def test_outcomes_of_other_samples_are_refused(lengths):
    with pytest.raises(ValueError, match=rf"equal lengths of at least 1, got \({lengths[0]},\) and \({lengths[1]},\)"):
        paired_outcomes(*(torch.zeros(n, dtype=torch.bool) for n in lengths))
