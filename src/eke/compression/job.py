"""What a run of `compress` was asked for, checked and in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .._types import Batch, Evaluate, Loss, Quality
from ..structures import Structure
from . import measure
from .attentions import Clusters, Conversion
from .budget import Budget
from .checks import mean_loss
from .measure import Inputs
from .recover import Recovery
from .solver import Solver
from .task import Forward

Progress = Callable[[str, float, str], None]
"""`progress(stage, share, text)`: called as a run advances."""


@dataclass(frozen=True)
class Job:
    """What `compress` was asked for, checked."""

    model: nn.Module
    batches: Iterable[Batch]
    loss: Loss
    budget: Budget
    evaluate: Evaluate | None
    report: Evaluate | None
    inputs: Inputs
    forward: Forward
    structures: tuple[Structure, ...]
    solver: Solver
    recovery: Recovery
    skip: tuple[str, ...]
    seed: int
    threads: int
    seconds: float
    samples: int
    progress: Progress
    attentions: tuple[Conversion | Clusters, ...] | None = None

    @property
    def timed(self) -> bool:
        """Whether plans are made for time: if it is limited, or if nothing but the drop is."""
        return self.budget.latency is not None or not self.budget.limited

    def score(self, model: nn.Module, *, of: str) -> Quality:
        """Return the score on the selection split; without one, minus the mean calibration loss."""
        if self.evaluate is not None:
            return measure.evaluate_on(model, self.evaluate, of=of)
        return -mean_loss(model, self.batches, loss=self.loss)
