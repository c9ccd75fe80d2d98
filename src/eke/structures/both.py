"""Two structures at once: a sparse support whose entries lie on a grid.

`project` chooses the support first and the grid for what is left of it, which is near the closest member but not
proved to be: heuristic. Stored are the packed support, the codes of kept entries only, and the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .grids import UniformGrid
from .packing import packed_bytes
from .sparse import NM, Rows, Unstructured
from .structure import ColumnRule, Exactness


@dataclass(frozen=True)
class Both:
    """Matrices with the support of one structure and the values of another.

    Args:
        first: `Unstructured`, `NM` or `Rows`.
        second: `UniformGrid` of at least 2 bits (one bit has no level for 0).

    Raises:
        TypeError: if the two do not compose.
    """

    first: Unstructured | NM | Rows
    second: UniformGrid

    def __post_init__(self) -> None:
        if not isinstance(self.first, Unstructured | NM | Rows) or not isinstance(self.second, UniformGrid):
            raise TypeError(
                f"Both composes Unstructured, NM or Rows with a UniformGrid, got {self.first}, {self.second}; for "
                "factors on a grid write LowRank(rank, UniformGrid(bits))."
            )
        if self.second.code_bits == 1:
            raise TypeError(f"Both needs a grid with a level for 0: at least 2 bits, got {self.second}.")

    @property
    def exactness(self) -> Exactness:
        """Heuristic: support and grid are chosen one after the other."""
        return "heuristic"

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse, by ValueError, a shape that one of the two refuses."""
        self.first.check(shape)
        self.second.check(shape)

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of support, codes of kept entries and scales: 8 times the stored bytes."""
        self.check(shape)
        codes = packed_bytes(self.first.kept(shape), self.second.code_bits)
        scales = 4 * shape[0] * self.second.groups(shape[1])
        return 8 * (self.first.support_bytes(shape) + codes + scales)

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return a member near v.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors, (n,) or (m, n).

        Returns:
            (m, n) in the dtype of v (float32 for half precision).
        """
        return self.second.project(self.first.project(v, score), score)

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the entries that the projection of v may keep, bool (m, n)."""
        return self.first.support(v, score)

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        """Return the rule that rounds column j on the support of v to the grid that suits it."""
        support = self.first.support(v, score)
        rule = self.second.by_columns(torch.where(support, v, torch.zeros_like(v)), score)
        columns = support.T.contiguous()
        return lambda column, j: rule(column * columns[j], j)

    def encode(self, v: Tensor) -> dict[str, Tensor]:
        """Return v projected and packed: support, codes of kept entries row by row, scales; a member loses nothing."""
        support = self.first.support(v)
        codes, scales = self.second.quantize(torch.where(support, v, torch.zeros_like(v)))
        packed = self.second.pack_codes(codes[support])
        return {"support": self.first.encode_support(support), "codes": packed, "scales": scales}

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the float32 matrix (m, n) that was packed."""
        support = self.first.decode_support(packed["support"], shape)
        codes = torch.zeros(shape, dtype=torch.int8, device=support.device)
        codes[support] = self.second.unpack_codes(packed["codes"], self.first.kept(shape))
        return self.second.dequantize(codes, packed["scales"])
