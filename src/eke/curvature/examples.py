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
from torch.nn import functional as F

from ..sites import Site
from .basis import gathered
from .capture import Calls

Sharing = Literal["sum", "expand", "reduce"]
"""What several locations of a matrix mean; see the module."""
_CHUNK = 1 << 23
"""Entries of examples' gradients held at once: 32 MB in float32."""


@dataclass(frozen=True)
class Seen:
    """How what a layer saw is to be read; see `rows_of`.

    Args:
        sharing: What several locations mean.
        mean: Whether the loss is a mean over examples, not their sum.
        loss_scale: What the loss was multiplied by.
        weights: Weights of the examples in the loss, None for equal ones.
    """

    sharing: Sharing
    mean: bool
    loss_scale: float
    weights: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Examples of a batch at one layer.

    Args:
        a: Inputs (groups, examples, locations, n).
        g: Gradients of each example's own loss (groups, examples, locations, m / groups).
        ones: Whether inputs have a last column of ones, for a bias, that is not stored.
    """

    a: Tensor
    g: Tensor
    ones: bool = False

    @property
    def examples(self) -> int:
        """Number of examples."""
        return self.a.shape[1]

    @property
    def locations(self) -> int:
        """Number of locations."""
        return self.a.shape[2]

    @property
    def widths(self) -> tuple[int, int]:
        """(m / groups, n), n with the column of ones."""
        return self.g.shape[3], self.a.shape[3] + self.ones

    @property
    def inputs(self) -> Tensor:
        """Inputs with the column of ones."""
        if not self.ones:
            return self.a
        return torch.cat([self.a, self.a.new_ones(()).expand(*self.a.shape[:3], 1)], 3)

    def factors(self, *, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Return A = E[sum_l a a^T] and the mean of g g^T over examples and locations: (groups, n, n), or the diagonal
        (groups, n) of what is not wanted whole.
        """  # noqa: D205
        a, g = self.a.flatten(1, 2), self.g.flatten(1, 2)
        first, second = _moment(a, wanted[0]), _moment(g, wanted[1]).div_(max(1, g.shape[1]))
        if self.ones:
            count = a.new_full((a.shape[0], 1), a.shape[1])
            first = _bordered(first, a.sum(1), count) if wanted[0] else torch.cat([first, count], 1)
        return first.div_(self.examples), second

    def mix_a_(self, factor: Tensor, share: float) -> None:
        """Replace a share of a running mean of A (groups, n, n) by this batch's, in place and without a copy."""
        rows = self.a.flatten(1, 2)
        mix_moment_(factor, rows, share, self.examples)
        if self.ones:
            line = rows.sum(1).mul_(share / self.examples)
            size = line.shape[1]
            for border in (factor[:, :size, size], factor[:, size, :size]):
                border.mul_(1 - share).add_(line)
            factor[:, size, size].mul_(1 - share).add_(share * rows.shape[1] / self.examples)

    def mix_g_(self, factor: Tensor, share: float) -> None:
        """Replace a share of a running mean of g g^T (groups, m, m) by this batch's, in place and without a copy."""
        rows = self.g.flatten(1, 2)
        mix_moment_(factor, rows, share, max(1, rows.shape[1]))

    def channels(self, taps: int) -> tuple[Tensor, Tensor | None]:
        """Return second moments of a convolution's input channels, whatever the tap of the kernel, and of the centre's
        with the constant 1 of the bias.

        Args:
            taps: Taps of the kernel, the last dimension of the inputs.

        Returns:
            (groups, channels, channels) and (groups, channels + 1, channels + 1), None without a bias; as mean over
            examples and taps of the sum over locations.
        """  # noqa: D205
        rows = self.a.flatten(1, 2).reshape(self.a.shape[0], -1, self.a.shape[3] // taps, taps)
        rows = rows.transpose(2, 3).flatten(1, 2)
        moment = (rows.mT @ rows).div_(self.examples * taps)
        if not self.ones:
            return moment, None
        line = rows.sum(1) / (self.examples * taps)
        return moment, _bordered(moment, line, line.new_full((len(line), 1), self.locations))

    def turned(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Rows:
        """Return the rows in other bases; None stands for the identity."""
        if a_basis is None:
            return Rows(self.a, _turned(self.g, g_basis), self.ones)
        if not self.ones:
            return Rows(_turned(self.a, a_basis), _turned(self.g, g_basis))
        a = torch.baddbmm(a_basis[:, -1:], self.a.flatten(1, 2), a_basis[:, :-1])
        shape = (*self.a.shape[:3], a_basis.shape[2])
        return Rows(a.reshape(shape), _turned(self.g, g_basis))

    def gradient(self) -> Tensor:
        """Return the mean of the examples' gradients (groups, m / groups, n)."""
        g = self.g.flatten(1, 2)
        found = g.mT @ self.a.flatten(1, 2)
        if self.ones:
            found = torch.cat([found, g.sum(1)[:, :, None]], 2)
        return found.div_(self.examples)

    def squares(self) -> Tensor:
        """Return the mean over examples of the squares of their gradients' entries, (groups, m / groups, n)."""
        return self.energies(None, None)

    @property
    def summed_first(self) -> bool:
        """Whether it is less work to turn the examples' gradients than their rows."""
        m, n = self.widths
        return self.locations > 1 and m * n * (m + n) < self.locations * (m * m + n * n)

    def energies(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Tensor:
        """Return the mean over examples of the squares of their gradients along pairs of directions.

        Args:
            g_basis: Orthonormal columns (groups, m / groups, p); None for the unit vectors.
            a_basis: (groups, n, q), likewise.

        Returns:
            (groups, p [+ 1], q [+ 1]); where there are fewer directions than dimensions, the last row (column) is the
            sum along everything orthogonal to them.
        """
        if self.locations == 1:
            lines = [_squared_inputs(self, a_basis), squared(self.g[:, :, 0], g_basis)]
            return (lines[1].mT @ lines[0]).div_(self.examples)
        whole = _cut(g_basis) or _cut(a_basis)
        rows = self if whole or self.summed_first else self.turned(g_basis, a_basis)
        total: Tensor | None = None
        step = max(1, _CHUNK // (self.g.shape[0] * self.widths[0] * self.widths[1]))
        for start in range(0, self.examples, step):
            g, a = rows.g[:, start : start + step], rows.a[:, start : start + step]
            each = g.mT @ a  # gradients (groups, examples, m, n)
            if rows.ones:
                each = torch.cat([each, g.sum(2)[..., None]], 3)
            here = along(each, g_basis, a_basis) if rows is self else each.square_().sum(1)
            total = here if total is None else total.add_(here)
        assert total is not None
        return total.div_(self.examples)


def along(each: Tensor, g_basis: Tensor | None, a_basis: Tensor | None) -> Tensor:
    """Return sums over gradients (groups, examples, m, n) of their squares along pairs of directions.

    Args:
        each: The gradients.
        g_basis: As in `Rows.energies`.
        a_basis: Likewise.

    Returns:
        As `Rows.energies`, summed over examples.
    """
    left = each if g_basis is None else g_basis.mT[:, None] @ each
    inside = (left if a_basis is None else left @ a_basis[:, None]).square().sum(1)
    rest = (_cut(g_basis), _cut(a_basis))
    if not any(rest):
        return inside
    rows = left.square().sum((1, 3)) if rest[1] else inside.sum(2)
    columns = inside.sum(1)
    if rest[0]:
        columns = (each if a_basis is None else each @ a_basis[:, None]).square().sum((1, 2))
    return gathered(inside, rows, columns, each.square().sum((1, 2, 3)), rest)


def sharing_of(gradient: Tensor) -> Sharing:
    """Return how locations share a matrix, told by the gradient at the output of the layer nearest to the loss.

    Args:
        gradient: (examples, ..., m), or (examples, m) where nothing is shared any more.

    Returns:
        "expand" where several locations of an example have gradients that differ, as with one loss a token; else "sum".
    """
    if gradient.dim() < 3:
        return "sum"
    rows = gradient.flatten(1, -2)
    several = bool(((rows != 0).any(2).sum(1) > 1).any())
    apart = (rows - rows[:, :1]).abs().amax() > 1e-5 * rows.abs().amax()  # a mean over locations gives each the same
    return "expand" if several and bool(apart) else "sum"


def _cut(basis: Tensor | None) -> int:
    """Return how many dimensions the directions of a basis leave out."""
    return 0 if basis is None else basis.shape[1] - basis.shape[2]


def _bordered(moment: Tensor, line: Tensor, corner: Tensor) -> Tensor:
    """Return second moments (groups, n + 1, n + 1) with those of a further coordinate."""
    top = torch.cat([moment, line[:, :, None]], 2)
    return torch.cat([top, torch.cat([line, corner], 1)[:, None]], 1)


def _squared_inputs(rows: Rows, basis: Tensor | None) -> Tensor:
    """Return squares of inputs of one location along directions, and of what is left beside them."""
    if basis is None:
        return rows.inputs[:, :, 0].square()
    squares = rows.turned(None, basis).a[:, :, 0].square_()
    if not _cut(basis):
        return squares
    norms = rows.a[:, :, 0].square().sum(2, keepdim=True).add_(int(rows.ones))
    return torch.cat([squares, norms.sub_(squares.sum(2, keepdim=True)).clamp_min_(0)], 2)


def mix_moment_(factor: Tensor, rows: Tensor, share: float, count: int) -> None:
    """Replace a share of the leading block of factors (groups, n [+ 1], n [+ 1]) by rows^T rows / count."""
    size = rows.shape[2]
    for running, group in zip(factor, rows):
        running[:size, :size].addmm_(group.mT, group, beta=1 - share, alpha=share / count)


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
    return rows if basis is None else (rows.flatten(1, 2) @ basis).unflatten(1, rows.shape[1:3])  # type: ignore[no-untyped-call]


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
    how = Seen("sum" if site.geometry is not None else sharing, mean, loss_scale, weights)
    return shared_rows(
        calls,
        lambda x: _inputs(site, x),
        lambda y: _in_groups(site.output_to_rows(y), site.groups),
        bias=bias,
        name=site.name,
        seen=how,
    )


def shared_rows(
    calls: Calls,
    inputs: Callable[[Tensor], Tensor],
    outputs: Callable[[Tensor], Tensor],
    *,
    bias: bool,
    name: str,
    seen: Seen,
) -> Rows:
    """Bring the calls of any layer into rows; see `rows_of`.

    Args:
        calls: Inputs and output gradients.
        inputs: From an input to (groups, examples, locations, n).
        outputs: From a gradient to (groups, examples, locations, m / groups).
        bias: Whether to append ones to the inputs.
        name: What to call the layer in messages.
        seen: How calls are to be read.

    Returns:
        The rows of all calls.

    Raises:
        ValueError: if there are not as many weights as examples.
    """
    sharing, weights = seen.sharing, seen.weights
    passes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for number, x, gradient in calls:
        passes.setdefault(number, []).append((_computable(inputs(x)), _computable(outputs(gradient))))
    merged = [_one_pass(parts) for parts in passes.values()]
    if len({a.shape[2] for a, _ in merged}) > 1 or sharing == "expand":
        # Sequences of different lengths can only count location by location.
        merged = [(a.flatten(1, 2)[:, :, None], g.flatten(1, 2)[:, :, None]) for a, g in merged]
    a, g = _joined([a for a, _ in merged], 1), _joined([g for _, g in merged], 1)
    if sharing == "reduce" and a.shape[2] > 1:
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    if sharing == "expand":
        active = (g != 0).flatten(2).any(2).any(0)
        if not bool(active.all()):
            a, g = a[:, active], g[:, active]
    scale = (a.shape[1] if seen.mean else 1) / seen.loss_scale
    if scale != 1:
        g = g * scale
    if weights is not None:
        if weights.shape != (a.shape[1],):
            raise ValueError(f"{name!r} saw {a.shape[1]} examples, got weights of shape {tuple(weights.shape)}.")
        root = weights.to(g).clamp_min(0).sqrt()
        g = g / torch.where(root > 0, root, torch.ones_like(root))[None, :, None, None]
    return Rows(a, g, bias)


def _inputs(site: Site, x: Tensor) -> Tensor:
    """Return what the matrix multiplies, (groups, examples, locations, n): of images in one copy, as a view."""
    geometry = site.geometry
    dims = 0 if geometry is None else len(geometry.kernel)
    if geometry is None or geometry.transposed or dims > 2:
        return site.inputs_to_rows(x).permute(2, 0, 1, 3)
    x = _computable(x if x.dim() == dims + 2 else x[None])
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    if any(sides):
        x = F.pad(x, sides, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
    line = (1,) * (2 - dims)
    images = x.reshape(*x.shape[:2], *line, *x.shape[2:])
    found = F.unfold(
        images, (*line, *geometry.kernel), dilation=(*line, *geometry.dilation), stride=(*line, *geometry.stride)
    )
    return found.reshape(len(found), geometry.groups, -1, found.shape[2]).permute(1, 0, 3, 2)


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
