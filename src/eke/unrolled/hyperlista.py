"""HyperLISTA: a network for sparse problems with three numbers instead of weights.

    r  = A x - b                      e = |A^+ r|_1, an estimate of |x - x*|_1
    th = c1 gamma e                   beta = c2 |x|_0               p = min(max(c3 log(|A^+ b|_1 / e), 0), 1)
    x+ = select(x - gamma W^H r + beta (x - x_last), th, p)         the floor(p n) largest pass unshrunk

W is `symmetric_weight(A)`; everything has one value a sample. The coherence with which the source multiplies c1 and c2
is part of them here. Scaling b scales x. Cost: two products a layer, m n and 2 m n, as W and A^+ lie side by side.
Nothing is ordered where the selection has room. e = 0 has its own guards: b = 0 gives x = 0.
Source: Chen, Liu, Wang and Yin, "Hyperparameter tuning is all you need for LISTA", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from .fused import GUARD, Numbers, run_fused
from .lista import real_dtype
from .operators import Dense, Operator, as_operator
from .shrink import select_support
from .solver import SparseSolver, State
from .weights import symmetric_weight

_C1, _C2, _C3, _N = 0.0132747, 0.004, 0.3, 500
"""Found by a grid search on 250 x 500 normal dictionaries, 10 % nonzeros, no noise; see `tune_hyperlista`."""


@dataclass(frozen=True)
class Tuning:
    """How the search for the numbers went.

    Args:
        c1: Found.
        c2: Found.
        c3: Found.
        nmse_db: Error of the best candidate on the problems given.
        seconds: Of the search.
        solved: Problems solved on the way.
    """

    c1: float
    c2: float
    c3: float
    nmse_db: float
    seconds: float
    solved: int


class HyperLISTA(SparseSolver):
    """The network with three numbers.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out.
        c1: Threshold over the estimated error, >= 0; None for 6.6 / n.
        c2: Momentum over the number of nonzeros, >= 0; None for 2 / n, about 0.2 over the nonzeros expected.
        c3: Growth of the support with the logarithm of the error, >= 0.
        layers: Layers.
        gamma: Step.
        weight: W, in A's shape; None for `symmetric_weight(A)`.
        pinv: Whether A may have a rank below m or columns that repeat.

    Raises:
        ValueError: if a number is negative or not finite, or the weight has another shape.
    """

    chunk = 1024

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        c1: float | None = None,
        c2: float | None = None,
        c3: float = _C3,
        layers: int = 16,
        gamma: float = 1.0,
        weight: Tensor | None = None,
        pinv: bool = False,
    ) -> None:
        super().__init__(as_operator(A), iterations=layers)
        usual = usual_numbers(self.operator.shape[1])
        c1, c2 = usual[0] if c1 is None else c1, usual[1] if c2 is None else c2
        for name, value in (("c1", c1), ("c2", c2), ("c3", c3), ("gamma", gamma)):
            if not 0 <= value < math.inf:
                raise ValueError(f"HyperLISTA's {name} must be a finite number, 0 or more, got {value!r}.")
        matrix = self.operator.dense()
        chosen = symmetric_weight(matrix, pinv=pinv) if weight is None else weight
        if chosen.shape != matrix.shape:
            raise ValueError(f"The weight must have A's shape {tuple(matrix.shape)}, got {tuple(chosen.shape)}.")
        self.gamma = gamma
        self.tuning: Tuning | None = None
        self.c1, self.c2, self.c3 = (self._scalar(value) for value in (c1, c2, c3))
        self.weights = Dense(torch.cat([chosen, _pseudo_inverse(matrix).mH], -1))

    def _scalar(self, value: float) -> nn.Parameter:
        dtype = real_dtype(self.operator.dtype)
        return nn.Parameter(torch.tensor(value, device=self.operator.device, dtype=dtype), requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.weights = Dense(fn(self.weights.matrix))
        return self

    def extra_repr(self) -> str:
        """Return the numbers."""
        numbers = f"c1={float(self.c1):.6g}, c2={float(self.c2):.6g}, c3={float(self.c3):.6g}"
        return f"{self.operator.shape}, {numbers}, layers={self.iterations}"

    def forward(self, b: Tensor, x0: Tensor | None = None) -> Tensor:
        """Return x after all layers.

        Args:
            b: (batch, m).
            x0: Start, (batch, n); None for zeros.

        Returns:
            (batch, n); differentiable in b, and in c1 and c2 once they require gradients. Not in c3: selections have no
            derivative.
        """
        return super().forward(b, x0)

    def _run(self, b: Tensor, x0: Tensor | None) -> Tensor:
        shared = isinstance(self.operator, Dense) and self.operator.batch is None
        if not shared or torch.is_grad_enabled() or b.is_complex() or torch.compiler.is_compiling():
            return super()._run(b, x0)
        matrices, numbers = (self.operator.dense(), self.weights.matrix), (self.c1, self.c2, self.c3)
        return run_fused(b, x0, matrices, numbers=numbers, gamma=self.gamma, layers=self.iterations)

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, the x before it, b, W^H and A^+ of A x - b side by side, |A^+ b|_1 and, if they differ, weights."""
        n = operator.shape[1]
        inner = self.weights.adjoint(-b)
        first = size_of(inner[:, n:])
        if x0 is not None:
            inner = self.weights.adjoint(operator.forward(x0) - b)
        x = b.new_zeros(len(b), n) if x0 is None else x0
        state = (x, x, b, inner, first)
        return state if operator.batch is None else (*state, self.weights.matrix)

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after a layer."""
        x, last, b, inner, first, *own = state
        if k:
            weights = Dense(own[0]) if own else self.weights
            inner = weights.adjoint(operator.forward(x) - b)
        new = layer(x, last, inner, first=first, numbers=(self.c1, self.c2, self.c3), gamma=self.gamma)
        return new, x, b, inner, first, *own


def usual_numbers(n: int) -> tuple[float, float, float]:
    """Return c1, c2 and c3 for n unknowns: |A^+ r|_1 and |x|_0 grow with n, so c1 and c2 fall with it."""
    return _C1 * (_N / n), _C2 * (_N / n), _C3


def layer(x: Tensor, last: Tensor, inner: Tensor, *, first: Tensor, numbers: Numbers, gamma: float = 1.0) -> Tensor:
    """Return what one layer makes of x.

    Args:
        x: (batch, n).
        last: The x before it, (batch, n).
        inner: W^H r and A^+ r side by side, (batch, 2 n), r = A x - b.
        first: |A^+ b|_1, (batch, 1).
        numbers: c1, c2 and c3: each a scalar or (batch, 1).
        gamma: Step.

    Returns:
        (batch, n).
    """
    n = x.shape[-1]
    c1, c2, c3 = numbers
    error = size_of(inner[:, n:])
    threshold = c1 * gamma * error
    share = (c3 * torch.log((first + GUARD) / (error + GUARD))).clamp(0, 1).detach()
    # the sum of |sign| counts faster than count_nonzero does
    momentum = c2 * x.detach().sgn().abs().sum(-1, keepdim=True).round()
    ahead = x + momentum * (x - last) if x.is_complex() else torch.lerp(x, last, -momentum)
    moved = torch.sub(ahead, inner[:, :n], alpha=gamma)
    return select_support(moved, threshold, share)


def size_of(v: Tensor) -> Tensor:
    """Return |v|_1 of each row, (batch, 1)."""
    return v.abs().sum(-1, keepdim=True)


def _pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return A^+, computed in float64."""
    wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    result: Tensor = torch.linalg.pinv(wide, rtol=1e-6).to(matrix.dtype)
    return result
