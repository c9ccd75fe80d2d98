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

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..sites import Site
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

    def factors(self, *, wanted: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return E[sum_l a a^T] and the mean of g g^T over examples and locations, each None if not wanted."""
        a, g = self.a.flatten(1, 2), self.g.flatten(1, 2)
        return (
            (a.mT @ a).div_(self.examples) if wanted[0] else None,
            (g.mT @ g).div_(max(1, g.shape[1])) if wanted[1] else None,
        )

    def turned(self, g_basis: Tensor | None, a_basis: Tensor | None) -> Rows:
        """Return the rows in other bases; None stands for the identity."""
        return Rows(_turned(self.a, a_basis), _turned(self.g, g_basis))

    def gradient(self) -> Tensor:
        """Return the mean of the examples' gradients (groups, m / groups, n)."""
        return (self.g.flatten(1, 2).mT @ self.a.flatten(1, 2)).div_(self.examples)

    def squares(self) -> Tensor:
        """Return the mean over examples of the squares of their gradients' entries, (groups, m / groups, n)."""
        if self.a.shape[2] == 1:
            return (self.g[:, :, 0].square().mT @ self.a[:, :, 0].square()).div_(self.examples)
        groups, _, _, m = self.g.shape
        n = self.a.shape[3]
        total = self.g.new_zeros(groups, m, n)
        step = max(1, _CHUNK // (groups * m * n))
        for start in range(0, self.examples, step):
            part = slice(start, start + step)
            total += (self.g[:, part].mT @ self.a[:, part]).square_().sum(1)
        return total / self.examples


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
    """
    passes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for number, x, gradient in calls:
        a = _computable(site.inputs_to_rows(x)).permute(2, 0, 1, 3)
        g = _computable(site.output_to_rows(gradient))
        g = g.reshape(*g.shape[:2], site.groups, -1).permute(2, 0, 1, 3)
        passes.setdefault(number, []).append((a, g))
    merged = [_one_pass(parts) for parts in passes.values()]
    if len({a.shape[2] for a, _ in merged}) > 1 or (sharing == "expand" and site.geometry is None):
        # Sequences of different lengths can only count location by location.
        merged = [(a.flatten(1, 2)[:, :, None], g.flatten(1, 2)[:, :, None]) for a, g in merged]
    a, g = torch.cat([a for a, _ in merged], 1), torch.cat([g for _, g in merged], 1)
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:3], 1)], 3)
    if sharing == "reduce" and site.geometry is None:
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    if sharing == "expand" and site.geometry is None:
        active = (g != 0).flatten(2).any(2).any(0)
        a, g = a[:, active], g[:, active]
    g = g * ((a.shape[1] if mean else 1) / loss_scale)
    if weights is not None:
        if weights.shape != (a.shape[1],):
            raise ValueError(f"{site.name!r} saw {a.shape[1]} examples, got weights of shape {tuple(weights.shape)}.")
        root = weights.to(g).clamp_min(0).sqrt()
        g = g / torch.where(root > 0, root, torch.ones_like(root))[None, :, None, None]
    return Rows(a, g)


def _one_pass(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the calls of one forward pass as locations of the same examples, or as examples where they do not fit."""
    if len({a.shape[1] for a, _ in parts}) == 1:
        return torch.cat([a for a, _ in parts], 2), torch.cat([g for _, g in parts], 2)
    flat = [(a.flatten(1, 2)[:, :, None], g.flatten(1, 2)[:, :, None]) for a, g in parts]
    return torch.cat([a for a, _ in flat], 1), torch.cat([g for _, g in flat], 1)


def _computable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
