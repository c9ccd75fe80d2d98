"""What a chain can reach on a matrix, before it is factorized.

    E_s = error of the best product of two factors with the patterns (pi_1 * ... * pi_s) and (pi_{s+1} * ... * pi_L)

is exact (a tail of block singular values), and cheaper than the factorization's best error E, which nobody can compute:

    max_s E_s  <=  E  <=  error of the left or right order with orthonormalization  <=  sqrt(sum_s E_s^2)

The first holds because every product of the chain is also a product of the two; the last because each split is an
orthogonal projection in the whole, so that squared errors add up, and earlier projections do not raise later E_s.
A matrix is a product of the chain iff every E_s is 0. E_s depends on three integers only (`spectrum`), which makes a
search over all chains possible. Cost: block singular values, O(n^2.5) at the middle interface of a square butterfly.
All of it is relative, so matrices whose squares would leave the range of numbers are scaled by a power of two first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import Chain, KSPattern, from_dense
from .fixed_support import Interface

_RANGE = 2.0**100
"""Norms up to this and from its inverse on are left as they are."""


def interface_errors(matrix: Tensor, chain: Chain) -> Tensor:
    """Return E_s of every interface, relative to the norm of the matrix.

    Args:
        matrix: (..., m, n), real or complex.
        chain: Ascending or descending, of L factors.

    Returns:
        (..., L - 1), float64; 0 where a matrix is 0.

    Raises:
        ValueError: if the chain is not chainable, or has another shape, or an entry is not finite.
    """  # noqa: DOC502
    if chain.direction == "descending":
        return interface_errors(matrix.mT, chain.transpose).flip(-1)
    matrix, _ = normalized(matrix)
    values = from_dense(matrix, chain.product())
    outside = outside_energy(matrix, values)
    tails = []
    for s in range(1, len(chain)):
        between = Interface.between(chain.product(0, s), chain.product(s))
        tails.append(outside + _tail(between.blocks(values), between.r))
    errors = torch.stack(tails, -1).sqrt() if tails else outside.new_zeros(*outside.shape, 0)
    return relative(errors, torch.linalg.matrix_norm(matrix)[..., None])


def spectrum(matrices: Tensor, rows: int, cols: int) -> Tensor:
    """Return the energies that rank r leaves at the interface (rows, cols) of full matrices, summed over a stack.

    Left of it the chain has split off a factor `rows` of the rows and `cols` of the columns. The blocks are
    rows x (n / cols), and E_s^2 is entry r = r_s, whatever else the chain is.

    Args:
        matrices: (..., m, n), real or complex.
        rows: q_1 ... q_s, divides m.
        cols: p_1 ... p_s, divides n.

    Returns:
        (k + 1,) float64 with k = min(rows, n / cols): energies of the singular values from r on, for r = 0 ... k.
    """
    m, n = matrices.shape[-2:]
    left = KSPattern(1, rows, cols, m // rows)
    between = Interface.between(left, KSPattern(cols, m // rows, n // cols, 1))
    sigma = torch.linalg.svdvals(between.blocks(in_double(matrices)[..., None, :, :, None]))
    energies = sigma.square().flatten(0, -2).sum(0)
    return torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))


def in_double(matrix: Tensor) -> Tensor:
    """Return a matrix, detached, in float64 or complex128."""
    return matrix.detach().to(torch.complex128 if matrix.is_complex() else torch.float64)


def normalized(values: Tensor, *, dims: int = 2) -> tuple[Tensor, Tensor]:
    """Return values in double precision, brought to a peak near 1 where fourth powers would leave the range.

    Args:
        values: (..., and `dims` dimensions that are scaled together).
        dims: How many dimensions one matrix has, or the entries of one factor.

    Returns:
        The values times 2^-e, the same ones where no e is needed, and e (...), int64.

    Raises:
        ValueError: if an entry is not finite.
    """
    double = in_double(values)
    parts = torch.view_as_real(double.resolve_conj()) if double.is_complex() else double
    within = tuple(range(-dims - double.is_complex(), 0))
    # One pass without a copy says that all is finite and of a good size, which is nearly always so.
    norms = torch.linalg.vector_norm(parts, dim=within)
    exponents = torch.zeros(norms.shape, dtype=torch.int64, device=norms.device)
    safe = (norms <= _RANGE) & (norms >= 1 / _RANGE)
    if bool(safe.all()):
        return double, exponents
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"factorize got {bad} of {values.numel()} entries that are not finite; check the matrix.")
    peaks = parts.abs().amax(within)
    exponents = torch.frexp(peaks).exponent.long().masked_fill(safe | (peaks == 0), 0)
    return times_power(double, -exponents, dims=dims), exponents


def times_power(values: Tensor, exponents: Tensor, *, dims: int = 2) -> Tensor:
    """Return values (..., and `dims` dimensions) times 2^exponents (...), in two steps because 2^1024 is no number."""
    if not bool(exponents.any()):
        return values
    first = exponents // 2
    for part in (first, exponents - first):
        values = values * torch.exp2(part.double()).reshape(*part.shape, *[1] * dims)
    return values


def relative(errors: Tensor, norms: Tensor) -> Tensor:
    """Return errors / norms, 0 where the norm is 0."""
    return (errors / norms.masked_fill(norms == 0, 1.0)).masked_fill(norms == 0, 0.0)


def outside_energy(matrix: Tensor, values: Tensor) -> Tensor:
    """Return the squared norm (...) of a matrix (..., m, n) outside a support, given its values (..., a, b, c, d)."""
    *stack, a, _, _, d = values.shape
    if a == d == 1:
        return torch.zeros(stack, dtype=torch.float64, device=values.device)
    rest = matrix.clone()
    apart = rest.view(*stack, a, -1, d, a, values.shape[-2], d)
    apart.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).zero_()
    energy: Tensor = torch.linalg.matrix_norm(rest).square()
    return energy


def _tail(blocks: Tensor, rank: int) -> Tensor:
    """Return the energy (...) that the best approximation of blocks (..., a1, t, s, d2, b1, c2) leaves."""
    if rank >= min(blocks.shape[-2:]):
        return torch.zeros(blocks.shape[:-6], dtype=torch.float64, device=blocks.device)
    tail: Tensor = torch.linalg.svdvals(blocks)[..., rank:].square().sum((-5, -4, -3, -2, -1))
    return tail
