"""Eigenbases of Kronecker factors that are kept up to date, and what else must turn with them.

A refresh is skipped where the factor is still nearly diagonal in its basis, ||offdiag(Q^T A Q)|| <= tolerance ||A||,
and is one step of orthogonal iteration Q <- qr(A Q) or an eigendecomposition otherwise. Squares of gradients along
old directions say this much about new ones: with R = Q_new^T Q_old, m2 <- (R_S . R_S) m2 (R_A . R_A)^T, the diagonal of
the turned diagonal matrix; a gradient M turns exactly, R_S M R_A^T.

Source: Eschenhagen et al., "Purifying Shampoo: investigating Shampoo's heuristics by decomposing its preconditioner",
2025 (the criterion); Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024 (one QR step).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Refresh = Literal["eigh", "qr"]


def refreshed(factor: Tensor, basis: Tensor | None, *, how: Refresh, tolerance: float) -> Tensor | None:
    """Return a better basis of a factor.

    Args:
        factor: (groups, n, n), symmetric positive semidefinite.
        basis: (groups, n, n), orthonormal columns, or None at the start.
        how: Eigenvectors, or one step of orthogonal iteration from the old basis.
        tolerance: Largest share of the factor's norm off the diagonal for which the old basis stays.

    Returns:
        Orthonormal columns in the type of the factor; None if the old basis stays or the factor is not finite.
    """
    if not bool(torch.isfinite(factor).all()):
        return None
    if basis is not None:
        turned = basis.mT @ factor @ basis
        aside = turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))
        if float(aside.norm()) <= tolerance * float(turned.norm()):
            return None
        if how == "qr":
            order = turned.diagonal(dim1=1, dim2=2).argsort(descending=True)
            ordered = basis.gather(2, order[:, None].expand_as(basis))
            better: Tensor = torch.linalg.qr(factor @ ordered)[0]
            return better
    try:
        vectors: Tensor = torch.linalg.eigh(factor)[1]
    except RuntimeError:  # no convergence: rare, and mostly in float32
        vectors = torch.linalg.eigh(factor.double())[1].to(factor.dtype)
    return vectors.flip(2).contiguous()  # largest first, as orthogonal iteration has them


def turn(matrix: Tensor, g_turn: Tensor | None, a_turn: Tensor | None) -> Tensor:
    """Return R_S M R_A^T (groups, m, n); None stands for the identity."""
    if g_turn is not None:
        matrix = g_turn @ matrix
    return matrix if a_turn is None else matrix @ a_turn.mT
