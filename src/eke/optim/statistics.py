"""What is known of one layer's curvature: factors, bases, second moments, momentum; all in the optimizer's state.

A side of a matrix has all eigenvectors of its factor, or, where `rank` is below its size, only that many leading ones,
found by subspace iteration from the last ones. Everything orthogonal to them then counts as one more direction with
its mean second moment, so the trace stays exact, and the gradient is damped in weights' space: cost and error shrink
and grow with the rank. Momentum is kept in the basis, and turned with it, or in weights' space where sides are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..curvature import Calls, Lookups, Rows, Seen, along, solved
from .basis import Refresh, centred, channel_basis, leading, refreshed, shares, turn
from .layers import Layer

Variant = Literal["ekfac", "ekfac_ra", "kfac"]
State = dict[str, Any]


_LONG, _LEADING = 128, 64
"""By default so many directions are told apart of sides longer than this."""


@dataclass(frozen=True)
class Rules:
    """How statistics are kept; the arguments of `EKFAC` of the same names."""

    variant: Variant
    basis_every: int
    decay: float
    refresh: Refresh
    tolerance: float
    largest: int
    rank: int | Literal["auto"] | None
    channels: bool

    def due(self, steps: int) -> bool:
        """Return whether bases are refreshed: in steps 1, 2, 4, ... at first, when gradients change most."""
        return steps % self.basis_every == 0 or (steps < self.basis_every and steps & (steps - 1) == 0)

    def reads(self, steps: int) -> bool:
        """Return whether statistics are measured: ten times between refreshes, and in every one of the first steps."""
        return steps < 2 * self.every or steps % self.every == 0 or self.due(steps)

    def directions(self, size: int) -> int:
        """Return how many directions of a side are told apart."""
        if self.rank == "auto":
            return _LEADING if size > _LONG and self.decay else size
        return size if self.rank is None else min(size, self.rank)

    @property
    def every(self) -> int:
        """Steps between measurements."""
        return max(1, self.basis_every // 10)


FEWEST = 32
"""Examples of a convolution to measure where not every step does: each brings many rows."""


def thinned(layer: Layer, calls: Calls, seen: Seen, *, turn: int) -> tuple[Calls, Seen]:
    """Return a lattice of the examples of a convolution's calls, and how it is to be read: means stay what they are.

    Args:
        layer: Other layers keep all of theirs.
        calls: What it was called with.
        seen: How all of them are to be read.
        turn: Shifts the lattice.
    """
    dims = layer.spatial
    if not dims or any(x.dim() != dims + 2 for _, x, _ in calls):
        return calls, seen
    step = min(len(x) for _, x, _ in calls) // FEWEST
    if step < 2:
        return calls, seen
    start = turn % step
    less = [(number, x[start::step], gradient[start::step]) for number, x, gradient in calls]
    share = sum(len(x) for _, x, _ in less) / sum(len(x) for _, x, _ in calls)
    return less, replace(seen, loss_scale=seen.loss_scale * share)


def update_factors(layer: Layer, state: State, rows: Rows | Lookups, rules: Rules) -> bool:
    """Bring factors and, if it is time, bases up to date, and turn what is known to new bases.

    Args:
        layer: The layer.
        state: Its state.
        rows: What was seen.
        rules: How.

    Returns:
        Whether everything seen was finite.
    """
    due = rules.due(int(state.get("steps", 0))) or "moments" not in state
    seen = int(state.get("seen", 0))
    decay = min(rules.decay, seen / (seen + 1))
    state["seen"] = seen + 1
    wanted = [has and size <= rules.largest for has, size in zip(layer.bases, rows.widths[::-1])]
    by_channel = rules.channels and layer.taps > 1 and isinstance(rows, Rows)
    turns: dict[str, Tensor | None] = {"g": None, "a": None}
    mixed = isinstance(rows, Rows) and not by_channel and all(wanted) and "a_factor" in state and "g_factor" in state
    if mixed and isinstance(rows, Rows):
        fine = {"a": finite(rows.a), "g": finite(rows.g)}
        if fine["a"]:
            rows.mix_a_(state["a_factor"], 1 - decay)
        if fine["g"]:
            rows.mix_g_(state["g_factor"], 1 - decay)
    else:
        batches = rows.factors(wanted=(wanted[0] and not by_channel, wanted[1]))
        found = {"a": batches[0], "g": batches[1]}
        if by_channel and isinstance(rows, Rows) and wanted[0]:
            found["a"] = centred(*rows.channels(layer.taps), layer.taps)
        fine = {key: math.isfinite(float(batch.sum())) for key, batch in found.items()}
        for key, batch in found.items():
            factor = state.get(f"{key}_factor")
            if fine[key]:
                state[f"{key}_factor"] = batch if factor is None else factor.lerp_(batch, 1 - decay)
    for key, good in fine.items():
        if due and good and state[f"{key}_factor"].dim() == 3:
            turns[key] = _refresh(state, key, rules, layer if by_channel and key == "a" else None)
    if "moments" in state and any(t is not None for t in turns.values()):
        _turn(state, turns)
    return all(fine.values())


def finite(rows: Tensor) -> bool:
    """Return whether second moments of rows are finite: no entry is above their trace."""
    flat = rows.flatten()
    return math.isfinite(float(torch.dot(flat, flat)))


def _refresh(state: State, key: str, rules: Rules, by_channel: Layer | None) -> Tensor | None:
    """Refresh a basis.

    Args:
        state: Of the layer.
        key: Which side.
        rules: How.
        by_channel: The layer if pixels count as uncorrelated.

    Returns:
        Q_new^T Q_old, or Q_new^T at the start; None if the basis stays.
    """
    factor, old = state[f"{key}_factor"], state.get(f"{key}_basis")
    if by_channel is not None:
        basis = channel_basis(factor, by_channel.taps, bias=by_channel.bias is not None)
    elif (rank := rules.directions(factor.shape[1])) < factor.shape[1]:
        basis = leading(factor, old, rank=rank)
    else:
        basis = refreshed(factor, old, how=rules.refresh, tolerance=rules.tolerance)
    if basis is None:
        return None
    state[f"{key}_basis"] = basis
    return basis.mT if old is None else basis.mT @ old


def _turn(state: State, turns: dict[str, Tensor | None]) -> None:
    sides = {}
    for key, turned in turns.items():
        basis = state.get(f"{key}_basis")
        sides[key] = None if turned is None or basis is None else shares(turned, basis.shape[1])
    state["moments"] = turn(state["moments"], sides["g"], sides["a"])
    state.pop("total", None)
    if "momentum" in state and not is_cut(state):
        state["momentum"] = turn(state["momentum"], turns["g"], turns["a"])


def is_cut(state: State) -> bool:
    """Return whether a side has fewer directions than dimensions."""
    bases = (state.get("g_basis"), state.get("a_basis"))
    return any(basis is not None and basis.shape[1] > basis.shape[2] for basis in bases)


def update_moments(state: State, batch: Tensor, decay: float) -> bool:
    """Bring the running mean of second moments up to date.

    Args:
        state: Of the layer.
        batch: The batch's moments.
        decay: Of the running mean, which starts as a plain one.

    Returns:
        Whether the batch's are finite, so that they were taken.
    """
    if not math.isfinite(float(batch.sum())):
        return False
    updates = int(state.get("updates", 0))
    decay = min(decay, updates / (updates + 1))
    state["updates"] = updates + 1
    state.pop("total", None)
    state["moments"] = batch if "moments" not in state else state["moments"].lerp_(batch, 1 - decay)
    return True


def mean_moments(state: State, sums: Tensor) -> Tensor:
    """Return sums over what is orthogonal to the directions as means, in place."""
    for dim, key in ((1, "g"), (2, "a")):
        basis = state.get(f"{key}_basis")
        if basis is not None and basis.shape[1] > basis.shape[2]:
            sums.select(dim, sums.shape[dim] - 1).div_(basis.shape[1] - basis.shape[2])
    return sums


def moments_of_gradient(state: State, gradient: Tensor) -> Tensor:
    """Return squares of a gradient (groups, m, n) along pairs of directions, means where directions are left out."""
    g, a = state.get("g_basis"), state.get("a_basis")
    return mean_moments(state, along(gradient[:, None], g, a))


def product_moments(state: State) -> Tensor:
    """Return the product of the factors' eigenvalues: K-FAC's moments."""
    lines = []
    for key in "ga":
        factor, basis = state[f"{key}_factor"], state.get(f"{key}_basis")
        if basis is None:
            lines.append(factor)
            continue
        values = ((factor @ basis) * basis).sum(1)
        if basis.shape[1] > basis.shape[2]:
            rest = factor.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) - values.sum(1, keepdim=True)
            values = torch.cat([values, rest.clamp_min(0) / (basis.shape[1] - basis.shape[2])], 1)
        lines.append(values)
    found: Tensor = lines[0][:, :, None] * lines[1][:, None, :]
    return found


@dataclass
class Move:
    """One layer's gradient with momentum, and what becomes of it.

    Args:
        layer: The layer.
        state: Its state, whose moments and bases are in use.
        gradient: In the basis; in weights' space where a side is cut.
        weight: What the gradient is to be divided by.
    """

    layer: Layer
    state: State
    gradient: Tensor
    weight: float

    def __post_init__(self) -> None:
        self.cut = is_cut(self.state)
        self.entries = self.layer.weight.numel() + (0 if self.layer.bias is None else self.layer.bias.numel())
        self._direction: Tensor | None = None

    def total(self) -> float:
        """Return the sum of all second moments, known since they were last measured."""
        if "total" not in self.state:
            self.state["total"] = float(self._total())
        return float(self.state["total"])

    def _total(self) -> Tensor:
        moments: Tensor = self.state["moments"]
        if not self.cut:
            return moments.sum()
        sizes = [moments.new_ones(size) for size in moments.shape[1:]]
        for line, key in zip(sizes, "ga"):
            basis = self.state.get(f"{key}_basis")
            if basis is not None and basis.shape[1] > basis.shape[2]:
                line[-1] = basis.shape[1] - basis.shape[2]
        return sizes[0] @ (moments @ sizes[1]).sum(0)

    def damp(self, damping: float, *, predict: bool) -> float:
        """Divide the gradient by the damped moments.

        Args:
            damping: Added to the moments.
            predict: Whether to return what follows.

        Returns:
            D . G = sum D^2 (m2 + damping), which a step of 1 along D changes to second order (twice).
        """
        damped = self.state["moments"] + damping
        if self.cut:
            g, a = self.state.get("g_basis"), self.state.get("a_basis")
            self._direction = solved(g, a, damped.reciprocal_(), self.gradient)
        else:
            self._direction = torch.div(self.gradient, damped, out=damped)
        if not predict:
            return 0.0
        return float(torch.dot(self._direction.flatten(), self.gradient.flatten())) / self.weight**2

    def apply(self, rate: float, *, decay: float) -> None:
        """Change the parameters."""
        direction = self._direction
        assert direction is not None
        if not self.cut:
            direction = turn(direction, self.state.get("g_basis"), self.state.get("a_basis"))
        self.layer.change_(direction, rate / self.weight, decay=decay)
