"""Chains of one matrix as paths through its divisors: the fewest parameters, the smallest error, and ranks.

A path goes from (1, 1) to (rows, cols) over nodes (Q, P), rows and columns split off so far; the error E_s of a node at
rank r is the tail of its spectrum, and a step costs P' (rows / Q) r r' parameters. Fronts of (parameters, sum of E_s^2)
over a grid of ranks find promising paths; along each of them ranks are then adjusted one by one.
Source: derived here from the bounds of Le, Zheng, Riccietti, Gribonval (2025).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ..patterns import Chain

Node = tuple[int, int]
Energies = Mapping[Node, np.ndarray]
_MANY, _KEPT = 64, 12
"""Nodes from which ranks are coarser and fronts are thinned to so many paths of each rank."""
_POLISHED = 64
"""Paths of a front, the most promising ones, whose ranks are adjusted."""


@dataclass(frozen=True)
class Path:
    """A chain of rows x cols as nodes and ranks.

    Args:
        parameters: Of its factors.
        energy: Sum of E_s^2.
        nodes: (1, 1), those between, (rows, cols).
        ranks: Of the nodes between.
    """

    parameters: int
    energy: float
    nodes: tuple[Node, ...]
    ranks: tuple[int, ...]

    @property
    def chain(self) -> Chain:
        """The chain."""
        steps = list(itertools.pairwise(self.nodes))
        if not steps:
            return Chain([(1, 1, 1, 1)])
        rows, cols = [q // last for (last, _), (q, _) in steps], [p // last for (_, last), (_, p) in steps]
        return Chain.radix(rows, cols, ranks=list(self.ranks))

    @classmethod
    def of(cls, energies: Energies, nodes: tuple[Node, ...], ranks: tuple[int, ...]) -> Path:
        """Return the path through nodes at ranks."""
        padded, rows = (1, *ranks, 1), nodes[-1][0]
        size = sum(
            p * (rows // last) * padded[s] * padded[s + 1]
            for s, ((last, _), (_, p)) in enumerate(itertools.pairwise(nodes))
        )
        return cls(size, float(sum(energies[node][r] for node, r in zip(nodes[1:-1], ranks))), nodes, ranks)

    def moved(self, energies: Energies, node: int, by: int) -> Path | None:
        """Return the path with another rank at one of the nodes between, None where there is no such rank."""
        rank = self.ranks[node] + by
        if not 1 <= rank <= len(energies[self.nodes[node + 1]]) - 1:
            return None
        return Path.of(energies, self.nodes, (*self.ranks[:node], rank, *self.ranks[node + 1 :]))


def _filled(path: Path, energies: Energies, most: int) -> Path:
    """Return the path with ranks raised where most energy is saved for a parameter, as long as they fit."""
    while True:
        options = [m for s in range(len(path.ranks)) if (m := path.moved(energies, s, 1)) and m.parameters <= most]
        options = [m for m in options if m.energy < path.energy]
        if not options:
            return path
        path = max(options, key=lambda m: (path.energy - m.energy) / (m.parameters - path.parameters))


def within_parameters(path: Path, energies: Energies, most: int) -> Path:
    """Adjust the ranks of a path to a limit on parameters: what is left is used, and given from node to node.

    Args:
        path: Within the limit.
        energies: E_s^2 by node and rank.
        most: Limit on parameters.

    Returns:
        A path through the same nodes, of no more energy.
    """
    path = _filled(path, energies, most)
    while len(path.ranks) > 1:
        lower = (m for s in range(len(path.ranks)) for by in (1, 4) if (m := path.moved(energies, s, -by)))
        best = min((_filled(m, energies, most) for m in lower), key=lambda m: m.energy, default=path)
        if not best.energy < path.energy * (1 - 1e-9):
            break
        path = best
    return path


def within_energy(path: Path, energies: Energies, limit: float) -> Path:
    """Adjust the ranks of a path to a limit on its energy.

    Args:
        path: Within the limit.
        energies: E_s^2 by node and rank.
        limit: On the sum of E_s^2.

    Returns:
        A path through the same nodes, of no more parameters.
    """
    while True:
        options = [m for s in range(len(path.ranks)) if (m := path.moved(energies, s, -1)) and m.energy <= limit]
        if not options:
            return path
        # Where most parameters are saved for what is lost.
        path = max(options, key=lambda m: (path.parameters - m.parameters) / max(m.energy - path.energy, 1e-300))


def two_steps(energies: Energies, rows: int, cols: int, most: int) -> list[Path]:
    """Return the paths of two factors within a limit on parameters, each of the largest rank that fits."""
    found = []
    for node, tails in energies.items():
        q, p = node
        rank = min(most // (p * rows + cols * (rows // q)), len(tails) - 2)
        if rank >= 1:
            found.append(Path.of(energies, ((1, 1), node, (rows, cols)), (rank,)))
    return found


def best_paths(energies: Energies, rows: int, cols: int, most: int, *, limit: float = -math.inf) -> list[Path]:
    """Return paths of small energy within a limit on parameters, one for every series of nodes.

    Args:
        energies: E_s^2 by node and rank.
        rows: Rows.
        cols: Columns.
        most: Limit on parameters.
        limit: Energy that will do: paths below it give up parameters instead.
    """
    best: dict[tuple[Node, ...], Path] = {}
    for path in [*_front(energies, rows, cols, most), *two_steps(energies, rows, cols, most)]:
        known = best.get(path.nodes)
        if known is None or path.energy < known.energy:
            best[path.nodes] = path
    ordered = sorted(best.values(), key=lambda path: (path.energy, path.parameters))
    filled = [within_parameters(path, energies, most) for path in ordered[:_POLISHED]]
    return [*(within_energy(p, energies, limit) if p.energy <= limit else p for p in filled), *ordered[_POLISHED:]]


def _successors(energies: Energies, rows: int, cols: int, node: Node) -> Iterator[Node]:
    """Yield the nodes that one factor leads to, the last one included."""
    for q, p in [*energies, (rows, cols)]:
        if (q, p) != node and q % node[0] == 0 and p % node[1] == 0:
            yield q, p


def _in_order(energies: Energies) -> list[Node]:
    return [(1, 1), *sorted(energies, key=math.prod)]


def fewest(energies: Energies, rows: int, cols: int, limit: float) -> int:
    """Return the fewest parameters of a chain of which every E_s^2 is at most a limit."""
    if rows == cols == 1:
        return 1
    rank = {(1, 1): 1, (rows, cols): 1}
    for node, tails in energies.items():
        kept = np.flatnonzero(tails[1:-1] <= limit)
        if len(kept):
            rank[node] = int(kept[0]) + 1
    best: dict[Node, int] = {(1, 1): 0}
    for node in _in_order(energies):
        if node in best and node in rank:
            for q, p in _successors(energies, rows, cols, node):
                if (q, p) in rank:
                    cost = best[node] + p * (rows // node[0]) * rank[node] * rank[q, p]
                    best[q, p] = min(cost, best.get((q, p), cost))
    return best[rows, cols]


def least_energy(energies: Energies, rows: int, cols: int, max_params: int) -> float:
    """Return the smallest max of E_s^2 over all chains within a limit on parameters, by bisection over its values."""
    values = np.unique(np.concatenate([np.zeros(1), *(tails[1:-1] for tails in energies.values())]))
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if fewest(energies, rows, cols, float(values[middle])) <= max_params:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _front(energies: Energies, rows: int, cols: int, limit: int) -> list[Path]:
    """Return the Pareto front of (parameters, sum of E_s^2) over chains within a limit, with the chains.

    Of many divisors only some points of each node's fronts are kept, spread evenly.
    """
    if rows == cols == 1:
        return [Path(1, 0.0, ((1, 1),), ())] if limit >= 1 else []
    last = (rows, cols)
    coarse = len(energies) > _MANY
    ranks = {node: _ranks(len(tails) - 2, coarse=coarse) for node, tails in energies.items()}
    ranks[last] = np.ones(1, dtype=np.int64)
    one = np.ones(1, np.int64)
    start = _Labels(0 * one, np.zeros(1), one, [], 0 * one)
    arrived: dict[Node, list[_Labels]] = {(1, 1): [start]}
    final = start
    for node in [*_in_order(energies), last]:
        here = arrived.pop(node, [])
        if not here:
            continue
        labels = _Labels.front(here, most=_KEPT if coarse else None)
        if node == last:
            final = labels
            continue
        for q, p in _successors(energies, rows, cols, node):
            size = p * (rows // node[0]) * labels.rank[:, None] * ranks[q, p] + labels.parameters[:, None]
            tails = energies.get((q, p))
            energy = labels.energy[:, None] + (np.zeros(1) if tails is None else tails[ranks[q, p]])
            origin, rank = np.nonzero(size <= limit)
            if len(origin):
                step = (labels, node, (q, p))
                made = _Labels(size[origin, rank], energy[origin, rank], ranks[q, p][rank], [step], origin)
                arrived.setdefault((q, p), []).append(made)
    if final is start:
        return []
    return [Path.of(energies, *final.way(i)) for i in range(len(final.parameters))]


@dataclass(frozen=True)
class _Labels:
    """Paths to one node: what they cost, what they lose, the rank they arrive with, and where they came from.

    Args:
        parameters: (k,).
        energy: (k,).
        rank: (k,).
        steps: (labels of the node before, it, this node), for every node that paths came from.
        origin: (k,): positions in the labels of all these nodes, one after the other.
    """

    parameters: np.ndarray
    energy: np.ndarray
    rank: np.ndarray
    steps: list[tuple[_Labels, Node, Node]]
    origin: np.ndarray

    @classmethod
    def front(cls, parts: list[_Labels], *, most: int | None) -> _Labels:
        """Return the paths that no other one of the same rank beats in both; at most so many of each rank."""
        offsets = np.cumsum([0, *(len(part.steps[0][0].parameters) if part.steps else 0 for part in parts)])
        parameters, energy, rank = (np.concatenate(c) for c in zip(*((x.parameters, x.energy, x.rank) for x in parts)))
        origin = np.concatenate([part.origin + offset for part, offset in zip(parts, offsets)])
        order = np.lexsort((energy, parameters, rank))
        kept = []
        for group in np.split(order, np.flatnonzero(np.diff(rank[order])) + 1):
            lowest = np.minimum.accumulate(energy[group])
            better = np.concatenate(([True], energy[group][1:] < lowest[:-1] * (1 - 1e-9)))
            found = group[better]
            if most is not None and len(found) > most:
                sizes = np.log(parameters[found] + 1.0)
                goals = np.linspace(sizes[0], sizes[-1], most)
                found = found[np.unique(np.searchsorted(sizes, goals - 1e-12))]
            kept.append(found)
        chosen = np.concatenate(kept)
        steps = [step for part in parts for step in part.steps]
        return cls(parameters[chosen], energy[chosen], rank[chosen], steps, origin[chosen])

    def way(self, index: int) -> tuple[tuple[Node, ...], tuple[int, ...]]:
        """Return the nodes and ranks of a path that is complete."""
        nodes: list[Node] = []
        ranks: list[int] = []
        labels = self
        while labels.steps:
            position = int(labels.origin[index])
            step = 0
            while position >= len(labels.steps[step][0].parameters):
                position -= len(labels.steps[step][0].parameters)
                step += 1
            before, _, here = labels.steps[step]
            nodes.append(here)
            ranks.append(int(before.rank[position]))
            labels, index = before, position
        # The last of them is that of the corner, where all paths begin.
        return ((1, 1), *reversed(nodes)), tuple(reversed(ranks[:-1]))


def _ranks(most: int, *, coarse: bool) -> np.ndarray:
    """Return ranks up to a limit: 1 ... 8 and then every fifth part more, or every second part more from 1 on."""
    found = [1] if coarse else list(range(1, min(most, 8) + 1))
    while found and found[-1] < most:
        found.append(min(most, math.ceil((1.5 if coarse else 1.25) * found[-1])))
    return np.array(found, dtype=np.int64)
