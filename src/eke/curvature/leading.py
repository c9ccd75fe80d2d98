"""The few directions along which samples' gradients agree, kept whole beside the corrected eigenvalues.

F = E[grad grad^T] of whole per-sample gradients has the moments m on its diagonal in a basis of pairs of directions,
and EKFAC drops all that is off it. But a change that cuts channels moves many pairs at once, and so do the gradients:
the cross terms add up, and such a change is priced too low beside one that is spread like noise. With leading
eigenpairs (s_k, u_k) of F itself,

    F ~ sum_k s_k u_k u_k^T + diag(m - sum_k s_k u_k^2).

The diagonal stays exact, trace included, and what is left of a second moment is one, so nothing is negative. What is
dropped is what the rest has off the diagonal: nothing once the directions span the gradients (the error need not fall
with the very first ones: cross terms of different directions cancel).

The directions come from a sketch of a fixed number of rows: what comes in is appended, and of the whole only its
leading part is kept. It is exact while the samples are no more than the rows; later its second moment stays below F.

Source: Levy and Lindenbaum, "Sequential Karhunen-Loeve basis extraction and its application to images", 2000 (the
sketch); Mishkin et al., "SLANG: Fast structured covariance approximations for Bayesian deep learning with natural
gradient", 2018 (low rank plus diagonal); beside EKFAC's diagonal ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .basis import Basis

ROOM = 1 << 25
"""Entries of all directions of all sites, 128 MB in float32: larger models get fewer directions, or none."""
_TOGETHER = 64  # samples that are appended at once


@dataclass(frozen=True)
class Leading:
    """Directions of large curvature, and the moments that they leave.

    Args:
        rows: (r, groups, m / groups, n), sqrt(s_k) u_k.
        rest: m - sum_k s_k u_k^2 along pairs of a basis's directions, in the shape of its moments.
    """

    rows: Tensor
    rest: Tensor

    @classmethod
    def beside(cls, rows: Tensor, basis: Basis) -> Leading:
        """Return the directions with what they leave of a basis's moments."""
        held = torch.zeros_like(basis.moments)
        for row in rows:
            held += basis.energies(row)
        return cls(rows, (basis.moments - held / basis.sizes).clamp_min_(0))

    def curvature(self, blocks: Tensor, energies: Tensor) -> float:
        """Return D^T F D of a change.

        Args:
            blocks: D, (groups, m / groups, n).
            energies: Its squares along pairs of the basis's directions.

        Returns:
            The sum of squares, not below 0.
        """
        along = self.rows.flatten(1) @ blocks.to(self.rows.dtype).flatten()
        return float((energies * self.rest).sum() + along.double().square().sum())


def affordable(most: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Return how many directions, `most` at most, matrices of these shapes can have together within `ROOM` entries.

    Args:
        most: Directions asked for.
        shapes: Of the matrices, (m, n).

    Raises:
        ValueError: if fewer than no directions are asked for.
    """
    if most < 0:
        raise ValueError(f"leading is a number of directions, 0 for none, got {most}.")
    return min(most, ROOM // max(1, sum(m * n for m, n in shapes)))


class Sketch:
    """The leading part of sum_n grad_n grad_n^T, over batches.

    Args:
        most: Rows that are kept; 0 keeps nothing.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._rows: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Add gradients of single samples (samples, ...), of one shape throughout."""
        for part in torch.split(gradients, _TOGETHER) if self.most else ():
            rows = part if self._rows is None else torch.cat([self._rows, part])
            self._rows = leading_rows(rows, self.most)

    def rows(self, scale: float) -> Tensor | None:
        """Return the rows (r, ...) whose outer products, summed, are the leading part times `scale`; None for none."""
        return None if self._rows is None else self._rows * scale**0.5


def leading_rows(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, orthogonal to each other, whose outer products sum to the leading part of the rows'.

    Args:
        rows: (count, ...).
        most: At least 1.

    Returns:
        (at most `most`, ...), largest first; fewer where the rows span less. Cost: count^2 entries multiply-adds.
    """
    flat = rows.flatten(1)
    gram = (flat @ flat.mT).double()
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = values > 1e-6 * values[:1]
    found: Tensor = vectors[:, kept].mT.to(flat.dtype) @ flat
    return found.reshape(-1, *rows.shape[1:])
