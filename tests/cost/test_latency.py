"""Interleaving, its budget and its interval, on a simulated clock; nothing here depends on real time."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from eke.cost import compare_latency, fewest_pairs, interleave, latency, paired_ratio, pinned_threads
from eke.cost.latency import Latency


class Machine:
    """A clock that only functions made by it advance, by their nanoseconds times the noise of the moment."""

    def __init__(self, noise=lambda now: 1.0) -> None:
        self.now = 0
        self.noise = noise
        self.log: list[str] = []

    def clock(self) -> int:
        return self.now

    def runs(self, name: str, nanoseconds: float):
        def run() -> None:
            self.log.append(name)
            self.now += max(1, round(nanoseconds * self.noise(self.now)))

        return run

    def compare(self, a: float, b: float, **options):
        return compare_latency(self.runs("a", a), self.runs("b", b), clock=self.clock, **options)


def busy(seed: int, *, share: float = 0.4, slowdown: float = 3.0, stay: float = 0.9):
    """Noise with memory: a busy state that lasts about 1 / (1 - stay) calls, and log-normal jitter."""
    rng = np.random.default_rng(seed)
    state = {"busy": False}

    def noise(_: int) -> float:
        if rng.random() > stay:
            state["busy"] = rng.random() < share
        return math.exp(0.05 * rng.standard_normal()) * (slowdown if state["busy"] else 1.0)

    return noise


MS = 1e6


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5])
def test_ratio_is_time_of_a_over_time_of_b(ratio):
    result = Machine().compare(ratio * MS, MS)
    assert result.ratio == pytest.approx(ratio, rel=1e-9)
    assert result.interval == pytest.approx((ratio, ratio), rel=1e-9)
    assert result.faster is (ratio > 1.02)
    assert result.seconds_a == pytest.approx(ratio * 1e-3)
    assert result.seconds_b == pytest.approx(1e-3)


def test_a_claim_needs_the_whole_interval_above_the_threshold():
    assert Machine().compare(1.021 * MS, MS).faster
    assert not Machine().compare(1.019 * MS, MS).faster
    noisy = Machine(busy(0)).compare(1.05 * MS, MS, seconds=0.1)
    assert noisy.interval[0] < noisy.ratio < noisy.interval[1]
    assert noisy.faster is (noisy.interval[0] > 1.02)


@pytest.mark.parametrize("milliseconds", [0.002, 0.05, 1.0, 40.0])
@pytest.mark.parametrize("seconds", [0.5, 3.0])
def test_measurement_stays_within_its_budget(milliseconds, seconds):
    machine = Machine()
    if milliseconds * 20 > seconds * 1e3:
        pytest.skip("fewest rounds exceed this budget")
    result = machine.compare(milliseconds * MS, milliseconds * MS, seconds=seconds)
    assert 0.5 * seconds < machine.now / 1e9 <= seconds
    assert result.a.within_budget
    assert result.a.elapsed_seconds == machine.now / 1e9


def test_slow_functions_get_the_fewest_pairs_and_say_so():
    machine = Machine()
    with pytest.warns(UserWarning, match=r"8 samples of a, b took 1[78] s instead of 3 s; raise `seconds`"):
        result = machine.compare(1000 * MS, 1000 * MS, seconds=3.0)
    assert (result.samples, result.a.within_budget) == (8, False)


def test_order_is_drawn_afresh_each_round_and_fair():
    machine = Machine()
    machine.compare(MS, MS, seconds=2.0, seed=3)
    pairs = [tuple(machine.log[i : i + 2]) for i in range(0, len(machine.log) - 1, 2)]
    assert set(pairs) <= {("a", "b"), ("b", "a")}
    share = pairs.count(("a", "b")) / len(pairs)
    assert 0.4 < share < 0.65
    again = Machine()
    again.compare(MS, MS, seconds=2.0, seed=3)
    assert again.log == machine.log


def test_fast_functions_are_called_many_times_a_sample():
    result = Machine().compare(100.0, 1000.0, seconds=0.2)
    assert (result.a.calls_per_sample, result.b.calls_per_sample) == (1000, 100)
    assert result.ratio == pytest.approx(0.1)


def test_slow_drift_cancels():
    drifting = Machine(lambda now: 1.0 + now / 1e9)
    assert drifting.compare(MS, MS, seconds=3.0).ratio == pytest.approx(1.0, abs=5e-3)
    drifting = Machine(lambda now: 1.0 + now / 1e9)
    assert drifting.compare(1.1 * MS, MS, seconds=3.0).ratio == pytest.approx(1.1, abs=5e-3)


@pytest.mark.filterwarnings("ignore:8 samples of a, b took")
@pytest.mark.parametrize("milliseconds", [1.0, 30.0, 150.0], ids=lambda ms: f"{ms} ms")
def test_no_speed_up_is_claimed_between_equals_under_bursts(milliseconds):
    claims = sum(
        Machine(busy(seed)).compare(milliseconds * MS, milliseconds * MS, seed=seed, seconds=3.0).faster
        for seed in range(60)
    )
    assert claims <= 1  # each claims with probability at most 0.005, whatever the noise: P(2 of 60) < 0.04


def test_a_true_speed_up_is_found_under_bursts():
    results = [Machine(busy(seed)).compare(5.5 * MS, 5.0 * MS, seed=seed, seconds=3.0) for seed in range(20)]
    assert sum(result.faster for result in results) >= 18
    assert sum(result.interval[0] <= 1.1 <= result.interval[1] for result in results) >= 18


def times(*samples: float) -> Latency:
    return Latency(1.0, 1.0, 1.0, samples, 1, 1, 1.0, True)


def test_interval_never_excludes_the_order_statistics_of_the_sign_test():
    """For n = 8 at 99 %, and only these eight, the exact interval is the range; for 15 it is x_(3) to x_(13)."""
    eight = times(*np.exp(np.arange(8.0)))
    assert paired_ratio(eight, times(*[1.0] * 8))[1] == pytest.approx((1.0, math.exp(7)))
    fifteen = times(*np.exp(np.arange(15.0)))
    low, high = np.log(paired_ratio(fifteen, times(*[1.0] * 15))[1])
    assert low <= 2.0 + 1e-9
    assert high >= 12.0 - 1e-9


def test_interval_widens_where_neighbours_see_the_same_noise():
    rng = np.random.default_rng(0)
    widths = {"independent": 0.0, "in blocks": 0.0}
    for _ in range(20):
        noises = {"independent": rng.standard_normal(400), "in blocks": np.repeat(rng.standard_normal(80), 5)}
        for name, noise in noises.items():
            low, high = paired_ratio(times(*np.exp(0.1 * noise)), times(*[1.0] * 400))[1]
            widths[name] += math.log(high / low) / 20
    assert widths["in blocks"] > 1.4 * widths["independent"]


def test_intervals_cover_the_truth():
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        pairs = times(*np.exp(0.2 + 0.1 * rng.standard_t(2, 60)))
        low, high = paired_ratio(pairs, times(*[1.0] * 60), confidence=0.9, seed=seed)[1]
        covered += low <= math.exp(0.2) <= high
    assert covered >= 82  # 0.9 * 100 less three standard deviations rounded down


def test_fewest_pairs_are_where_all_on_one_side_is_rare_enough():
    assert [fewest_pairs(confidence) for confidence in (0.5, 0.9, 0.95, 0.99, 0.999)] == [2, 5, 6, 8, 11]


def test_many_functions_share_their_rounds():
    machine = Machine(busy(2))
    measured = interleave(
        {name: machine.runs(name, cost * MS) for name, cost in {"x": 1.0, "y": 2.0, "z": 4.0}.items()},
        seconds=2.0,
        clock=machine.clock,
    )
    assert list(measured) == ["x", "y", "z"]
    assert len({len(value.samples) for value in measured.values()}) == 1
    ratio, (low, high) = paired_ratio(measured["z"], measured["x"])
    assert low <= ratio <= high
    assert ratio == pytest.approx(4.0, rel=0.1)


def test_latency_of_one_function():
    machine = Machine()
    result = latency(machine.runs("run", 2 * MS), seconds=1.0, clock=machine.clock)
    assert (result.lower_quartile, result.median, result.upper_quartile) == pytest.approx((2e-3, 2e-3, 2e-3))
    assert result.within_budget


def test_results_survive_json():
    result = Machine(busy(0)).compare(MS, MS, seconds=0.2)
    again = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert (again["ratio"], tuple(again["interval"])) == (result.ratio, result.interval)
    assert tuple(again["a"]["samples"]) == result.a.samples
    assert again["threads"] == result.threads == torch.get_num_threads()


def test_threads_are_pinned_inside_and_restored():
    before = torch.get_num_threads()
    seen = set()
    machine = Machine()

    def run() -> None:
        seen.add(torch.get_num_threads())
        machine.now += 10**7

    result = compare_latency(run, run, threads=before + 1, seconds=0.5, clock=machine.clock)
    assert (seen, result.threads, torch.get_num_threads()) == ({before + 1}, before + 1, before)


def test_failure_restores_threads_and_garbage_collection():
    before = torch.get_num_threads()
    collected = []

    def fail() -> None:
        collected.append(gc.isenabled())
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        latency(fail, threads=before + 1)
    assert (torch.get_num_threads(), gc.isenabled(), collected) == (before, True, [False])


def test_generators_are_left_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    Machine().compare(MS, MS, seconds=0.1)
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002


@pytest.mark.parametrize("seconds", [0, -1.0, math.nan, math.inf])
def test_budgets_must_be_positive(seconds):
    with pytest.raises(ValueError, match=f"seconds must be a positive number, got {seconds!r}"):
        Machine().compare(MS, MS, seconds=seconds)


@pytest.mark.parametrize("threads", [0, -2, 1.5])
def test_threads_must_be_positive(threads):
    with pytest.raises(ValueError, match=f"threads must be a positive integer or None, got {threads!r}"):
        Machine().compare(MS, MS, threads=threads)
    with pytest.raises(ValueError, match="threads"), pinned_threads(threads):
        pass


@pytest.mark.parametrize("confidence", [0.0, 1.0, 99])
def test_confidence_must_be_a_share(confidence):
    with pytest.raises(ValueError, match=f"confidence must lie between 0 and 1, got {confidence!r}"):
        Machine().compare(MS, MS, confidence=confidence)


def test_a_clock_that_stands_still_is_refused():
    with pytest.raises(ValueError, match=r"'a' took 0\.0 ns by the clock"):
        compare_latency(lambda: None, lambda: None, seconds=1e-6, clock=lambda: 0)


def test_samples_must_pair_suffice_and_be_positive():
    eight = times(*[1.0] * 8)
    with pytest.raises(ValueError, match=r"confidence 0\.99 needs .* at least 8, got 8 and 7"):
        paired_ratio(eight, times(*[1.0] * 7))
    with pytest.raises(ValueError, match=r"at least 8, got 1 and 1"):
        paired_ratio(times(1.0), times(1.0))
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"positive numbers of seconds, got one of {bad}"):
            paired_ratio(eight, times(*[1.0] * 7, bad))


def test_something_must_be_measured():
    with pytest.raises(ValueError, match=r"at least one function, got \{\}"):
        interleave({}, seconds=1.0)
    with pytest.raises(ValueError, match="fewest_rounds must be at least 2, got 1"):
        interleave({"x": lambda: None}, seconds=1.0, fewest_rounds=1)


FAULTS = """
import platform, resource, sys
import torch
from eke import cost

torch.set_num_threads(1)
x = torch.randn(64, 32, 28, 28)
work = lambda: torch.relu(x + 1)
if sys.argv[1] == "measured":
    cost.latency(work, seconds=0.05)
for _ in range(20):  # small blocks settle among the large ones in the first ten or so, which may fetch one more
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    work()
print(platform.libc_ver()[0], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_what_a_call_frees_is_kept_for_the_next_one():
    """Two blocks of 6 MB a call are 3 136 pages; a measurement must not pay for them in each of 50 calls."""
    done = subprocess.run([sys.executable, "-c", FAULTS, "measured"], capture_output=True, text=True, check=True)
    library, faults = done.stdout.split()
    if library != "glibc":
        pytest.skip(f"{library} keeps memory by rules of its own")
    assert int(faults) < 3136
