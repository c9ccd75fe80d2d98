"""The gradient of each example of a batch at one layer, as sums of outer products, and its moments.

Example n has the gradient G_n = sum_l g_nl a_nl^T of its own loss (l: locations of a convolution, tokens, calls).
Four ways to share a matrix:

    plain    one location;
    sum      the gradient of an example as it is: one loss an example (convolutions, pooled tokens);
    expand   each location counts as an example: one loss a token;
    reduce   a_n = mean_l a_nl, g_n = sum_l g_nl: a cheap stand-in for `sum`.

Moments in bases U_S, U_A: mean_n (U_S^T G_n U_A)^2, entry by entry; for one location ((g U_S)^2)^T (a U_A)^2 / N, one
product. Source: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018;
Eschenhagen et al., "Kronecker-factored approximate curvature for modern neural network architectures", 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sites import Site
from .basis import gathered
from .capture import Calls

Sharing = Literal["sum", "expand", "reduce"]
"""What several locations of a matrix mean; see the module."""
_CHUNK = 1 << 23
"""Entries of examples' gradients held at once: 32 MB in float32."""


@dataclass(frozen=True)
class Rows:
    """Examples of a batch at one layer.

    Args:
        a: Inputs (groups, examples, locations, n), with a last column of ones where the layer has a bias.
        g: Gradients of each example's own loss (groups, examples, locations, m / groups).
    """

    a: Tensor
    g: Tensor

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.a.shape[1]

    @property
    def widths(self) -> tuple[int, int]:
        """(m / groups, n)."""
        return self.g.shape[3], self.a.shape[3]

    def factors(self, *, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Return A = E[sum_l a a^T] and the mean of g g^T over examples and locations: (groups, n, n), or the diagonal
        (groups, n) of what is not wanted whole.
        """  # noqa: D205
        found = [_moment(x.flatten(1, 2), whole) for x, whole in zip((self.a, self.g), wanted)]
        return found[0].div_(self.examples), found[1].div_(max(1, self.g.shape[1] * self.g.shape[2]))

    def channels(self, taps: int, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        """Return second moments of a convolution's input channels, whatever the tap of the kernel, and of the centre's
        with the constant 1 of the bias.

        Args:
            taps: Taps of the kernel, the last dimension of the inputs.
            bias: Whether a column of ones follows.

        Returns:
            (groups, channels, channels) and (groups, channels + 1, channels + 1), None without a bias; as mean over
            examples and taps of the sum over locations.
        """  # noqa: D205
        a = self.a.flatten(1, 2)
        inputs = a[:, :, : a.shape[2] - bias].reshape(*a.shape[:2], -1, taps)
        rows = inputs.transpose(2, 3).flatten(1, 2)
        moment = (rows.mT @ rows).div_(self.examples * taps)
        if not bias:
            return moment, None
        line = rows.sum(1, keepdim=True) / (self.examples * taps)
        corner = line.new_full((len(line), 1, 1), self.a.shape[2])
        return moment, torch.cat([torch.cat([moment, line.mT], 2), torch.cat([line, corner], 2)], 1)

    def turned(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Rows:
        """Return the rows in other bases; None stands for the identity."""
        return Rows(_turned(self.a, a_basis), _turned(self.g, g_basis))

    def gradient(self) -> Tensor:
        """Return the mean of the examples' gradients (groups, m / groups, n)."""
        return (self.g.flatten(1, 2).mT @ self.a.flatten(1, 2)).div_(self.examples)

    def squares(self) -> Tensor:
        """Return the mean over examples of the squares of their gradients' entries, (groups, m / groups, n)."""
        return self.energies(None, None)

    def energies(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Tensor:
        """Return the mean over examples of the squares of their gradients along pairs of directions.

        Args:
            g_basis: Orthonormal columns (groups, m / groups, p); None for the unit vectors.
            a_basis: (groups, n, q), likewise.

        Returns:
            (groups, p [+ 1], q [+ 1]); where there are fewer directions than dimensions, the last row (column) is the
            sum along everything orthogonal to them.
        """
        if self.a.shape[2] == 1:
            lines = [squared(x[:, :, 0], basis) for x, basis in ((self.g, g_basis), (self.a, a_basis))]
            return (lines[0].mT @ lines[1]).div_(self.examples)
        rest = tuple(0 if b is None else b.shape[1] - b.shape[2] for b in (g_basis, a_basis))
        turned = self.turned(g_basis, a_basis)
        groups, m, n = self.g.shape[0], self.g.shape[3], self.a.shape[3]
        total: Tensor | None = None
        step = max(1, _CHUNK // (groups * m * n))
        for start in range(0, self.examples, step):
            part = slice(start, start + step)
            g, a, whole_g, whole_a = turned.g[:, part], turned.a[:, part], self.g[:, part], self.a[:, part]
            here = (g.mT @ a).square_().sum(1)
            if any(rest):
                rows = (g.mT @ whole_a).square_().sum((1, 3)) if rest[1] else here.sum(2)
                columns = (whole_g.mT @ a).square_().sum((1, 2)) if rest[0] else here.sum(1)
                everything = (whole_g.mT @ whole_a).square_().sum((1, 2, 3)) if all(rest) else here.sum((1, 2))
                here = gathered(here, rows, columns, everything, (rest[0], rest[1]))
            total = here if total is None else total.add_(here)
        assert total is not None
        return total / self.examples


def _moment(rows: Tensor, whole: bool) -> Tensor:
    return rows.mT @ rows if whole else rows.square().sum(1)


def squared(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Return squares (..., rows, q [+ 1]) of rows along directions, and of what is left beside them."""
    if basis is None:
        return rows.square()
    squares = (rows @ basis).square_()
    if basis.shape[1] == basis.shape[2]:
        return squares
    beside = rows.square().sum(2, keepdim=True).sub_(squares.sum(2, keepdim=True)).clamp_min_(0)
    return torch.cat([squares, beside], 2)


def _turned(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else (rows.flatten(1, 2) @ basis).view(rows.shape)


def rows_of(
    site: Site, calls: Calls, *, bias: bool, sharing: Sharing, mean: bool, loss_scale: float, weights: Tensor | None
) -> Rows:
    """Bring what a layer was called with into the form above.

    Args:
        site: The layer.
        calls: Inputs and output gradients. Calls in one forward pass are locations of the same examples, calls in
            several passes (accumulated gradients) are further examples.
        bias: Whether to append ones to the inputs.
        sharing: What several locations mean.
        mean: Whether the loss is the mean over all examples of all passes (for "expand" over all locations with a
            gradient), not their sum.
        loss_scale: What the loss was multiplied by.
        weights: Weights of the examples in the loss, (examples,): a weighted mean of squared gradients, not of squared
            weighted gradients, goes into the moments, so rows carry their square root. None for equal ones.

    Returns:
        The rows of all calls.

    Raises:
        ValueError: if there are not as many weights as examples.
    """  # noqa: DOC502
    return shared_rows(
        calls,
        lambda x: site.inputs_to_rows(x).permute(2, 0, 1, 3),
        lambda y: _in_groups(site.output_to_rows(y), site.groups),
        bias=bias, sharing="sum" if site.geometry is not None else sharing, mean=mean, loss_scale=loss_scale,
        weights=weights, name=site.name,
    )  # fmt: skip


def shared_rows(
    calls: Calls, inputs: Callable[[Tensor], Tensor], outputs: Callable[[Tensor], Tensor], *, bias: bool,
    sharing: Sharing, mean: bool, loss_scale: float, weights: Tensor | None, name: str,
) -> Rows:  # fmt: skip
    """Bring the calls of any layer into rows; see `rows_of` for what is not said here.

    Args:
        calls: Inputs and output gradients.
        inputs: From an input to (groups, examples, locations, n).
        outputs: From a gradient to (groups, examples, locations, m / groups).
        bias: As in `rows_of`.
        sharing: Likewise.
        mean: Likewise.
        loss_scale: Likewise.
        weights: Likewise.
        name: What to call the layer in messages.

    Returns:
        The rows of all calls.

    Raises:
        ValueError: if there are not as many weights as examples.
    """
    passes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for number, x, gradient in calls:
        passes.setdefault(number, []).append((_computable(inputs(x)), _computable(outputs(gradient))))
    merged = [_one_pass(parts) for parts in passes.values()]
    if len({a.shape[2] for a, _ in merged}) > 1 or sharing == "expand":
        # Sequences of different lengths can only count location by location.
        merged = [(a.flatten(1, 2)[:, :, None], g.flatten(1, 2)[:, :, None]) for a, g in merged]
    a, g = _joined([a for a, _ in merged], 1), _joined([g for _, g in merged], 1)
    if bias:
        a = torch.cat([a, a.new_ones(()).expand(*a.shape[:3], 1)], 3)
    if sharing == "reduce" and a.shape[2] > 1:
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    if sharing == "expand":
        active = (g != 0).flatten(2).any(2).any(0)
        if not bool(active.all()):
            a, g = a[:, active], g[:, active]
    scale = (a.shape[1] if mean else 1) / loss_scale
    if scale != 1:
        g = g * scale
    if weights is not None:
        if weights.shape != (a.shape[1],):
            raise ValueError(f"{name!r} saw {a.shape[1]} examples, got weights of shape {tuple(weights.shape)}.")
        root = weights.to(g).clamp_min(0).sqrt()
        g = g / torch.where(root > 0, root, torch.ones_like(root))[None, :, None, None]
    return Rows(a, g)


def _in_groups(rows: Tensor, groups: int) -> Tensor:
    return rows.reshape(*rows.shape[:2], groups, -1).permute(2, 0, 1, 3)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _one_pass(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the calls of one forward pass as locations of the same examples, or as examples where they do not fit."""
    if len({a.shape[1] for a, _ in parts}) == 1:
        return _joined([a for a, _ in parts], 2), _joined([g for _, g in parts], 2)
    flat = [(a.flatten(1, 2)[:, :, None], g.flatten(1, 2)[:, :, None]) for a, g in parts]
    return _joined([a for a, _ in flat], 1), _joined([g for _, g in flat], 1)


def _computable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
