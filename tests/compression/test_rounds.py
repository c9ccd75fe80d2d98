"""Rounds of planning: what is asked, what is measured, what is kept."""

from __future__ import annotations

import pytest

from eke import Budget
from eke.compression import rounds

BEFORE = {"latency": 0.01, "size": 1000.0, "macs": 1e6, "parameters": 250.0, "peak_memory": 5000.0}


def test_a_limited_cost_is_asked_for_once_and_as_it_is():
    assert rounds.attempts(Budget(size="0.5x", macs="1kMAC"), BEFORE) == [{"size": 500.0, "macs": 1000.0}]


def test_with_a_limit_on_the_drop_alone_less_and_less_is_asked_for():
    found = rounds.attempts(Budget(max_drop="1%"), BEFORE)
    assert [limits["latency"] for limits in found[:3]] == pytest.approx([0.005, 0.007, 0.009])
    assert [limits["size"] for limits in found] == pytest.approx([250.0, 350.0, 450.0, 300.0, 600.0])


def test_the_last_attempts_limit_no_time():
    assert all(set(limits) == {"size"} for limits in rounds.attempts(Budget(max_drop="1%"), BEFORE)[3:])


def test_a_limit_on_the_drop_does_not_add_limits_to_others():
    assert rounds.attempts(Budget(max_drop="1%", parameters="0.5x"), BEFORE) == [{"parameters": 125.0}]
