"""How long a model takes, and how much faster a net is, with as many calls as its pace allows.

Intervals need some rounds, and short calls need many to be told from a scheduler's whims. Calls of seconds have those
averaged out, and a run has tens of nets to time: then few rounds must do. What is published is measured in full.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping

from .. import cost

Run = Callable[[], object]


def once(run: Run, *, budget: float = 0.0, threads: int | None = None) -> float:
    """Return the seconds of one call, the median of some; of a single one where that is longer than the budget.

    Args:
        run: Calls a model.
        budget: Seconds that may be spent.
        threads: Torch threads.
    """
    with cost.pinned_threads(threads):
        run()
        begun = time.perf_counter()
        run()
        seconds = time.perf_counter() - begun
    return seconds if seconds > budget else cost.latency(run, threads=threads, seconds=budget).median


def rounds(seconds_per_round: float, *, usual: int, budget: float) -> int:
    """Return how many rounds a comparison takes at least: fewer than usual where they take thrice the budget, but two.

    Args:
        seconds_per_round: Of all functions once.
        usual: Rounds of short calls.
        budget: Seconds of the comparison.
    """
    return usual if usual * seconds_per_round <= 3 * budget else max(2, int(3 * budget / seconds_per_round))


def interleaved(
    runs: Mapping[str, Run], *, expected: float, usual: int, budget: float, threads: int | None = None, seed: int = 0
) -> dict[str, cost.Latency]:
    """Measure several functions in turns, slow ones in few rounds.

    Args:
        runs: The functions by name.
        expected: Seconds of one of them, about.
        usual: Fewest rounds of short calls.
        budget: Seconds of the comparison.
        threads: Torch threads.
        seed: Of the order.

    Returns:
        Times by name.
    """
    fewest = rounds(len(runs) * expected, usual=usual, budget=budget)
    with warnings.catch_warnings():
        if fewest < usual:
            warnings.simplefilter("ignore")  # that it takes longer than the budget was decided here
        return cost.interleave(runs, seconds=budget, threads=threads, fewest_rounds=fewest, seed=seed)


def speedup(
    first: Run, second: Run, *, expected: float, budget: float, threads: int | None = None, seed: int = 0
) -> float:
    """Return how many times faster the second function is.

    Args:
        first: Calls the original.
        second: Calls what is compared with it.
        expected: Seconds that the first takes, about.
        budget: Seconds of the comparison.
        threads: Torch threads.
        seed: Of the order.

    Returns:
        The ratio of times: as `cost.compare_latency` has it, or of medians over few rounds for slow models.
    """
    usual = cost.fewest_pairs(0.95)
    if rounds(2 * expected, usual=usual, budget=budget) == usual:
        return cost.compare_latency(first, second, threads=threads, seconds=budget, seed=seed).ratio
    runs = {"first": first, "second": second}
    found = interleaved(runs, expected=expected, usual=usual, budget=budget, threads=threads, seed=seed)
    return found["first"].median / found["second"].median
