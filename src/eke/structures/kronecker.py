"""Products of Kronecker-sparse factors: butterflies, Monarch matrices and everything between them and low rank.

The projection is `linalg.factorize` from left to right, which comes within sqrt(L - 1) of the least distance for L
factors without redundancy (Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees", 2025);
with one or two factors it is exact. A score that is a row weight times a column weight keeps the set: scale, project,
scale back. Cost: O(m n) for a butterfly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import factorize
from ..linalg.factorization import product
from ..patterns import Chain, to_dense
from .low_rank import separable
from .structure import Exactness, check_matrix, check_shape


@dataclass(frozen=True, repr=False)
class KroneckerSparse:
    """Products of factors with the patterns of a chain, kept in float32.

    Args:
        chain: Ascending or descending; it fits matrices of its own shape only.

    Raises:
        ValueError: if the chain is not chainable.
    """

    chain: Chain

    def __post_init__(self) -> None:
        _ = self.chain.direction

    def __repr__(self) -> str:
        return f"KroneckerSparse({self.chain})"

    @property
    def exactness(self) -> Exactness:
        """Within sqrt(L - 1) of the least distance, L counted without redundant pairs; exact for L <= 2."""
        factors = len(self.chain.reduce()[0])
        return "exact" if factors <= 2 else math.sqrt(factors - 1)

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse matrices of another shape.

        Raises:
            ValueError: if the shape is not the chain's.
        """
        check_shape(self, shape)
        if tuple(shape) != self.chain.shape:
            raise ValueError(f"{self} holds matrices of shape {self.chain.shape}, got {tuple(shape)}; use skip=.")

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of the factors in float32: 8 times the stored bytes."""
        self.check(shape)
        return 32 * self.chain.parameters

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return a product near v.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors: (n,), or (m, n) of the form row weight * column weight.

        Returns:
            (m, n) in the dtype of v (float32 for half precision). Other scores than such products raise ValueError.
        """
        check_matrix(self, v, score)
        self.check((v.shape[0], v.shape[1]))
        dtype = torch.promote_types(v.dtype, torch.float32)
        if score is None:
            return factorize(v.double(), self.chain).to_dense().to(dtype)
        left, right = separable(self, score.double().expand_as(v))
        scaled = factorize(left[:, None] * v.double() * right, self.chain).to_dense()
        return (scaled / left[:, None] / right).to(dtype)

    def encode(self, v: Tensor) -> Mapping[str, Tensor]:
        """Return the factors (a, b, c, d) of a member v (m, n) in float32, named by their place in the chain."""
        check_matrix(self, v, None)
        self.check((v.shape[0], v.shape[1]))
        return {str(i): block.float() for i, block in enumerate(factorize(v.double(), self.chain).blocks)}

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the member from its factors.

        Args:
            packed: What `encode` returned.
            shape: (m, n) of the matrix.

        Returns:
            float32 (m, n); equal to what was encoded up to float32 rounding.

        Raises:
            ValueError: if the factors are not those of the chain.
        """
        self.check(shape)
        blocks = [packed[str(i)] for i in range(len(self.chain))]
        for block, pattern in zip(blocks, self.chain):
            if tuple(block.shape) != tuple(pattern):
                raise ValueError(f"{self}.decode needs a factor of shape {tuple(pattern)}, got {tuple(block.shape)}.")
        return to_dense(product(self.chain, blocks))
