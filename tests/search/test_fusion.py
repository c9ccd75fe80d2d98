"""Fusion and rank correlations against scipy and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from eke import search


def test_fusion_by_hand():
    found = search.fuse({"a": [1.0, 5.0, 3.0], "b": [2.0, 2.0, 9.0]})
    expected = [math.log(1 / 3) + math.log(1.5 / 3), math.log(3 / 3) + math.log(1.5 / 3), math.log(2 / 3) + math.log(1)]
    np.testing.assert_allclose(found, expected)


def test_fusion_sees_ranks_only_and_what_is_no_number_is_last():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    np.testing.assert_array_equal(search.fuse({"a": np.exp(a), "b": 3 * b}), search.fuse({"a": a, "b": b}))
    assert search.fuse({"a": [float("nan"), 1.0, float("-inf")]}).argmax() == 1
    np.testing.assert_allclose(search.fuse({"a": a}, weights={"a": -2.0}), 2 * search.fuse({"a": -a}))


def test_correlations_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x = rng.integers(0, 9, 60).astype(float)
    y = x + rng.normal(size=60) * 3
    z = x + rng.normal(size=60)
    assert search.rank_correlation(x, y, resamples=10).value == pytest.approx(stats.spearmanr(x, y)[0])
    kendall = search.rank_correlation(x, y, kind="kendall", resamples=10)
    assert kendall.value == pytest.approx(stats.kendalltau(x, y)[0])
    # the partial correlation is that of the residuals of ranks
    rx, ry, rz = (stats.rankdata(v) for v in (x, y, z))
    residuals = [r - np.polyval(np.polyfit(rz, r, 1), rz) for r in (rx, ry)]
    expected = np.corrcoef(*residuals)[0, 1]
    assert search.partial_correlation(x, y, z) == pytest.approx(expected)
    assert search.rank_correlation(x, y, given=z, resamples=10).value == pytest.approx(expected)


def test_interval_covers_and_narrows():
    rng = np.random.default_rng(2)
    hits, truth = 0, 6 / math.pi * math.asin(0.7 / 2)
    for seed in range(30):
        x = rng.normal(size=200)
        y = 0.7 * x + math.sqrt(1 - 0.49) * rng.normal(size=200)
        low, high = search.rank_correlation(x, y, resamples=100, seed=seed).interval
        hits += low <= truth <= high
        assert 0.05 < high - low < 0.3
    assert hits >= 25  # of 30: fewer has a probability of 0.3 % if 95 % are covered


def test_constants_have_no_correlation():
    assert math.isnan(search.rank_correlation([1.0, 1, 1, 1], [1.0, 2, 3, 4], resamples=5).value)
    assert math.isnan(search.rank_correlation([1.0, 1, 1, 1], [1.0, 2, 3, 4], kind="kendall", resamples=5).value)
    assert math.isnan(search.partial_correlation([1.0, 2, 3, 4], [4.0, 1, 3, 2], [1.0, 2, 3, 4]))


def test_wrong_lists_are_named():
    with pytest.raises(ValueError, match="same architectures for each proxy, got shapes"):
        search.fuse({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"weights for \['c'\], and scores for \['a'\]"):
        search.fuse({"a": [1.0]}, weights={"c": 1.0})
    with pytest.raises(ValueError, match="same length of at least 3"):
        search.rank_correlation([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="kind='kendall'; leave it out"):
        search.rank_correlation([1.0, 2, 3], [1.0, 2, 3], given=[1.0, 2, 3], kind="kendall")
