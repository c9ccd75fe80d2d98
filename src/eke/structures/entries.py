"""Sparse matrices that are multiplied as such: what `Unstructured` keeps, in a layer that skips the rest.

Members, projection and packed bytes are those of `Unstructured` (of `Both` with a grid). What differs is what a model
does with them: `compress` puts an `nn.SparseLinear` in the place of a linear layer or 1 x 1 convolution with such a
matrix, whose time is measured, where `Unstructured` saves bytes alone.
From some 70 % of zeros on that pays on CPUs (benchmarks/sparse_runtime.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .both import Both
from .grids import UniformGrid
from .sparse import Unstructured
from .structure import ColumnRule, Exactness


@dataclass(frozen=True)
class EntrySparse:
    """Matrices with a share of their entries anywhere, which run without the others.

    Args:
        density: Share of entries kept, in (0, 1]; at least one entry is.
        grid: Grid of at least 2 bits that kept entries are stored on; None stores them in float32.

    Raises:
        ValueError: if density is not in (0, 1].
        TypeError: if grid is no `UniformGrid`, or one without a level for 0.
    """

    density: float
    grid: UniformGrid | None = None

    def __post_init__(self) -> None:
        _ = self.stored

    def __repr__(self) -> str:
        return f"EntrySparse({self.density}" + (f", {self.grid})" if self.grid else ")")

    @property
    def stored(self) -> Unstructured | Both:
        """The structure with the same members, as which a matrix is packed."""
        entries = Unstructured(self.density)
        return entries if self.grid is None else Both(entries, self.grid)

    @property
    def exactness(self) -> Exactness:
        """Exact; heuristic with a grid, as support and grid are chosen one after the other."""
        return self.stored.exactness

    def kept(self, shape: tuple[int, int]) -> int:
        """Return round(density * m * n), at least 1."""
        return Unstructured(self.density).kept(shape)

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse, by ValueError, what is no shape of a matrix."""
        self.stored.check(shape)

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of a bitmap and the kept entries: 8 times the stored bytes."""
        return self.stored.bits(shape)

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the member near v (m, n) that keeps its largest entries, weighted by score (n,) or (m, n)."""
        return self.stored.project(v, score)

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the entries that the projection of v (m, n) may keep, bool (m, n)."""
        return self.stored.support(v, score)

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        """Return the rule that brings column j to the support of v, and to its grid."""
        return self.stored.by_columns(v, score)

    def encode(self, v: Tensor) -> Mapping[str, Tensor]:
        """Return bitmap and values (codes and scales with a grid) of a member v (m, n)."""
        return self.stored.encode(v)

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the float32 matrix (m, n) that was packed."""
        return self.stored.decode(packed, shape)
