"""Vector approximate message passing with a Bernoulli-normal prior that is learned from b alone.

Two estimators exchange what each has learned that the other did not know, as a mean and a variance a sample:

    linear      x ~ N(r, t):  z = A^H (A A^H + (s/t) I)^-1 (b - A r),  c = tr(A^H (A A^H + (s/t) I)^-1 A) / n
                it knows      q = r + z / c  with variance  e = t (1 - c) / c
    denoiser    x_i = 0 or N(0, v), the latter with probability d:  posterior mean x and variance u e given q ~ N(x, e)
                it knows      r = (x - u q) / (1 - u)  with variance  t = e u / (1 - u)

d and v are the posterior's own (EM). The noise variance s is the weighted least squares fit of s + t l_i to the squares
of the residual in the eigenbasis of A A^H (Fisher scoring; ours): EM takes many steps to see that there is none. Cost:
one eigendecomposition, then 2 m n a step. Exact for random A in the limit of large n; for coherent ones it may diverge
or wander about, which the solution says (`diverged`, `settled`). `polish` ends with least squares on the likely
support, kept where it explains b far better.
Sources: Rangan, Schniter and Fletcher, "Vector approximate message passing", 2017; Ma and Ping, "Orthogonal AMP",
2017; Vila and Schniter, "Expectation-maximization Gaussian-mixture AMP", 2013 (the prior by EM).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .operators import Operator
from .polish import polish
from .solver import Callback, Solution, SparseSolver, State

_LEAST_NOISE = 1e-3
"""Noise is taken for at least this share of the mean of t l_i: the scale at which its estimate is rounding."""
_BETWEEN = 2
"""Steps between one try of least squares and the next."""
_OWN = 11
"""Entries of a state before those of matrices that differ by sample."""
_FIRST_DENSITY = 0.15
_SETTLED = 0.02
"""A sample that the next step would move by more than this, relative to x, has not settled."""


class VAMP(SparseSolver):
    """Message passing whose prior and noise are learned, unless they are given.

    Args:
        A: (m, n), (batch, m, n) or an operator that can be written out; coherent ones may diverge.
        iterations: Steps, at least 1.
        density: Share of nonzeros if it is known; None learns one for each sample.
        variance: Of the nonzeros if it is known; None learns one for each sample.
        noise_variance: Of each entry of b if it is known; None learns one for each sample.
        damping: Part of each message that is new, in (0, 1]; below 1 for matrices less random.
        polish: Times that least squares on the likely support are tried at the end, two steps apart; for b without
            noise.

    Raises:
        ValueError: if a number is out of range.
    """

    runaway = 1.0 + 1e-3
    chunk = 128

    def __init__(
        self,
        A: Tensor | Operator,
        *,
        iterations: int = 20,
        density: float | None = None,
        variance: float | None = None,
        noise_variance: float | None = None,
        damping: float = 1.0,
        polish: int = 0,
    ) -> None:
        super().__init__(A, iterations=iterations)
        for name, value, most in (
            ("density", density, 1.0),
            ("variance", variance, float("inf")),
            ("damping", damping, 1.0),
        ):
            if value is not None and not 0 < value <= most:
                raise ValueError(f"{name} must be above 0 and at most {most:g}, got {value!r}.")
        if noise_variance is not None and not noise_variance >= 0:
            raise ValueError(f"noise_variance must be 0 or more, got {noise_variance!r}.")
        if isinstance(polish, bool) or not isinstance(polish, int) or polish < 0:
            raise ValueError(f"polish is a number of rounds, 0 or more, got {polish!r}.")
        self.density, self.variance, self.noise_variance = density, variance, noise_variance
        self.damping, self.polish = damping, polish
        self._decomposed: tuple[Operator, Tensor, Tensor, Tensor] | None = None
        self._inverse: tuple[Operator, Tensor] | None = None

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return eigenvalues l of A A^H, U with A A^H = U diag(l) U^H, and U^H A, computed once in float64."""
        if self._decomposed is None or self._decomposed[0] is not self.operator:
            matrix = self.operator.dense().detach()
            wide = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
            if matrix.shape[-2] <= matrix.shape[-1]:
                values, vectors = torch.linalg.eigh(wide @ wide.mH)
                turned = vectors.mH @ wide
            else:
                vectors, singular, right = torch.linalg.svd(wide, full_matrices=False)
                values, turned = singular.square(), singular.unsqueeze(-1) * right
            real = matrix.real.dtype if matrix.is_complex() else matrix.dtype
            values = values.clamp_min(0).to(real)
            self._decomposed = (self.operator, values, vectors.to(matrix.dtype), turned.to(matrix.dtype))
        return self._decomposed[1:]

    def start(self, operator: Operator, b: Tensor, x0: Tensor | None) -> State:
        """Return x, the message r and all that is known of each sample.

        Args:
            operator: A.
            b: (batch, m).
            x0: (batch, n) or None.

        Returns:
            x, r, t, d, v, s, U^H b, the energy of b outside U's range, the scale of b, the step's variance of x, b,
            and for matrices that differ l, U^H A and U.
        """
        values, vectors, turned = self.rotated()
        m, n = operator.shape
        scale = torch.linalg.vector_norm(b, dim=-1, keepdim=True) / m**0.5
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        unit = b / scale
        inner = unit @ vectors.conj() if vectors.ndim == 2 else (vectors.mH @ unit.unsqueeze(-1)).squeeze(-1)
        outside = (unit.abs().square().sum(-1, keepdim=True) - inner.abs().square().sum(-1, keepdim=True)).clamp_min(0)
        gain = values.sum(-1, keepdim=True).expand(len(b), 1) / m
        start = unit.new_zeros(len(b), n) if x0 is None else x0 / scale
        density = torch.full_like(scale, self.density or min(_FIRST_DENSITY, 0.5 * m / n))
        spread = 1 / gain / density if self.variance is None else self.variance / scale.square()
        noise = torch.full_like(scale, 1e-2) if self.noise_variance is None else self.noise_variance / scale.square()
        t = density * spread
        if x0 is not None:
            left = (inner - _times(turned, start)).abs().square().sum(-1, keepdim=True) / m
            t = (left / gain).clamp_min(torch.finfo(scale.dtype).eps)
        state = (start, start, t, density, spread, noise, inner, outside, scale, t, b)
        return (*state, values, turned, vectors) if operator.batch is not None else state

    def step(self, k: int, operator: Operator, state: State) -> State:
        """Return the state after the linear estimator and the denoiser."""
        del k
        _, r, t, density, spread, noise, inner, outside, scale, _, b, *own = state
        values, turned = own[:2] if own else (self.rotated()[0], self.rotated()[2])
        m, n = operator.shape
        residual = _residual(turned, r, inner)
        level = t * values
        if self.noise_variance is None:
            power = residual.abs().square() if residual.is_complex() else residual.square()
            noise = _fitted_noise(power, level, noise, outside, m - values.shape[-1])
        inverse = (noise + level).reciprocal()
        c = (values.shape[-1] - noise * inverse.sum(-1, keepdim=True)) / n
        q = _corrected(turned, residual * (inverse * (t / c)), r)
        e = t * (1 - c).clamp_min(1e-7) / c
        x, u, density_new, spread_new = _denoised(q, e, density, spread)
        u = u.clamp(1e-12, 1 - 1e-6)
        message = x * (1 / (1 - u)) - q * (u / (1 - u))
        t_new = (e * u / (1 - u)).clamp_min(torch.finfo(scale.dtype).eps ** 2)
        if self.damping < 1:
            message = torch.lerp(r, message, self.damping)
            t_new = torch.lerp(t, t_new, self.damping)
        known = density if self.density is not None else density_new
        wide = spread if self.variance is not None else spread_new
        return (x, message, t_new, known, wide, noise, inner, outside, scale, e * u, b, *own)

    def finish(self, operator: Operator, state: State) -> Tensor:
        """Return x in b's scale, polished if that was asked for."""
        x = state[0] * state[8]
        rows: Tensor | None = None
        for _ in range(self.polish):
            better, exact = self._polished(operator, state)
            x = better if rows is None else x.index_copy(0, rows, better)
            left = (~exact).nonzero().squeeze(-1)
            if not len(left):
                break
            rows = left if rows is None else rows[left]
            operator, state = operator.select(left), tuple(part[left] for part in state)
            for k in range(_BETWEEN):
                state = self.step(self.iterations + k, operator, state)
        return x

    def _polished(self, operator: Operator, state: State) -> tuple[Tensor, Tensor]:
        """Return x after least squares on likely supports, and which samples are exact."""
        if len(state) > _OWN:
            values, turned, vectors = state[_OWN:]
            inverse = _pseudo_inverse(values, vectors, turned)
        else:
            if self._inverse is None or self._inverse[0] is not self.operator:
                self._inverse = (self.operator, _pseudo_inverse(*self.rotated()))
            inverse = self._inverse[1]
        return polish(
            operator,
            state[10],
            state[0] * state[8],
            score=state[1].abs(),
            count=state[3].squeeze(-1) * operator.shape[1],
            correct=lambda residual, rows: _back(inverse if inverse.ndim == 2 else inverse[rows], residual),
            rounds=2,
        )

    def details(self, operator: Operator, state: State) -> dict[str, Tensor]:
        """Return density, variance of nonzeros, noise variance, posterior variance of x, `settled`; (batch,) each."""
        moved = self.change(state, self.step(self.iterations, operator, state))
        density, spread, noise, scale, left = (state[i].squeeze(-1) for i in (3, 4, 5, 8, 9))
        square = scale.square()
        return {
            "density": density,
            "variance": spread * square,
            "noise_variance": noise * square,
            "posterior_variance": left * square,
            "settled": moved <= _SETTLED,
        }

    def trusted(self, solution: Solution) -> Tensor:
        """Return which answers have settled, (batch,)."""
        return solution.details["settled"] & ~solution.diverged

    def solve(
        self,
        b: Tensor,
        *,
        x0: Tensor | None = None,
        tolerance: float | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Return the solution; a RuntimeWarning says how many samples still move, see `SparseSolver.solve`."""
        solution = super().solve(b, x0=x0, tolerance=tolerance, callback=callback)
        moving = int((~self.trusted(solution) & ~solution.diverged).sum())
        if moving:
            warnings.warn(
                f"VAMP has not settled on {moving} of {len(b)} problems: one more step would move x by more than "
                f"{_SETTLED:.0%}. Take more iterations, damping=0.5, or a solver that converges, such as fista.",
                RuntimeWarning,
                stacklevel=2,
            )
        return solution


def _pseudo_inverse(values: Tensor, vectors: Tensor, turned: Tensor) -> Tensor:
    """Return U (U^H A / l), whose conjugate transpose is A^+; least eigenvalues count as rounding."""
    floor = torch.maximum(values, 1e-10 * values.amax(-1, keepdim=True))
    return vectors @ (turned / floor.unsqueeze(-1))


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """Return A x for one matrix or one a sample."""
    return x @ matrix.T if matrix.ndim == 2 else (matrix @ x.unsqueeze(-1)).squeeze(-1)


def _residual(matrix: Tensor, x: Tensor, b: Tensor) -> Tensor:
    """Return b - A x for one matrix or one a sample."""
    return torch.addmm(b, x, matrix.T, alpha=-1) if matrix.ndim == 2 else b - _times(matrix, x)


def _corrected(matrix: Tensor, r: Tensor, x: Tensor) -> Tensor:
    """Return x + A^H r for one matrix or one a sample."""
    return torch.addmm(x, r, matrix.conj()) if matrix.ndim == 2 else x + _back(matrix, r)


def _back(matrix: Tensor, r: Tensor) -> Tensor:
    """Return A^H r for one matrix or one a sample."""
    return r @ matrix.conj() if matrix.ndim == 2 else (matrix.mH @ r.unsqueeze(-1)).squeeze(-1)


def _fitted_noise(power: Tensor, level: Tensor, noise: Tensor, outside: Tensor, spare: int) -> Tensor:
    """Return the noise variance that fits |residual_i|^2 = noise + level_i best, by a step of Fisher scoring.

    Args:
        power: |residual_i|^2 in the eigenbasis, (batch, k).
        level: t l_i, (batch, k).
        noise: Last estimate, (batch, 1).
        outside: Energy of b outside A's range, (batch, 1).
        spare: Dimensions of that outside.

    Returns:
        (batch, 1), positive.
    """
    least = (_LEAST_NOISE * level.mean(-1, keepdim=True)).clamp_min(torch.finfo(noise.dtype).eps ** 2)
    weight = (noise + level).reciprocal().square()
    top = (weight * (power - level)).sum(-1, keepdim=True)
    bottom = weight.sum(-1, keepdim=True)
    if spare:
        top, bottom = top + outside / noise.square(), bottom + spare / noise.square()
    return torch.maximum(top / bottom, least)


def _denoised(q: Tensor, e: Tensor, density: Tensor, spread: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the posterior of x given q ~ N(x, e) for x zero or normal.

    Args:
        q: (batch, n).
        e: Variance, (batch, 1).
        density: Prior probability of a nonzero, (batch, 1).
        spread: Prior variance of a nonzero, (batch, 1).

    Returns:
        The mean (batch, n), the mean posterior variance over e, and the prior of EM: density and variance.
    """
    n = q.shape[-1]
    degrees = 1.0 if q.is_complex() else 0.5
    a = spread / (spread + e)
    power = q.abs().square() if q.is_complex() else q.square()
    odds = torch.log(density / (1 - density)) + degrees * torch.log(e / (spread + e))
    p = torch.sigmoid(torch.addcmul(odds.expand_as(power), power, degrees * a / e))
    weighed = p * power
    count = p.sum(-1, keepdim=True)
    energy = weighed.sum(-1, keepdim=True)
    # not energy - sum(p weighed): that difference of nearly equal numbers loses the last digits of single precision
    unsure = torch.addcmul(weighed, p, weighed, value=-1).sum(-1, keepdim=True)
    variance = (a * count + a.square() / e * unsure) / n
    count = count.clamp_min(1e-6 * n)
    return p * q * a, variance, (count / n).clamp_max(0.999), a.square() * energy / count + a * e


def vamp(
    A: Tensor | Operator,
    b: Tensor,
    *,
    iterations: int = 20,
    density: float | None = None,
    variance: float | None = None,
    noise_variance: float | None = None,
    damping: float = 1.0,
    polish: int = 0,
    x0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
) -> Solution:
    """Return the posterior mean by message passing; see `VAMP` for the arguments and `SparseSolver.solve`."""
    solver = VAMP(
        A,
        iterations=iterations,
        density=density,
        variance=variance,
        noise_variance=noise_variance,
        damping=damping,
        polish=polish,
    )
    return solver.solve(b, x0=x0, tolerance=tolerance, callback=callback)
