"""Which chain for a matrix: the best one under a limit on parameters, or the smallest one within a tolerance.

Every ascending chain has a product pattern (a, b, c, d), on whose a d blocks b x c it is a chain of full matrices; the
descending ones are those of the transpose. In such a family the error E_s of an interface depends on three integers:
rows Q = q_1 ... q_s and columns P = p_1 ... p_s split off so far, and the rank r (`spectrum`). So its chains are the
paths from (1, 1, 1) to (b, c, 1) in one graph, whose steps cost a d P' (b / Q) r r' parameters. Two searches:

    smallest sum of E_s^2, the proved bound of the error:   Pareto fronts of (parameters, sum) at each node
    smallest max of E_s, below which no chain can come:     shortest path with the least rank that each node needs

The first gives candidates, which are factorized and measured; the second says how much better any chain could be. A
family is left out when what lies outside of its support is already more than the best bound.
Source: derived here from the bounds of Le, Zheng, Riccietti, Gribonval (2025). Cost: block singular values for every
pair of divisors, then the fronts; about 15 s of one core for 384 x 384.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..patterns import Chain, KSPattern, divisors, from_dense
from .bounds import normalized, outside_energy, spectrum
from .factorization import Factorization
from .hierarchical import check_matrix, factorize

_CANDIDATES = 6
_MANY, _KEPT = 64, 12
"""Pairs of divisors from which ranks are coarser and fronts are thinned to so many paths of each rank."""
_Node = tuple[int, int]
_Energies = dict[_Node, np.ndarray]
_Found = tuple[int, float, Chain]


@dataclass(frozen=True)
class ChainChoice:
    """A chosen chain with its factors, and what no other ascending or descending chain could beat.

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
    """Choose a chain for a matrix, among all that `factorize` takes: ascending and descending, of any product pattern.

    The search minimises what is proved, the upper bound of the error, over ranks 1 to 8 and a grid of larger ones (a
    coarser grid, and thinned fronts, where sides have many divisors), measures the most promising candidates, and says
    what no chain of any rank could beat.

    Args:
        matrix: (m, n), real or complex.
        max_params: Most parameters; the smallest error is looked for.
        tolerance: Largest relative Frobenius error; the fewest parameters are looked for. Factors are rounded to the
            dtype of the matrix: below that only one dense factor may be left.

    Returns:
        The chain, its factors, and the bound over all chains.

    Raises:
        TypeError: if the matrix is not a tensor of 32 or 64 bits a number.
        ValueError: if not exactly one of the limits is given, it cannot be kept, or it is no such number; if the
            matrix is a stack, is empty, or has entries that are not finite.
    """  # noqa: DOC502
    if (max_params is None) == (tolerance is None):
        raise ValueError(f"best_chain needs either max_params or tolerance, got {max_params!r} and {tolerance!r}.")
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.numel() == 0:
        shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ValueError(
            f"best_chain chooses for one matrix (m, n) with entries, got {shape}; take those of a stack one by one."
        )
    check_matrix(matrix, Chain([(1, matrix.shape[0], matrix.shape[1], 1)]))
    if tolerance is not None:
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
            raise ValueError(f"best_chain needs a tolerance >= 0, got {tolerance!r}.")
        return _smallest(matrix, tolerance)
    if isinstance(max_params, bool) or not isinstance(max_params, int) or max_params < 1:
        raise ValueError(f"best_chain needs max_params to be a positive integer, got {max_params!r}.")
    return _nearest(matrix, max_params)


