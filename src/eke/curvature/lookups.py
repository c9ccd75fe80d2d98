"""The gradient of each example at a table whose rows are looked up, and its moments.

Example n looks up rows v_nl; with g_nl the gradient of its loss there, G_n = sum_l e_v g_nl^T. The inputs are unit
vectors, so their second moment is the diagonal of how often a row is looked up, and their basis stays the identity.
Rows looked up twice by one example add up before they are squared. Cost: the lookups times d^2 to turn, never the
table's height times d^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .examples import squared


@dataclass(frozen=True)
class Lookups:
    """Examples of a batch at a table (height, d), as the matrix whose output side are its rows.

    Args:
        index: Rows looked up (examples, locations).
        g: Gradients of each example's own loss (examples, locations, d).
        height: Rows of the table.
    """

    index: Tensor
    g: Tensor
    height: int

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.index.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """(height, d)."""
        return self.height, self.g.shape[2]

    def factors(self, *, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Return the second moment (1, d, d) of gradients, or its diagonal if not wanted whole, and how often an
        example looks up each row (1, height).
        """  # noqa: D205
        g = self.g.flatten(0, 1)
        moment = g.mT @ g if wanted[0] else g.square().sum(0)
        counts = torch.bincount(self.index.flatten(), minlength=self.height).to(g)
        return (moment / max(1, len(g)))[None], (counts / self.examples)[None]

    def turned(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Lookups:
        """Return the lookups with gradients in another basis (1, d, q); rows have none."""
        assert g_basis is None
        return self if a_basis is None else Lookups(self.index, self.g @ a_basis[0], self.height)

    def gradient(self) -> Tensor:
        """Return the mean of the examples' gradients (1, height, d)."""
        return self._added(self.index.flatten(), self.g.flatten(0, 1))[None]

    def squares(self) -> Tensor:
        """Return the mean over examples of the squares of their gradients' entries, (1, height, d)."""
        return self.energies(None, None)

    def energies(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Tensor:
        """Return mean squares along directions (1, d, q), and of what is left beside them, (1, height, q [+ 1])."""
        assert g_basis is None
        keys = torch.arange(self.examples, device=self.index.device)[:, None] * self.height + self.index
        known, place = torch.unique(keys.flatten(), return_inverse=True)
        sums = self.g.new_zeros(len(known), self.g.shape[2]).index_add_(0, place, self.g.flatten(0, 1))
        return self._added(known % self.height, squared(sums[None], a_basis)[0])[None]

    def _added(self, rows: Tensor, values: Tensor) -> Tensor:
        total = values.new_zeros(self.height, values.shape[1]).index_add_(0, rows, values)
        return total.div_(self.examples)
