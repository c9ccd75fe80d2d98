"""Training after pruning: what is removed stays removed.

One `Training` describes how the dense model was trained; four ways continue it with masks:

    fine_tune_        weights as pruned, the last learning rate
    rewind_rate_      weights as pruned, the schedule of the last steps anew (learning-rate rewinding)
    rewind_weights_   weights of an earlier checkpoint, the schedule from there on
    from_scratch      fresh weights in the pruned architecture, the whole schedule: the control

Source: Renda, Frankle, Carbin, "Comparing rewinding and fine-tuning in neural network pruning", 2020; Frankle, Carbin,
"The lottery ticket hypothesis", 2019; Liu et al., "Rethinking the value of network pruning", 2019 (the control).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..training import run
from .masks import MaskSet


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Args:
        loss: `loss(model, batch)`: mean loss.
        data: The batch of samples with these indices (size,).
        samples: Number of samples.
        optimizer: Makes an optimizer of parameters, with the rate that the schedule scales.
        steps: Of the whole training.
        batch_size: Samples a step.
        rate: Learning rate at a share of the whole training, in [0, 1), relative to the optimizer's.
        seed: Of the orders of samples.

    Raises:
        ValueError: if steps is not positive.
    """

    loss: Loss
    data: Callable[[Tensor], Batch]
    samples: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    steps: int
    batch_size: int = 100
    rate: Callable[[float], float] = lambda _share: 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Training needs steps >= 1, got {self.steps}.")

    def train_(
        self, model: nn.Module, *, start: int = 0, end: int | None = None, masks: MaskSet | None = None
    ) -> list[float]:
        """Train in place, in training mode; flags are put back.

        Args:
            model: The model.
            start: Step of the schedule to begin with.
            end: Step to end before; None for all. Beyond the last one its rate stays.
            masks: What is kept; None for everything.

        Returns:
            Losses of the steps.
        """
        flags = [(module, module.training) for module in model.modules()]
        optimizer = self.optimizer(p for p in model.parameters() if p.requires_grad)
        rates = [group["lr"] for group in optimizer.param_groups]
        handle = None if masks is None else masks.follow(model, optimizer)

        def step(index: int, samples: Tensor) -> float:
            share = min(index, self.steps - 1) / self.steps
            for group, full in zip(optimizer.param_groups, rates):
                group["lr"] = full * self.rate(share)
            optimizer.zero_grad()
            value = self.loss(model, self.data(samples))
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return float(value.detach())

        model.train()
        try:
            return run(
                step, samples=self.samples, batch_size=self.batch_size, start=start,
                steps=self.steps if end is None else end, seed=self.seed,
            )  # fmt: skip
        finally:
            if handle is not None:
                handle.remove()
            for module, training in flags:
                module.training = training


def fine_tune_(model: nn.Module, masks: MaskSet, training: Training, *, steps: int) -> list[float]:
    """Train what is kept with the last learning rate, in place.

    Args:
        model: Pruned (`masks.apply_`).
        masks: What is kept.
        training: How the dense model was trained.
        steps: How long.

    Returns:
        Losses of the steps. A number of steps below 1 is a ValueError.
    """
    _check(steps)
    return training.train_(model, start=training.steps, end=training.steps + steps, masks=masks)


def rewind_rate_(model: nn.Module, masks: MaskSet, training: Training, *, steps: int) -> list[float]:
    """Train what is kept with the schedule of the last steps, in place; with all of them it is the whole schedule.

    Args:
        model: Pruned (`masks.apply_`).
        masks: What is kept.
        training: How the dense model was trained.
        steps: How long, at most as long as the training.

    Returns:
        Losses of the steps. A number of steps out of range is a ValueError.
    """
    _check(steps, training.steps)
    return training.train_(model, start=training.steps - steps, masks=masks)


def rewind_weights_(
    model: nn.Module, masks: MaskSet, training: Training, *, steps: int, early: Mapping[str, Tensor]
) -> list[float]:
    """Put the weights back to where they were `steps` before the end and train what is kept from there, in place.

    Args:
        model: Its weights are replaced.
        masks: What is kept.
        training: How the dense model was trained.
        steps: Before the end, at most as long as the training.
        early: `state_dict()` of the dense model at that step.

    Returns:
        Losses of the steps. A number of steps out of range is a ValueError.
    """
    _check(steps, training.steps)
    model.load_state_dict(early)
    return training.train_(model, start=training.steps - steps, masks=masks)


def from_scratch(
    model: nn.Module, masks: MaskSet, training: Training, *, reset: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Train the pruned architecture from fresh weights with the whole schedule: what pruning has to beat.

    Args:
        model: Left as it is.
        masks: What is kept.
        training: How the dense model was trained.
        reset: Draws all weights of a model anew; None calls `reset_parameters` of every module that has it.

    Returns:
        A trained copy.

    Raises:
        ValueError: if some parameter belongs to a module without `reset_parameters` and reset is None.
    """
    fresh = copy.deepcopy(model)
    if reset is not None:
        reset(fresh)
    else:
        for name, module in fresh.named_modules():
            again = getattr(module, "reset_parameters", None)
            if callable(again):
                again()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ValueError(f"Module {name!r} has parameters and no reset_parameters(); give reset=.")
    training.train_(fresh, masks=masks)
    return fresh


def _check(steps: int, most: int | None = None) -> None:
    if steps < 1 or (most is not None and steps > most):
        raise ValueError(f"steps must be from 1 to {'any number' if most is None else most}, got {steps}.")
