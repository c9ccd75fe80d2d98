"""Types that every room shares: what a loss is, what an evaluation returns.

`loss(model, batch)` returns the mean loss of a batch as a scalar tensor; `evaluate(model)` returns a float that is
larger when the model is better, or what each sample did, from which intervals follow: `Counts` where a sample is right
or wrong, `Samples` elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
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
        name: What the share is called in reports.

    Raises:
        ValueError: if the numbers contradict each other.
    """

    correct: int
    total: int
    outcomes: Tensor | None = None
    order: str | None = None
    name: str = "accuracy"

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


@dataclass(frozen=True)
class Metric:
    """What the totals of samples say: one number, its name and its direction.

    Args:
        name: Shown in reports, such as "perplexity".
        of: The number from totals: (..., columns) -> (...), each entry for itself.
        lower_is_better: Whether less of it is better.
        positive: Whether it is positive and differences of it are ratios, as of errors: intervals are then made on a
            logarithmic scale.
        span: Largest possible difference between two models, 1 for shares; None if there is none.
        percent: Whether it is shown as per cent.

    Raises:
        ValueError: if it has no name, or the span is not positive.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    lower_is_better: bool = False
    positive: bool = False
    span: float | None = None
    percent: bool = False

    def __post_init__(self) -> None:
        if not self.name or (self.span is not None and not self.span > 0):
            raise ValueError(f"Metric needs a name and a positive span or None, got {self.name!r} and {self.span!r}.")


@dataclass(frozen=True)
class Samples:
    """What each sample adds to the totals from which a metric is computed.

    A sample is what was drawn independently: an image with all its pixels, a sequence with all its tokens, a query. Two
    models are compared sample by sample where the order is the same.

    Args:
        sums: (samples, columns), kept as float64 on the CPU; a mean has two columns, value and weight.
        metric: The number that their totals give.
        order: Optional fingerprint of the samples in their order, as for `Counts`.

    Raises:
        ValueError: if there is no sample, or an entry is not finite.
    """

    sums: Tensor
    metric: Metric
    order: str | None = None

    def __post_init__(self) -> None:
        if self.sums.ndim != 2 or 0 in self.sums.shape:
            raise ValueError(
                f"Samples.sums must be (samples, columns) with at least one of each, got {tuple(self.sums.shape)}."
            )
        object.__setattr__(self, "sums", self.sums.detach().to("cpu", torch.float64))
        if not bool(torch.isfinite(self.sums).all()):
            bad = int((~torch.isfinite(self.sums)).any(1).sum())
            raise ValueError(
                f"Samples.sums has values that are not finite in {bad} of {len(self.sums)} samples: check the model's "
                "outputs and the targets."
            )

    @classmethod
    def mean(
        cls,
        values: Tensor,
        *,
        name: str,
        weights: Tensor | None = None,
        lower_is_better: bool = False,
        span: float | None = None,
        order: str | None = None,
    ) -> Self:
        """Score a mean over samples.

        Args:
            values: Mean value of each sample, (samples,).
            name: Of the metric.
            weights: Weight of each sample, (samples,), such as its number of tokens; None weighs all the same.
            lower_is_better: Whether less is better.
            span: Largest possible difference between two models, 1 for shares.
            order: Fingerprint of the samples in their order.

        Returns:
            The score.

        Raises:
            ValueError: if values and weights are not of one length, or a weight is negative.
        """
        weighed = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.to(torch.float64)
        if values.ndim != 1 or weighed.shape != values.shape or bool((weighed < 0).any()):
            raise ValueError(
                "Samples.mean needs values (samples,) and weights >= 0 of the same shape, got "
                f"{tuple(values.shape)} and {tuple(weighed.shape)}, least weight "
                f"{float(weighed.min()) if weighed.numel() else 0.0:g}."
            )
        sums = torch.stack([values.to(torch.float64) * weighed, weighed], 1)
        return cls(sums, Metric(name, quotient, lower_is_better=lower_is_better, span=span), order)

    @property
    def value(self) -> float:
        """The metric, as it is shown."""
        return float(self.metric.of(self.sums.sum(0)))

    @property
    def score(self) -> float:
        """The metric with the sign with which larger is better."""
        return -self.value if self.metric.lower_is_better else self.value


def quotient(totals: Tensor) -> Tensor:
    """Return the quotient of the first two columns of totals (..., 2): a mean, or a mean by weights."""
    return totals[..., 0] / totals[..., 1]


Quality = float | Counts | Samples
"""What an evaluation returns: a plain number that is larger when the model is better, or what each sample did."""

Evaluate = Callable[[nn.Module], Quality]
"""`evaluate(model)`: its quality; a plain number is larger when the model is better."""
