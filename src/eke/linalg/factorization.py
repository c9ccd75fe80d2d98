"""The result of `factorize`: factors, and how good they are, computed when asked for.

Errors are measured: the factors as returned are multiplied and compared with the matrix. All are relative to its
Frobenius norm. The lower bound holds for every product of the chain, the upper one for the order that was taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..patterns import Chain, from_dense, to_dense
from .bounds import interface_errors, normalized, outside_energy, relative, times_power
from .fixed_support import Interface, multiply
from .metric import Metric


@dataclass(frozen=True, eq=False)
class Factorization:
    """Factors of a matrix, or of a stack of them.

    Numbers of a stack are over all its matrices together: root sums of squares over the root of the sum of the squared
    norms. Those of each matrix are `errors` and `interface_errors`.

    Args:
        chain: Patterns of the factors, leftmost first.
        blocks: Entries (..., a, b, c, d) of each factor.
        matrix: What was factorized, (..., m, n).
        proved: Whether the upper bound is proved for the way the factors were found.
        metric: What the changes were measured in.
    """

    chain: Chain
    blocks: list[Tensor] = field(repr=False)
    matrix: Tensor = field(repr=False)
    proved: bool = field(default=False, kw_only=True, repr=False)
    metric: Metric | None = field(default=None, kw_only=True, repr=False)

    @property
    def parameters(self) -> int:
        """Entries of all factors of one matrix."""
        return self.chain.parameters

    def to_dense(self) -> Tensor:
        """Return the product of the factors, (..., m, n), in their dtype."""
        return to_dense(product(self.chain, self.blocks))

    @cached_property
    def errors(self) -> Tensor:
        """Relative Frobenius error of each matrix, (...), float64."""
        matrix, _ = normalized(self.matrix)
        values, inside = self._values(), from_dense(matrix, self.chain.product())
        change = torch.linalg.vector_norm((values - inside).flatten(-4), dim=-1)
        whole = torch.hypot(change, outside_energy(matrix, inside).sqrt())
        return relative(whole, torch.linalg.matrix_norm(matrix))

    @cached_property
    def interface_errors(self) -> Tensor:
        """Relative error E_s of the best two factors at each interface of each matrix, (..., L - 1), float64."""
        return interface_errors(self.matrix, self.chain)

    @cached_property
    def error(self) -> float:
        """Relative Frobenius error, measured."""
        return self._together(self.errors)

    @cached_property
    def lower_bound(self) -> float:
        """No product of the chain has a smaller relative error: max of E_s, proved."""
        errors = self.interface_errors
        return self._together(errors.amax(-1)) if errors.shape[-1] else self._outside()

    @cached_property
    def upper_bound(self) -> float | None:
        """The relative error is at most sqrt(sum of E_s^2), up to rounding; None where that is not proved."""
        if not self.proved:
            return None
        errors = self.interface_errors
        if not errors.shape[-1]:
            return self._outside()
        return self._together(errors.square().sum(-1).sqrt())

    @cached_property
    def weighted_error(self) -> float | None:
        """Relative error in the metric, sqrt(loss(change) / loss(matrix)); None without a metric."""
        if self.metric is None:
            return None
        matrix, _ = normalized(self.matrix)
        whole = self.metric.loss(matrix)
        return (self.metric.loss(to_dense(self._values()) - matrix) / whole) ** 0.5 if whole > 0 else 0.0

    def _values(self) -> Tensor:
        """Return the product of the factors in double precision, times the power of two that normalizes the matrix."""
        _, exponents = normalized(self.matrix)
        parts = [normalized(block, dims=4) for block in self.blocks]
        shift = sum((part for _, part in parts), -exponents)
        return times_power(product(self.chain, [block for block, _ in parts]), shift, dims=4)

    def _outside(self) -> float:
        matrix, _ = normalized(self.matrix)
        outside = outside_energy(matrix, from_dense(matrix, self.chain.product())).sqrt()
        return self._together(relative(outside, torch.linalg.matrix_norm(matrix)))

    def _together(self, errors: Tensor) -> float:
        """Return the relative error of the whole stack from those of its matrices (...)."""
        if errors.numel() == 0:
            return 0.0
        matrix, exponents = normalized(self.matrix)
        norms = times_power(torch.linalg.matrix_norm(matrix), exponents - exponents.amax(), dims=0)
        whole = torch.linalg.vector_norm(norms)
        return float(torch.linalg.vector_norm(errors * norms) / whole) if whole > 0 else 0.0


def product(chain: Chain, blocks: list[Tensor]) -> Tensor:
    """Return the values (..., a, b, c, d) of the product of a chainable chain's factors."""
    if chain.direction == "descending":
        mirrored = product(chain.transpose, [block.transpose(-3, -2) for block in reversed(blocks)])
        return mirrored.transpose(-3, -2)
    values = blocks[-1]
    for i in range(len(chain) - 2, -1, -1):
        values = multiply(blocks[i], values, Interface.between(chain[i], chain.product(i + 1)))
    return values
