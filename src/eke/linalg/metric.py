"""The quadratic in which a change of a matrix is measured.

    loss(D) = 1/2 tr(D^T G D A),   D (m, n) the change, A (n, n) of the inputs, G (m, m) of the output gradients

A alone (G = I) measures the mean squared change of the output; both together predict the loss. Rows are coupled by G
only, columns by A only. Cost: O(m n (m + n)). Solvers that are asked for several structures in one metric share what
they derive from it (`derived`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

MANY = 1 << 18
"""Entries of a matrix from which a method may be replaced by one that takes less memory or time."""
WIDE = 1280
"""Rows or columns from which a method may be replaced by one that scales better; its docstring says by which."""


@dataclass(frozen=True)
class Metric:
    """Kronecker-factored quadratic form.

    Args:
        a: (n, n), symmetric positive semidefinite.
        g: (m, m), symmetric positive semidefinite; None for the identity.

    Raises:
        ValueError: if a factor is not square, finite and symmetric with a non-negative diagonal.
    """

    a: Tensor
    g: Tensor | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, factor in (("a", self.a), ("g", self.g)):
            if factor is not None:
                _check_factor(name, factor)

    def derived(self, key: Hashable, compute: Callable[[], _T]) -> _T:
        """Return what follows from the factors alone, computed once and kept as long as the metric is.

        Args:
            key: Names what it is, with all that it depends on besides the factors.
            compute: Computes it.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        found: _T = self._derived[key]
        return found

    def loss(self, delta: Tensor) -> float:
        """Return 1/2 tr(D^T G D A), computed in float64.

        Args:
            delta: D, (m, n).

        Returns:
            The value, >= 0 up to rounding.
        """
        self.check(tuple(delta.shape))
        delta = delta.double()
        weighted = delta @ self.a.double()
        if self.g is not None:
            weighted = self.g.double() @ weighted
        return 0.5 * float((weighted * delta).sum())

    def gradient(self, delta: Tensor) -> Tensor:
        """Return G D A (m, n), the gradient of `loss` at D (m, n), in the dtype of D."""
        weighted = delta @ self.a.to(delta.dtype)
        return weighted if self.g is None else self.g.to(delta.dtype) @ weighted

    def score(self, shape: tuple[int, int]) -> Tensor:
        """Return the weight (m, n) of each entry's squared error on its own: the diagonal of the form.

        Args:
            shape: (m, n) of the matrix.

        Returns:
            (m, n) in the dtype of a.
        """
        self.check(shape)
        columns = self.a.diagonal().clamp_min(0)
        rows = columns.new_ones(shape[0]) if self.g is None else self.g.diagonal().clamp_min(0).to(columns.dtype)
        return rows[:, None] * columns

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse a matrix that does not belong to this metric.

        Raises:
            ValueError: if the shape does not fit a and g.
        """
        rows = "any" if self.g is None else self.g.shape[0]
        if len(shape) != 2 or shape[1] != self.a.shape[0] or (self.g is not None and shape[0] != rows):
            raise ValueError(f"The metric measures matrices of {rows} rows and {self.a.shape[0]} columns, got {shape}.")


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return matrix + damping * mean(diagonal) * I in float64; all zero becomes damping * I.

    Args:
        matrix: (..., n, n), symmetric.
        damping: Relative to the mean of the diagonal, >= 0.

    Returns:
        (..., n, n), a new float64 tensor.

    Raises:
        ValueError: if damping is negative.
    """
    if not damping >= 0:
        raise ValueError(f"damping must be >= 0, relative to the mean of the diagonal, got {damping}.")
    level = matrix.diagonal(dim1=-2, dim2=-1).double().mean(-1)
    level = torch.where(level > 0, level, torch.ones_like(level)) * damping
    identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
    return matrix.double() + level[..., None, None] * identity


def cholesky(matrix: Tensor, *, what: str = "The second moment of the inputs") -> Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix.

    Args:
        matrix: (n, n), float64.
        what: Named in the message.

    Returns:
        (n, n), lower triangular.

    Raises:
        ValueError: if it is not positive definite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info.max()):
        raise ValueError(
            f"{what} ({matrix.shape[-1]} x {matrix.shape[-1]}) is not positive definite, seen at column "
            f"{int(info.max())}; use more calibration samples or a larger damping."
        )
    return factor


def damped_cholesky(
    matrix: Tensor, damping: float, *, most: float = 1e-2, what: str = "The second moment of the inputs"
) -> Tensor:
    """Return the lower Cholesky factor of a damped second moment.

    Rounding leaves a moment of few samples, or one in float32, slightly indefinite. So a positive damping that is not
    enough is raised tenfold until it is, up to about `most`; what is still not positive definite is no second moment.

    Args:
        matrix: (n, n), symmetric.
        damping: Relative to the mean of the diagonal; 0 is not raised.
        most: Largest damping that is tried, within a factor of 2.
        what: Named in the message.

    Returns:
        (n, n), lower triangular, float64.

    Raises:
        ValueError: if damping is negative or no damping that is tried suffices.
    """  # noqa: DOC502
    while 0 < damping < 0.5 * most:
        factor, info = torch.linalg.cholesky_ex(damped(matrix, damping))
        if not int(info):
            return Tensor(factor)
        damping *= 10
    return cholesky(damped(matrix, damping), what=what)


def finite(matrix: Tensor, *, what: str = "The solver") -> Tensor:
    """Return a matrix in float64, detached.

    Args:
        matrix: Any shape.
        what: Named in the message.

    Returns:
        The same values in float64.

    Raises:
        ValueError: if an entry is not finite.
    """
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise ValueError(f"{what} got {bad} of {matrix.numel()} entries that are not finite; check the weights.")
    return matrix.detach().double()


def _check_factor(name: str, factor: Tensor) -> None:
    if factor.dim() != 2 or factor.shape[0] != factor.shape[1]:
        raise ValueError(f"Metric.{name} must be a square matrix, got shape {tuple(factor.shape)}.")
    if not factor.numel():
        return
    ends = [float(end) for end in factor.aminmax()]
    if not all(map(math.isfinite, ends)):
        raise ValueError(f"Metric.{name} has {int((~torch.isfinite(factor)).sum())} entries that are not finite.")
    if not torch.equal(factor, factor.T):
        asymmetry = float((factor - factor.T).abs().max())
        if asymmetry > 1e-4 * max(map(abs, ends)):
            raise ValueError(f"Metric.{name} must be symmetric, its entries differ by up to {asymmetry:.3g}.")
    if bool((factor.diagonal() < 0).any()):
        raise ValueError(f"Metric.{name} needs a diagonal >= 0, got {float(factor.diagonal().min()):.3g}.")
