"""One thread, and clocks that measure for milliseconds instead of seconds: what is measured is not judged here."""

from __future__ import annotations

import functools

import pytest
import torch

from eke import cost

from .nets import Tiny, trained

MEASUREMENTS = ("compare_latency", "interleave", "latency", "module_times")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shorten_measurements(setattr_=setattr, *, seconds: float = 0.02) -> None:
    """Make every measurement of `eke.cost` as short as it can be."""
    for name in MEASUREMENTS:
        measure = getattr(cost, name)

        @functools.wraps(measure)
        def short(*arguments, measure=measure, **options):
            return measure(*arguments, **{**options, "seconds": seconds})

        setattr_(cost, name, short)


@pytest.fixture
def quick(monkeypatch):
    shorten_measurements(monkeypatch.setattr)


@pytest.fixture(scope="session")
def taught() -> Tiny:
    """A trained net for tests that do not change it."""
    return trained()
