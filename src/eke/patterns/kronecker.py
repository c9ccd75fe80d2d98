"""One Kronecker-sparse factor: a fixed support that four integers describe.

    support = I_a (x) 1_{b x c} (x) I_d,   K[i*b*d + k*d + j, i*c*d + l*d + j] = blocks[i, k, l, j]

Its free entries are a tensor `blocks` of shape (a, b, c, d): the shape is the pattern. a*d dense b x c products on
strided rows and columns, so y = K x costs 2abcd operations instead of 2(abd)(acd).
Source: Zheng, Riccietti, Gribonval, "Efficient identification of butterfly sparse matrix factorizations", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KSPattern:
    """Support I_a (x) 1_{b x c} (x) I_d of one Kronecker-sparse factor.

    Args:
        a: Super-blocks on the diagonal.
        b: Rows of a dense block.
        c: Columns of a dense block.
        d: Stride between the rows, and the columns, of a dense block.

    Raises:
        ValueError: if an entry is not a positive integer.
    """

    a: int
    b: int
    c: int
    d: int

    def __post_init__(self) -> None:
        for name in ("a", "b", "c", "d"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"KSPattern.{name} must be a positive integer, got {value!r}.")

    def __iter__(self) -> Iterator[int]:
        """Return an iterator over a, b, c, d, so that `torch.randn(*pattern)` works."""
        return iter((self.a, self.b, self.c, self.d))

    def __str__(self) -> str:
        return f"({self.a}, {self.b}, {self.c}, {self.d})"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.a * self.b * self.d, self.a * self.c * self.d

    @property
    def parameters(self) -> int:
        """Number of free entries, abcd."""
        return self.a * self.b * self.c * self.d

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product with a vector, 2abcd."""
        return 2 * self.parameters

    @property
    def density(self) -> float:
        """Share of entries that are free, 1/(ad)."""
        return 1 / (self.a * self.d)

    @property
    def transpose(self) -> KSPattern:
        """The pattern of the transposed matrix, (a, c, b, d)."""
        return KSPattern(self.a, self.c, self.b, self.d)

    def support(self) -> Tensor:
        """Return the support as a bool matrix (a*b*d, a*c*d)."""
        return to_dense(torch.ones(*self)) != 0


def to_dense(blocks: Tensor) -> Tensor:
    """Return the matrix (..., a*b*d, a*c*d) whose free entries are blocks (..., a, b, c, d)."""
    *stack, a, b, c, d = blocks.shape
    dense = blocks.new_zeros(*stack, a, b, d, a, c, d)
    dense.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-4, -2))
    return dense.reshape(*stack, a * b * d, a * c * d)


def from_dense(matrix: Tensor, pattern: KSPattern) -> Tensor:
    """Return the entries of a matrix that lie on the support of a pattern.

    Args:
        matrix: (..., a*b*d, a*c*d).
        pattern: Whose support is read; what lies outside is ignored.

    Returns:
        (..., a, b, c, d), a view where a = d = 1.

    Raises:
        ValueError: if the matrix does not have the shape of the pattern.
    """
    if tuple(matrix.shape[-2:]) != pattern.shape:
        raise ValueError(
            f"The pattern {pattern} describes matrices of shape {pattern.shape}, got one of {tuple(matrix.shape)}."
        )
    a, b, c, d = pattern
    apart = matrix.reshape(*matrix.shape[:-2], a, b, d, a, c, d)
    return apart.diagonal(dim1=-6, dim2=-3).diagonal(dim1=-4, dim2=-2).movedim(-2, -4)
