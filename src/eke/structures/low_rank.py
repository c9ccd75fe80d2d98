"""Matrices of low rank: two thin factors instead of one matrix.

The truncated singular value decomposition is the closest one (Eckart & Young, "The approximation of one matrix by
another of lower rank", 1936). A score that is a product of one weight a row and one a column keeps it exact: scale,
truncate, scale back. Other scores make the problem NP-hard (Gillis & Glineur, 2011) and are refused.
Cost: one SVD, O(m n min(m, n)), in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .structure import Exactness, check_matrix, check_shape


@dataclass(frozen=True)
class LowRankPacked:
    """Two factors: the matrix is left @ right.

    Args:
        left: float32 (m, rank).
        right: float32 (rank, n).
    """

    left: Tensor
    right: Tensor

    @property
    def bytes(self) -> int:
        """Bytes of both factors."""
        return 4 * (self.left.numel() + self.right.numel())


@dataclass(frozen=True)
class LowRank:
    """Matrices of at most this rank.

    Args:
        rank: Largest rank, positive.

    Raises:
        ValueError: if rank is not positive.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LowRank needs a rank of at least 1, got {self.rank}.")

    @property
    def exactness(self) -> Exactness:
        """Exact, by Eckart and Young."""
        return "exact"

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse matrices smaller than the rank.

        Raises:
            ValueError: if the rank is above min(m, n).
        """
        check_shape(self, shape)
        if self.rank > min(shape):
            raise ValueError(f"{self} needs a matrix with min(m, n) >= {self.rank}, got {tuple(shape)}; use skip=.")

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of two float32 factors."""
        self.check(shape)
        return 32 * self.rank * (shape[0] + shape[1])

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the closest matrix of this rank.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors: (n,), or (m, n) of the form row weight * column weight.

        Returns:
            (m, n) in the dtype of v (float32 for half precision).

        Raises:
            ValueError: if the score is no product of row and column weights.
        """
        weights = check_matrix(self, v, score)
        self.check((v.shape[0], v.shape[1]))
        dtype = torch.promote_types(v.dtype, torch.float32)
        if weights is None:
            return truncate(v.double(), self.rank).to(dtype)
        weights = weights.double()
        peak = weights.max().clamp_min(torch.finfo(torch.float64).tiny)
        rows, columns = weights.sum(1), weights.sum(0)
        if float((torch.outer(rows, columns) / weights.sum().clamp_min(1e-300) - weights).abs().max()) > 1e-5 * peak:
            raise ValueError(
                f"{self} needs a score that is a row weight times a column weight; pass (n,) column weights."
            )
        # A weight of 0 leaves its row or column free; a small one keeps the scaling invertible.
        left, right = (w.clamp_min(1e-12 * float(w.max()) or 1.0).sqrt() for w in (rows, columns))
        scaled = truncate(left[:, None] * v.double() * right, self.rank)
        return (scaled / left[:, None] / right).to(dtype)

    def encode(self, v: Tensor) -> LowRankPacked:
        """Return the factors of the projection of v (m, n), singular values shared equally between them."""
        self.check((v.shape[0], v.shape[1]))
        u, s, vh = torch.linalg.svd(v.double(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return LowRankPacked((u[:, : self.rank] * root).float(), (root[:, None] * vh[: self.rank]).float())

    def decode(self, packed: LowRankPacked, shape: tuple[int, int]) -> Tensor:
        """Return left @ right.

        Args:
            packed: The factors.
            shape: (m, n) of the matrix.

        Returns:
            float32 (m, n); equal to what was encoded up to float32 rounding.

        Raises:
            ValueError: if the factors do not give this shape.
        """
        if (packed.left.shape[0], packed.right.shape[1]) != tuple(shape):
            raise ValueError(
                f"{self}.decode needs factors of a matrix {tuple(shape)}, got {tuple(packed.left.shape)} and "
                f"{tuple(packed.right.shape)}."
            )
        return packed.left @ packed.right


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """Return the closest matrix (m, n) of this rank in the Frobenius norm."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return nearest
