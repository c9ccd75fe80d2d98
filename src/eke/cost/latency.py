"""Time two or more functions against each other on a machine that others use too.

Each round runs every function once, in an order drawn afresh, so neighbours in time are compared in pairs and slow
drifts cancel. The ratio is the median of the paired ratios, which shrugs off samples that another process interrupted.

Its interval covers two: a circular block bootstrap over rounds, since neighbouring rounds see the same noise, and the
order-statistic interval of the sign test. The second is exact for equal functions under any noise, however bursty:
which of two neighbouring time slots is called A was a coin's choice, independent of the noise and of other rounds.

Source: H. Kuensch, "The jackknife and the bootstrap for general stationary observations", 1989; D. Politis and
J. Romano, "A circular block-resampling procedure for stationary data", 1992; R. Fisher,
"The Design of Experiments", 1935.

Under heavy load the ratio leans towards 1, as interruptions add the same slice to both sides: speed-ups are missed
then, not invented.

Threads are pinned for the measurement and restored; the garbage collector is off while timing; memory that a call
frees is kept for the next one (see `keep_memory`).
Cost: the given seconds, warm-up included, unless one call is so slow that the fewest rounds take longer.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Clock = Callable[[], int]
"""Nanoseconds from an arbitrary start, never going back."""

Floats = NDArray[np.float64]

FASTER_ABOVE = 1.02
"""A speed-up is claimed when the lower end of the interval of the ratio is above this."""

_MOST_ROUNDS = 4000
_MOST_CALLS = 100_000
_RESAMPLES = 2000


@dataclass(frozen=True)
class Latency:
    """Times of one function.

    Args:
        median: Seconds of one call.
        lower_quartile: Seconds that a quarter of the samples stay below.
        upper_quartile: Seconds that a quarter of the samples exceed.
        samples: Seconds of one call, one a round, in the order measured.
        calls_per_sample: Calls behind each sample.
        threads: Torch threads while measuring.
        elapsed_seconds: Time of the whole measurement, that of functions measured with it and warm-up included.
        within_budget: Whether the fewest rounds fitted into the given seconds.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    samples: tuple[float, ...]
    calls_per_sample: int
    threads: int
    elapsed_seconds: float
    within_budget: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return asdict(self) | {"samples": list(self.samples)}


