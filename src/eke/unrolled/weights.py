"""Closed forms of the weights that ALISTA and HyperLISTA optimise, and what coherence promises.

Both minimise |W^H A|_F^2 with w_i^H a_i = 1 for every column. With M = A A^H, K = M^-1 A, P = A^H K:

    analytic:   columns decouple,           w_i = K_i / (a_i^H K_i)
    symmetric:  W = Q A with Q Hermitian    Q = K diag(l) K^H  where  |P|^2 l = 1  (entrywise square, n x n)

The first is Lagrange's condition 2 M w_i = l_i a_i, the second 2 M Q M = A diag(l) A^H. Q is positive semidefinite
where l >= 0, as in general position; where it is not, alternating projections find the best Q that is.
All in float64, batched, differentiable. Cost: m^3 + m^2 n, and n^3 / 3 more for the symmetric one.
Sources of the problems: Liu, Chen, Wang and Yin, "ALISTA", 2019, and Chen et al., "Hyperparameter tuning is all you
need for LISTA", 2021, who solve them by gradients; the closed forms are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .operators import Operator, as_operator

_DYKSTRA_STEPS = 20_000


def analytic_weight(A: Tensor | Operator, *, pinv: bool = False) -> Tensor:
    """Return ALISTA's weight: the W of least |W^H A|_F whose columns answer their own with one.

    Args:
        A: (m, n) or (batch, m, n), real or complex, or an operator that can be written out.
        pinv: Whether A may have a rank below m, an error otherwise: M is then inverted on its range.

    Returns:
        W in A's shape and dtype.
    """
    a, dtype = _wide(A)
    k = _gram_solve(a, pinv=pinv)
    return (k / (a.conj() * k).sum(-2, keepdim=True).real).to(dtype)


def symmetric_weight(A: Tensor | Operator, *, pinv: bool = False) -> Tensor:
    """Return HyperLISTA's weight: W = Q A, Q positive semidefinite, so that W^H A is Hermitian with a unit diagonal.

    Args:
        A: (m, n) or (batch, m, n), real or complex, or an operator that can be written out.
        pinv: Whether A may have a rank below m, or columns that repeat: systems are then solved on their range.

    Returns:
        W in A's shape and dtype.

    Raises:
        ValueError: if A has a rank below m or columns that repeat (up to a factor) without `pinv`, a column of zeros,
            entries that are not finite, columns that repeat with other lengths, or no positive semidefinite Q fits.
    """
    a, dtype = _wide(A)
    k = _gram_solve(a, pinv=pinv)
    squared = (a.mH @ k).abs().square()
    ones = torch.ones_like(squared[..., :1])
    if pinv:
        multipliers = torch.linalg.pinv(squared, hermitian=True) @ ones
        worst = float((squared @ multipliers - 1).abs().max())
        if worst > 1e-6:
            raise ValueError(
                f"symmetric_weight has no answer for A of shape {tuple(a.shape)}: the diagonal is off by {worst:.2g}. "
                "Columns that repeat up to a factor need one length: normalize the columns of A."
            )
    else:
        factor, info = torch.linalg.cholesky_ex(squared)
        if bool((info != 0).any()) or _is_singular(factor, squared):
            raise ValueError(
                f"symmetric_weight has no unique answer for A of shape {tuple(a.shape)}: columns repeat up to a factor "
                "(or n > m (m + 1) / 2). Merge them, or pass pinv=True."
            )
        multipliers = torch.cholesky_solve(ones, factor)
    if bool((multipliers >= 0).all()):
        result: Tensor = k @ (multipliers * (k.mH @ a))
        return result.to(dtype)
    q: Tensor = k @ (multipliers.to(k.dtype) * k.mH)
    q = (q + q.mH) / 2
    values = torch.linalg.eigvalsh(q)
    if bool((values[..., 0] < -1e-10 * values[..., -1]).any()):
        q = _semidefinite(a)
    return (q @ a).to(dtype)


def _semidefinite(a: Tensor) -> Tensor:
    """Return the best positive semidefinite Q by Dykstra's alternating projections.

    With A = U S V^H and Q = U S^-1 R S^-1 U^H, the objective is |R - I|_F^2 and the diagonal v_i^H R v_i = 1 for rows
    v_i of V: a projection of I on the intersection of a cone and an affine set.

    Args:
        a: A, float64 or complex128.

    Returns:
        Q.

    Raises:
        ValueError: if no such Q exists.
    """
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    squared = (vh.mH @ vh).abs().square()
    inverse = torch.linalg.pinv(squared, hermitian=True)
    r = torch.eye(s.shape[-1], dtype=a.dtype, device=a.device).expand(*s.shape, -1)
    cone = torch.zeros_like(r)
    for _ in range(_DYKSTRA_STEPS):
        diagonal = (vh.conj() * (r @ vh)).sum(-2).real.unsqueeze(-1)
        on_affine = r + vh @ ((inverse @ (1 - diagonal)).to(vh.dtype) * vh.mH)
        values, vectors = torch.linalg.eigh(on_affine + cone)
        r_next = vectors @ (values.clamp_min(0).unsqueeze(-1).to(vectors.dtype) * vectors.mH)
        cone = on_affine + cone - r_next
        step, r = float((r_next - r).abs().max()), r_next
        if step < 1e-13:
            break
    diagonal = (vh.conj() * (r @ vh)).sum(-2).real
    worst = float((diagonal - 1).abs().max())
    if worst > 1e-6:
        raise ValueError(
            f"symmetric_weight found no positive semidefinite Q for A of shape {tuple(a.shape)}: the diagonal is off "
            f"by {worst:.2g}. Normalize the columns of A, or use analytic_weight."
        )
    left = u / s.unsqueeze(-2)
    q: Tensor = left @ r @ left.mH
    return q


def _wide(A: Tensor | Operator) -> tuple[Tensor, torch.dtype]:
    """Return A written out in float64 or complex128, and the dtype to give back."""
    matrix = as_operator(A).dense()
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64), matrix.dtype


def _gram_solve(a: Tensor, *, pinv: bool) -> Tensor:
    """Return (A A^H)^-1 A, or with the pseudo-inverse.

    Args:
        a: A, float64 or complex128.
        pinv: Whether the rank may be below m.

    Returns:
        In A's shape.

    Raises:
        ValueError: if the rank is below m and must not be.
    """
    gram = a @ a.mH
    if pinv:
        inverse: Tensor = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12)
        return inverse @ a
    factor, info = torch.linalg.cholesky_ex(gram)
    if bool((info != 0).any()) or _is_singular(factor, gram):
        raise ValueError(
            f"A of shape {tuple(a.shape)} has a rank below m = {a.shape[-2]}, so A A^H has no inverse. Leave out rows "
            "that depend on others, or pass pinv=True to work on the range of A."
        )
    solved: Tensor = torch.cholesky_solve(a, factor)
    return solved


def _is_singular(factor: Tensor, matrix: Tensor) -> bool:
    """Return whether a Cholesky factor has a pivot at the level of rounding."""
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).real.square()
    scale = matrix.detach().diagonal(dim1=-2, dim2=-1).real.amax(-1, keepdim=True)
    return bool((pivots <= matrix.shape[-1] * torch.finfo(torch.float64).eps * scale).any())


@dataclass(frozen=True)
class Coherence:
    """How well the columns of A are told apart.

    Args:
        mutual: Largest |a_i^H a_j| / (|a_i| |a_j|) of different columns.
        generalized: Largest |w_i^H a_j| of different columns, for the weight that was given; None without one.
        off_diagonal: |W^H A - diag|_F^2 for the weight, or of the normalized Gram matrix without one.
        welch_bound: No (m, n) dictionary has a smaller mutual coherence.
        guaranteed_sparsity: Every x with at most so many nonzeros is the only sparsest solution, and the one found by
            basis pursuit and OMP: the largest integer below (1 + 1 / mutual) / 2. Proved, and pessimistic.
    """

    mutual: float
    generalized: float | None
    off_diagonal: float
    welch_bound: float
    guaranteed_sparsity: int

    def __str__(self) -> str:
        general = "" if self.generalized is None else f", {self.generalized:.4f} with the weight"
        return (
            f"coherence {self.mutual:.4f}{general} (Welch bound {self.welch_bound:.4f}); recovery is proved up to "
            f"{self.guaranteed_sparsity} nonzeros"
        )


def coherence(A: Tensor | Operator, weight: Tensor | None = None) -> Coherence:
    """Return the coherence report of one dictionary.

    Args:
        A: (m, n), or an operator that can be written out.
        weight: W (m, n) with w_i^H a_i = 1, such as `analytic_weight(A)`.

    Returns:
        The report.

    Raises:
        ValueError: if A is not one matrix with at least 2 columns, or the weight has another shape.
    """
    a, _ = _wide(A)
    if a.ndim != 2 or a.shape[1] < 2:
        raise ValueError(f"coherence looks at one matrix (m, n) with n >= 2, got {tuple(a.shape)}.")
    m, n = a.shape
    unit = a / torch.linalg.vector_norm(a, dim=0)
    gram = (unit.mH @ unit).abs().fill_diagonal_(0)
    mutual, general, off = float(gram.max()), None, gram
    if weight is not None:
        if weight.shape != a.shape:
            raise ValueError(f"The weight must have A's shape {tuple(a.shape)}, got {tuple(weight.shape)}.")
        off = (weight.to(a.dtype).mH @ a).abs().fill_diagonal_(0)
        general = float(off.max())
    return Coherence(
        mutual=mutual,
        generalized=general,
        off_diagonal=float(off.square().sum()),
        welch_bound=math.sqrt(max(0, n - m) / (m * (n - 1))),
        guaranteed_sparsity=recovery_condition(mutual, n=n),
    )


def recovery_condition(mutual: float, *, n: int) -> int:
    """Return how many nonzeros are provably recovered: the largest integer s < (1 + 1 / mutual) / 2, n at most.

    Args:
        mutual: Mutual coherence, in [0, 1].
        n: Unknowns.

    Returns:
        The number.

    Raises:
        ValueError: if the coherence is outside [0, 1].

    Source: Donoho and Elad, "Optimally sparse representation in general dictionaries", 2003; Tropp, "Greed is good",
    2004.
    """
    if not 0 <= mutual <= 1 + 1e-9:
        raise ValueError(f"A mutual coherence is in [0, 1], got {mutual!r}.")
    if mutual == 0:
        return n
    return min(n, math.ceil((1 + 1 / mutual) / 2) - 1)
