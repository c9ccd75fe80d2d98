"""Matrices of low rank: two thin factors instead of one matrix.

The truncated singular value decomposition is the closest one (Eckart & Young, "The approximation of one matrix by
another of lower rank", 1936). A score that is a product of one weight a row and one a column keeps it exact: scale,
truncate, scale back. Other scores make the problem NP-hard (Gillis & Glineur, 2011) and are refused.
Cost: one SVD, O(m n min(m, n)), in float64; above 256 rows and columns the eigenvectors of the smaller Gram matrix
take its place, ten times as fast: what they lose, singular values below 1e-8 of the largest, float32 cannot hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import UniformGrid
from .structure import Exactness, check_matrix, check_shape

_SMALL = 256


@dataclass(frozen=True, repr=False)
class LowRank:
    """Matrices of at most this rank, as two factors, which may lie on a grid.

    Args:
        rank: Largest rank: a positive whole number, or a share in (0, 1) of min(m, n), at least 1.
        grid: Grid of both factors; None keeps them in float32.

    Raises:
        ValueError: if rank is out of range.
        TypeError: if grid is no `UniformGrid`.
    """

    rank: int | float
    grid: UniformGrid | None = None

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and not isinstance(self.rank, bool)
        if not (self.rank >= 1 if whole else 0 < self.rank < 1):
            raise ValueError(f"LowRank needs a rank of at least 1 or a share in (0, 1), got {self.rank}.")
        if self.grid is not None and not isinstance(self.grid, UniformGrid):
            raise TypeError(f"LowRank keeps its factors on a UniformGrid or in float32, got {self.grid!r}.")

    def __repr__(self) -> str:
        return f"LowRank(rank={self.rank}" + (f", grid={self.grid})" if self.grid else ")")

    @property
    def exactness(self) -> Exactness:
        """Exact, by Eckart and Young; heuristic with factors on a grid, which are rounded one after the other."""
        return "exact" if self.grid is None else "heuristic"

    def rank_of(self, shape: tuple[int, int]) -> int:
        """Return the rank as a whole number for a matrix of this shape."""
        return self.rank if isinstance(self.rank, int) else max(1, round(self.rank * min(shape)))

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse matrices smaller than the rank.

        Raises:
            ValueError: if the rank is above min(m, n).
        """
        check_shape(self, shape)
        if self.rank_of(shape) > min(shape):
            raise ValueError(f"{self} needs a matrix with min(m, n) >= {self.rank}, got {tuple(shape)}; use skip=.")

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of the two factors: 8 times the stored bytes."""
        self.check(shape)
        rank = self.rank_of(shape)
        if self.grid is None:
            return 32 * rank * (shape[0] + shape[1])
        return self.grid.bits((shape[0], rank)) + self.grid.bits((rank, shape[1]))

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the closest matrix of this rank; with a grid, the product of its rounded factors.

        With a grid it is not idempotent: a product of rounded factors has other factors as well.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors: (n,), or (m, n) of the form row weight * column weight.

        Returns:
            (m, n) in the dtype of v (float32 for half precision). Other scores than such products raise ValueError.
        """
        check_matrix(self, v, score)
        shape = (v.shape[0], v.shape[1])
        self.check(shape)
        dtype = torch.promote_types(v.dtype, torch.float32)
        weights = None if score is None else score.double().expand_as(v)
        if self.grid is None:
            return self._nearest(v.double(), weights).to(dtype)
        # Without weights, the factors of the nearest matrix are those of v itself.
        left, right = self.factors(v if weights is None else self._nearest(v.double(), weights))
        return (self.grid.project(left.float()).double() @ self.grid.project(right.float()).double()).to(dtype)

    def _nearest(self, v: Tensor, weights: Tensor | None) -> Tensor:
        rank = self.rank_of((v.shape[0], v.shape[1]))
        if weights is None:
            return truncate(v, rank)
        left, right = separable(self, weights)
        return truncate(left[:, None] * v * right, rank) / left[:, None] / right

    def factors(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (m, rank) and (rank, n) of the projection of v (m, n), not rounded, in float64.

        Singular values are shared equally between them.
        """
        rank = self.rank_of((v.shape[0], v.shape[1]))
        left, right = leading(v.double(), rank)
        # One of the two has orthonormal vectors, the lengths of the other's are the singular values.
        root = (left.norm(dim=0) * right.norm(dim=1)).sqrt()
        share = root / torch.where(root > 0, root.square(), torch.ones_like(root))
        if left.shape[0] > right.shape[1]:
            return left * share, right * root[:, None]
        return left * root, right * share[:, None]

    def encode(self, v: Tensor) -> dict[str, Tensor]:
        """Return both factors of the projection of v (m, n): float32, or codes and scales of each."""
        self.check((v.shape[0], v.shape[1]))
        both = dict(zip(("left", "right"), (factor.float() for factor in self.factors(v))))
        if self.grid is None:
            return both
        return {f"{side}.{part}": x for side, f in both.items() for part, x in self.grid.encode(f).items()}

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return left @ right.

        Args:
            packed: The factors.
            shape: (m, n) of the matrix.

        Returns:
            float32 (m, n); equal to what was encoded up to float32 rounding.

        Raises:
            ValueError: if the factors do not give this shape.
        """
        rank = self.rank_of(shape)
        shapes = {"left": (shape[0], rank), "right": (rank, shape[1])}
        if self.grid is None:
            found = {side: packed[side] for side in shapes}
        else:
            parts = {side: {part: packed[f"{side}.{part}"] for part in ("codes", "scales")} for side in shapes}
            found = {side: self.grid.decode(parts[side], shapes[side]) for side in shapes}
        if any(tuple(found[side].shape) != shapes[side] for side in shapes):
            raise ValueError(
                f"{self}.decode needs factors of a matrix {tuple(shape)}, got {tuple(found['left'].shape)} and "
                f"{tuple(found['right'].shape)}."
            )
        return found["left"] @ found["right"]


def separable(structure: object, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return positive scales of rows (m,) and columns (n,) whose products have weights (m, n) as their squares.

    Args:
        structure: Named in the message.
        weights: A row weight times a column weight, float64; only ratios count.

    Returns:
        The scales, in a ratio to the true ones that is the same for all entries.

    Raises:
        ValueError: if the weights are no such product.
    """
    # With a peak of 1 no product of them over- or underflows.
    weights = weights / (float(weights.max()) or 1.0)
    rows, columns = weights.sum(1), weights.sum(0)
    if float((torch.outer(rows, columns) / (float(weights.sum()) or 1.0) - weights).abs().max()) > 1e-5:
        raise ValueError(
            f"{structure} needs a score that is a row weight times a column weight, got {tuple(weights.shape)} others; "
            "pass (n,) column weights."
        )
    # A weight of 0 leaves its row or column free; a small one keeps the scaling invertible.
    left, right = (w.clamp_min(1e-12 * float(w.max()) or 1.0).sqrt() for w in (rows, columns))
    return left, right


def truncate(matrix: Tensor, rank: int) -> Tensor:
    """Return the closest matrix (m, n) of this rank in the Frobenius norm."""
    left, right = leading(matrix, rank)
    nearest: Tensor = left @ right
    return nearest


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors of the closest matrix of a rank.

    Args:
        matrix: (m, n), float64.
        rank: At most min(m, n).

    Returns:
        (m, rank) and (rank, n), larger singular values first: those of a smaller rank are the first of these. That of
        the smaller side has orthonormal vectors, the other holds the singular values.
    """
    rows, columns = matrix.shape
    if min(rows, columns) <= _SMALL:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        if rows > columns:
            return u[:, :rank] * s[:rank], vh[:rank]
        return u[:, :rank], s[:rank, None] * vh[:rank]
    if rows > columns:
        right, left = leading(matrix.mT, rank)
        return left.mT, right.mT
    vectors = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)[:, :rank]
    return vectors, vectors.mT @ matrix