@dataclass(frozen=True)
class LatencyComparison:
    """How much time A takes for each second of B.

    Args:
        ratio: time(a) / time(b), the median over pairs; above 1, b is faster.
        interval: Ends of the ratio's confidence interval.
        confidence: Of the interval.
        a: Times of A.
        b: Times of B.
        seed: Of the order and the bootstrap.
    """

    ratio: float
    interval: tuple[float, float]
    confidence: float
    a: Latency
    b: Latency
    seed: int

    @property
    def faster(self) -> bool:
        """Whether a speed-up of B may be claimed: the whole interval is above `FASTER_ABOVE`."""
        return self.interval[0] > FASTER_ABOVE

    @property
    def seconds_a(self) -> float:
        """Median seconds of one call of A."""
        return self.a.median

    @property
    def seconds_b(self) -> float:
        """Median seconds of one call of B."""
        return self.b.median

    @property
    def threads(self) -> int:
        """Torch threads while measuring."""
        return self.a.threads

    @property
    def samples(self) -> int:
        """Number of pairs."""
        return len(self.a.samples)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file, the samples included."""
        return {
            "ratio": self.ratio,
            "interval": list(self.interval),
            "confidence": self.confidence,
            "faster": self.faster,
            "faster_above": FASTER_ABOVE,
            "threads": self.threads,
            "seed": self.seed,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
        }


def compare_latency(
    run_a: Callable[[], object],
    run_b: Callable[[], object],
    *,
    threads: int | None = None,
    seconds: float = 3.0,
    seed: int = 0,
    confidence: float = 0.99,
    clock: Clock = time.perf_counter_ns,
) -> LatencyComparison:
    """Measure A and B interleaved, and say how much faster B is.

    Args:
        run_a: Does the work of A once; its result is dropped.
        run_b: Does the work of B once.
        threads: Torch threads while measuring, restored after; `None` keeps their number.
        seconds: Budget of the whole measurement.
        seed: Of the order and of the bootstrap; the global RNG is not used.
        confidence: Of the interval.
        clock: Nanoseconds; for tests.

    Returns:
        Ratio, interval and all samples.
    """
    measured = interleave(
        {"a": run_a, "b": run_b},
        seconds=seconds,
        threads=threads,
        fewest_rounds=fewest_pairs(confidence),
        seed=seed,
        clock=clock,
    )
    ratio, interval = paired_ratio(measured["a"], measured["b"], confidence=confidence, seed=seed)
    return LatencyComparison(ratio, interval, confidence, measured["a"], measured["b"], seed)


def latency(
    run: Callable[[], object],
    *,
    threads: int | None = None,
    seconds: float = 1.0,
    clock: Clock = time.perf_counter_ns,
) -> Latency:
    """Measure one function alone. Two such numbers do not make a speed-up: use `compare_latency` for that.

    Args:
        run: Does the work once.
        threads: Torch threads while measuring; `None` keeps their number.
        seconds: Budget of the whole measurement.
        clock: Nanoseconds; for tests.

    Returns:
        Median, quartiles and all samples.
    """
    return interleave({"run": run}, seconds=seconds, threads=threads, clock=clock)["run"]


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    threads: int | None = None,
    fewest_rounds: int = 8,
    seed: int = 0,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, Latency]:
    """Measure several functions under the same noise; any two of them can go to `paired_ratio`.

    Args:
        runs: The functions by name.
        seconds: Budget of the whole measurement.
        threads: Torch threads while measuring; `None` keeps their number.
        fewest_rounds: Rounds that are measured whatever they take; a warning says when they exceed the budget.
        seed: Of the order.
        clock: Nanoseconds; for tests.

    Returns:
        Times by name, each with the same number of samples.

    Raises:
        ValueError: if there is nothing to measure, a number is out of range, or the clock saw no time pass.
    """
    if not runs:
        raise ValueError(f"interleave needs at least one function, got {dict(runs)!r}.")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be a positive number, got {seconds!r}.")
    if fewest_rounds < 2:
        raise ValueError(f"fewest_rounds must be at least 2, got {fewest_rounds!r}.")
    keep_memory()
    with pinned_threads(threads) as pinned, _no_garbage_collection():
        names, functions = list(runs), list(runs.values())
        start = clock()
        schedule = _Schedule(int(seconds * 1e9), fewest_rounds, np.random.default_rng(seed), clock)
        samples, calls = schedule.measure(functions)
        elapsed = (clock() - start) / 1e9
    if samples.min() <= 0:
        name = names[int(samples.min(axis=1).argmin())]
        raise ValueError(f"{name!r} took {samples.min()} ns by the clock; let one call do more work.")
    within = samples.shape[1] > fewest_rounds or elapsed <= seconds
    if not within:
        warnings.warn(
            f"{fewest_rounds} samples of {', '.join(names)} took {elapsed:.2g} s instead of {seconds:.2g} s; "
            "raise `seconds` or measure a smaller batch.",
            stacklevel=3,
        )
    return {
        name: _summary(samples[i] / 1e9, calls=calls[i], threads=pinned, elapsed=elapsed, within=within)
        for i, name in enumerate(names)
    }


def paired_ratio(
    a: Latency, b: Latency, *, confidence: float = 0.99, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Return time(a) / time(b) with its interval, from samples that `interleave` took together.

    Args:
        a: Times of A.
        b: Times of B, measured in the same rounds.
        confidence: Of the interval.
        seed: Of the bootstrap.

    Returns:
        The median of the paired ratios, and the ends of its interval.

    Raises:
        ValueError: if the samples do not pair, are too few for the confidence, or are not positive.
    """
    needed = fewest_pairs(confidence)
    if len(a.samples) != len(b.samples) or len(a.samples) < needed:
        raise ValueError(
            f"a paired ratio with confidence {confidence} needs the same number of samples of both, at least {needed}, "
            f"got {len(a.samples)} and {len(b.samples)}; measure both in one call of interleave, for longer."
        )
    times = np.array([a.samples, b.samples])
    if not (np.isfinite(times).all() and times.min() > 0):
        raise ValueError(f"samples must be positive numbers of seconds, got one of {float(times.min())!r}.")
    pairs = np.log(times[0] / times[1])
    booted = _block_bootstrap(pairs, confidence, np.random.default_rng(seed))
    signed = _sign_interval(pairs, confidence)
    low, high = min(booted[0], signed[0]), max(booted[1], signed[1])
    return math.exp(float(np.median(pairs))), (math.exp(low), math.exp(high))


