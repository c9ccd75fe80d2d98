"""Eigenbases of Kronecker factors that are kept up to date, and what else must turn with them.

A refresh is skipped where the factor is still nearly diagonal in its basis, ||offdiag(Q^T A Q)|| <= tolerance ||A||,
and is one step of orthogonal iteration Q <- qr(A Q) or an eigendecomposition otherwise. Squares of gradients along
old directions say this much about new ones: with R = Q_new^T Q_old, m2 <- (R_S . R_S) m2 (R_A . R_A)^T, the diagonal of
the turned diagonal matrix; a gradient M turns exactly, R_S M R_A^T.

Source: Eschenhagen et al., "Purifying Shampoo: investigating Shampoo's heuristics by decomposing its preconditioner",
2025 (the criterion); Vyas et al., "SOAP: improving and stabilizing Shampoo using Adam", 2024 (one QR step).
"""

from __future__ import annotations

import math
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
    if not math.isfinite(float(factor.sum())):
        return None
    if basis is not None and (tolerance or how == "qr"):
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


def leading(factor: Tensor, basis: Tensor | None, *, rank: int) -> Tensor | None:
    """Return the leading eigenvectors of a factor by subspace iteration.

    Args:
        factor: (groups, n, n), symmetric positive semidefinite.
        basis: Where to start, (groups, n, rank); None for a random start and two rounds more.
        rank: How many, below n.

    Returns:
        Orthonormal columns (groups, n, rank), largest first; None if the factor is not finite.
    """
    if not math.isfinite(float(factor.sum())):
        return None
    rounds = 1
    if basis is None:
        generator = torch.Generator(device=factor.device).manual_seed(0)
        shape = (factor.shape[0], factor.shape[1], rank)
        basis, rounds = torch.randn(shape, generator=generator, dtype=factor.dtype, device=factor.device), 3
    for _ in range(rounds):
        basis = torch.linalg.qr(factor @ basis)[0]
    values, vectors = torch.linalg.eigh(basis.mT @ factor @ basis)
    order = values.argsort(1, descending=True)
    found: Tensor = basis @ vectors.gather(2, order[:, None].expand_as(vectors))
    return found


def shares(turned: Tensor, size: int) -> Tensor:
    """Return how much of each old direction is in each new one, with all that no direction spans as the last.

    Args:
        turned: Q_new^T Q_old (groups, q, q).
        size: Dimensions of the space.

    Returns:
        (groups, q [+ 1], q [+ 1]); lines add up to 1, so that means of squares stay means.
    """
    squares = turned.square()
    rest = size - squares.shape[1]
    if not rest:
        return squares
    beside = (1 - squares.sum(2, keepdim=True)).clamp_min_(0)
    below = (1 - squares.sum(1, keepdim=True)).clamp_min_(0) / rest
    corner = 1 - below.sum(2, keepdim=True)
    return torch.cat([torch.cat([squares, beside], 2), torch.cat([below, corner], 2)], 1)


def centred(channels: Tensor, constant: Tensor | None, taps: int) -> Tensor:
    """Return the second moment of patches whose pixels are uncorrelated, with a bias at the centre of the kernel.

    Args:
        channels: (groups, c, c), second moment of channels at any tap.
        constant: (groups, c + 1, c + 1), with the constant 1 of the bias as the last; None without.
        taps: Taps of the kernel.

    Returns:
        (groups, c * taps [+ 1], ...), channels before taps.
    """
    groups, c = channels.shape[:2]
    eye = torch.eye(taps, dtype=channels.dtype, device=channels.device)
    found = torch.einsum("gij,kl->gikjl", channels, eye).reshape(groups, c * taps, c * taps)
    if constant is None:
        return found
    found = torch.nn.functional.pad(found, (0, 1, 0, 1))
    middle = slice(taps // 2, c * taps, taps)
    found[:, middle, -1] = constant[:, :-1, -1]
    found[:, -1, middle] = constant[:, -1, :-1]
    found[:, -1, -1] = constant[:, -1, -1]
    return found


def channel_basis(factor: Tensor, taps: int, *, bias: bool) -> Tensor | None:
    """Return eigenvectors of what `centred` returned: those of channels at each tap, with the bias at the centre.

    Args:
        factor: (groups, c * taps [+ 1], ...).
        taps: Taps of the kernel.
        bias: Whether there is a constant 1.

    Returns:
        Orthonormal columns (groups, c * taps [+ 1], ...), None if the factor is not finite.
    """
    size = factor.shape[1]
    found = torch.zeros_like(factor)
    blocks: dict[bool, Tensor] = {}
    for tap in range(taps):
        lines = list(range(tap, size - bias, taps))
        middle = bias and tap == taps // 2
        if middle:
            lines.append(size - 1)
        here = torch.tensor(lines, device=factor.device)
        if middle not in blocks:
            basis = refreshed(factor[:, here][:, :, here], None, how="eigh", tolerance=0.0)
            if basis is None:
                return None
            blocks[middle] = basis
        found[:, here[:, None], here] = blocks[middle]
    return found
