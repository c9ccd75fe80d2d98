"""Budgets: every way to write a quantity, every way to get it wrong."""

from __future__ import annotations

import math

import pytest

from eke.compression.budget import RESOURCES, Budget, show

READINGS = [
    ("latency", "0.5x", 8.0, 4.0),
    ("latency", "50%", 8.0, 4.0),
    ("latency", "3ms", 8.0, 3e-3),
    ("latency", "3 ms", 8.0, 3e-3),
    ("latency", "250us", 8.0, 250e-6),
    ("latency", "2S", 8.0, 2.0),
    ("latency", "1/4 x", 8.0, 2.0),
    ("latency", "1e-3s", 8.0, 1e-3),
    ("size", "1/12x", 1200.0, 100.0),
    ("size", "400kB", 1.0, 400e3),
    ("size", "2MiB", 1.0, 2.0**21),
    ("size", "1.5MB", 1.0, 1.5e6),
    ("size", ".5GB", 1.0, 5e8),
    ("size", 4096, 1.0, 4096.0),
    ("size", "4096", 1.0, 4096.0),
    ("macs", "1.5GMAC", 1.0, 1.5e9),
    ("macs", "3mmac", 1.0, 3e6),
    ("macs", 12.5, 1.0, 12.5),
    ("parameters", "2.5M", 1.0, 2.5e6),
    ("parameters", "10k", 1.0, 1e4),
    ("parameters", "25%", 8.0, 2.0),
    ("peak_memory", "64MB", 1.0, 64e6),
    ("peak_memory", "1KiB", 1.0, 1024.0),
]


@pytest.mark.parametrize(("name", "quantity", "before", "wanted"), READINGS)
def test_a_quantity_means_its_number_times_its_unit(name, quantity, before, wanted):
    budget = Budget(**{name: quantity})
    assert budget.limit(name, before=before) == pytest.approx(wanted, rel=1e-15)
    assert budget.limited == (name,)


@pytest.mark.parametrize(("quantity", "wanted"), [("1%", 0.01), ("0.5 %", 0.005), (0.01, 0.01), ("1/4", 0.25)])
def test_a_drop_is_a_share(quantity, wanted):
    budget = Budget(max_drop=quantity)
    assert budget.drop == pytest.approx(wanted, rel=1e-15)
    assert budget.limited == ()


def test_what_is_not_given_is_not_limited():
    budget = Budget(size="0.5x")
    assert budget.drop is None
    assert [budget.limit(name, before=2.0) for name in RESOURCES] == [None, 1.0, None, None, None]


def test_limits_come_in_the_order_of_the_reports():
    assert Budget(macs="1x", latency="1x", max_drop="1%", size="1x").limited == ("latency", "size", "macs")


def test_the_json_holds_what_was_written():
    assert Budget(max_drop="1%", size=4096).to_json() == {"max_drop": "1%", "size": 4096}
    assert Budget(**Budget(max_drop="1%", macs="0.3x").to_json()) == Budget(max_drop="1%", macs="0.3x")


def test_a_budget_without_limits_is_refused():
    with pytest.raises(ValueError, match=r"limits nothing, got None for every field: .*Budget\(max_drop='1%'"):
        Budget()


@pytest.mark.parametrize("quantity", ["", "x", "-1x", "0.5.5x", "3 m s", "nan", "inf", "1/x", "half", "3."])
def test_unreadable_text_is_refused_with_an_example(quantity):
    with pytest.raises(
        ValueError, match=r"Budget\.size could not be read: .* Write for example '0\.5x', '50%' or '400kB'"
    ):
        Budget(size=quantity)
    with pytest.raises(ValueError, match=r"Budget\.max_drop could not be read: .* Write for example '1%' or 0\.01"):
        Budget(max_drop=quantity)


@pytest.mark.parametrize("quantity", [0, "0x", "1/0x", math.inf, -1.0, math.nan])
def test_numbers_that_are_not_positive_and_finite_are_refused(quantity):
    with pytest.raises(ValueError, match=r"Budget\.macs (must be positive and finite|could not be read)"):
        Budget(macs=quantity)


@pytest.mark.parametrize("quantity", [True, [1], (0.5, "x"), object()])
def test_other_types_are_refused(quantity):
    with pytest.raises(TypeError, match=r"Budget\.latency must be a number or text such as '0\.5x', got "):
        Budget(latency=quantity)


@pytest.mark.parametrize(
    ("name", "quantity", "allowed"),
    [
        ("latency", "3kB", "'x', '%', 's', 'ms', 'us'"),
        ("latency", 3, "'ms'"),
        ("size", "3ms", "'kb', 'mb'"),
        ("macs", "3GFLOP", "'gmac'"),
    ],
)
def test_unknown_units_are_refused_with_those_that_are_known(name, quantity, allowed):
    with pytest.raises(
        ValueError, match=rf"Budget\.{name} has (the unknown unit .*|no unit) in .*; allowed: .*{allowed}"
    ):
        Budget(**{name: quantity})


def test_a_drop_takes_no_other_unit():
    with pytest.raises(ValueError, match=r"Budget\.max_drop has the unknown unit 'ms' in '3ms': write '1%' or 0\.01"):
        Budget(max_drop="3ms")


@pytest.mark.parametrize("quantity", [1, "100%", "1.5"])
def test_a_drop_of_everything_is_refused(quantity):
    with pytest.raises(ValueError, match=r"Budget\.max_drop must be below 100 %, got .*: one point is '1%' or 0\.01"):
        Budget(max_drop=quantity)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("latency", 3.1e-3, "3.1 ms"),
        ("latency", 2.5, "2.5 s"),
        ("latency", 4.2e-5, "42 us"),
        ("size", 4.7e6, "4.7 MB"),
        ("size", 96.0, "96 B"),
        ("peak_memory", 2.5e9, "2.5 GB"),
        ("macs", 1.5e9, "1.5 GMAC"),
        ("parameters", 12345.0, "12.35 k"),
        ("parameters", 12.0, "12"),
    ],
)
def test_values_are_shown_with_a_unit_that_suits_them(name, value, text):
    assert show(name, value) == text