def _nearest(matrix: Tensor, max_params: int) -> ChainChoice:
    """Return the chain of least error within a limit on parameters."""  # noqa: DOC501
    families = _families(matrix)
    smallest = min(family.fewest(math.inf) for family in families)
    if max_params < smallest:
        rows, cols = matrix.shape
        raise ValueError(f"max_params={max_params} is below the smallest chain of {rows} x {cols}, {smallest}.")
    found: list[_Found] = []
    least, bound = math.inf, math.inf
    for family in families:
        if family.outside < bound and family.fewest(math.inf) <= max_params:
            least = min(least, family.least_energy(max_params))
            found += family.front(max_params)
            bound = min(bound, min(energy for _, energy, _ in found))
    tried = [factorize(matrix, chain) for _, _, chain in sorted(found, key=lambda f: (f[1], f[0]))[:_CANDIDATES]]
    return ChainChoice(min(tried, key=lambda f: f.error), math.sqrt(least), None)


def _smallest(matrix: Tensor, tolerance: float) -> ChainChoice:
    """Return the chain of fewest parameters within a tolerance; the one dense factor has no error."""
    limit, most = tolerance**2, matrix.numel()
    families = [family for family in _families(matrix) if family.outside <= limit]
    few = min(family.fewest(limit) for family in families)
    found: list[_Found] = [(most, 0.0, Chain([(1, matrix.shape[0], matrix.shape[1], 1)]))]
    for family in families:
        found += family.front(most)
        most = min(parameters for parameters, energy, _ in found if energy <= limit)
    found.sort(key=lambda f: f[:2])
    sure = next(i for i, (_, energy, _) in enumerate(found) if energy <= limit)
    near = sorted(range(sure), key=lambda i: found[i][1])[:_CANDIDATES]
    # Rounding of the factors may raise an error above its bound: the next ones come to their turn.
    beyond = [i for i in range(sure, len(found)) if found[i][1] <= limit]
    tried = (factorize(matrix, found[i][2]) for i in (*sorted(near), *beyond))
    return ChainChoice(next(one for one in tried if one.error <= tolerance), None, few)


