"""Types that every room shares: what a loss is, what an evaluation returns.

`loss(model, batch)` returns the mean loss of a batch as a scalar tensor; `evaluate(model)` returns a float that is
larger when the model is better, or `Counts`, from which exact intervals follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Batch = Any
"""Whatever the user's data yields; only `loss` and `forward` look inside."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""`loss(model, batch)`: the mean loss of the batch, a scalar tensor."""


@dataclass(frozen=True)
class Counts:
    """How many samples were right.

    Args:
        correct: Number of correct samples.
        total: Number of samples.
        outcomes: Optional bool tensor (total,), one entry a sample in the order of the data. With it, two models are
            compared sample by sample, which narrows the interval of their difference.
        order: Optional fingerprint of the samples in their order; outcomes are compared one by one only where it is the
            same (a loader that shuffles gives another one every time).

    Raises:
        ValueError: if the numbers contradict each other.
    """

    correct: int
    total: int
    outcomes: Tensor | None = None
    order: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total:
            raise ValueError(f"Counts needs 0 <= correct <= total, got correct={self.correct}, total={self.total}.")
        if self.outcomes is not None and self.outcomes.numel() != self.total:
            raise ValueError(
                f"Counts.outcomes must have one entry a sample ({self.total}), got {self.outcomes.numel()}."
            )

    @property
    def share(self) -> float:
        """Share of correct samples; `nan` for none."""
        return self.correct / self.total if self.total else float("nan")


Evaluate = Callable[[nn.Module], float | Counts]
"""`evaluate(model)`: larger is better."""
