"""Sparse matrices: which entries may differ from zero.

Each projection keeps the entries (or rows) with the largest sum of score * v**2, which is exactly the closest member:
the distance is the sum over what is dropped. Ties keep the earlier entry. Values are stored in float32 beside the
support: a bitmap for `Unstructured`, the places in each group for `NM` (ceil(log2 m) bits each, as sparse tensor cores
read them), a bitmap of rows for `Rows`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .packing import pack, packed_bytes, unpack
from .structure import ColumnRule, Exactness, check_matrix, check_shape

_SHORT = 512
"""Entries of a line that are sorted; of a longer one the least that stays is selected."""


class Sparse(Protocol):
    """A structure that is a choice of entries: what follows from its support."""

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the entries that the projection of v keeps, bool (m, n)."""
        ...

    def kept(self, shape: tuple[int, int]) -> int:
        """Return how many entries a member stores."""
        ...

    def support_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of the packed support."""
        ...

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse, by ValueError, a shape that no member has."""
        check_shape(self, shape)

    def encode_support(self, support: Tensor) -> Tensor:
        """Return the support as packed bytes, uint8."""
        ...

    def decode_support(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the support (m, n) of packed bytes."""
        ...

    @property
    def exactness(self) -> Exactness:
        """Exact: what is dropped is the least possible."""
        return "exact"

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the closest member to v (m, n), in its dtype.

        Args:
            v: Matrix (m, n).
            score: Weights of the squared errors, (n,) or (m, n).

        Returns:
            v with all entries outside the support set to 0.
        """
        return torch.where(self.support(v, score), v, torch.zeros_like(v))

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        """Return the rule that sets column j to 0 outside the support of v's projection."""
        support = self.support(v, score)
        return lambda column, j: column * support[:, j]

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of packed support and float32 values: 8 times the stored bytes."""
        self.check(shape)
        return 8 * (self.support_bytes(shape) + 4 * self.kept(shape))

    def encode(self, v: Tensor) -> dict[str, Tensor]:
        """Return v (m, n) projected and packed, support uint8 and values float32; a member in float32 loses nothing."""
        support = self.support(v)
        return {"support": self.encode_support(support), "values": v[support].to(torch.float32)}

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the float32 matrix (m, n) that was packed."""
        matrix = torch.zeros(shape, dtype=torch.float32, device=packed["values"].device)
        matrix[self.decode_support(packed["support"], shape)] = packed["values"]
        return matrix


@dataclass(frozen=True)
class Unstructured(Sparse):
    """Matrices with a share of their entries anywhere.

    Args:
        density: Share of entries kept, in (0, 1]; at least one entry is.

    Raises:
        ValueError: if density is not in (0, 1].
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self, self.density)

    def kept(self, shape: tuple[int, int]) -> int:
        """Return round(density * m * n), at least 1."""
        return max(1, round(self.density * shape[0] * shape[1]))

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the entries with the largest score * v**2, bool (m, n)."""
        worth = _worth(self, v, score)
        return _largest(worth.reshape(1, -1), self.kept((v.shape[0], v.shape[1]))).view_as(worth)

    def support_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a bitmap of all entries."""
        return packed_bytes(shape[0] * shape[1], 1)

    def encode_support(self, support: Tensor) -> Tensor:
        """Return a bitmap of all entries, row by row."""
        return pack(support.to(torch.uint8), 1)

    def decode_support(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the support (m, n) of a bitmap."""
        return unpack(packed, 1, shape[0] * shape[1]).view(shape).bool()


@dataclass(frozen=True)
class NM(Sparse):
    """Matrices with n entries in every m consecutive ones of a row; NM(2, 4) is what sparse tensor cores multiply.

    Args:
        n: Entries kept, 1 to m.
        m: Size of a group of columns, 2 to 256.

    Raises:
        ValueError: if not 1 <= n <= m or m is not in 2..256.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m or not 2 <= self.m <= 256:
            raise ValueError(f"NM keeps n of m entries, 1 <= n <= m and 2 <= m <= 256, got n={self.n}, m={self.m}.")

    def check(self, shape: tuple[int, int]) -> None:
        """Refuse columns that m does not divide.

        Raises:
            ValueError: if m does not divide the number of columns.
        """
        check_shape(self, shape)
        if shape[1] % self.m:
            raise ValueError(
                f"{self} needs a number of columns divisible by {self.m}, got {tuple(shape)}; "
                "leave the site out with skip=."
            )

    def kept(self, shape: tuple[int, int]) -> int:
        """Return the number of groups times n."""
        return shape[0] * shape[1] // self.m * self.n

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the n entries of each group with the largest score * v**2, bool (m, n)."""
        worth = _worth(self, v, score)
        self.check((v.shape[0], v.shape[1]))
        return _largest(worth.reshape(-1, self.m), self.n).view_as(worth)

    @property
    def _place_bits(self) -> int:
        return math.ceil(math.log2(self.m))

    def support_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of the places of kept entries within their groups."""
        return packed_bytes(self.kept(shape), self._place_bits)

    def encode_support(self, support: Tensor) -> Tensor:
        """Return the place of each kept entry within its group, in order."""
        return pack(support.reshape(-1, self.m).nonzero()[:, 1].to(torch.uint8), self._place_bits)

    def decode_support(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the support (m, n) of packed places."""
        places = unpack(packed, self._place_bits, self.kept(shape)).long().view(-1, self.n)
        support = torch.zeros(len(places), self.m, dtype=torch.bool, device=packed.device)
        return support.scatter_(1, places, True).view(shape)


@dataclass(frozen=True)
class Rows(Sparse):
    """Matrices with a share of their rows; the others are zero.

    Args:
        density: Share of rows kept, in (0, 1]; at least one row is.

    Raises:
        ValueError: if density is not in (0, 1].
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self, self.density)

    def _rows(self, shape: tuple[int, int]) -> int:
        return max(1, round(self.density * shape[0]))

    def kept(self, shape: tuple[int, int]) -> int:
        """Return the entries of the kept rows, round(density * m) of them."""
        return self._rows(shape) * shape[1]

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the rows with the largest sum of score * v**2, bool (m, n)."""
        worth = _worth(self, v, score).sum(1)
        rows = _largest(worth[None], self._rows((v.shape[0], v.shape[1])))[0]
        return rows[:, None].expand_as(v)

    def support_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of a bitmap of rows."""
        return packed_bytes(shape[0], 1)

    def encode_support(self, support: Tensor) -> Tensor:
        """Return a bitmap of rows."""
        return pack(support[:, 0].to(torch.uint8), 1)

    def decode_support(self, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return the support (m, n) of a bitmap of rows."""
        return unpack(packed, 1, shape[0]).bool()[:, None].expand(shape)


def _worth(structure: object, v: Tensor, score: Tensor | None) -> Tensor:
    weights = check_matrix(structure, v, score)
    # Compare |v| sqrt(score): squares of small entries would underflow and tie.
    size = v.abs() if weights is None else v.abs() * weights.sqrt()
    if isinstance(structure, Rows):
        peak = size.max().clamp_min(torch.finfo(size.dtype).tiny)
        return (size / peak).square()
    return size


def _largest(worth: Tensor, count: int) -> Tensor:
    """Return the `count` largest entries of each line, bool; ties keep the earlier."""
    if worth.shape[1] <= _SHORT:
        order = worth.argsort(dim=1, descending=True, stable=True)[:, :count]
        return torch.zeros_like(worth, dtype=torch.bool).scatter_(1, order, True)
    least = worth.kthvalue(worth.shape[1] - count + 1, dim=1, keepdim=True).values
    above, level = worth > least, worth == least
    return above | (level & (level.cumsum(1) <= count - above.sum(1, keepdim=True)))


def _check_density(structure: object, density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"{type(structure).__name__} needs a density in (0, 1], got {density}.")
