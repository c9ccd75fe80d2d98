"""The product of two Kronecker-sparse factors: exact best approximation, block by block.

With r = a_1 c_1 / a_2, s = d_1 / d_2, t = a_2 / a_1, the values of the product pattern (a_1, b_1 s, t c_2, d_2) are
a_2 d_1 independent blocks b_1 x c_2, and X_1 X_2 can have any blocks of rank at most r: the best approximation is the
truncated singular value decomposition of each. One factor gets orthonormal vectors, the other carries the values.
Only the leading vectors of one side are needed, so they come from the smaller Gram matrix (for two rows and r = 1 in
closed form); where squaring would lose digits that the result has, from the decomposition itself (`_gram_is_safe`).
Source: Le, Zheng, Riccietti, Gribonval, "Spurious valleys, NP-hardness, and tractability of sparse matrix
factorization with fixed support", 2023. Cost: O(b_1 c_2 min(b_1, c_2)) for each block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops.pair_splits import leading_of_two, pair_splits
from ..patterns import KSPattern

Side = Literal["left", "right", "both"]
"""Which factor gets orthonormal vectors; "both" shares the singular values equally."""

_PIECE = 2**15
"""Entries from which a piece of blocks is worth a step of its own."""


class Interface(NamedTuple):
    """The integers of one pair of neighbours: how their entries form blocks."""

    left: KSPattern
    right: KSPattern
    r: int
    s: int
    t: int

    @classmethod
    def between(cls, left: KSPattern, right: KSPattern) -> Interface:
        """Return the interface of two ascending chainable patterns."""
        return cls(left, right, left.a * left.c // right.a, left.d // right.d, right.a // left.a)

    def blocks(self, values: Tensor) -> Tensor:
        """Return values (..., a1, b1*s, t*c2, d2) of the product as blocks (..., a1, t, s, d2, b1, c2)."""
        apart = values.reshape(*values.shape[:-4], self.left.a, self.left.b, self.s, self.t, self.right.c, self.right.d)
        return apart.movedim((-3, -4, -1, -5, -2), (-5, -4, -3, -2, -1))

    def values(self, blocks: Tensor) -> Tensor:
        """Return blocks (..., a1, t, s, d2, b1, c2) as values (..., a1, b1*s, t*c2, d2) of the product."""
        apart = blocks.movedim((-5, -4, -3, -2, -1), (-3, -4, -1, -5, -2))
        return apart.reshape(*blocks.shape[:-6], self.left.a, self.left.b * self.s, self.t * self.right.c, self.right.d)

    def left_blocks(self, values: Tensor) -> Tensor:
        """Return the left factor's values (..., a1, b1, c1, d1) as blocks (..., a1, t, s, d2, b1, r)."""
        apart = values.reshape(*values.shape[:-4], self.left.a, self.left.b, self.t, self.r, self.s, self.right.d)
        return apart.movedim((-4, -2, -1, -5, -3), (-5, -4, -3, -2, -1))

    def left_values(self, blocks: Tensor) -> Tensor:
        """Return blocks (..., a1, t, s, d2, b1, r) as the left factor's values (..., a1, b1, c1, d1)."""
        apart = blocks.movedim((-5, -4, -3, -2, -1), (-4, -2, -1, -5, -3))
        return apart.reshape(*blocks.shape[:-6], *self.left)

    def right_blocks(self, values: Tensor) -> Tensor:
        """Return the right factor's values (..., a2, b2, c2, d2) as blocks (..., a1, t, s, d2, r, c2)."""
        apart = values.reshape(*values.shape[:-4], self.left.a, self.t, self.r, self.s, self.right.c, self.right.d)
        return apart.movedim((-3, -1, -4, -2), (-4, -3, -2, -1))

    def right_values(self, blocks: Tensor) -> Tensor:
        """Return blocks (..., a1, t, s, d2, r, c2) as the right factor's values (..., a2, b2, c2, d2)."""
        apart = blocks.movedim((-4, -3, -2, -1), (-3, -1, -4, -2))
        return apart.reshape(*blocks.shape[:-6], *self.right)


