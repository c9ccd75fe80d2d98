"""Fast transforms as matrices and as exact butterfly factors.

    Hadamard:  H_{2n} = [[H_n, H_n], [H_n, -H_n]]
    Fourier:   F_n P = [[I, D], [I, -D]] (I_2 (x) F_{n/2}) P',   D = diag(w^0 ... w^{n/2-1}),   w = exp(-2 pi i / n)

with P the bit reversal: F_n[:, bit_reversal(n)] = X_1 ... X_L in the square dyadic chain (Cooley & Tukey, "An algorithm
for the machine calculation of complex Fourier series", 1965). Members of the chain, so exact tests of a factorization,
and starting points of layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..patterns import Chain


def hadamard(n: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return Sylvester's Hadamard matrix (n, n) of entries 1 and -1, n a power of two."""
    matrix = torch.ones(1, 1, dtype=dtype)
    for _ in Chain.butterfly(n):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def fourier(n: int, *, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Return the matrix (n, n) of the discrete Fourier transform, exp(-2 pi i j k / n)."""
    index = torch.arange(n)
    # Reduced modulo n while it is whole: the angle of a large product would lose digits.
    angle = (-2 * math.pi / n) * (index[:, None] * index % n).double()
    return torch.polar(torch.ones_like(angle), angle).to(dtype)


def cosine(n: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the orthonormal matrix (n, n) of the discrete cosine transform of type II."""
    index = torch.arange(n)
    matrix = torch.cos((math.pi / (2 * n)) * (index[:, None] * (2 * index + 1) % (4 * n)).double())
    matrix *= math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(dtype)


def hadamard_blocks(n: int, *, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return the factors (a, 2, 2, d) of `hadamard(n)` in `Chain.butterfly(n)`."""
    pair = torch.tensor([[1, 1], [1, -1]], dtype=dtype)
    return [pair[None, :, :, None].expand(*pattern).clone() for pattern in Chain.butterfly(n)]


def fourier_blocks(n: int, *, dtype: torch.dtype = torch.complex128) -> list[Tensor]:
    """Return the factors (a, 2, 2, d) of `fourier(n)[:, bit_reversal(n)]` in `Chain.butterfly(n)`."""
    found = []
    for pattern in Chain.butterfly(n):
        angle = (-math.pi / pattern.d) * torch.arange(pattern.d, dtype=torch.float64)
        twiddles = torch.polar(torch.ones_like(angle), angle)
        ones = torch.ones_like(twiddles)
        block = torch.stack((torch.stack((ones, twiddles)), torch.stack((ones, -twiddles))))
        found.append(block.expand(*pattern).to(dtype).clone())
    return found
