"""Tables over decisions as arrays, and what can be said about them without solving: totals, domination, lower bounds.

Costs are summed per scope (a set of decisions that share a table); a scope inside another is added to it. Option o of a
decision is dominated by o' if, for the loss and for every limited cost r, sum over its scopes S of
max over the rest of S of (T_rS[o'] - T_rS[o]) <= 0: whatever its neighbours do, o' costs no more (Goldstein, 1994).

With multipliers l >= 0 of the limits and messages p between a scope and its decisions, the Lagrangian falls apart into
one small problem per scope and one per decision: their least values add to a lower bound of the loss, and forcing an
option raises it by a known amount. Options with bound + amount above a known plan's loss are in no better plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Picks = NDArray[np.intp]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Scope:
    """A table over several decisions.

    Args:
        over: Decisions, ascending.
        table: (resources, options of the first decision, of the second, ...).
    """

    over: tuple[int, ...]
    table: Table


@dataclass(frozen=True)
class Duals:
    """Prices at which the problem falls apart.

    Args:
        limits: (budgets, limited resources): price of a limit, per whole limit, not negative.
        messages: One array a scope, (budgets, options of all its decisions one after the other).
    """

    limits: Table
    messages: tuple[Table, ...]


@dataclass(frozen=True)
class Graph:
    """A problem as arrays; resource 0 is the loss, the others are limited somewhere.

    Args:
        kept: Original index of every option that is left, one array a decision.
        unary: (resources, decisions, options), 0 where a decision has fewer options.
        scopes: Tables over several decisions; none inside another.
        constant: (resources,): what no decision changes.
    """

    kept: tuple[Picks, ...]
    unary: Table
    scopes: tuple[Scope, ...]
    constant: Table

    @classmethod
    def of(
        cls, sizes: Sequence[int], tables: Mapping[tuple[int, ...], Sequence[tuple[int, Table]]], rows: int
    ) -> Graph:
        """Sum tables into scopes.

        Args:
            sizes: Options of every decision.
            tables: (resource, table) pairs by the decisions they are over, in the order of the table's axes.
            rows: Resources.

        Returns:
            The graph, with all options.
        """
        unary, constant = np.zeros((rows, len(sizes), max(sizes, default=1))), np.zeros(rows)
        sums: dict[tuple[int, ...], Table] = {}
        around: dict[int, list[tuple[int, ...]]] = {}
        for over in sorted(tables, key=len, reverse=True):
            wider = order = tuple(sorted(over))
            if len(order) > 1 and order not in sums:
                wider = next((scope for scope in around.get(order[0], []) if set(order) <= set(scope)), order)
            if len(order) > 1 and wider not in sums:
                sums[wider] = np.zeros((rows, *(sizes[c] for c in wider)))
                for choice in wider:
                    around.setdefault(choice, []).append(wider)
            for resource, table in tables[over]:
                if not over:
                    constant[resource] += float(table)
                elif len(over) == 1:
                    unary[resource, over[0], : sizes[over[0]]] += table
                else:
                    shape = [sizes[c] if c in over else 1 for c in wider]
                    sums[wider][resource] += np.transpose(table, np.argsort(over)).reshape(shape)
        kept = tuple(np.arange(size) for size in sizes)
        return cls(kept, unary, tuple(Scope(over, table) for over, table in sums.items()), constant)

    @property
    def valid(self) -> Mask:
        """(decisions, options): True where there is an option."""
        sizes = np.asarray([len(kept) for kept in self.kept], dtype=np.intp)
        return np.asarray(np.arange(self.unary.shape[2])[None] < sizes[:, None])

    def totals(self, picks: Picks) -> Table:
        """Return the total (resources,) of every resource at the picked options (decisions,)."""
        found = self.constant + self.unary[:, np.arange(len(picks)), picks].sum(axis=1)
        for scope in self.scopes:
            found = found + scope.table[(slice(None), *picks[list(scope.over)])]
        return np.asarray(found)

    def originals(self, picks: Picks) -> Picks:
        """Return the original indices of picked options (budgets, decisions)."""
        return np.asarray([[kept[o] for kept, o in zip(self.kept, row)] for row in picks], dtype=np.intp)

    def only(self, keep: Mask) -> Graph:
        """Return the graph with the options (decisions, options) that are True; one at least of every decision."""
        chosen = [np.flatnonzero(row[: len(kept)]) for row, kept in zip(keep, self.kept)]
        unary = np.zeros((*self.unary.shape[:2], max(map(len, chosen), default=1)))
        for c, options in enumerate(chosen):
            unary[:, c, : len(options)] = self.unary[:, c, options]
        scopes = tuple(
            Scope(s.over, s.table[np.ix_(np.arange(len(s.table)), *(chosen[c] for c in s.over))]) for s in self.scopes
        )
        return Graph(tuple(kept[options] for kept, options in zip(self.kept, chosen)), unary, scopes, self.constant)

    def undominated(self, *, ordered: bool) -> Graph:
        """Leave options out without losing the best plan.

        Args:
            ordered: Keep the best sequence of plans, too, whose options never decrease: an option goes only if no other
                that is left lies between it and the one that dominates it; only then the replacement keeps the order.

        Returns:
            The graph with what is left.
        """
        graph = self
        while True:
            keep = np.zeros(graph.valid.shape, dtype=bool)
            for choice, kept in enumerate(graph.kept):
                better = graph._better(choice)
                keep[choice, : len(kept)] = _neighbours_left(better) if ordered else _left(better)
            smaller = graph.only(keep)
            # Options that are gone may have been the only reason why a neighbour's option was needed.
            if not self.scopes or sum(map(len, smaller.kept)) == sum(map(len, graph.kept)):
                return smaller
            graph = smaller

    def _better(self, choice: int) -> Mask:
        """Return (options, options): whether the second costs no more than the first whatever the neighbours do."""
        size = len(self.kept[choice])
        table = self.unary[:, choice, :size]
        worst = table[:, None, :] - table[:, :, None]
        for scope in self.scopes:
            if choice in scope.over:
                rows = np.moveaxis(scope.table, 1 + scope.over.index(choice), 1).reshape(len(table), size, -1)
                worst = worst + np.stack([(rows - rows[:, o : o + 1]).max(axis=2) for o in range(size)], axis=1)
        return np.asarray((worst <= 0).all(axis=0))

    def bound(self, weights: Table, limits: Table, *, duals: Duals, allowed: Mask) -> tuple[float, Table]:
        """Bound the weighted loss from below, for sequences of plans whose options never decrease.

        Args:
            weights: (budgets,).
            limits: (budgets, limited resources), infinite where there is none.
            duals: Prices; any give a bound, those of the relaxed program the best.
            allowed: (budgets, decisions, options) that may be picked.

        Returns:
            The bound, and by how much each option (budgets, decisions, options) raises it if it is forced.
        """
        prices = np.concatenate([weights[:, None], duals.limits / limits], axis=1)
        alone = np.where(allowed, np.einsum("br,rco->bco", prices, self.unary), np.inf)
        value = float(prices[:, 1:].ravel() @ np.tile(self.constant[1:], (len(weights), 1)).ravel())
        value += float(weights.sum() * self.constant[0] - duals.limits.sum())
        raised = np.zeros_like(alone)
        for scope, messages in zip(self.scopes, duals.messages):
            joint = np.tensordot(prices, scope.table, axes=(1, 0))
            start = 0
            for axis, choice in enumerate(scope.over):
                size = joint.shape[1 + axis]
                message = messages[:, start : start + size]
                alone[:, choice, :size] += message
                joint -= message.reshape(-1, *(size if a == axis else 1 for a in range(len(scope.over))))
                start += size
            least = joint.reshape(len(weights), -1).min(axis=1)
            value += float(least.sum())
            for axis, choice in enumerate(scope.over):
                others = tuple(1 + a for a in range(len(scope.over)) if a != axis)
                raised[:, choice, : joint.shape[1 + axis]] += joint.min(axis=others) - least[:, None]
        through = _least_through(alone)
        decisions = through[0].min(axis=1)
        return value + float(decisions.sum()), raised + through - decisions[:, None]


def no_duals(graph: Graph, budgets: int) -> Duals:
    """Return prices of nothing: the bound is then what each table costs at least."""
    lengths = [sum(scope.table.shape[1:]) for scope in graph.scopes]
    return Duals(np.zeros((budgets, len(graph.constant) - 1)), tuple(np.zeros((budgets, n)) for n in lengths))


def _left(better: Mask) -> Mask:
    """Return the options (options,) that no other dominates; of equal ones the first."""
    equal_or_worse = better & ~better.T
    earlier = np.tril(better & better.T, -1)
    return np.asarray(~(equal_or_worse | earlier).any(axis=1))


def _neighbours_left(better: Mask) -> Mask:
    """Return the options that are left when each may only give way to the next one that is left on either side."""
    left = list(range(len(better)))
    place = 0
    while place < len(left):
        option = left[place]
        before = place > 0 and bool(better[option, left[place - 1]])
        after = place + 1 < len(left) and bool(better[option, left[place + 1]] and not better[left[place + 1], option])
        if before or after:
            del left[place]
            place = max(place - 1, 0)
        else:
            place += 1
    keep = np.zeros(len(better), dtype=bool)
    keep[left] = True
    return keep


def _least_through(alone: Table) -> Table:
    """Return the least cost (budgets, decisions, options) of a non-decreasing sequence through each option."""
    ahead, behind = alone.copy(), alone.copy()
    for b in range(1, len(alone)):
        ahead[b] += np.minimum.accumulate(ahead[b - 1], axis=1)
        behind[-1 - b] += np.minimum.accumulate(behind[-b][:, ::-1], axis=1)[:, ::-1]
    # Closed options are infinite: the sum of both halves counts an option's own cost twice.
    own = np.where(np.isfinite(alone), alone, 0.0)
    return np.asarray(ahead + behind - own)
