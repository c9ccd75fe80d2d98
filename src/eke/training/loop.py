"""The one training loop: a number of steps over batches in an order that depends only on the seed and the step.

Recovery, unrolled fits, retraining and conversion call it with a step function. The order of epoch e is a permutation
drawn from (seed, e) alone, so a run that continues at step s sees exactly the batches that an uninterrupted one sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[int, Tensor], float]
"""`step(index, samples)`: train on the samples with these indices (batch,) and return the loss."""


def order(samples: int, *, epoch: int, seed: int) -> Tensor:
    """Return the permutation of the samples that epoch `epoch` uses."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(samples, generator=generator)


def run(
    step: Step,
    *,
    samples: int,
    batch_size: int,
    steps: int,
    start: int = 0,
    seed: int = 0,
    after: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Call `step` for every index from `start` to `steps`.

    Args:
        step: Trains once.
        samples: Number of samples; each epoch uses whole batches of a new order.
        batch_size: Samples a batch; clipped to `samples`.
        steps: Index at which to end.
        start: Index at which to begin, for a run that is continued.
        seed: Of the orders.
        after: Called with (index, loss) after each step, for progress and checkpoints.

    Returns:
        Losses of the steps that ran.

    Raises:
        ValueError: if a number is out of range.
        FloatingPointError: if a loss is not finite; names the step.
    """
    if samples < 1 or batch_size < 1 or not 0 <= start <= steps:
        raise ValueError(
            f"run needs samples >= 1, batch_size >= 1 and 0 <= start <= steps, got samples={samples}, "
            f"batch_size={batch_size}, start={start}, steps={steps}."
        )
    size = min(batch_size, samples)
    batches = samples // size
    losses: list[float] = []
    current, permutation = -1, torch.empty(0, dtype=torch.long)
    for index in range(start, steps):
        epoch, position = divmod(index, batches)
        if epoch != current:
            current, permutation = epoch, order(samples, epoch=epoch, seed=seed)
        loss = step(index, permutation[position * size : (position + 1) * size])
        if not math.isfinite(loss):
            raise FloatingPointError(f"The loss became {loss} at step {index} of {steps}: lower the learning rate.")
        losses.append(loss)
        if after is not None:
            after(index, loss)
    return losses
