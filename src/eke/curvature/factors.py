"""Kronecker factors of one matrix site and what follows from them.

For a matrix W (m, n) used at locations l of a sample (one for a vector, pixels of a convolution, tokens), with input
rows a_l, output gradients g_l of the sample's own loss and change D of W,

    1/2 E[sum_l (g_l^T D a_l)^2]  ~  1/2 tr(D^T G D A),   A = E[sum_l a a^T],   G = mean of g g^T over samples and l.

Two approximations: a and g are treated as independent, and products across locations as uncorrelated (K-FAC's expand,
KFC's spatially uncorrelated derivatives). Locations where g is exactly 0 (masked tokens, inputs a loss ignores) enter
neither factor: A is the sum over the others, G the mean over them, so the product keeps its scale.

Both approximations fail where locations agree (before a global pooling g is the same everywhere), by a factor of up to
the number of locations. So the form is corrected as in EKFAC: in the eigenbases U_G, U_A the eigenvalues become the
measured second moments E[(U_G^T grad U_A)^2] of whole per-sample gradients, grad = sum_l g_l a_l^T. Then
`quadratic` is exact for a change along any one pair of eigenvectors, and G is scaled to give A x G the right trace
(`coherence` says by how much) for all who use the plain factors. With `leading` directions of the per-sample gradients
kept whole, `quadratic` also knows what such pairs do together.

With `groups` g the matrix is g blocks of m/g rows, each with its own n inputs; every factor has the group first.

Source: Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015; Grosse &
Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", 2016; Eschenhagen et al.,
"Kronecker-factored approximate curvature for modern neural network architectures", 2023; George et al., "Fast
approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import WIDE
from .basis import Basis, directions
from .leading import Leading


@dataclass(frozen=True)
class Factors:
    """Curvature of one site.

    Args:
        a: (groups, n, n), mean over samples of the sum over locations of a a^T.
        g: (groups, m / groups, m / groups), mean over samples and locations of g g^T, times `coherence`.
        mean: (groups, n), mean input over samples and locations.
        samples: Samples seen.
        locations: Mean number of locations a sample where g is not 0.
        active: Share of all locations where g is not 0.
        channel_dim: Dimension of the site's output that holds the m channels.
        coherence: Trace of the per-sample gradients' second moment over that of the uncorrelated approximation.
        basis: Eigenbases with corrected eigenvalues; None where they were not measured.
        leading: Directions of large curvature, kept whole; None where there are none.
        gradient: (m, n), mean gradient of the loss; None where it was not measured.
    """

    a: Tensor
    g: Tensor
    mean: Tensor
    samples: int
    locations: float
    active: float = 1.0
    channel_dim: int = -1
    coherence: float = 1.0
    basis: Basis | None = None
    leading: Leading | None = None
    gradient: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix, all groups' rows stacked."""
        return self.g.shape[0] * self.g.shape[1], self.a.shape[1]

    @property
    def second_moment(self) -> Tensor:
        """(groups, n, n), mean of a a^T over samples and locations: what belongs to `mean`."""
        return self.a / self.locations

    @property
    def homogeneous(self) -> Tensor:
        """(groups, n + 1, n + 1): A of the inputs with a constant 1 appended, for matrices with a bias column."""
        sums = self.mean[:, :, None] * self.locations
        corner = sums.new_full((sums.shape[0], 1, 1), self.locations)
        return torch.cat([torch.cat([self.a, sums], 2), torch.cat([sums.mT, corner], 2)], 1)

    def quadratic(self, delta: Tensor) -> float:
        """Return the predicted loss increase of a change D of the matrix, 1/2 tr(D^T G D A) if not corrected.

        Args:
            delta: (m, n).

        Returns:
            The prediction in units of the loss, >= 0 up to rounding; computed in float64 (float32 for wide matrices).
        """
        blocks = self._blocks(delta)
        if self.basis is not None:
            energies = self.basis.energies(blocks)
            if self.leading is not None:
                return 0.5 * self.leading.curvature(blocks, energies)
            return 0.5 * float((energies * self.basis.moments).sum())
        dtype = torch.float32 if max(self.shape) > WIDE else torch.float64
        weighted = self.g.to(dtype) @ blocks.to(dtype) @ self.a.to(dtype)
        return 0.5 * float((weighted.double() * blocks).sum())

    def linear(self, delta: Tensor) -> float:
        """Return the first-order change of the loss, <gradient, D>, of a change D (m, n); 0 if it was not measured."""
        blocks = self._blocks(delta).double()
        return 0.0 if self.gradient is None else float((self.gradient.double().view_as(blocks) * blocks).sum())

    @property
    def diagonal(self) -> Tensor:
        """(m, n): curvature of each entry on its own."""
        if self.basis is not None:
            return self.basis.diagonal().reshape(self.shape).to(self.a.dtype)
        outer = self.g.diagonal(dim1=1, dim2=2)[:, :, None] * self.a.diagonal(dim1=1, dim2=2)[:, None, :]
        return outer.reshape(self.shape)

    @property
    def output(self) -> Tensor:
        """(m, m): mean of g g^T over samples and all locations, block diagonal over groups."""
        groups, rows, _ = self.g.shape
        full = self.g.new_zeros(groups, rows, groups, rows)
        each = torch.arange(groups, device=full.device)
        full[each, :, each, :] = self.g * (self.active / self.coherence)
        return full.view(groups * rows, groups * rows)

    def eigenbasis(self) -> Basis:
        """Return the corrected eigenbasis, or that of the factors themselves: by `eigh` in float64, or the leading part
        of a wide factor by subspace iteration in float32.
        """  # noqa: D205
        if self.basis is not None:
            return self.basis
        (g_values, g_vectors), (a_values, a_vectors) = directions(self.g), directions(self.a)
        return Basis(g_vectors, a_vectors, g_values[:, :, None] * a_values[:, None, :])

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Return the matrix as (groups, m / groups, n).

        Raises:
            ValueError: if it is not (m, n).
        """
        if tuple(matrix.shape) != self.shape:
            raise ValueError(f"The site's matrix is {self.shape}, got a change or gradient of {tuple(matrix.shape)}.")
        return matrix.reshape(self.g.shape[0], self.g.shape[1], self.a.shape[1])


def output_quadratic(g: Tensor, change: Tensor, channel_dim: int) -> float:
    """Return 1/2 E[sum_l dy_l^T G dy_l] of a change dy of an output.

    Args:
        g: (m, m), mean over samples and all locations of the gradients' second moment.
        change: dy, samples first, m channels at `channel_dim`, anything else is a location.
        channel_dim: Dimension of the channels.

    Returns:
        The predicted loss increase, computed in float64.

    Raises:
        ValueError: if the channels do not fit.
    """
    if change.shape[channel_dim] != g.shape[0]:
        raise ValueError(
            f"The output has {g.shape[0]} channels in dimension {channel_dim}, got a change of {tuple(change.shape)}."
        )
    rows = change.detach().movedim(channel_dim, -1).reshape(-1, g.shape[0]).double()
    moment = rows.T @ rows / change.shape[0]
    return 0.5 * float((g.double() * moment).sum())
