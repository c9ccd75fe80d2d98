"""What a chain can reach on a matrix, before it is factorized.

    E_s = error of the best product of two factors with the patterns (pi_1 * ... * pi_s) and (pi_{s+1} * ... * pi_L)

is exact (a tail of block singular values), and cheaper than the factorization's best error E, which nobody can compute:

    max_s E_s  <=  E  <=  error of the left or right order with orthonormalization  <=  sqrt(sum_s E_s^2)

The first holds because every product of the chain is also a product of the two; the last because each split is an
orthogonal projection in the whole, so that squared errors add up, and earlier projections do not raise later E_s.
A matrix is a product of the chain iff every E_s is 0. E_s depends on three integers only (`spectrum`), which makes a
search over all chains possible. Cost: block singular values, O(n^2.5) at the middle interface of a square butterfly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..patterns import Chain, KSPattern, from_dense
from .fixed_support import Interface


def interface_errors(matrix: Tensor, chain: Chain) -> Tensor:
    """Return E_s of every interface, relative to the norm of the matrix.

    Args:
        matrix: (..., m, n), real or complex.
        chain: Ascending or descending, of L factors.

    Returns:
        (..., L - 1), float64; 0 where a matrix is 0.

    Raises:
        ValueError: if the chain is not chainable, or has another shape.
    """  # noqa: DOC502
    if chain.direction == "descending":
        return interface_errors(matrix.mT, chain.transpose).flip(-1)
    matrix = in_double(matrix)
    values = from_dense(matrix, chain.product())
    outside = outside_energy(matrix, values)
    tails = []
    for s in range(1, len(chain)):
        between = Interface.between(chain.product(0, s), chain.product(s))
        tails.append(outside + _tail(between.blocks(values), between.r))
    errors = torch.stack(tails, -1).sqrt() if tails else outside.new_zeros(*outside.shape, 0)
    return relative(errors, torch.linalg.matrix_norm(matrix)[..., None])


def spectrum(matrix: Tensor, rows: int, cols: int) -> Tensor:
    """Return the energies that rank r leaves at the interface (rows, cols) of a full matrix.

    Left of it the chain has split off a factor `rows` of the rows and `cols` of the columns. The blocks are
    rows x (n / cols), and E_s^2 is entry r = r_s, whatever else the chain is.

    Args:
        matrix: (m, n), real or complex.
        rows: q_1 ... q_s, divides m.
        cols: p_1 ... p_s, divides n.

    Returns:
        (k + 1,) float64 with k = min(rows, n / cols): energies of the singular values from r on, for r = 0 ... k.
    """
    m, n = matrix.shape
    left = KSPattern(1, rows, cols, m // rows)
    between = Interface.between(left, KSPattern(cols, m // rows, n // cols, 1))
    sigma = torch.linalg.svdvals(between.blocks(in_double(matrix)[None, ..., None]))
    energies = sigma.square().flatten(0, -2).sum(0)
    return torch.cat((energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)))


def in_double(matrix: Tensor) -> Tensor:
    """Return a matrix, detached, in float64 or complex128."""
    return matrix.detach().to(torch.complex128 if matrix.is_complex() else torch.float64)


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
