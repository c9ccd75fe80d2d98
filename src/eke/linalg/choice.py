"""Which chain for a matrix: the best one under a limit on parameters, or the smallest one within a tolerance.

The error E_s of an interface depends on three integers: rows Q = q_1 ... q_s and columns P = p_1 ... p_s split off so
far, and the rank r (`spectrum`). So all chains of a size are the paths from (1, 1, 1) to (m, n, 1) in one graph, whose
steps cost P' (m / Q) r r' parameters. Two searches over all of them, none of which lists them:

    smallest sum of E_s^2, the proved bound of the error:   Pareto fronts of (parameters, sum) at each node
    smallest max of E_s, below which no chain can come:     shortest path with the least rank that each node needs

The first gives candidates, which are factorized and measured; the second says how much better any chain could be.
Source: derived here from the bounds of Le, Zheng, Riccietti, Gribonval (2025). Cost: block singular values for every
pair of divisors, then the fronts; about a second for 64 x 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..patterns import Chain, divisors
from .bounds import spectrum
from .factorization import Factorization
from .hierarchical import check_matrix, factorize

_CANDIDATES = 6
_Node = tuple[int, int]
_Energies = dict[_Node, np.ndarray]


@dataclass(frozen=True)
class ChainChoice:
    """A chosen chain with its factors, and what no other chain could beat.

    Args:
        factorization: Of the chain that was chosen.
        least_error: No chain within `max_params` has a smaller relative error; None with a tolerance.
        least_parameters: No chain with fewer parameters meets the tolerance; None with `max_params`.
    """

    factorization: Factorization
    least_error: float | None
    least_parameters: int | None

    @property
    def chain(self) -> Chain:
        """The chain that was chosen."""
        return self.factorization.chain


def best_chain(matrix: Tensor, *, max_params: int | None = None, tolerance: float | None = None) -> ChainChoice:
    """Choose a chain for a matrix, among all ascending ones.

    The search minimises what is proved, the upper bound of the error, over ranks 1 to 8 and a grid of larger ones,
    measures the most promising candidates, and says what no chain of any rank could beat.

    Args:
        matrix: (m, n), real or complex.
        max_params: Most parameters; the smallest error is looked for.
        tolerance: Largest relative Frobenius error; the fewest parameters are looked for.

    Returns:
        The chain, its factors, and the bound over all chains.

    Raises:
        TypeError: if the matrix is not a tensor of 32 or 64 bits a number.
        ValueError: if not exactly one of the limits is given, none can be kept, or the matrix is a stack.
    """  # noqa: DOC502
    if (max_params is None) == (tolerance is None):
        raise ValueError(f"best_chain needs either max_params or tolerance, got {max_params!r} and {tolerance!r}.")
    if not isinstance(matrix, Tensor) or matrix.ndim != 2:
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(f"best_chain chooses for one matrix (m, n), got {shape}; take those of a stack one by one.")
    rows, cols = matrix.shape
    check_matrix(matrix, Chain([(1, rows, cols, 1)]))
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"best_chain needs a tolerance >= 0, got {tolerance!r}.")
    energies = _energies(matrix)
    if max_params is not None:
        smallest = _fewest(energies, rows, cols, math.inf)
        if max_params < smallest:
            raise ValueError(f"max_params={max_params} is below the smallest chain of {rows} x {cols}, {smallest}.")
        least = _least_error(energies, rows, cols, max_params)
        found = _paths(energies, rows, cols, max_params)
        tried = [factorize(matrix, chain) for _, _, chain in sorted(found, key=lambda f: f[1])[:_CANDIDATES]]
        return ChainChoice(min(tried, key=lambda f: f.error), least, None)
    assert tolerance is not None
    few = _fewest(energies, rows, cols, tolerance**2)
    front = sorted(_paths(energies, rows, cols, rows * cols), key=lambda f: f[0])
    sure = next(i for i, (_, energy, _) in enumerate(front) if energy <= tolerance**2)
    for _, _, chain in front[max(0, sure - _CANDIDATES) : sure]:
        tried_one = factorize(matrix, chain)
        if tried_one.error <= tolerance:
            return ChainChoice(tried_one, None, few)
    return ChainChoice(factorize(matrix, front[sure][2]), None, few)


def _energies(matrix: Tensor) -> _Energies:
    """Return relative E_s^2 by rank for every pair of divisors but the corners."""
    rows, cols = matrix.shape
    whole = float(torch.linalg.matrix_norm(matrix.detach().to(torch.promote_types(matrix.dtype, torch.float64)))) ** 2
    scale = 1 / whole if whole > 0 else 0.0
    return {
        (q, p): scale * spectrum(matrix, q, p).cpu().numpy()
        for q in divisors(rows)
        for p in divisors(cols)
        if (q, p) not in ((1, 1), (rows, cols)) and min(q, cols // p) > 1
    }


def _successors(energies: _Energies, rows: int, cols: int, node: _Node) -> Iterator[_Node]:
    """Yield the nodes that one factor leads to, the last one included."""
    for q, p in [*energies, (rows, cols)]:
        if (q, p) != node and q % node[0] == 0 and p % node[1] == 0:
            yield q, p


def _in_order(energies: _Energies) -> list[_Node]:
    return [(1, 1), *sorted(energies, key=math.prod)]


def _fewest(energies: _Energies, rows: int, cols: int, limit: float) -> int:
    """Return the fewest parameters of a chain of which every E_s^2 is at most a limit."""
    rank = {(1, 1): 1, (rows, cols): 1}
    for node, tails in energies.items():
        kept = np.flatnonzero(tails[1:-1] <= limit)
        if len(kept):
            rank[node] = int(kept[0]) + 1
    best: dict[_Node, int] = {(1, 1): 0}
    for node in _in_order(energies):
        if node in best and node in rank:
            for q, p in _successors(energies, rows, cols, node):
                if (q, p) in rank:
                    cost = best[node] + p * (rows // node[0]) * rank[node] * rank[q, p]
                    best[q, p] = min(cost, best.get((q, p), cost))
    return best[rows, cols]


def _least_error(energies: _Energies, rows: int, cols: int, max_params: int) -> float:
    """Return the smallest max of E_s over all chains within a limit on parameters, by bisection over its values."""
    values = np.unique(np.concatenate([np.zeros(1), *(tails[1:-1] for tails in energies.values())]))
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _fewest(energies, rows, cols, float(values[middle])) <= max_params:
            high = middle
        else:
            low = middle + 1
    return math.sqrt(float(values[low]))


def _paths(energies: _Energies, rows: int, cols: int, limit: int) -> list[tuple[int, float, Chain]]:
    """Return the Pareto front of (parameters, sum of E_s^2) over chains within a limit, with the chains.

    A label is (parameters, energy, origin); the labels of a node and rank are kept where no other has less of both.
    """
    ranks = {node: _ranks(len(tails) - 2) for node, tails in energies.items()} | {(rows, cols): [1]}
    arrived: dict[tuple[_Node, int], list[_Label]] = {((1, 1), 1): [_Label(0, 0.0, None, (1, 1), 1)]}
    for node in [*_in_order(energies), (rows, cols)]:
        for rank in ranks.get(node, [1]):
            labels = _front(arrived.get((node, rank), []))
            arrived[node, rank] = labels
            if not labels or node == (rows, cols):
                continue
            for q, p in _successors(energies, rows, cols, node):
                tails = energies.get((q, p))
                for r in ranks[q, p]:
                    size = p * (rows // node[0]) * rank * r
                    more = 0.0 if tails is None else float(tails[r])
                    there = arrived.setdefault(((q, p), r), [])
                    for label in labels:
                        if label.parameters + size <= limit:
                            there.append(_Label(label.parameters + size, label.energy + more, label, (q, p), r))
    return [(label.parameters, label.energy, label.chain()) for label in arrived[(rows, cols), 1]]


@dataclass(slots=True)
class _Label:
    """A path to a node: what it costs, what it loses, and where it came from."""

    parameters: int
    energy: float
    origin: _Label | None
    node: _Node
    rank: int

    def chain(self) -> Chain:
        """Return the chain of a path that is complete."""
        steps, ranks = [], []
        label = self
        while label.origin is not None:
            before = label.origin
            steps.append((label.node[0] // before.node[0], label.node[1] // before.node[1]))
            ranks.append(before.rank)
            label = before
        steps.reverse()
        return Chain.radix([q for q, _ in steps], [p for _, p in steps], ranks=ranks[-2::-1])


def _front(labels: list[_Label]) -> list[_Label]:
    """Return the labels that no other one beats in both, by parameters."""
    kept: list[_Label] = []
    for label in sorted(labels, key=lambda found: (found.parameters, found.energy)):
        if not kept or label.energy < kept[-1].energy * (1 - 1e-9):
            kept.append(label)
    return kept


def _ranks(most: int) -> list[int]:
    """Return 1 ... 8 and then every fifth part more, up to a limit."""
    found = list(range(1, min(most, 8) + 1))
    while found and found[-1] < most:
        found.append(min(most, math.ceil(1.25 * found[-1])))
    return found
