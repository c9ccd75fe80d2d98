"""A feasible plan without a solver: the start that bounds the search, and what is left if time runs out.

From the untouched model on, the option that costs the least loss per unit of excess over the limits is taken until all
limits are kept; then options that win loss back within the limits. Over several budgets the next one starts at the
last one's options and never goes below them. Cost: one pass over the changed tables a step.
"""

from __future__ import annotations

import time

import numpy as np

from .graph import Graph, Picks, Table


class _Descent:
    """A plan that changes one option at a time, with the change of every total for every option at hand."""

    def __init__(self, graph: Graph, limits: Table, picks: Picks) -> None:
        self.graph = graph
        self.limited = np.isfinite(limits)
        self.scale = np.concatenate([[1.0], np.where(self.limited, 1 / limits, 0.0)])
        self.picks = picks.copy()
        self.scopes = [[s for s in graph.scopes if c in s.over] for c in range(len(picks))]
        self.neighbours = [sorted({c, *(d for s in self.scopes[c] for d in s.over)}) for c in range(len(picks))]
        self.change = np.zeros_like(graph.unary)
        for choice in range(len(picks)):
            self._refresh(choice)
        self.totals = graph.totals(picks) * self.scale

    def _refresh(self, choice: int) -> None:
        size = len(self.graph.kept[choice])
        line = self.graph.unary[:, choice, :size].copy()
        for scope in self.scopes[choice]:
            place = [slice(None), *(slice(None) if c == choice else int(self.picks[c]) for c in scope.over)]
            line += scope.table[tuple(place)]
        self.change[:, choice, :size] = (line - line[:, self.picks[choice], None]) * self.scale[:, None]

    def move(self, flat: int) -> None:
        """Take the option at a flat index of (decisions, options)."""
        choice, option = divmod(flat, self.change.shape[2])
        self.totals += self.change[:, choice, option]
        self.picks[choice] = option
        for other in self.neighbours[choice]:
            self._refresh(other)

    def run(self, low: Picks, high: Picks, deadline: float) -> bool:
        """Move until all limits are kept, then until no single move wins loss or the time is up.

        Args:
            low: Least option of every decision.
            high: Largest option of every decision.
            deadline: On the clock of `time.perf_counter`.

        Returns:
            Whether all limits are kept.
        """
        options = np.arange(self.change.shape[2])[None]
        open_ = self.graph.valid & (options >= low[:, None]) & (options <= high[:, None])
        while True:
            loss, costs = self.change[0], self.change[1:]
            excess = self.totals[1:] - self.limited
            if (excess <= 1e-12).all():
                fits = open_ & (costs <= np.maximum(-excess, 0)[:, None, None]).all(axis=0)
                score = np.where(fits, loss, 0.0)
                if score.min() >= -1e-12 * max(self.totals[0], 1e-300) or time.perf_counter() > deadline:
                    return True
            else:
                after = np.maximum(excess[:, None, None] + costs, 0).sum(axis=0)
                gain = np.where(open_, np.maximum(excess, 0).sum() - after, 0.0)
                if gain.max() <= 1e-12:
                    return False
                # A move that costs no loss comes first, the largest of them; then the cheapest for its gain.
                ratio = np.where(loss > 0, loss / np.maximum(gain, 1e-300), -gain)
                score = np.where(gain > 1e-12, ratio, np.inf)
            self.move(int(score.argmin()))


def approach(graph: Graph, limits: Table, *, deadline: float) -> Picks:
    """Return the plan (decisions,) where descent ends, whether it keeps the limits (limited resources,) or not."""
    zero = np.zeros(len(graph.kept), dtype=np.intp)
    descent = _Descent(graph, limits, zero)
    descent.run(zero, _last(graph), deadline)
    return descent.picks


def _last(graph: Graph) -> Picks:
    return np.asarray([len(kept) - 1 for kept in graph.kept], dtype=np.intp)


def descend(graph: Graph, limits: Table, *, deadline: float) -> Picks | None:
    """Look for plans within the limits whose options never decrease from one budget to the next.

    Args:
        graph: The problem.
        limits: (budgets, limited resources), each budget's no larger than the one's before it; infinite for none.
        deadline: When to stop improving, on the clock of `time.perf_counter`.

    Returns:
        Options (budgets, decisions), or None if none were found.
    """
    zero = np.zeros(len(graph.kept), dtype=np.intp)
    last = _last(graph)
    found = [zero]
    for line in limits:
        descent = _Descent(graph, line, found[-1])
        if not descent.run(found[-1], last, deadline):
            break
        found.append(descent.picks)
    else:
        return np.asarray(found[1:])
    # What served the loose budgets is in the way of a tight one: the tightest plan keeps every budget.
    descent = _Descent(graph, limits[-1], zero)
    if not descent.run(zero, last, deadline):
        return None
    back = [descent.picks]
    for line in limits[-2::-1]:
        descent = _Descent(graph, line, back[-1])
        descent.run(zero, back[-1], deadline)
        back.append(descent.picks)
    return np.asarray(back[::-1])
