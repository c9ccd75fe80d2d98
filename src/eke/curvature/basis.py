"""Directions of output and input space, and the curvature of a change along each pair of them.

A factor of up to `WIDE` rows has all of its eigenvectors as directions. Of a wider one only the `LEADING` ones of
largest eigenvalue are kept, found by subspace iteration, and all that is orthogonal to them counts as one more,
with its mean second moment, measured like the others. So the trace is exact, a change that is spread evenly is priced
exactly, and cost and memory grow with LEADING (m + n) instead of m^2 + n^2.

Source: Halko, Martinsson, Tropp, "Finding structure with randomness", 2011 (subspace iteration). Cost of a wide factor:
3 n^2 LEADING multiply-adds and two orthogonalisations, n LEADING^2 each, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import MANY, WIDE

LEADING = 512
"""Directions of a wide factor that are told apart."""
_OVERSAMPLING, _ITERATIONS = 32, 2


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of output and input space, and the curvature along each pair of them.

    Where there are fewer directions than rows (columns), `moments` has one row (column) more: the mean curvature of all
    that is orthogonal to them.

    Args:
        g_vectors: (groups, m / groups, p), float64, or float32 where they are many.
        a_vectors: (groups, n, q), likewise.
        moments: (groups, p [+ 1], q [+ 1]), float64, curvature along g_vectors[:, :, i] a_vectors[:, :, j]^T.
    """

    g_vectors: Tensor
    a_vectors: Tensor
    moments: Tensor

    @property
    def rest(self) -> tuple[int, int]:
        """Dimensions of output and input space that no direction spans."""
        return tuple(v.shape[1] - v.shape[2] for v in (self.g_vectors, self.a_vectors))  # type: ignore[return-value]

    @property
    def sizes(self) -> Tensor:
        """How many pairs of directions each entry of `moments` stands for, float64, broadcastable to it."""
        ones = [self.moments.new_ones(size) for size in self.moments.shape[1:]]
        for line, rest in zip(ones, self.rest):
            if rest:
                line[-1] = rest
        return ones[0][:, None] * ones[1]

    def rotate(self, blocks: Tensor) -> Tensor:
        """Return U_G^T D U_A of (..., groups, m / groups, n), in the dtype of the blocks."""
        return self.g_vectors.mT.to(blocks.dtype) @ blocks @ self.a_vectors.to(blocks.dtype)

    def energies(self, blocks: Tensor) -> Tensor:
        """Return the squares of changes (groups, m / groups, n) along each pair of directions, in the shape of moments,
        float64; what is orthogonal to the directions is summed.
        """  # noqa: D205
        if not any(self.rest):
            several = torch.float32 in (self.g_vectors.dtype, self.a_vectors.dtype)
            return self.rotate(blocks.to(torch.float32 if several else torch.float64)).double().square_()
        blocks = blocks.to(torch.float32)
        turned_g, turned_a = self.g_vectors.mT.to(blocks.dtype), self.a_vectors.to(blocks.dtype)
        right = blocks @ turned_a
        inside = (turned_g @ right).double().square_()
        # Along directions that span everything, squares sum to the whole.
        rows = (turned_g @ blocks).double().square_().sum(2) if self.rest[1] else inside.sum(2)
        columns = right.double().square_().sum(1) if self.rest[0] else inside.sum(1)
        return gathered(inside, rows, columns, blocks.double().square_().sum((1, 2)), self.rest)

    def diagonal(self) -> Tensor:
        """Return the curvature (groups, m / groups, n) of each entry of the matrix on its own."""
        shares = []
        for vectors, rest in zip((self.g_vectors, self.a_vectors), self.rest):
            squares = vectors.double().square()
            if rest:
                # The part of an entry's direction that none spans.
                outside = (1 - squares.sum(2, keepdim=True)).clamp_min_(0)
                squares = torch.cat([squares, outside], 2)
            shares.append(squares)
        return shares[0] @ self.moments @ shares[1].mT

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        """Return (curvature + damping I)^-1 applied to a gradient.

        Args:
            gradient: (m, n).
            damping: Positive, in units of the curvature.

        Returns:
            (m, n) in the dtype of the gradient.

        Raises:
            ValueError: if damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}.")
        g, a = self.g_vectors.double(), self.a_vectors.double()
        blocks = gradient.reshape(g.shape[0], g.shape[1], a.shape[1]).double()
        return solved(g, a, 1 / (self.moments + damping), blocks).reshape(gradient.shape).to(gradient.dtype)

    def mv(self, delta: Tensor) -> Tensor:
        """Return the curvature applied to a change (m, n), in its dtype."""
        g, a = self.g_vectors.double(), self.a_vectors.double()
        blocks = delta.reshape(g.shape[0], g.shape[1], a.shape[1]).double()
        return solved(g, a, self.moments, blocks).reshape(delta.shape).to(delta.dtype)

    def trace(self) -> float:
        """Return the sum of all eigenvalues."""
        return float((self.moments * self.sizes).sum())

    def logdet(self, damping: float) -> float:
        """Return the logarithm of the determinant of curvature + damping I.

        Raises:
            ValueError: if damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}.")
        return float(((self.moments + damping).log() * self.sizes).sum())

    def dense(self) -> Tensor:
        """Return the whole matrix (m n, m n), float64, rows and columns in the order of the flattened matrix.

        Raises:
            ValueError: if it has more than 2^26 entries.
        """
        m, n = self.g_vectors.shape[0] * self.g_vectors.shape[1], self.a_vectors.shape[1]
        if (m * n) ** 2 > 1 << 26:
            raise ValueError(f"dense is for small matrices; {m} x {n} would take {(m * n) ** 2} entries: use mv.")
        units = torch.eye(m * n, dtype=torch.float64, device=self.moments.device).reshape(-1, m, n)
        return torch.stack([self.mv(unit).flatten() for unit in units])