@dataclass(frozen=True)
class _Family:
    """The chains of one direction and product pattern.

    Args:
        pattern: (a, b, c, d), of the matrix or of its transpose.
        transposed: Whether it is the transpose's.
        blocks: The blocks (a, d, b, c) on the support, of a matrix of norm 1.
        outside: Energy of the entries outside of the support.
    """

    pattern: KSPattern
    transposed: bool
    blocks: Tensor
    outside: float

    @cached_property
    def energies(self) -> _Energies:
        """E_s^2 by rank, of the blocks together, for every pair of divisors but the corners."""
        _, b, c, _ = self.pattern
        return {
            (q, p): spectrum(self.blocks, q, p).cpu().numpy()
            for q in divisors(b)
            for p in divisors(c)
            if (q, p) not in ((1, 1), (b, c)) and min(q, c // p) > 1
        }

    @property
    def copies(self) -> int:
        """Blocks, each of which has a chain of its own."""
        return self.pattern.a * self.pattern.d

    def fewest(self, limit: float) -> int:
        """Return the fewest parameters of a chain of which every E_s^2 is at most a limit, no less than `outside`."""
        _, b, c, _ = self.pattern
        if limit == math.inf:
            return self.copies * min(b + c, b * c)
        return self.copies * _fewest(self.energies, b, c, limit - self.outside)

    def least_energy(self, max_params: int) -> float:
        """Return the smallest max of E_s^2 over the chains within a limit on parameters."""
        _, b, c, _ = self.pattern
        return self.outside + _least_energy(self.energies, b, c, max_params // self.copies)

    def front(self, max_params: int) -> list[_Found]:
        """Return the Pareto front of (parameters, sum of E_s^2) within a limit, with the chains."""
        _, b, c, _ = self.pattern
        found = _paths(self.energies, b, c, max_params // self.copies)
        return [(self.copies * size, self.outside + energy, self._whole(chain)) for size, energy, chain in found]

    def _whole(self, chain: Chain) -> Chain:
        """Return the chain of the matrix of which each block has a given one."""
        a, _, _, d = self.pattern
        whole = Chain([(a * p.a, p.b, p.c, p.d * d) for p in chain])
        return whole.transpose if self.transposed else whole


def _families(matrix: Tensor) -> list[_Family]:
    """Return all families, those with less energy outside first."""
    rows, cols = matrix.shape
    dense, _ = normalized(matrix)
    norm = torch.linalg.matrix_norm(dense)
    dense = dense / norm if norm > 0 else dense
    found = []
    for transposed, one in ((False, dense), (True, dense.mT)):
        m, n = one.shape
        for a in divisors(math.gcd(rows, cols)):
            for d in divisors(math.gcd(rows, cols) // a):
                pattern = KSPattern(a, m // (a * d), n // (a * d), d)
                values = from_dense(one, pattern)
                outside = float(outside_energy(one, values))
                found.append(_Family(pattern, transposed, values.permute(0, 3, 1, 2), outside))
    return sorted(found, key=lambda family: family.outside)


def _successors(energies: _Energies, rows: int, cols: int, node: _Node) -> Iterator[_Node]:
    """Yield the nodes that one factor leads to, the last one included."""
    for q, p in [*energies, (rows, cols)]:
        if (q, p) != node and q % node[0] == 0 and p % node[1] == 0:
            yield q, p


def _in_order(energies: _Energies) -> list[_Node]:
    return [(1, 1), *sorted(energies, key=math.prod)]


def _fewest(energies: _Energies, rows: int, cols: int, limit: float) -> int:
    """Return the fewest parameters of a chain of which every E_s^2 is at most a limit."""
    if rows == cols == 1:
        return 1
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


def _least_energy(energies: _Energies, rows: int, cols: int, max_params: int) -> float:
    """Return the smallest max of E_s^2 over all chains within a limit on parameters, by bisection over its values."""
    values = np.unique(np.concatenate([np.zeros(1), *(tails[1:-1] for tails in energies.values())]))
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _fewest(energies, rows, cols, float(values[middle])) <= max_params:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _paths(energies: _Energies, rows: int, cols: int, limit: int) -> list[_Found]:
    """Return the Pareto front of (parameters, sum of E_s^2) over chains within a limit, with the chains.

    Of many divisors only some points of each node's fronts are kept, spread evenly.
    """
    if rows == cols == 1:
        return [(1, 0.0, Chain([(1, 1, 1, 1)]))] if limit >= 1 else []
    last = (rows, cols)
    coarse = len(energies) > _MANY
    ranks = {node: _ranks(len(tails) - 2, coarse=coarse) for node, tails in energies.items()}
    ranks[last] = np.ones(1, dtype=np.int64)
    one = np.ones(1, np.int64)
    start = _Labels(0 * one, np.zeros(1), one, [], 0 * one)
    arrived: dict[_Node, list[_Labels]] = {(1, 1): [start]}
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
    return [(int(final.parameters[i]), float(final.energy[i]), final.chain(i)) for i in range(len(final.parameters))]


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
    steps: list[tuple[_Labels, _Node, _Node]]
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

    def chain(self, index: int) -> Chain:
        """Return the chain of a path that is complete."""
        factors, ranks = [], []
        labels = self
        while labels.steps:
            position = int(labels.origin[index])
            step = 0
            while position >= len(labels.steps[step][0].parameters):
                position -= len(labels.steps[step][0].parameters)
                step += 1
            before, node, here = labels.steps[step]
            factors.append((here[0] // node[0], here[1] // node[1]))
            ranks.append(int(before.rank[position]))
            labels, index = before, position
        factors.reverse()
        return Chain.radix([q for q, _ in factors], [p for _, p in factors], ranks=ranks[-2::-1])


def _ranks(most: int, *, coarse: bool) -> np.ndarray:
    """Return ranks up to a limit: 1 ... 8 and then every fifth part more, or every second part more from 1 on."""
    found = [1] if coarse else list(range(1, min(most, 8) + 1))
    while found and found[-1] < most:
        found.append(min(most, math.ceil((1.5 if coarse else 1.25) * found[-1])))
    return np.array(found, dtype=np.int64)
