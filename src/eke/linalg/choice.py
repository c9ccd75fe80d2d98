"""Which chain for a matrix: the best one under a limit on parameters, or the smallest one within a tolerance.

Every ascending chain has a product pattern (a, b, c, d), on whose a d blocks b x c it is a chain of full matrices; the
descending ones are those of the transpose. In such a family the error E_s of an interface depends on three integers:
rows Q = q_1 ... q_s and columns P = p_1 ... p_s split off so far, and the rank r (`spectrum`). So its chains are the
paths from (1, 1, 1) to (b, c, 1) in one graph, whose steps cost a d P' (b / Q) r r' parameters. Two searches:

    smallest sum of E_s^2, the proved bound of the error:   Pareto fronts of (parameters, sum) at each node, ranks
                                                            then adjusted along the best paths
    smallest max of E_s, below which no chain can come:     shortest path with the least rank that each node needs

The first gives candidates, which are factorized and measured; the second says how much better any chain could be. A
family is left out when what lies outside of its support is already more than the best bound.
Source: derived here from the bounds of Le, Zheng, Riccietti, Gribonval (2025). Cost: block singular values for every
pair of divisors, then the fronts; about 15 s of one core for 384 x 384.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..patterns import Chain, KSPattern, divisors, from_dense
from .bounds import normalized, outside_energy, spectrum
from .factorization import Factorization
from .hierarchical import check_matrix, factorize
from .paths import Energies, best_paths, fewest, least_energy

_CANDIDATES = 6
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
    coarser grid, and thinned fronts, where sides have many divisors), adjusts the ranks of the best paths, measures the
    most promising candidates, and says what no chain of any rank could beat. Two factors are tried at every rank.

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
            found += family.best(max_params)
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
        found += family.best(most, limit=limit)
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
    def energies(self) -> Energies:
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
        return self.copies * fewest(self.energies, b, c, limit - self.outside)

    def least_energy(self, max_params: int) -> float:
        """Return the smallest max of E_s^2 over the chains within a limit on parameters."""
        _, b, c, _ = self.pattern
        return self.outside + least_energy(self.energies, b, c, max_params // self.copies)

    def best(self, max_params: int, *, limit: float = -math.inf) -> list[_Found]:
        """Return parameters, sum of E_s^2 and chain of promising chains within a limit; see `best_paths`."""
        _, b, c, _ = self.pattern
        found = best_paths(self.energies, b, c, max_params // self.copies, limit=limit - self.outside)
        return [(self.copies * p.parameters, self.outside + p.energy, self._whole(p.chain)) for p in found]

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