def split(values: Tensor, interface: Interface, side: Side) -> tuple[Tensor, Tensor]:
    """Return the best two factors for the values of a product pattern.

    Args:
        values: (..., a1, b1*s, t*c2, d2), float64 or complex128.
        interface: The pair.
        side: Which factor gets orthonormal vectors.

    Returns:
        Values (..., a1, b1, c1, d1) and (..., a2, b2, c2, d2) of the factors.
    """
    stack, blocks = values.shape[:-4], interface.blocks(values)
    left, right = values.new_empty(*stack, *interface.left), values.new_empty(*stack, *interface.right)
    u, v = interface.left_blocks(left), interface.right_blocks(right)
    if side == "right":
        # B^T = U V gives B = V^T U^T without a conjugation.
        _leading(blocks.mT, v.mT, u.mT)
    else:
        _leading(blocks, u, v)
    if side == "both":
        root = torch.linalg.vector_norm(v, dim=-1).sqrt()
        u *= root[..., None, :]
        v /= root.masked_fill(root == 0, 1.0)[..., None]
    return left, right


def split_pairs(values: Tensor, patterns: Sequence[KSPattern]) -> list[Tensor]:
    """Return what `split` gives when one factor after the other is split off on the left, with side "left".

    Args:
        values: (..., a, m, c, 1) of a product that begins with the patterns, float64 or complex128.
        patterns: The factors to split off, each with b = 2 and rank 1, and the one that follows.

    Returns:
        The values of these factors and those of the product of all others.
    """
    stack = values.shape[:-4]
    pieces = [right.a // left.a for left, right in itertools.pairwise(patterns)]
    rows = values.reshape(math.prod(values.shape[:-3]), *values.shape[-3:-1])
    vectors, rest = pair_splits(rows.resolve_conj().resolve_neg().contiguous(), pieces)
    factors = [found.view(*stack, *pattern) for found, pattern in zip(vectors, patterns)]
    return [*factors, rest.view(*stack, patterns[-1].a, *rest.shape[1:], 1)]


def multiply(left: Tensor, right: Tensor, interface: Interface) -> Tensor:
    """Return the values (..., a1, b1*s, t*c2, d2) of the product of two factors given by their values."""
    return interface.values(interface.left_blocks(left) @ interface.right_blocks(right))


def _leading(blocks: Tensor, u: Tensor, v: Tensor) -> None:
    """Fill in U with orthonormal columns and V = U^H B such that U V is the best approximation of its rank.

    Args:
        blocks: B, (..., b, c), float64 or complex128.
        u: U, (..., b, rank), is overwritten.
        v: V, (..., rank, c), is overwritten; its rows are orthogonal up to rounding, larger ones first.
    """
    (rows, cols), rank = blocks.shape[-2:], u.shape[-1]
    if rank == 1 and rows == 2:
        # Parts that stay in the cache: in one piece the time goes into memory that is seen for the first time.
        dim = max(range(blocks.ndim - 2), key=lambda i: blocks.shape[i])
        size = max(1, 2 * _PIECE * blocks.shape[dim] // max(1, blocks.numel()))
        for part in zip(*(torch.split(whole, size, dim) for whole in (blocks, u, v))):
            _leading_of_two(*part)
        return
    if blocks.ndim > 4 and blocks.numel() >= _PIECE * blocks.shape[0]:
        # Large pieces of the leading dimensions are multiplied where they lie; all at once they would be copied first.
        for piece in zip(blocks, u, v):
            _leading(*piece)
        return
    if rank == 1 and _is_rank_one(blocks, u, v):
        return
    wide = rows <= cols
    gram = blocks @ blocks.mH if wide else blocks.mH @ blocks
    energies, vectors = torch.linalg.eigh(gram)
    if not _gram_is_safe(energies, rank):
        left, sigma, right = torch.linalg.svd(blocks, full_matrices=False)
        u.copy_(left[..., :rank])
        v.copy_(sigma[..., :rank, None] * right[..., :rank, :])
        return
    chosen = vectors[..., -rank:].flip(-1)
    u.copy_(chosen if wide else _orthonormal(blocks @ chosen)[0])
    v.copy_(u.mH @ blocks)


def _leading_of_two(blocks: Tensor, u: Tensor, v: Tensor) -> None:
    """Do `_leading` in rank 1 for blocks (..., 2, c)."""
    x, y = blocks.unbind(-2)
    top, bottom = leading_of_two(_energy(x), _energy(y), torch.linalg.vecdot(y, x))
    u[..., 0, 0], u[..., 1, 0] = top, bottom
    out = v[..., 0, :]
    torch.mul(x, top.conj()[..., None], out=out)
    out.addcmul_(y, bottom.conj()[..., None])


def _is_rank_one(blocks: Tensor, u: Tensor, v: Tensor) -> bool:
    """Return whether all blocks have rank 1 up to rounding, and fill in U and V as `_leading` does if they have.

    From the row of largest norm, one step of the power method: its angle to the leading vector, at most the ratio
    3e-7 of the first two singular values that the test allows, is multiplied by the square of that ratio.
    """
    energies = _energy(blocks)
    largest = energies.argmax(-1)[..., None, None].expand(*blocks.shape[:-2], 1, blocks.shape[-1])
    first, _ = _orthonormal(blocks @ blocks.gather(-2, largest).mH)
    u.copy_(first)
    v.copy_(first.mH @ blocks)
    whole = energies.sum(-1)
    return bool((whole - _energy(v[..., 0, :]) <= 1e-13 * whole).all())


def _energy(x: Tensor) -> Tensor:
    """Return the squared norm of the last dimension."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(-2)
    energy: Tensor = torch.linalg.vecdot(x, x)
    return energy


def _gram_is_safe(energies: Tensor, rank: int) -> bool:
    """Return whether eigenvectors of the Gram matrices are as good as singular vectors.

    Rounding turns an eigenvector of energy l_i towards one of energy l_j by eps l_1 / (l_i - l_j), which adds
    eps^2 l_1^2 / (l_i - l_j) to the squared error, never more than l_i - l_j. That is compared with the rounding of
    the values themselves and with the error that is there anyway, for each matrix of a stack by itself.

    Args:
        energies: Eigenvalues (..., a1, t, s, d2, k) in ascending order, or those of a piece of one matrix.
        rank: How many of them are kept.
    """
    if rank == 1 or rank == energies.shape[-1]:
        return True
    eps = torch.finfo(energies.dtype).eps
    top, last, dropped = energies[..., -1], energies[..., -rank], energies[..., -rank - 1]
    gap = last - dropped
    added = torch.minimum((eps * top).square() / gap.clamp_min(torch.finfo(gap.dtype).tiny), eps * top)
    whole, lost = energies.clamp_min(0).sum(-1), energies[..., :-rank].clamp_min(0).sum(-1)
    one = tuple(range(-min(4, added.ndim), 0))
    added, whole, lost = (part.sum(one) if one else part for part in (added, whole, lost))
    return bool((added <= (4 * eps) ** 2 * whole + 1e-12 * lost).all())


def _orthonormal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q, R of matrices (..., m, k) with k <= m; one column is divided by its norm, which is faster."""
    if matrix.shape[-1] > 1:
        q, r = torch.linalg.qr(matrix)
        return q, r
    norm = torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    zero = norm == 0
    q = matrix / norm.masked_fill(zero, 1.0)
    first = torch.zeros_like(q)
    first[..., 0, :] = 1.0
    return torch.where(zero, first, q), norm.to(matrix.dtype)


def shift_right(left: Tensor, right: Tensor, interface: Interface) -> tuple[Tensor, Tensor]:
    """Return two factors with the same product, the left one with orthonormal blocks."""
    q, r = _orthonormal(interface.left_blocks(left))
    return interface.left_values(q), interface.right_values(r @ interface.right_blocks(right))


def shift_left(left: Tensor, right: Tensor, interface: Interface) -> tuple[Tensor, Tensor]:
    """Return two factors with the same product, the right one with orthonormal blocks."""
    q, r = _orthonormal(interface.right_blocks(right).mH)
    return interface.left_values(interface.left_blocks(left) @ r.mH), interface.right_values(q.mH)


def onto_left(values: Tensor, left: Tensor, interface: Interface) -> Tensor:
    """Return the best right factor of a product when the left one is fixed and has orthonormal blocks."""
    return interface.right_values(interface.left_blocks(left).mH @ interface.blocks(values))


def onto_right(values: Tensor, right: Tensor, interface: Interface) -> Tensor:
    """Return the best left factor of a product when the right one is fixed and has orthonormal blocks."""
    return interface.left_values(interface.blocks(values) @ interface.right_blocks(right).mH)


def expand(values: Tensor, interface: Interface) -> tuple[Tensor, Tensor]:
    """Return two factors of a redundant pair with exactly this product: one of them an identity, padded with zeros.

    Args:
        values: (..., a1, b1*s, t*c2, d2) of the product.
        interface: A pair with r >= min(b1, c2).

    Returns:
        Values of both factors, equal to the given ones or 0 or 1.
    """
    blocks = interface.blocks(values)
    rows, cols = blocks.shape[-2:]
    left = blocks.new_zeros(*blocks.shape[:-1], interface.r)
    right = blocks.new_zeros(*blocks.shape[:-2], interface.r, cols)
    if interface.r >= rows:
        left[..., :rows].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        right[..., :rows, :] = blocks
    else:
        left[..., :cols] = blocks
        right[..., :cols, :].diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return interface.left_values(left), interface.right_values(right)
