"""Few rounds for slow calls, and ratios that say which is faster."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from eke.compression import measure, pace


class Run:
    """Counts its calls."""

    def __init__(self, layers: int) -> None:
        net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(layers)]).eval()
        self.calls, self.run = 0, measure.runner(net, (torch.ones(64, 256),))

    def __call__(self) -> object:
        self.calls += 1
        return self.run()


@pytest.mark.parametrize(("each", "rounds"), [(0.01, 6), (0.5, 6), (1.0, 3), (10.0, 2)])
def test_slow_models_are_compared_in_fewer_rounds(each, rounds):
    assert pace.rounds(each, usual=6, budget=1.0) == rounds


def test_slow_functions_get_their_few_rounds_without_a_warning():
    runs = {"a": Run(1), "b": Run(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pace.interleaved(runs, expected=100.0, usual=8, budget=1e-6)
    assert {name: len(latency.samples) for name, latency in found.items()} == {"a": 2, "b": 2}
    with pytest.warns(UserWarning, match="8 samples of a, b took"):
        pace.interleaved(runs, expected=1e-9, usual=8, budget=1e-6)


@pytest.mark.parametrize("expected", [1e-6, 100.0])
def test_a_speedup_is_that_of_the_second_function(expected):
    slow, fast = Run(60), Run(1)
    assert pace.speedup(slow, fast, expected=expected, budget=0.05) > 2
    assert pace.speedup(fast, slow, expected=expected, budget=0.05) < 0.5


def test_one_call_that_takes_longer_than_the_budget_is_enough():
    run = Run(1)
    assert pace.once(run) > 0
    assert run.calls == 2
    assert pace.once(run, budget=0.02) > 0
    assert run.calls > 10
