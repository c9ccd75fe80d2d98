"""Axes: values land in order and inside, ticks are round and few."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eke.report.axes import Scale, fit

VALUES = st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=8)


@given(VALUES, st.booleans())
def test_values_keep_their_order_and_stay_inside(values, log):
    scale = fit(values, 90, 730, log=log)
    places = [scale.at(v) for v in sorted(values)]
    assert places == sorted(places)
    assert all(90 <= p <= 730 for p in places)


@given(VALUES, st.booleans())
def test_ticks_lie_inside_and_are_few(values, log):
    scale = fit(values, 0, 1, log=log)
    ticks = scale.ticks()
    slack = 1e-6 * (scale.high - scale.low)
    assert len(ticks) <= 12
    assert all(scale.low - slack <= t <= scale.high + slack for t in ticks)


def test_known_ticks():
    assert fit([0.88, 0.93], 0, 1, log=False).ticks() == pytest.approx([0.88, 0.89, 0.90, 0.91, 0.92, 0.93])
    assert fit([2, 24], 0, 1, log=True).ticks() == [2, 5, 10, 20]
    assert fit([2e-5, 0.2], 0, 1, log=True).ticks() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])


def test_logarithmic_axis_has_equal_ratios():
    scale = Scale(1, 100, 0, 200, log=True)
    assert [scale.at(v) for v in (1, 10, 100)] == [0, 100, 200]


def test_axis_is_logarithmic_when_values_span_far():
    assert fit([1, 9], 0, 1).log
    assert not fit([1, 7], 0, 1).log
    assert not fit([0, 900], 0, 1).log


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_single_value_stands_in_the_middle(value):
    scale = fit([value], 0, 100, log=False)
    assert scale.at(value) == pytest.approx(50)
    assert math.isfinite(scale.ticks()[0])


def test_impossible_scales_are_refused():
    with pytest.raises(ValueError, match=r"at least one value, got \[\]"):
        fit([], 0, 1)
    with pytest.raises(ValueError, match="positive values, got 0"):
        fit([0.0, 1.0], 0, 1, log=True)
