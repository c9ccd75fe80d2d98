"""Orders of rows and columns in which a matrix is a butterfly.

Known families: the bit reversal, which makes the Fourier matrix one, and the eight permutations that put together, at
every level, the even before the odd indices or not and either half reversed or not (Dao et al., "Learning fast
algorithms for linear transforms using butterfly factorizations", 2019).

Unknown orders (`find_permutations`, square, a power of two) are searched level by level. In a butterfly the rows go
in pairs and the columns in two halves, such that every pair is of rank one in each half. Given the halves, the energy
that a pair leaves is the smaller eigenvalue of 2 x 2 Gram matrices, known for all pairs at once, and the pairs are
matched at least cost; given the pairs, each column goes where it fits better. The two steps alternate, from the
columns that one row and a possible partner tell apart, for several partners; leading vectors of the pairs make the
rows of the next level. Heuristic: the result is checked by factorizing. Cost O(n^3). The problem is that of
"Factorisation butterfly par identification algorithmique de blocs de rang un", GRETSI 2023; the alternation is our
own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..patterns import Chain
from .bounds import normalized
from .factorization import Factorization
from .hierarchical import Order, check_matrix, factorize

_ROUNDS = 8


@dataclass(frozen=True, eq=False)
class Permuted:
    """A factorization of a matrix whose rows and columns were put in another order.

    Args:
        rows: (m,) indices: row i of what was factorized is row rows[i] of the matrix.
        cols: (n,) indices of the columns.
        factorization: Of matrix[rows][:, cols].
    """

    rows: Tensor
    cols: Tensor
    factorization: Factorization

    @property
    def error(self) -> float:
        """Relative Frobenius error, which an order does not change."""
        return self.factorization.error

    def to_dense(self) -> Tensor:
        """Return the product with rows and columns in the order of the matrix, (m, n)."""
        return self.factorization.to_dense()[self.rows.argsort()][:, self.cols.argsort()]


def bit_reversal(n: int) -> Tensor:
    """Return the indices 0 ... n-1 in the order of their reversed binary digits, n a power of two."""
    order = torch.zeros(1, dtype=torch.long)
    for _ in Chain.butterfly(n):
        order = torch.cat((2 * order, 2 * order + 1))
    return order


def level_permutations(n: int) -> dict[tuple[int, int, int], Tensor]:
    """Return the eight permutations of 0 ... n-1 that repeat one choice at every level, n a power of two.

    Returns:
        Indices (n,) by (second half reversed, first half reversed, even before odd); (0, 0, 1) is the bit reversal.
    """
    levels = len(Chain.butterfly(n))
    found = {}
    for second in (0, 1):
        for first in (0, 1):
            for split in (0, 1):
                order = torch.arange(n)
                for level in range(levels, 1, -1):
                    rows = order.reshape(-1, 2**level)
                    if split:
                        rows = torch.cat((rows[:, 0::2], rows[:, 1::2]), 1)
                    left, right = rows.chunk(2, 1)
                    left, right = left.flip(1) if first else left, right.flip(1) if second else right
                    order = torch.cat((left, right), 1).flatten()
                found[second, first, split] = order
    return found


def best_level_permutation(matrix: Tensor, chain: Chain, *, order: Order = "left") -> Permuted:
    """Factorize with the columns in the best of the eight orders.

    Args:
        matrix: (m, n), n a power of two.
        chain: Of shape (m, n).
        order: Of the interfaces, as for `factorize`.

    Returns:
        The order of least error, and its factors.

    Raises:
        TypeError: if the matrix is not a tensor of 32 or 64 bits a number.
        ValueError: if it is a stack, does not fit the chain, or its columns are not a power of two.
    """  # noqa: DOC502
    check_matrix(matrix, chain)
    if matrix.ndim != 2:
        raise ValueError(
            f"best_level_permutation needs one matrix (m, n), got {tuple(matrix.shape)}; take those of a stack alone."
        )
    tried = [
        Permuted(torch.arange(matrix.shape[0]), cols, factorize(matrix[:, cols], chain, order=order))
        for cols in level_permutations(matrix.shape[-1]).values()
    ]
    return min(tried, key=lambda found: found.error)


def find_permutations(matrix: Tensor, *, tries: int = 4) -> Permuted:
    """Look for orders of rows and columns in which a square matrix is a product of `Chain.butterfly(n)`.

    Finds those of permuted butterflies whose blocks tell rows apart, and of permuted Hadamard and Fourier matrices. It
    gets less reliable with noise and for matrices that are near no butterfly: look at `error`.

    Args:
        matrix: (n, n), real or complex, n a power of two.
        tries: Partners of the first row that are tried at each level.

    Returns:
        The orders that were found, with the factors.

    Raises:
        TypeError: if the matrix is not a tensor of 32 or 64 bits a number.
        ValueError: if it is not square with a power of two as its size, or tries is not positive.
    """  # noqa: DOC502
    chain = Chain.butterfly(matrix.shape[-1])
    check_matrix(matrix, chain)
    if matrix.ndim != 2 or not isinstance(tries, int) or tries < 1:
        raise ValueError(
            f"find_permutations needs one matrix and tries >= 1, got {tuple(matrix.shape)} and tries={tries!r}."
        )
    rows, cols = _orders(normalized(matrix)[0], tries)
    return Permuted(rows, cols, factorize(matrix[rows][:, cols], chain))


def _orders(matrix: Tensor, tries: int) -> tuple[Tensor, Tensor]:
    """Return orders of rows and columns, found level by level.

    A part is what is left of the matrix on one group of columns: (rows, columns), rows being groups of rows of the
    matrix. `members` are those groups, (rows, 2^level), the first level's choice being the slowest index.
    """
    parts, columns = [matrix], [torch.arange(matrix.shape[1])]
    members = torch.arange(matrix.shape[0])[:, None]
    while len(members) > 1:
        pairs, halves = _level(parts, tries)
        members = torch.stack((members[pairs[:, 0]], members[pairs[:, 1]]), -1).flatten(1)
        vectors = _vectors(parts, pairs, halves)
        split = [
            ((u.mH @ part[:, side][pairs])[:, 0], names[side])
            for part, names, half, both in zip(parts, columns, halves, vectors)
            for side, u in ((~half, both[0]), (half, both[1]))
        ]
        parts, columns = [part for part, _ in split], [names for _, names in split]
    return members[0], torch.cat(columns)


def _level(parts: list[Tensor], tries: int) -> tuple[Tensor, list[Tensor]]:
    """Return pairs of rows (rows / 2, 2) and for each part its second half of columns (bool), at least cost found."""
    best: tuple[float, Tensor, list[Tensor]] | None = None
    for partner in _partners(parts)[:tries]:
        halves = [_two_directions(part[[0, int(partner)]]) for part in parts]
        pairs, cost = _match(parts, halves)
        for _ in range(_ROUNDS):
            again = _assign(parts, pairs, halves)
            new_pairs, new_cost = _match(parts, again)
            if not new_cost < cost:
                break
            pairs, halves, cost = new_pairs, again, new_cost
        if best is None or cost < best[0]:
            best = cost, pairs, halves
    assert best is not None
    return best[1], best[2]


def _partners(parts: list[Tensor]) -> Tensor:
    """Return the rows but the first, those first with which its columns lie nearest to two directions.

    Columns (x, y) on two lines make (x^2, sqrt(2) x y, y^2) lie on a plane: their moment has an eigenvalue 0.
    """
    energy = torch.zeros(len(parts[0]) - 1, dtype=torch.float64, device=parts[0].device)
    for part in parts:
        x, y = part[:1].expand(len(part) - 1, -1), part[1:]
        norms = (x.abs().square() + y.abs().square()).sqrt()
        scale = norms.masked_fill(norms == 0, 1.0).sqrt()
        lifted = torch.stack((x * x, 2**0.5 * x * y, y * y), 1) / (scale**3)[:, None]
        energy += torch.linalg.eigvalsh(lifted @ lifted.mH)[:, 0]
    return energy.argsort() + 1


def _two_directions(pair: Tensor) -> Tensor:
    """Return which columns of two rows (2, n) belong to the second of two directions, half of them.

    A column up to its scale is a point (|x|^2 - |y|^2, 2 Re x y*, 2 Im x y*) / norm on a sphere; the two clouds are cut
    where they extend most.
    """
    x, y = pair
    cross = 2 * x * y.conj()
    points = torch.stack((x.abs().square() - y.abs().square(), cross.real, cross.imag if cross.is_complex() else 0 * x))
    weights = points.norm(dim=0)
    points = points / weights.masked_fill(weights == 0, 1.0)
    centred = (points - (points * weights).sum(1, keepdim=True) / weights.sum().clamp_min(1e-300)) * weights.sqrt()
    axis = torch.linalg.eigh(centred @ centred.mT)[1][:, -1]
    return _upper_half(axis @ points)


def _upper_half(values: Tensor) -> Tensor:
    """Return a mask of the larger half of values (n,)."""
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[values.argsort(descending=True, stable=True)[: len(values) // 2]] = True
    return mask


def _match(parts: list[Tensor], halves: list[Tensor]) -> tuple[Tensor, float]:
    """Return pairs of rows (rows / 2, 2), matched greedily at least cost, and the energy that they leave."""
    count = len(parts[0])
    cost = torch.zeros(count, count, dtype=torch.float64, device=parts[0].device)
    for part, half in zip(parts, halves):
        for side in (~half, half):
            gram = part[:, side] @ part[:, side].mH
            own = gram.diagonal().real
            mean, apart = (own[:, None] + own) / 2, (own[:, None] - own) / 2
            cost += mean - torch.hypot(apart, gram.abs())
    upper = torch.triu_indices(count, count, 1, device=cost.device)
    free = [True] * count
    pairs, left = [], 0.0
    order = cost[upper[0], upper[1]].argsort(stable=True)
    for i, j in upper[:, order].T.tolist():
        if free[i] and free[j]:
            free[i] = free[j] = False
            pairs.append((i, j))
            left += float(cost[i, j])
            if 2 * len(pairs) == count:
                break
    return torch.tensor(pairs), left


def _vectors(parts: list[Tensor], pairs: Tensor, halves: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return for each part the leading vectors (pairs, 2, 1) of its blocks in the first and in the second half."""
    found = []
    for part, half in zip(parts, halves):
        first, second = (
            torch.linalg.eigh(part[:, side][pairs] @ part[:, side][pairs].mH)[1][..., -1:] for side in (~half, half)
        )
        found.append((first, second))
    return found


def _assign(parts: list[Tensor], pairs: Tensor, halves: list[Tensor]) -> list[Tensor]:
    """Return halves in which each column is where the leading vectors of the present ones explain more of it."""
    found = []
    for part, (first, second) in zip(parts, _vectors(parts, pairs, halves)):
        blocks = part[pairs]
        explained = [(u.mH @ blocks).abs().square().sum((0, 1)) for u in (first, second)]
        found.append(_upper_half(explained[1] - explained[0]))
    return found