def solved(g: Tensor | None, a: Tensor | None, factors: Tensor, blocks: Tensor) -> Tensor:
    """Return the matrix with eigenvalues `factors` along pairs of directions, applied to blocks.

    Args:
        g: (groups, m, p), orthonormal columns; None for the unit vectors.
        a: (groups, n, q), likewise.
        factors: (groups, p [+ 1], q [+ 1]); what no direction spans has the last row (column).
        blocks: (groups, m, n).

    Returns:
        (groups, m, n). Cost: m n (p + q) multiply-adds, twice.
    """
    p, q = (blocks.shape[1] if g is None else g.shape[2]), (blocks.shape[2] if a is None else a.shape[2])
    below, beside = factors.shape[1] > p, factors.shape[2] > q
    left = blocks if g is None else g.mT @ blocks
    right = blocks if a is None or not below else blocks @ a
    inside = left if a is None else left @ a
    # What no direction spans has a factor of its own; along the others it is corrected to theirs.
    low, side = factors[:, p:, :q], factors[:, :p, q:]
    weight = factors[:, :p, :q]
    if below:
        weight = weight - low
    if beside:
        weight = weight - side
    both = factors[:, p:, q:]
    if below and beside:
        weight = weight + both
    inside = inside * weight
    if not below:
        # Nothing is left out below: the sum is turned back once.
        whole = inside if a is None else inside @ a.mT
        return _times(g, whole.addcmul_(side, left) if beside else whole)
    found = _times(g, inside).addcmul_(low - both if beside else low, right)
    found = found if a is None else found @ a.mT
    if beside and g is not None:
        found.baddbmm_(g, (side - both) * left).addcmul_(both, blocks)
    return found


def _times(g: Tensor | None, inside: Tensor) -> Tensor:
    return inside if g is None else g @ inside


def gathered(inside: Tensor, rows: Tensor, columns: Tensor, total: Tensor, rest: tuple[int, int]) -> Tensor:
    """Return squares along all pairs of directions, with what is orthogonal to them in a last row and column.

    Args:
        inside: (..., p, q), squares along pairs of directions.
        rows: (..., p), squares along the first directions, whatever the second.
        columns: (..., q), the other way round.
        total: (...), all squares.
        rest: Dimensions that the first and the second directions do not span.

    Returns:
        (..., p [+ 1], q [+ 1]), not below 0.
    """
    found = inside
    if rest[1]:
        found = torch.cat([found, (rows - inside.sum(-1))[..., None]], -1)
    if rest[0]:
        below = columns - inside.sum(-2)
        if rest[1]:
            below = torch.cat([below, (total - rows.sum(-1) - below.sum(-1))[..., None]], -1)
        found = torch.cat([found, below[..., None, :]], -2)
    return found.clamp_min(0)


def directions(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of second moments: all, or the leading ones of a wide factor.

    Args:
        moment: (groups, n, n), symmetric positive semidefinite.

    Returns:
        Values (groups, q) and, with the mean of all others as the last, (groups, q + 1); vectors (groups, n, q).
    """
    n = moment.shape[1]
    if n <= WIDE:
        values, vectors = torch.linalg.eigh(moment.double())
        return values.clamp_min_(0), vectors.to(torch.float32 if n * n > MANY else torch.float64).contiguous()
    trace = moment.diagonal(dim1=1, dim2=2).double().sum(1)
    # With a mean eigenvalue of 1 nothing under- or overflows in float32.
    level = trace / n
    moment = moment.float() / torch.where(level > 0, level, torch.ones_like(level))[:, None, None].float()
    generator = torch.Generator(device=moment.device).manual_seed(0)
    shape = (moment.shape[0], n, LEADING + _OVERSAMPLING)
    vectors = torch.randn(shape, generator=generator, device=moment.device)
    for _ in range(_ITERATIONS):
        vectors = torch.linalg.qr(moment @ vectors)[0]
    values, turned = torch.linalg.eigh((vectors.mT @ (moment @ vectors)).double())
    values = level[:, None] * values[:, -LEADING:].clamp_min(0)
    vectors = vectors @ turned[:, :, -LEADING:].float()
    others = (trace - values.sum(1)).clamp_min(0) / (n - LEADING)
    return torch.cat([values, others[:, None]], 1), vectors
