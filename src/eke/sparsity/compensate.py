"""What survivors of a removal become: the values that keep a layer's outputs, given the inputs it sees.

With A = E[a a^T] of a layer's inputs and W before the removal, row by row on the kept columns S:

    Refit   v_S = (A_SS)^-1 A_S: w      least squares: what OBS reaches entry by entry, whatever the order
    Sweep   columns in one order, each row's error handed to the columns still to come (SparseGPT)

A is damped relative to its mean diagonal. A compensation is called as `compensate(model, masks)` with the model as it
is before the removal and returns new values by name, 0 outside of the masks.
Cost: Refit m n^2 a step of conjugate gradients, Sweep n^3 / 3 + m n^2 once.
Source: Hassibi, Stork, "Optimal brain surgeon", 1993; Frantar, Alistarh, "SparseGPT", 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..linalg import Metric, damped
from ..solvers import refit, swept
from ..structures import ColumnRule, Exactness
from .criteria import input_moments, sites_of

Compensation = Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""`compensate(model, masks)`: values by parameter name, 0 where a mask is False."""


@dataclass(frozen=True)
class Refit:
    """Least squares on the kept entries of each row: the outputs before the removal, as near as they can be had.

    Args:
        loss: Runs the model; its value does not matter.
        batches: Data.
        damping: Added to A, relative to its mean diagonal.
        steps: Most steps of conjugate gradients.
    """

    loss: Loss
    batches: Sequence[Batch]
    damping: float = 0.01
    steps: int = 100

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new values by name."""
        return _by_site(self, model, masks, self._fit)

    def _fit(self, weight: Tensor, mask: Tensor, a: Tensor) -> Tensor:
        return refit(weight, mask, Metric(damped(a, self.damping)), steps=self.steps)


@dataclass(frozen=True)
class Sweep:
    """One sweep over columns, largest input first: the error of each is handed to those still to come.

    A sweep can end above plain removal; where it does, by the outputs' error, plain removal is what comes back.

    Args:
        loss: Runs the model; its value does not matter.
        batches: Data.
        damping: Added to A, relative to its mean diagonal.
    """

    loss: Loss
    batches: Sequence[Batch]
    damping: float = 0.01

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return new values by name."""
        return _by_site(self, model, masks, self._fit)

    def _fit(self, weight: Tensor, mask: Tensor, a: Tensor) -> Tensor:
        return swept(_Support(mask), weight, Metric(a), damping=self.damping)


@dataclass(frozen=True)
class _Support:
    """The matrices that vanish outside of one mask, as solvers see a structure."""

    mask: Tensor

    @property
    def exactness(self) -> Exactness:
        return "exact"

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        return v * self.mask

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        return lambda column, j: column * self.mask[:, j]


def _by_site(
    given: Refit | Sweep,
    model: nn.Module,
    masks: Mapping[str, Tensor],
    fit: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    sites = sites_of(model, list(masks))
    found = {}
    for name, moment in input_moments(model, given.loss, given.batches, sites).items():
        site = sites[name]
        weight = site.matrix_of(site.tensor(model).detach()).double().chunk(site.groups)
        mask = site.matrix_of(masks[name]).chunk(site.groups)
        parts = [fit(w, m, a) for w, m, a in zip(weight, mask, moment)]
        found[name] = site.stored_of(torch.cat(parts)).to(site.tensor(model)) * masks[name]
    return found
