"""Factors that minimise tr(D^T G D A) instead of |D|^2: inputs and outputs that matter more count more.

A product of a chain stays one when its first factor (a, b, c, d) is multiplied from the left by d separate b x b
matrices (a = 1), or its last one from the right by a separate c x c matrices (d = 1). So for the diagonal blocks of G
and A that the outer factors can absorb, whitening makes the problem the plain one; for a low-rank chain these are all
of A and G, and the result is exact. Sweeps then lower the true loss: with the other factors fixed it is a quadratic in
one, on which conjugate gradients are run. Cost of a sweep: O(L) products of m x n with A and G.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..patterns import Chain, KSPattern, from_dense, to_dense
from .factorization import product
from .fixed_support import Interface, onto_left, onto_right, shift_left, shift_right
from .metric import Metric, damped_cholesky

_DAMPING = 1e-10
_STEPS = 10


class Whitening(NamedTuple):
    """Cholesky factors of the diagonal blocks of a metric that the outer factors absorb.

    left: (a*d, b, b) for the rows, grouped as the first pattern groups them, or None; right: (a*d, c, c) for columns.
    """

    first: KSPattern
    last: KSPattern
    left: Tensor | None
    right: Tensor

    @classmethod
    def of(cls, metric: Metric, chain: Chain) -> Self:
        """Return the whitening of a metric for an ascending chain."""
        first, last = chain[0], chain[len(chain) - 1]
        rows = None if metric.g is None else _roots(metric.g, (first.a, first.b, first.d), "output gradient")
        return cls(first, last, rows, _roots(metric.a, (last.a, last.c, last.d), "input"))

    def apply(self, matrix: Tensor) -> Tensor:
        """Return L_G^T W L_A (m, n), of which the plain distance is the weighted one of W."""
        white = _times(matrix, self.right, (self.last.a, self.last.c, self.last.d))
        if self.left is None:
            return white
        return _times(white.mT, self.left, (self.first.a, self.first.b, self.first.d)).mT

    def undo(self, blocks: list[Tensor]) -> list[Tensor]:
        """Return the factors of L_G^-T (X_1 ... X_L) L_A^-1."""
        found = list(blocks)
        last = found[-1].permute(0, 3, 1, 2).reshape(-1, self.last.b, self.last.c)
        solved = torch.linalg.solve_triangular(self.right, last, upper=False, left=False)
        found[-1] = solved.reshape(self.last.a, self.last.d, self.last.b, self.last.c).permute(0, 2, 3, 1)
        if self.left is not None:
            first = found[0].permute(0, 3, 1, 2).reshape(-1, self.first.b, self.first.c)
            solved = torch.linalg.solve_triangular(self.left.mT, first, upper=True)
            found[0] = solved.reshape(self.first.a, self.first.d, self.first.b, self.first.c).permute(0, 2, 3, 1)
        return found


def transposed(metric: Metric | None, matrix: Tensor) -> Metric | None:
    """Return the metric of the transposed matrix."""
    if metric is None:
        return None
    rows = torch.eye(matrix.shape[0], dtype=metric.a.dtype, device=metric.a.device) if metric.g is None else metric.g
    return Metric(rows, metric.a)


def swept(matrix: Tensor, chain: Chain, blocks: list[Tensor], *, metric: Metric, sweeps: int) -> list[Tensor]:
    """Return factors of a lower loss, or the given ones.

    Args:
        matrix: W, (m, n), float64.
        chain: Ascending, without redundancy.
        blocks: Where to start.
        metric: The loss.
        sweeps: How often to go through the factors.

    Returns:
        The factors.
    """
    items = list(blocks)
    last = len(chain) - 1
    for i in range(last, 0, -1):
        items[i - 1 : i + 1] = shift_left(items[i - 1], items[i], Interface.between(chain[i - 1], chain[i]))
    for sweep in range(sweeps):
        forward = sweep % 2 == 0
        for step in range(last + 1):
            i = step if forward else last - step
            items[i] = _conjugate_gradients(matrix, chain, items, metric, i)
            if forward and i < last:
                items[i : i + 2] = shift_right(items[i], items[i + 1], Interface.between(chain[i], chain[i + 1]))
            elif not forward and i > 0:
                items[i - 1 : i + 1] = shift_left(items[i - 1], items[i], Interface.between(chain[i - 1], chain[i]))
    before, after = (metric.loss(to_dense(product(chain, found)) - matrix) for found in (blocks, items))
    return items if after < before else list(blocks)


def _conjugate_gradients(matrix: Tensor, chain: Chain, items: list[Tensor], metric: Metric, i: int) -> Tensor:
    """Return factor i of least loss with the others fixed, from where it is; every step lowers it."""

    def dense(values: Tensor) -> Tensor:
        return to_dense(product(chain, [*items[:i], values, *items[i + 1 :]]))

    def adjoint(weights: Tensor) -> Tensor:
        values = from_dense(weights, chain.product())
        for j in range(i):
            values = onto_left(values, items[j], Interface.between(chain[j], chain.product(j + 1)))
        for j in range(len(chain) - 1, i, -1):
            values = onto_right(values, items[j], Interface.between(chain.product(i, j), chain[j]))
        return values

    found = items[i]
    downhill = -adjoint(metric.gradient(dense(found) - matrix))
    direction, energy = downhill, downhill.square().sum()
    smallest = 1e-24 * energy
    for _ in range(_STEPS):
        change = dense(direction)
        weights = metric.gradient(change)
        bend = (weights * change).sum()
        if not energy > smallest or not bend > 0:
            break
        length = energy / bend
        found = found + length * direction
        downhill = downhill - length * adjoint(weights)
        previous, energy = energy, downhill.square().sum()
        direction = downhill + energy / previous * direction
    return found


def _roots(factor: Tensor, sizes: tuple[int, int, int], what: str) -> Tensor:
    """Return Cholesky factors (a*d, k, k) of the diagonal blocks with rows i*k*d + (0 ... k-1)*d + j of a factor."""
    a, k, d = sizes
    apart = factor.double().reshape(a, k, d, a, k, d).diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3)
    blocks = apart.permute(2, 3, 0, 1).reshape(a * d, k, k)
    return torch.stack([
        damped_cholesky(block, _DAMPING, what=f"A diagonal block of the {what} moment") for block in blocks
    ])


def _times(matrix: Tensor, roots: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    """Return a matrix (m, a*k*d) times the block-diagonal matrix that `_roots` describes."""
    a, k, d = sizes
    apart = matrix.reshape(-1, a, k, d).permute(1, 3, 0, 2).reshape(a * d, -1, k) @ roots
    return apart.reshape(a, d, -1, k).permute(2, 0, 3, 1).reshape(matrix.shape)