def fewest_pairs(confidence: float) -> int:
    """Return how many pairs an interval of this confidence needs: all falling on one side must be unlikely enough.

    Args:
        confidence: Of a two-sided interval.

    Returns:
        The smallest n with 2 * 2^-n <= 1 - confidence; 8 for 0.99.

    Raises:
        ValueError: if the confidence is no share.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}.")
    return max(2, math.ceil(1 - math.log2(1 - confidence)))


@contextmanager
def pinned_threads(threads: int | None) -> Iterator[int]:
    """Set torch's number of threads inside, and restore it.

    Args:
        threads: Number of threads, or `None` to keep it.

    Yields:
        The number in force.

    Raises:
        ValueError: if it is no positive integer.
    """
    before = torch.get_num_threads()
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be a positive integer or None, got {threads!r}.")
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Schedule:
    """Rounds in random order until the budget (ns) would be exceeded."""

    budget: int
    fewest_rounds: int
    rng: np.random.Generator
    clock: Clock

    def measure(self, functions: Sequence[Callable[[], object]]) -> tuple[Floats, list[int]]:
        """Return samples in ns, (functions, rounds), and the calls behind each."""
        start = self.clock()
        # A sample of budget/2000 is far above the clock's resolution and below a scheduler's slice.
        calls = [self._calls_per_sample(shortest) for shortest in self._warm_up(functions)]
        rounds: list[list[float]] = []
        longest = 0.0
        while len(rounds) < _MOST_ROUNDS:
            begun = self.clock()
            if len(rounds) >= self.fewest_rounds and begun - start + longest > 0.98 * self.budget:
                break
            taken = [0.0] * len(functions)
            for i in self.rng.permutation(len(functions)):
                taken[i] = _timed(functions[i], calls[i], self.clock)
            rounds.append(taken)
            longest = max(0.9 * longest, self.clock() - begun)
        return np.array(rounds).T, calls

    def _warm_up(self, functions: Sequence[Callable[[], object]]) -> list[float]:
        """Return the shortest time of each, called in turn until a tenth of the budget is spent."""
        start = self.clock()
        shortest = [math.inf] * len(functions)
        passes = 0
        while passes == 0 or (self.clock() - start < 0.1 * self.budget and passes < _MOST_CALLS):
            shortest = [min(best, _timed(run, 1, self.clock)) for best, run in zip(shortest, functions)]
            passes += 1
        return shortest

    def _calls_per_sample(self, nanoseconds: float) -> int:
        return min(_MOST_CALLS, max(1, math.ceil(self.budget / 2000 / max(1.0, nanoseconds))))


def _timed(run: Callable[[], object], calls: int, clock: Clock) -> float:
    """Return the nanoseconds of one call; work on a GPU is waited for."""
    waits = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    begun = clock()
    for _ in range(calls):
        run()
    if waits:
        torch.cuda.synchronize()
    return (clock() - begun) / calls


def _block_bootstrap(pairs: Floats, confidence: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return the interval of the median by resampling runs of n^(1/3) neighbours, the last followed by the first."""
    count = len(pairs)
    length = max(1, round(count ** (1 / 3)))
    starts = rng.integers(0, count, (_RESAMPLES, math.ceil(count / length), 1))
    chosen = ((starts + np.arange(length)) % count).reshape(_RESAMPLES, -1)[:, :count]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.median(pairs[chosen], axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _sign_interval(pairs: Floats, confidence: float) -> tuple[float, float]:
    """Return x_(k), x_(n+1-k) with the largest k for which 2 P(Binomial(n, 1/2) < k) <= 1 - confidence."""
    count = len(pairs)
    allowed = Fraction((1 - confidence) / 2) * 2**count
    rank = 0
    term = below = 1
    while below <= allowed:
        rank += 1
        term = term * (count - rank + 1) // rank
        below += term
    ordered = np.sort(pairs)
    return float(ordered[rank - 1]), float(ordered[count - rank])


def _summary(samples: Floats, *, calls: int, threads: int, elapsed: float, within: bool) -> Latency:
    lower, median, upper = (float(value) for value in np.quantile(samples, [0.25, 0.5, 0.75]))
    return Latency(median, lower, upper, tuple(samples.tolist()), calls, threads, elapsed, within)


def keep_memory() -> None:
    """Let the C library keep what a call frees for the next call, in blocks of up to 31 MiB.

    Left alone, glibc gives freed activations back to the system and takes them anew, page by page, in every call, until
    a large block happens to be freed: the same two networks then differ by 3.3x or by 5.6x, as the process's past has
    it. Freeing one large block raises its thresholds once, as any longer life of a process does. Other allocators are
    not changed by it.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
